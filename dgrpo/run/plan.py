"""What a run will cost, from its recipe and the model's configuration alone: passes, FLOPs, memory, hours.

Nothing is downloaded and no weight is loaded: the network's own code runs on tensors without memory.

Shapes: B rows of a micro-batch, P prompt tokens, C completion tokens, L = P + C, V vocabulary, d width.
"""

import argparse
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from peft import LoraConfig, get_peft_model
from peft.utils.error import NoMatchingPeftModuleError
from torch import nn
from trl import ModelConfig, get_peft_config

from dgrpo.cli import CARDS
from dgrpo.models import experts
from dgrpo.models.bidirectional import BidirectionalReading
from dgrpo.models.families import FAMILIES
from dgrpo.models.head import MAX_LOGITS_BYTES
from dgrpo.models.loading import family_of, load_config
from dgrpo.noise import stream
from dgrpo.run.live import LiveBytes, without_memory
from dgrpo.run.settings import RecipeConfig, parse_recipe
from dgrpo.run.steps import CHECKPOINTS
from dgrpo.sampling import Rollout, SamplerConfig
from dgrpo.sampling.draw import MAX_DRAW_BYTES, draw
from dgrpo.tasks import EMBEDDED, EMBEDDED_MODELS
from dgrpo.trainers import DiffuGRPOConfig
from dgrpo.trainers.plugins import configured_estimator
from dgrpo.views import draw_views
from dgrpo.vocabulary import _SHARE_OF_GPU

GB = 1e9
# CUDA's context, and what the allocator cannot use: an assumption.
OVERHEAD = 1.5
# Share of a card's peak that products of this size reach: an assumption, to be replaced by `benchmarks/gpu.py`'s.
EFFICIENCY = 0.4
# A parameter in NF4 with doubly quantized scales.
BYTES_IN_4_BIT = 0.516
# Checkpoints whose shape is known by name: pattern, family, and what their config.json says beyond the defaults.
_QWEN3 = {"head_dim": 128, "num_key_value_heads": 8, "vocab_size": 151936}
SHAPES: list[tuple[str, str, dict[str, Any]]] = [
    (r"LLaDA-MoE-7B", "llada_moe", {}),
    (r"LLaDA2.*mini", "llada2_moe", {}),
    (r"LLaDA-(8B|1\.5)", "llada", {"mlp_hidden_size": 12288}),
    (
        r"(Dream|DiffuCoder).*7B",
        "Dream",
        {
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "vocab_size": 152064,
        },
    ),
    (
        r"SDAR-8B",
        "sdar",
        _QWEN3 | {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32},
    ),
    (
        r"SDAR-4B",
        "sdar",
        _QWEN3 | {"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32},
    ),
    (
        r"SDAR-1\.7B",
        "sdar",
        _QWEN3 | {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "num_attention_heads": 16},
    ),
]


def model_configuration(name: str) -> tuple[Any, Any]:
    """(family, configuration) of a folder with a config.json, or of a known name; ValueError for another."""
    if name in EMBEDDED_MODELS:
        name = str(CHECKPOINTS / f"gsm8k{EMBEDDED_MODELS[name]}")
    if Path(name).is_dir():
        return family_of(name), load_config(name)
    for pattern, key, changes in SHAPES:
        if re.search(pattern, name):
            return FAMILIES[key], FAMILIES[key].config_class(**changes)
    raise ValueError(
        f"model_name_or_path={name!r}: no folder, and not among the shapes that are known by name "
        f"({', '.join(pattern for pattern, *_ in SHAPES)}). Give a folder with the checkpoint's config.json."
    )


def on_meta(config: Any, family: Any, dtype: torch.dtype, lora: LoraConfig | None, checkpointing: bool) -> nn.Module:
    """The network as it is trained, without weights."""
    before = torch.get_default_dtype()
    with torch.device("meta"):
        torch.set_default_dtype(dtype)
        try:
            model = family.model_class(config)
        finally:
            torch.set_default_dtype(before)
        if lora is not None:
            try:
                model = get_peft_model(model, lora)
            except NoMatchingPeftModuleError as error:
                raise ValueError(f"lora_target_modules={lora.target_modules}: the model has none of them.") from error
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    return model.train()


@dataclass(frozen=True)
class Network:
    """FLOPs of a model: a multiplication and an addition are two."""

    model: Any

    @property
    def config(self) -> Any:
        return self.model.config

    def layers(self) -> nn.ModuleList:
        number = self.config.num_hidden_layers
        return next(m for m in self.model.modules() if isinstance(m, nn.ModuleList) and len(m) == number)

    def head(self) -> int:
        """For one position."""
        return 2 * self.config.hidden_size * self.model.get_output_embeddings().weight.shape[0]

    def forward(self, rows: int, tokens: int, asked: int, keys: int | None = None) -> tuple[int, int, int]:
        """Of frozen products, of trained ones and of attention: rows of so many tokens, the last `asked` of interest.

        `keys`: the tokens that each of them sees, by default as many.
        """
        config, *before, last = self.config, *self.layers()
        heads = config.num_attention_heads
        width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
        whole = any(isinstance(module, BidirectionalReading) for module in self.model.modules())
        products = {False: 0, True: 0}
        for layer in (*before, last):
            for name, module in layer.named_modules():
                if not isinstance(module, nn.Linear):
                    continue
                shared = layer is not last or whole or re.search(r"(k|v)_proj|query_key_value", name)
                share = 1.0
                if re.search(r"\bexperts\.\d", name):
                    share = config.num_experts_per_tok / config.num_experts
                count = 2 * rows * (tokens if shared else asked) * module.in_features * module.out_features * share
                products[module.weight.requires_grad] += int(count)
        queries = len(before) * tokens + (tokens if whole else asked)
        return products[False], products[True], 4 * rows * queries * (keys or tokens) * width

    def update(self, rows: int, tokens: int, asked: int, recomputed: int) -> int:
        """A forward and a backward pass, with `recomputed` more forward passes."""
        frozen, trained, attention = self.forward(rows, tokens, asked)
        return int(frozen * (2 + recomputed) + trained * (3 + recomputed) + attention * (3.5 + recomputed))


@dataclass(frozen=True)
class Scoring:
    """A micro-batch as scoring sees it: distinct canvases and scored positions of each pass through the network."""

    canvases: list[int]
    positions: list[int]


def scoring_of(args: DiffuGRPOConfig, prompt_tokens: int, vocab_size: int) -> Scoring:
    """Counted on a micro-batch of random full-length completions, whose views the recipe's own estimator draws."""
    rows, length = args.per_device_train_batch_size, args.max_completion_length
    generator = stream("plan")
    group = torch.arange(rows) // args.num_generations
    prompts = torch.randint(1, vocab_size, (rows, prompt_tokens), generator=generator)[group]
    sampler = args.sampler().of(None)
    block_length = sampler.max_completion_length // sampler.num_blocks
    order = torch.rand(rows, sampler.num_blocks, block_length, generator=generator).argsort(2)
    each = max(1, block_length // sampler.steps_per_block)
    step = order // each + torch.arange(sampler.num_blocks)[:, None] * sampler.steps_per_block
    rollout = Rollout(
        prompt_ids=prompts,
        prompt_mask=torch.ones_like(prompts, dtype=torch.bool),
        completion_ids=torch.randint(1, vocab_size, (rows, length), generator=generator),
        completion_mask=torch.ones(rows, length, dtype=torch.bool),
        revealed_at=step.flatten(1),
        confidence=torch.rand(rows, length, generator=generator),
        entropy=torch.rand(rows, length, generator=generator),
        group=group,
        num_forwards=0,
        num_steps=sampler.steps_per_block * sampler.num_blocks,
    )
    unit = group if args.whole_groups else torch.arange(rows)
    views = draw_views(configured_estimator(args), rollout, unit, ("plan",)).each(lambda value: value[:, 0])
    weights, canvases = views.weights, views.canvases(torch.cat([prompts, rollout.completion_ids], 1), 0)
    found = Scoring([], [])
    for chunk in torch.arange(weights.shape[1]).split(args.views_per_pass or weights.shape[1]):
        scored = weights[:, chunk].flatten(0, 1) != 0
        part = canvases[:, chunk].flatten(0, 1)[scored.any(1)]
        distinct, number = part.unique(dim=0, return_inverse=True)
        row, column = scored[scored.any(1)].nonzero(as_tuple=True)
        found.canvases.append(max(1, len(distinct)))
        found.positions.append(len((number[row] * length + column).unique()))
    return found


@dataclass(frozen=True)
class Part:
    """One part of a cycle (a rollout and all the updates on it) of one process."""

    name: str
    canvases: int
    passes: int
    flops: float


def _rollout(network: Network, config: SamplerConfig, rows: int, groups: int, batch: int, tokens: int) -> Part:
    """The fixed schedule; a parallel rule is counted as if it committed one token at a time."""
    steps, block = config.steps_per_block, config.max_completion_length // config.num_blocks
    passes, canvases, flops = 0, 0, 0.0
    batches = -(-rows // batch)
    for number in range(config.num_blocks):
        is_open = block
        for step in range(steps):
            if not is_open:
                break
            first = number == step == 0 and not config.cfg_scale
            shown = groups if first else rows * (2 if config.cfg_scale else 1)
            start = tokens - config.max_completion_length + number * block
            refresh = config.cache is None or step % (config.cache_refresh or steps) == 0
            window: int = tokens if refresh else (block if config.cache == "dual" else tokens - start)
            flops += sum(network.forward(shown, window, block, tokens)) + shown * is_open * network.head()
            passes, canvases = passes + batches, canvases + shown
            is_open -= -(-is_open // (steps - step))
    return Part("rollout", canvases, passes, flops)


def cycle(network: Network, args: DiffuGRPOConfig, scoring: Scoring, tokens: int, kl_by_adapter: bool) -> list[Part]:
    """The parts of a cycle of one process."""
    length, steps, draws = args.max_completion_length, args.steps_per_generation, args.num_iterations
    rows = args.per_device_train_batch_size * steps
    batch = min(args.rollout_batch_size or rows, rows)
    parts = [_rollout(network, args.sampler().of(None), rows, -(-rows // args.num_generations), batch, tokens)]
    scored = sum(scoring.positions) * network.head()
    passes, canvases = len(scoring.canvases), sum(scoring.canvases)
    forward = sum(sum(network.forward(rows, tokens, length)) for rows in scoring.canvases) + scored
    # The first inner update's ratio is 1 by construction.
    old = draws - 1 if args.gradient_accumulation_steps == steps else draws
    for name, times in (("old policy", old), ("reference", draws if args.beta or kl_by_adapter else 0)):
        if times:
            parts.append(Part(name, times * steps * canvases, times * steps * passes, times * steps * forward))
    recomputed = int(args.gradient_checkpointing) + (passes > 1)
    update = sum(network.update(rows, tokens, length, recomputed) for rows in scoring.canvases)
    frozen_head = not network.model.get_output_embeddings().weight.requires_grad
    update += scored * (2 if frozen_head else 3) * (1 if passes == 1 else 2)
    times = draws * steps
    parts.append(Part("updates", times * canvases, times * passes, times * update))
    return parts


@contextmanager
def _even_experts() -> Iterator[None]:
    """Without values no token chooses an expert: each gets as many."""

    def through(modules: nn.ModuleList, x, counts):
        sizes = [len(x) // len(modules) + (index < len(x) % len(modules)) for index in range(len(modules))]
        return torch.cat([expert(part) for expert, part in zip(modules, x.split(sizes), strict=True)])

    with mock.patch.object(experts, "_one_by_one", through):
        yield


def activations(build, layers: int, rows: int, tokens: int, asked: int, grad: bool, bf16: bool):
    """Bytes of one pass's hidden states: at the end of the forward pass, and at the peak, with `grad` of the backward.

    `build(n)` is the model with n layers: two sizes are run, the rest follows, as all layers but few are alike.
    """
    found: dict[int, tuple[int, int]] = {}
    sizes = (layers,) if layers <= 4 else (3, 4)
    for size in sizes:
        model = build(size)
        mode = without_memory(model)
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        with _even_experts(), mode, LiveBytes(model) as live, torch.set_grad_enabled(grad):
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                ids = torch.zeros(rows, tokens, dtype=torch.long)
                hidden = base.hidden_states(ids, columns=slice(tokens - asked, tokens))
            kept = live.now
            if grad:
                loss = hidden.float().sum()
                del hidden
                loss.backward()
        found[size] = kept, live.peak
    if len(sizes) == 1:
        return found[layers]
    return tuple(few + (layers - sizes[0]) * (more - few) for few, more in zip(*found.values(), strict=True))


def _drawing(sampler: SamplerConfig, vocab: int) -> float:
    """Bytes at work while tokens are drawn, per byte of the logits that one chunk draws from."""
    with LiveBytes(nn.Module()) as live:
        logits = torch.zeros(2, vocab)
        draw(logits, torch.rand(2) if sampler.temperature else None, sampler, 0, vocab)
    return live.peak / (4 * logits.numel()) - 1


def memory(build, network: Network, settings: tuple, scoring: Scoring, tokens: int, card_bytes: float = 0) -> dict:
    """Bytes by part, on one process. `card_bytes`: of a GPU, whose chunks are larger than a CPU's."""
    args, model_config, num_gpus, zero = settings
    model, config, length = network.model, network.config, args.max_completion_length
    vocab = model.get_output_embeddings().weight.shape[0]
    layers, width = config.num_hidden_layers, config.hidden_size
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    weights = 0.0
    in_layers = {id(weight) for weight in network.layers().parameters() if weight.dim() == 2}
    for weight in {id(p): p for p in model.parameters() if not p.requires_grad}.values():
        small = model_config.load_in_4bit and id(weight) in in_layers
        weights += weight.numel() * (BYTES_IN_4_BIT if small else weight.dtype.itemsize)
    # AdamW in float32: weight, gradient, two moments. ZeRO keeps a 16-bit copy and spreads the rest.
    spread = {0: 16.0, 2: 2 + 14 / num_gpus, 3: 16 / num_gpus}[zero]
    weights = weights / num_gpus if zero == 3 else weights
    chunk = max(MAX_LOGITS_BYTES, card_bytes // _SHARE_OF_GPU)
    canvases, positions = max(scoring.canvases), max(scoring.positions)
    logits = 3 * min(chunk, positions * vocab * 4)
    run = partial(activations, build, layers, tokens=tokens, asked=length, bf16=bool(args.bf16))
    # Beside the logits: the expected and the target row of each scored position.
    rows = 2 * positions * width * 4
    sampler, num_rows = args.sampler().of(None), args.per_device_train_batch_size * args.steps_per_generation
    batch = min(args.rollout_batch_size or num_rows, num_rows) * (2 if args.cfg_scale else 1)
    asked = batch * (sampler.block_length or 0) * vocab * 4
    cache = 0
    if sampler.cache:
        heads = config.num_attention_heads
        key_width = (getattr(config, "head_dim", None) or width // heads) * (config.num_key_value_heads or heads)
        cache = 4 * layers * key_width * batch * tokens * (1 if args.bf16 else 2)
    drawing = _drawing(sampler, vocab) * min(max(MAX_DRAW_BYTES, card_bytes // _SHARE_OF_GPU), asked)
    rollout = max(run(rows=batch, grad=False)[1], asked + drawing) + cache
    kept, peak = run(rows=canvases, grad=True)
    return {
        "weights": weights,
        "trained weights with gradients and AdamW": trained * spread,
        "rollout": rollout,
        "scoring": max(run(rows=canvases, grad=False)[1], logits),
        # The head is at work before the layers' backward pass.
        "update": max(peak, kept + rows + logits),
    }


@dataclass(frozen=True)
class Plan:
    """A run's costs on one process of `num_gpus`."""

    parameters: int
    trained: int
    canvas: tuple[int, int]  # prompt and completion tokens
    cycles: float
    parts: list[Part]
    memory: dict[str, float]

    @property
    def peak(self) -> float:
        """Bytes: what stays, and the largest of what comes and goes."""
        stays = ("weights", "trained weights with gradients and AdamW")
        return sum(self.memory[name] for name in stays) + max(
            value for name, value in self.memory.items() if name not in stays
        )

    def hours(self, tflops: float, efficiency: float = EFFICIENCY) -> float:
        return self.cycles * sum(part.flops for part in self.parts) / (tflops * 1e12 * efficiency) / 3600


def plan_of(words: list[str], *, prompt_tokens: int | None = None, num_gpus: int = 1, zero: int = 0, card: str = ""):
    """The `Plan` of a recipe: `words` are its command line, such as ["--config", "recipes/gsm8k_llada_8b.yaml"]."""
    recipe, args, model_config = parse_recipe("plan", RecipeConfig, DiffuGRPOConfig, ModelConfig, argv=words)
    family, config = model_configuration(model_config.model_name_or_path or EMBEDDED)
    if getattr(config, "block_length", None) is not None:
        raise ValueError(
            f"model_name_or_path={model_config.model_name_or_path!r}: models that attend block by block are not "
            "planned yet."
        )
    lora: Any = get_peft_config(model_config)
    if lora is not None and model_config.lora_target_modules is None:
        lora.target_modules = family.lora_targets
    if lora is not None and args.disable_dropout:
        lora.lora_dropout = 0.0
    bf16 = args.bf16 and lora is not None
    dtype = torch.bfloat16 if bf16 or model_config.load_in_4bit else torch.float32

    def build(num_layers: int):
        smaller = type(config).from_dict(config.to_dict() | {"layer_types": None})
        smaller.num_hidden_layers = num_layers
        if getattr(smaller, "layer_types", None) is not None:
            smaller.layer_types = smaller.layer_types[:num_layers]
        return on_meta(smaller, family, dtype, lora, bool(args.gradient_checkpointing))

    prompt_tokens = prompt_tokens or args.max_prompt_length or 200
    tokens = prompt_tokens + args.max_completion_length
    network = Network(build(config.num_hidden_layers))
    scoring = scoring_of(args, prompt_tokens, config.vocab_size)
    card_bytes = CARDS[card][0] * GB if card else 0
    updates = args.num_iterations * args.steps_per_generation / args.gradient_accumulation_steps
    weights = {id(p): p for p in network.model.parameters()}.values()
    return Plan(
        parameters=sum(p.numel() for p in weights),
        trained=sum(p.numel() for p in weights if p.requires_grad),
        canvas=(prompt_tokens, args.max_completion_length),
        cycles=args.max_steps / updates,
        parts=cycle(network, args, scoring, tokens, args.log_kl and lora is not None and args.beta == 0),
        memory=memory(build, network, (args, model_config, num_gpus, zero), scoring, tokens, card_bytes),
    )


# What to try where a run does not fit, in this order, each on top of those before.
REMEDIES = (
    ["--gradient_checkpointing", "true"],
    ["--views_per_pass", "1"],
    ["--rollout_batch_size", "6"],
    ["--load_in_4bit", "true"],
    ["--lora_r", "32"],
)


def table(plan: Plan, card: str) -> str:
    """The plan as text."""
    lines = [
        f"{plan.parameters / 1e9:.2f} billion parameters, {plan.trained / 1e6:.1f} million of them trained",
        f"{plan.cycles:.0f} cycles of a rollout and its updates; canvas {plan.canvas[0]} + {plan.canvas[1]} tokens",
        "",
        f"{'a cycle, one process':<24}{'canvases':>10}{'passes':>8}{'TFLOP':>10}",
    ]
    lines += [f"{p.name:<24}{p.canvases:>10,}{p.passes:>8,}{p.flops / 1e12:>10,.1f}" for p in plan.parts]
    lines += ["", f"{'memory, one process':<46}{'GB':>6}"]
    lines += [f"{name:<46}{value / GB:>6.1f}" for name, value in plan.memory.items()]
    lines += [f"{'at the peak':<46}{plan.peak / GB:>6.1f}"]
    size, tflops = CARDS[card]
    fits = "fits" if plan.peak / GB + OVERHEAD <= size else "does not fit"
    lines += [
        "",
        f"{card}: {fits} in {size} GB ({OVERHEAD} of them for CUDA); about {plan.hours(tflops):.1f} hours without "
        f"evaluations, if {EFFICIENCY:.0%} of {tflops} TFLOP/s are reached.",
    ]
    return "\n".join(lines)


def main(arguments: argparse.Namespace) -> None:
    """Prints the plan of a recipe and, where it does not fit, what to change."""
    words = ["--config", arguments.config, "--use_cpu", "true", *arguments.settings]
    how = {"num_gpus": arguments.gpus, "zero": arguments.zero, "prompt_tokens": arguments.prompt_tokens}
    how |= {"card": arguments.card}
    plan, room = plan_of(words, **how), CARDS[arguments.card][0] - OVERHEAD
    print(table(plan, arguments.card))
    added: list[str] = []
    for remedy in REMEDIES if plan.peak / GB > room else ():
        added += remedy
        peak = plan_of([*words, *added], **how).peak / GB
        print(f"with {' '.join(added)}: {peak:.1f} GB")
        if peak <= room:
            break
