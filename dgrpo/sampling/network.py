"""Logits at open positions: guidance, caches, equal rows and passes that only other processes need."""

from typing import Any

import torch
from torch import Tensor

from dgrpo.models.blocks import BlockPast
from dgrpo.sampling.cache import WindowCache
from dgrpo.sampling.config import SamplerConfig


class Network:
    """The model as the sampler asks it, for one batch; the only part that knows how an answer is computed.

    Shapes: b rows at work, L = P + C canvas positions, n of them asked for in each row, V vocabulary.
    """

    def __init__(self, model: Any, config: SamplerConfig, prompt_width: int):
        self.model, self.config, self.prompt_width = model, config, prompt_width
        self.block_length = getattr(model, "block_length", None)
        self.cache: WindowCache | None = None
        # Exact keys and values of finished blocks, where the model attends block by block.
        self.past: BlockPast | None = None
        if self.block_length is not None and config.cache is None:
            self.past = BlockPast(prompt_width + config.max_completion_length)
        self.num_forwards = 0

    def begin_block(self, start: int, rows: Tensor | None = None) -> None:
        """From now on columns of the block at `start` are asked for, in `rows` of those of the last block (None: all).

        Full attention starts each block from keys and values of its own.
        """
        self.cache = None
        # What may be stored: a shifted family asks the last finished token for what stands behind it.
        self.finished = max(0, start - self.model.logit_shift)
        if self.past is not None:
            self.past.rows = None
            if rows is not None:
                self.past.select(rows)

    def worth_leaving(self, num_done: int, num_rows: int) -> bool:
        """Whether smaller passes pay for setting `num_done` of the rows aside: a cache has to be copied for it.

        None may leave before the pass that stores the keys and values of what was finished last.
        """
        if self.past is not None and (self.past.length < self.finished or not self.past.keys):
            return False
        return (self.cache is None and self.past is None) or 4 * num_done >= num_rows

    def keep(self, rows: Tensor) -> None:
        """Until the block's end only these rows are asked for."""
        if self.cache is not None:
            self.cache.select(rows)
        if self.past is not None:
            self.past.rows = rows if self.past.rows is None else self.past.rows[rows]

    def logits(self, ids: Tensor, mask: Tensor | None, at: Tensor, block: slice) -> Tensor:
        """Float32 logits [b, n, V] at columns `at` [b, n] of the canvases `ids` [b, L], all of them in `block`."""
        if self.config.cfg_scale:
            without_prompt = ids.clone()
            without_prompt[:, : self.prompt_width] = self.model.config.mask_token_id
            masks = None if mask is None else torch.cat([mask, mask])
            logits = self._pass(torch.cat([ids, without_prompt]), masks, at.repeat(2, 1), block)
            conditional, unconditional = logits.chunk(2)
            return unconditional + (1 + self.config.cfg_scale) * (conditional - unconditional)
        if self.block_length is not None:
            # Nobody sees what comes behind the block; what is not stored yet is computed with it.
            ids, mask = ids[:, : block.stop], None if mask is None else mask[:, : block.stop]
            if self.past is None:
                return self._pass(ids, mask, at, block, distinct=self.num_forwards == 0)
            first = self.past.length
            own = slice(block.start - first, block.stop - first)
            return self._pass(ids[:, first:], mask, at - first, own, self.past, distinct=not self.past.keys)
        if self.config.cache in (None, "recompute"):
            return self._pass(ids, mask, at, block, distinct=self.num_forwards == 0)
        if self.cache is None or self.cache.age == self.config.cache_refresh:
            self.cache = WindowCache()
            logits = self._pass(ids, mask, at, block, self.cache, distinct=self.num_forwards == 0)
            stop = block.stop if self.config.cache == "dual" else ids.shape[1]
            self.cache.window = slice(block.start - self.model.logit_shift, stop)
            return logits
        window = self.cache.window
        assert window is not None
        self.cache.age += 1
        block = slice(block.start - window.start, block.stop - window.start)
        return self._pass(ids[:, window], mask, at - window.start, block, self.cache)

    def _pass(
        self,
        ids: Tensor,
        mask: Tensor | None,
        at: Tensor,
        block: slice,
        cache: WindowCache | BlockPast | None = None,
        distinct: bool = False,
    ) -> Tensor:
        """One pass through the network; with `distinct`, equal rows go through once."""
        self.num_forwards += 1
        copies = None
        if distinct:
            visible = ids if mask is None else ids.masked_fill(~mask, -1)
            unique, copies = visible.unique(dim=0, return_inverse=True)
            rows = torch.arange(len(ids), device=ids.device)
            first = rows.new_full((len(unique),), len(ids)).scatter_reduce(0, copies, rows, "amin")
            ids, at, mask = ids[first], at[first], None if mask is None else mask[first]
        length = ids.shape[1]
        position_ids = None
        if isinstance(cache, WindowCache) and cache.window is not None:
            position_ids = torch.arange(cache.window.start, cache.window.start + length, device=ids.device)[None]
        flat = (torch.arange(len(ids), device=ids.device)[:, None] * length + at).flatten()
        logits = self.model(ids, mask, position_ids=position_ids, past_key_values=cache, positions=flat, columns=block)
        logits = logits.view(*at.shape, -1)
        if isinstance(cache, BlockPast):
            cache.commit(max(0, self.finished - cache.length))
        if copies is None:
            return logits
        if cache is not None:
            cache.select(copies)
        return logits[copies]

    def idle_pass(self, ids: Tensor) -> None:
        """A pass whose result nobody reads: other processes still need this one's share of the weights."""
        self.num_forwards += 1
        self.model(ids[:1], positions=torch.zeros(1, dtype=torch.long, device=ids.device))
