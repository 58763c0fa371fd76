"""Rollouts through compiled layers: passes of few shapes, so that torch compiles (or records) each of them once.

Compiled are the passes that repeat: over the whole canvas with full attention, or over a block beside stored keys and
values. Those that store, the head and the drawing are not. Rows are padded to the batch's size halved up to three
times, canvases and stored keys to a multiple of 64 tokens; the layers' answer is always a whole block.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dgrpo.models.blocks import BlockPast
from dgrpo.sampling.cache import WindowCache
from dgrpo.sampling.config import SamplerConfig
from dgrpo.sampling.network import Network

# `compile_rollouts`, and what torch.compile is told. CUDA graphs spare the launches as well.
COMPILERS: dict[str, dict[str, Any]] = {
    "inductor": {},
    "cudagraphs": {"mode": "reduce-overhead"},
    "eager": {"backend": "eager"},
}
HALVINGS, MULTIPLE = 3, 64
# torch stops compiling a function after 8 shapes; row counts times canvas lengths are more.
MAX_SHAPES = 64


class Stored:
    """Keys and values of K tokens that a pass reads beside its own; nothing is written, so it can be recorded."""

    length = 0

    def __init__(self, keys: list[Tensor], values: list[Tensor]):
        self.keys, self.values = keys, values

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Stored and own keys and values, [B, heads, K + L, head_dim]."""
        return torch.cat([self.keys[layer_idx], key], 2), torch.cat([self.values[layer_idx], value], 2)


def _layers(model, ids, mask, position_ids, past, columns):
    return type(model).network(model, ids, mask, position_ids, past, columns)


@cache
def _compiled(how: str):
    """Kept as long as the process, so that later rollouts find what earlier ones compiled."""
    return torch.compile(_layers, dynamic=False, **COMPILERS[how])


@contextmanager
def compiled_layers(model: Any, how: str) -> Iterator[None]:
    """Inside, the model's layers are compiled; its masks and its head are not."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model

    def network(ids, mask, position_ids, past, columns):
        # As a tensor: a slice's bounds would be part of what is compiled.
        columns = torch.arange(columns.start, columns.stop, device=ids.device)
        return _compiled(how)(base, ids, mask, position_ids, past, columns)

    base.network = network
    try:
        with torch._dynamo.config.patch(recompile_limit=MAX_SHAPES):
            yield
    finally:
        del base.network


class CompiledNetwork(Network):
    """`Network` through compiled layers: the same tokens, but for the rounding of products of other sizes."""

    def __init__(self, model: Any, config: SamplerConfig, prompt_width: int):
        super().__init__(model, config, prompt_width)
        assert config.compile_rollouts is not None
        self.how, self.most = config.compile_rollouts, 1
        if "flash" in (attention := model.config._attn_implementation):
            raise ValueError(
                f"compile_rollouts={self.how!r} pads rows, which attn_implementation={attention!r} does not keep in "
                "one shape: choose 'sdpa'."
            )
        if getattr(model.config, "num_experts", None):
            raise ValueError(
                f"compile_rollouts={self.how!r}: experts get other numbers of tokens each time; leave it out."
            )
        if self.how == "cudagraphs" and model.device.type != "cuda":
            raise ValueError(f"compile_rollouts='cudagraphs' on {model.device}: choose 'inductor', or leave it out.")
        # What the window's passes read, and which of it is no padding; None until the next of them.
        self.stored: tuple[Stored, Tensor] | None = None

    def begin_block(self, start: int, rows: Tensor | None = None) -> None:
        super().begin_block(start, rows)
        self.stored = None

    def keep(self, rows: Tensor) -> None:
        super().keep(rows)
        self.stored = None

    def _pass(
        self,
        ids: Tensor,
        mask: Tensor | None,
        at: Tensor,
        block: slice,
        cache: WindowCache | BlockPast | None = None,
        distinct: bool = False,
    ) -> Tensor:
        self.most = max(self.most, len(ids))
        # Where in the canvas this pass begins, and whether later ones read what it stores.
        if isinstance(cache, WindowCache):
            start, stores = cache.window.start if cache.window else 0, cache.window is None
        else:
            start = cache.length if cache is not None else 0
            stores = cache is not None and start < self.finished
        if distinct or stores:
            self.stored = None
            return super()._pass(ids, mask, at, block, cache, distinct)
        self.num_forwards += 1
        (num_rows, length), device = ids.shape, ids.device
        size = self.most
        for _ in range(HALVINGS):
            size = half if (half := -(-size // 2)) >= num_rows else size
        rows = torch.arange(size, device=device).clamp(max=num_rows - 1)
        ids, stored, visible = ids[rows], None, None
        position_ids = torch.arange(start, start + length, device=device)[None]
        if cache is None:
            extra = -length % MULTIPLE
            seen = mask if mask is None else mask[rows]
            seen = F.pad(ids.new_ones(ids.shape).bool() if seen is None else seen, (extra, 0))
            ids, at = F.pad(ids, (extra, 0)), at + extra
            block = slice(block.start + extra, block.stop + extra)
            position_ids = torch.arange(-extra, length, device=device)[None]
        else:
            if self.block_length is not None:
                # Keys: the store as it will be at the end, of which later blocks are hidden yet.
                visible = ids.new_ones(1, 1, 1).bool()
                if mask is not None:
                    position_ids = mask.cumsum(1)[rows, -length:] - 1
            if self.stored is None:
                self.stored = self._stored(cache, mask, rows, slice(start, start + length))
            stored, seen = self.stored
        flat = (torch.arange(size, device=device)[:, None] * ids.shape[1] + at[rows]).flatten()
        with compiled_layers(self.model, self.how):
            logits = self.model(
                ids,
                seen,
                position_ids=position_ids,
                past_key_values=stored,
                visible=visible,
                positions=flat,
                columns=block,
            )
        return logits.view(size, at.shape[1], -1)[:num_rows]

    def _stored(
        self, cache: WindowCache | BlockPast, mask: Tensor | None, rows: Tensor, window: slice
    ) -> tuple[Stored, Tensor]:
        """What is stored outside the window, filled up to K tokens, and a mask [b, K + L] of it and the window.

        A block model's store is filled up to what it will hold at the end.
        """
        total = next(iter(cache.keys.values())).shape[2]
        mask = torch.ones(len(rows), total, dtype=torch.bool, device=rows.device) if mask is None else mask[rows]
        outside = torch.arange(window.start, device=rows.device)
        if isinstance(cache, WindowCache):
            outside = torch.cat([outside, torch.arange(window.stop, total, device=rows.device)])
        elif cache.rows is not None:
            rows = cache.rows[rows]
        room = total + -total % MULTIPLE - len(outside)
        keys, values = (
            [F.pad(store[layer][rows][:, :, outside], (0, 0, 0, room)) for layer in range(len(store))]
            for store in (cache.keys, cache.values)
        )
        return Stored(keys, values), torch.cat([F.pad(mask[:, outside], (0, room)), mask[:, window]], 1)
