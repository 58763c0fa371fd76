"""What a run will cost, from its recipe and the model's configuration alone: passes, FLOPs, memory, hours.

Nothing is downloaded and no weight is loaded: the network's own code runs on tensors without memory.

Shapes: B rows of a micro-batch, P prompt tokens, C completion tokens, L = P + C, V vocabulary, d width.
"""

import argparse
from dataclasses import dataclass
from typing import Any

import torch
from trl import ModelConfig, get_peft_config

from dgrpo.cli import CARDS
from dgrpo.run.memory import memory
from dgrpo.run.scored import Scoring, scoring_of
from dgrpo.run.settings import RecipeConfig, parse_recipe
from dgrpo.run.shapes import Network, model_configuration, on_meta
from dgrpo.sampling import SamplerConfig
from dgrpo.tasks import EMBEDDED
from dgrpo.trainers import DiffuGRPOConfig

GB = 1e9
# CUDA's context, and what the allocator cannot use: an assumption.
OVERHEAD = 1.5
# Share of a card's peak that products of this size reach: an assumption, to be replaced by `benchmarks/gpu.py`'s.
EFFICIENCY = 0.4


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
    attends = getattr(network.config, "block_length", None)
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
            keys, commits = tokens, -(-is_open // (steps - step))
            if attends is not None:
                # Nobody sees beyond the block; its first pass also stores what was finished last.
                keys, commits = start + block, min(is_open, block // steps + (step < block % steps))
                window = 2 * block if step == 0 else block
                window = keys if number == step == 0 or config.cache == "recompute" else window
            flops += sum(network.forward(shown, window, block, keys)) + shown * is_open * network.head()
            passes, canvases = passes + batches, canvases + shown
            is_open -= commits
    return Part("rollout", canvases, passes, flops)


def cycle(network: Network, args: DiffuGRPOConfig, scoring: Scoring, tokens: int, kl_by_adapter: bool) -> list[Part]:
    """The parts of a cycle of one process."""
    steps, draws = args.steps_per_generation, args.num_iterations
    rows = args.per_device_train_batch_size * steps
    batch = min(args.rollout_batch_size or rows, rows)
    sampler = args.sampler().of(getattr(network.config, "block_length", None))
    parts = [_rollout(network, sampler, rows, -(-rows // args.num_generations), batch, tokens)]
    scored = sum(scoring.positions) * network.head()
    passes, canvases = len(scoring.positions), sum(scoring.canvases)
    forward = sum(sum(network.forward(*one[:4])) for one in scoring.passes) + scored
    # The first inner update's ratio is 1 by construction.
    old = draws - 1 if args.gradient_accumulation_steps == steps else draws
    for name, times in (("old policy", old), ("reference", draws if args.beta or kl_by_adapter else 0)):
        if times:
            parts.append(Part(name, times * steps * canvases, times * steps * passes, times * steps * forward))
    again = int(args.gradient_checkpointing)
    update = sum(network.update(*one[:3], again + one.recomputed, one.keys) for one in scoring.passes)
    frozen_head = not network.model.get_output_embeddings().weight.requires_grad
    update += scored * (2 if frozen_head else 3) * (1 if passes == 1 else 2)
    times = draws * steps
    parts.append(Part("updates", times * canvases, times * passes, times * update))
    return parts


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

    attends = getattr(config, "block_length", None)
    prompt_tokens = prompt_tokens or args.max_prompt_length or 200
    prompt_tokens -= prompt_tokens % (attends or 1)
    tokens = prompt_tokens + args.max_completion_length
    network = Network(build(config.num_hidden_layers))
    scoring = scoring_of(args, prompt_tokens, config.vocab_size, attends)
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
