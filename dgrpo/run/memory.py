"""Memory of a run by part: the network's own code, on tensors without memory."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from dgrpo.models import experts
from dgrpo.models.blocks import Clean
from dgrpo.models.head import MAX_LOGITS_BYTES
from dgrpo.run.live import LiveBytes, without_memory
from dgrpo.run.scored import Pass, Scoring
from dgrpo.run.shapes import Network
from dgrpo.sampling import SamplerConfig
from dgrpo.sampling.draw import MAX_DRAW_BYTES, draw
from dgrpo.vocabulary import _SHARE_OF_GPU

# A parameter in NF4 with doubly quantized scales.
BYTES_IN_4_BIT = 0.516


@contextmanager
def _even_experts() -> Iterator[None]:
    """Without values no token chooses an expert: each gets as many."""

    def through(modules: nn.ModuleList, x, counts):
        sizes = [len(x) // len(modules) + (index < len(x) % len(modules)) for index in range(len(modules))]
        return torch.cat([expert(part) for expert, part in zip(modules, x.split(sizes), strict=True)])

    with mock.patch.object(experts, "_one_by_one", through):
        yield


def _tokens(one: Pass) -> int:
    return one.rows * one.tokens


def _whole(passes: list[Pass], model: Any) -> Tensor:
    """Hidden states of one pass over whole canvases."""
    one = passes[0]
    ids = torch.zeros(one.rows, one.tokens, dtype=torch.long)
    return model.hidden_states(ids, columns=slice(one.tokens - one.asked, one.tokens))


def _by_blocks(passes: list[Pass], model: Any) -> Tensor:
    """Those of a block model's copies: the clean stream (prompts, completions), then chunks of columns."""
    prompt, *rest = passes
    past, before = Clean(), []
    model.hidden_states(torch.zeros(prompt.rows, prompt.tokens, dtype=torch.long), None, None, past)
    copies = torch.zeros(max(one.rows for one in passes), dtype=torch.long)
    before = [(keys[copies], values[copies]) for keys, values in past.layers()]
    hidden = []
    for index, one in enumerate(rest):
        stored = one.keys - one.tokens
        ids, positions = torch.zeros(one.rows, one.tokens, dtype=torch.long), torch.arange(one.tokens)[None]
        if index == 0 and len(rest) > 1:
            past = Clean(before)
            model.hidden_states(ids, None, None, past)
            before = past.layers()
            continue
        past = Clean([(keys[:, :, :stored], values[:, :, :stored]) for keys, values in before])
        visible = torch.ones(1, one.tokens, one.keys, dtype=torch.bool)
        hidden.append(model.hidden_states(ids, None, positions, past, visible).flatten(0, 1))
    return torch.cat(hidden)


def activations(build, layers: int, grad: bool, bf16: bool, hidden_states: Callable[[Any], Tensor]):
    """Bytes of a call's hidden states: at the end of the forward pass, and at the peak, with `grad` of the backward.

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
                hidden = hidden_states(base)
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
    positions = max(scoring.positions)
    logits = 3 * min(chunk, positions * vocab * 4)
    run = partial(activations, build, layers, bf16=bool(args.bf16))
    # Beside the logits: the expected and the target row of each scored position.
    rows = 2 * positions * width * 4
    attends = getattr(config, "block_length", None)
    sampler, num_rows = args.sampler().of(attends), args.per_device_train_batch_size * args.steps_per_generation
    batch = min(args.rollout_batch_size or num_rows, num_rows) * (2 if args.cfg_scale else 1)
    size = sampler.block_length or 0
    asked = batch * size * vocab * 4
    cache = 0
    if sampler.cache or attends is not None:
        heads = config.num_attention_heads
        key_width = (getattr(config, "head_dim", None) or width // heads) * (config.num_key_value_heads or heads)
        cache = 4 * layers * key_width * batch * tokens * (1 if args.bf16 else 2)
    drawing = _drawing(sampler, vocab) * min(max(MAX_DRAW_BYTES, card_bytes // _SHARE_OF_GPU), asked)
    if attends is None:
        shown = [Pass(batch, tokens, length, tokens)]
        call, scored_passes = _whole, [max(scoring.passes, key=_tokens)]
    else:
        # The prompts of the groups with their first block, and later a finished block with the next.
        groups = -(-batch // args.num_generations)
        shown = [max(Pass(groups, tokens - length + size, size, 0), Pass(batch, 2 * size, size, 0), key=_tokens)]
        call, scored_passes = _by_blocks, scoring.passes
    rollout = max(run(grad=False, hidden_states=partial(_whole, shown))[1], asked + drawing) + cache

    def measure(grad: bool) -> tuple[float, float]:
        passes = scored_passes
        if call is _by_blocks and passes[-1].recomputed:
            # One chunk's activations live at a time: those of the last, which sees most.
            passes = [*passes[:2], passes[-1]]
        return run(grad=grad, hidden_states=partial(call, passes))

    (kept, peak), (kept_scoring, peak_scoring) = measure(grad=True), measure(grad=False)
    return {
        "weights": weights,
        "trained weights with gradients and AdamW": trained * spread,
        "rollout": rollout,
        "scoring": max(peak_scoring, kept_scoring + rows + logits),
        # The head is at work before the layers' backward pass.
        "update": max(peak, kept + rows + logits),
    }
