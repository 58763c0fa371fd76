"""The reverse process: from an empty canvas to a completion, block by block.

Shapes: B rollouts, P prompt tokens (padded on the left), C completion tokens, L = P + C; b rows still being denoised,
n positions of the current block that may be chosen, V vocabulary.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dgrpo.noise import uniform
from dgrpo.sampling.cache import WindowCache
from dgrpo.sampling.config import SamplerConfig
from dgrpo.sampling.draw import NEVER, draw, may_commit

# The draw of a token and that of a random order, at one (row, step, position), must not share their noise.
_ORDER_STREAM = 1 << 40


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Dropout off and gradients off inside; every module's training mode as it was afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def tokens_per_step(num_open: Tensor, steps: int) -> Tensor:
    """How many tokens each of `steps` steps commits, [B, steps]: equal shares, the remainder to the first steps."""
    share, rest = num_open // steps, num_open % steps
    return share[:, None] + (torch.arange(steps) < rest[:, None]).long()


class Denoiser:
    """One batch on its way from all hidden to all revealed, and the trace of it.

    `any_rank(flag)` tells whether the flag is true on any process; every process then makes the same number of
    passes, as ZeRO-3 and FSDP need. Alone, it is `bool`.
    """

    def __init__(
        self,
        model: Any,
        config: SamplerConfig,
        canvas: Tensor,
        prompt_mask: Tensor,
        keys: Tensor,
        end_ids: Tensor,
        any_rank: Callable[[bool], bool] = bool,
    ):
        self.model, self.config, self.any_rank, self.end_ids = model, config, any_rank, end_ids
        self.prompt_width = prompt_mask.shape[1]
        self.mask_token_id, self.num_words = model.config.mask_token_id, model.config.vocab_size
        self.steps_per_block = config.block_length if config.parallel else config.diffusion_steps // config.num_blocks
        self.num_steps = self.steps_per_block * config.num_blocks
        # The rows still at work: their row in the batch, canvas, attention mask and noise key.
        self.where = torch.arange(len(canvas), device=canvas.device)
        self.ids, self.keys = canvas.clone(), keys
        completion_mask = prompt_mask.new_ones(len(canvas), config.max_completion_length)
        self.attention_mask = None if prompt_mask.all() else torch.cat([prompt_mask, completion_mask], 1)
        # The record of the whole batch.
        is_open = canvas[:, self.prompt_width :] == self.mask_token_id
        self.canvas = canvas
        self.revealed_at = is_open.long() * (self.num_steps + 1) - 1
        self.confidence = (~is_open).float()
        self.entropy = torch.zeros_like(self.confidence)
        self.cache: WindowCache | None = None
        self.num_forwards = 0

    def run(self) -> None:
        for block in range(self.config.num_blocks):
            if not self.any_rank(len(self.where) > 0):
                break
            start = block * self.config.block_length
            self.cache = None
            steps = self._steps(start)
            while self.any_rank((now := next(steps, None)) is not None):
                if now is None:
                    self._idle_pass()
                else:
                    step, width, budget = now
                    self._step(start, block * self.steps_per_block + step, width, budget)
            self._retire(start + self.config.block_length)
        self.canvas[self.where] = self.ids

    def _is_open(self, start: int) -> Tensor:
        block = self.ids[:, self.prompt_width + start : self.prompt_width + start + self.config.block_length]
        return block == self.mask_token_id

    def _steps(self, start: int) -> Iterator[tuple[int, int, Tensor | None]]:
        """The steps of the block at `start`: number, most open positions of a row, how many each row commits [b].

        The last is None where the model's confidence decides that.
        """
        if self.config.parallel:
            step = 0
            while len(self.where) and (width := int(self._is_open(start).sum(1).amax())):
                yield step, width, None
                step += 1
            return
        # One look at the device: how many positions are open in each row decides the whole schedule of the block.
        open_counts = self._is_open(start).sum(1).cpu()
        plan = tokens_per_step(open_counts, self.steps_per_block)
        left = open_counts[:, None] - plan.cumsum(1) + plan
        for step in range(self.steps_per_block):
            # A step that commits nothing changes nothing: its pass is left out.
            if plan[:, step].any():
                yield step, int(left[:, step].max()), plan[:, step]

    def _step(self, start: int, step: int, width: int, budget: Tensor | None) -> None:
        config = self.config
        is_open = self._is_open(start)
        # Open positions first; rows with fewer of them than `width` are filled up with positions that stay unchanged.
        columns = (~is_open).int().argsort(dim=1, stable=True)[:, :width]
        is_open = is_open.gather(1, columns)
        columns = columns + start
        logits = self._logits(columns, start).flatten(0, 1)
        if config.logits_eos_inf:
            logits[:, self.end_ids[0]] = NEVER
        noise = uniform(self.keys, step, columns).flatten() if config.temperature > 0 else None
        drawn = draw(logits, noise, config, self.mask_token_id, self.num_words)
        order = drawn.order
        if config.remasking == "random":
            order = uniform(self.keys, step + _ORDER_STREAM, columns).flatten().float()
        order = order.view(columns.shape)
        if config.confidence_eos_eot_inf:
            is_end = torch.isin(drawn.tokens, self.end_ids).view(columns.shape)
            if budget is None:
                # However sure, they are no candidates while an ordinary token is: a rule must not see them beside it.
                is_open &= ~is_end | ~(is_open & ~is_end).any(1, keepdim=True)
            else:
                order = order.masked_fill(is_end, NEVER)
        order = order.masked_fill(~is_open, -torch.inf)
        most = width if budget is None else int(budget.max())
        picked = order.argsort(dim=1, descending=True, stable=True)[:, :most]
        tokens, probs, entropy = (
            value.view(columns.shape).gather(1, picked) for value in (drawn.tokens, drawn.probs, drawn.entropy)
        )
        if budget is None:
            committed = may_commit(probs, entropy, is_open.gather(1, picked), config)
        else:
            committed = torch.arange(most, device=picked.device) < budget.to(picked.device)[:, None]
        columns = columns.gather(1, picked)
        at = self.prompt_width + columns
        self.ids.scatter_(1, at, torch.where(committed, tokens, self.ids.gather(1, at)))
        rows = self.where[:, None]
        for record, value in ((self.revealed_at, step), (self.confidence, probs), (self.entropy, entropy)):
            record[rows, columns] = torch.where(committed, value, record[rows, columns])

    def _logits(self, columns: Tensor, start: int) -> Tensor:
        """Float32 logits [b, n, V] at completion positions `columns` [b, n] of the current block."""
        at = self.prompt_width + columns
        begin = self.prompt_width + start
        block = slice(begin, begin + self.config.block_length)
        if self.config.cfg_scale:
            hidden_prompt = self.ids.clone()
            prompt = hidden_prompt[:, : self.prompt_width]
            prompt.fill_(self.mask_token_id)
            mask = self.attention_mask
            logits = self._pass(
                torch.cat([self.ids, hidden_prompt]),
                None if mask is None else torch.cat([mask, mask]),
                at.repeat(2, 1),
                block,
            )
            conditional, unconditional = logits.chunk(2)
            return unconditional + (1 + self.config.cfg_scale) * (conditional - unconditional)
        if self.config.cache is None:
            return self._pass(self.ids, self.attention_mask, at, block, distinct=self.num_forwards == 0)
        if self.cache is None or self.cache.age == self.config.cache_refresh:
            self.cache = WindowCache()
            logits = self._pass(self.ids, self.attention_mask, at, block, self.cache, distinct=self.num_forwards == 0)
            stop = block.stop if self.config.cache == "dual" else self.ids.shape[1]
            self.cache.window = slice(begin - self.model.logit_shift, stop)
            return logits
        window = self.cache.window
        assert window is not None
        self.cache.age += 1
        block = slice(begin - window.start, begin - window.start + self.config.block_length)
        return self._pass(self.ids[:, window], self.attention_mask, at - window.start, block, self.cache)

    def _pass(
        self,
        ids: Tensor,
        mask: Tensor | None,
        at: Tensor,
        block: slice,
        cache: WindowCache | None = None,
        distinct: bool = False,
    ) -> Tensor:
        """Logits [b, n, V] at columns `at` [b, n] of `ids`, all of them in `block`; `distinct`: equal rows once."""
        self.num_forwards += 1
        copies = None
        if distinct:
            key = ids if mask is None else ids.masked_fill(~mask, -1)
            found, copies = key.unique(dim=0, return_inverse=True)
            rows = torch.arange(len(ids), device=ids.device)
            first = rows.new_full((len(found),), len(ids)).scatter_reduce(0, copies, rows, "amin")
            ids, at, mask = ids[first], at[first], None if mask is None else mask[first]
        length = ids.shape[1]
        position_ids = None
        if cache is not None and cache.window is not None:
            position_ids = torch.arange(cache.window.start, cache.window.start + length, device=ids.device)[None]
        flat = (torch.arange(len(ids), device=ids.device)[:, None] * length + at).flatten()
        logits = self.model(ids, mask, position_ids=position_ids, past_key_values=cache, positions=flat, columns=block)
        logits = logits.view(*at.shape, -1)
        if copies is None:
            return logits
        if cache is not None:
            cache.expand(copies)
        return logits[copies]

    def _idle_pass(self) -> None:
        """A pass whose result nobody reads: other processes still need this one's share of the weights."""
        self.num_forwards += 1
        self.model(self.canvas[:1], positions=torch.zeros(1, dtype=torch.long, device=self.canvas.device))

    def _retire(self, stop: int) -> None:
        """Rows that hold an end-of-text token before `stop`, all revealed by now, leave the batch."""
        if not self.config.stop_at_eos or len(self.where) == 0:
            return
        done = torch.isin(self.ids[:, self.prompt_width : self.prompt_width + stop], self.end_ids).any(1)
        if not done.any():
            return
        self.canvas[self.where[done]] = self.ids[done]
        self.where, self.ids, self.keys = self.where[~done], self.ids[~done], self.keys[~done]
        if self.attention_mask is not None:
            self.attention_mask = self.attention_mask[~done]
