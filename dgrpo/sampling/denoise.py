"""The reverse process: from an empty canvas to a completion, block by block.

Shapes: B rollouts, P prompt tokens (padded on the left), C completion tokens, L = P + C; b rows at work, n positions
of the current block that are looked at, V vocabulary.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dgrpo.noise import uniform
from dgrpo.sampling.config import SamplerConfig
from dgrpo.sampling.draw import NEVER, draw
from dgrpo.sampling.network import Network
from dgrpo.sampling.policy import Sight, commit

# Draws of a token, of a random order and of a policy's own, at one (row, step, position), must not share their noise.
_ORDER_STREAM = 1 << 40
_POLICY_STREAM = 2 << 40


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


class Denoiser:
    """The loop: one batch on its way from all hidden to all revealed, and the record of it.

    It steps through the blocks, sets rows aside that are done with theirs, and keeps processes in step:
    `any_rank(flag)` tells whether the flag is true on any process; every process then makes the same number of passes,
    as ZeRO-3 and FSDP need. Alone, it is `bool`.
    """

    def __init__(
        self,
        network: Network,
        config: SamplerConfig,
        canvas: Tensor,
        prompt_mask: Tensor,
        keys: Tensor,
        end_ids: Tensor,
        prompt_tail: Tensor,
        any_rank: Callable[[bool], bool] = bool,
    ):
        self.network, self.config, self.any_rank, self.end_ids = network, config, any_rank, end_ids
        self.prompt_width, self.prompt_tail = prompt_mask.shape[1], prompt_tail
        self.mask_token_id, self.num_words = network.model.config.mask_token_id, network.model.config.vocab_size
        assert config.block_length is not None  # as SamplerConfig.of leaves it
        self.block_length = config.block_length
        self.policy = config.policy or commit
        self.revises = getattr(self.policy, "revises", True)
        self.persists = getattr(self.policy, "persists", False)
        self.canvas, self.all_keys = canvas, keys
        completion_mask = prompt_mask.new_ones(len(canvas), config.max_completion_length)
        self.all_visible = None if prompt_mask.all() else torch.cat([prompt_mask, completion_mask], 1)
        self.given = canvas[:, self.prompt_width :] != self.mask_token_id
        # Probability of each shown token when it was written; only kept for policies that may ask for it.
        self.confidence = self.given.float()
        # Each step's (rows [b], columns, step or -1 where nothing changed, tokens, probs, entropy [b, n]).
        self.log: list[tuple[Tensor, ...]] = []
        self.events: list[tuple[Tensor, Tensor]] = []

    def run(self, on_step: Callable[["Denoiser"], Any] = bool) -> None:
        alive, going_on = torch.arange(len(self.canvas), device=self.canvas.device), None
        for block in range(self.config.num_blocks):
            if not self.any_rank(len(alive) > 0):
                break
            start = block * self.block_length
            columns = torch.arange(start, start + self.block_length, device=self.canvas.device)
            self.network.begin_block(self.prompt_width + start, going_on)
            self._take(alive)
            steps = self._steps(start)
            while self.any_rank((now := next(steps, None)) is not None):
                if now is None:
                    self.network.idle_pass(self.canvas)
                else:
                    self._step(start, block * self.config.steps_per_block, *now)
                    on_step(self)
            self.canvas[self.rows] = self.ids
            self._record()
            if self.config.stop_at_eos:
                # Rows with an end-of-text token in this block leave the batch.
                is_end = torch.isin(self.canvas[alive[:, None], self.prompt_width + columns], self.end_ids)
                is_end &= columns >= self.prompt_tail[alive, None]
                going_on = (~is_end.any(1)).nonzero()[:, 0]
                alive, going_on = alive[going_on], going_on if len(going_on) < len(alive) else None

    def _take(self, rows: Tensor) -> None:
        """Put these rows [b] of the batch to work."""
        self.rows, self.ids, self.keys = rows, self.canvas[rows], self.all_keys[rows]
        self.visible = None if self.all_visible is None else self.all_visible[rows]

    def _is_open(self, start: int) -> Tensor:
        block = self.ids[:, self.prompt_width + start : self.prompt_width + start + self.block_length]
        return block == self.mask_token_id

    def _steps(self, start: int) -> Iterator[tuple[int, int]]:
        """The steps of the block at `start` that may change something: number, and most open positions of a row.

        Rows that are done are set aside until the block's end, so the others' passes get smaller.
        """
        # Rows that a policy may still revise: at first those that are not given entirely.
        self.restless = ~self.given[self.rows, start : start + self.block_length].all(1)
        num_open = self._num_left(start).tolist()
        for step in range(self.config.steps_per_block):
            if not any(num_open):
                return
            if (num_done := num_open.count(0)) and self.network.worth_leaving(num_done, len(num_open)):
                stay = (self._num_left(start) == 0).int().argsort(stable=True)[: len(num_open) - num_done]
                self.canvas[self.rows] = self.ids
                self._take(self.rows[stay])
                self.network.keep(stay)
                num_open = [number for number in num_open if number]
            yield step, max(num_open)
            if self.policy is commit and not self.config.parallel:
                # The schedule tells, without another look at the device.
                num_open = [number - self._share(number, step) for number in num_open]
            else:
                num_open = self._num_left(start).tolist()

    def _share(self, num_open: Any, step: int) -> Any:
        """How many of a row's open positions the fixed schedule commits at a step of the block; ints, or a tensor."""
        num_steps, size = self.config.steps_per_block, self.block_length
        if self.network.block_length is None:
            # Equal shares of what is open over the steps that are left, the remainder to the first of them.
            return -(-num_open // (num_steps - step))
        # As published for these models: equal shares of a whole block. One that is given in part takes fewer steps.
        most = size // num_steps + (step < size % num_steps)
        return num_open - (num_open - most) * (num_open > most)

    def _num_left(self, start: int) -> Tensor:
        """Open positions of each row [b], and one more where a policy that revises may not be done: 0 when it is."""
        num_open = self._is_open(start).sum(1)
        return num_open + self.restless if self.revises else num_open

    def _step(self, start: int, first_step: int, step: int, width: int) -> None:
        config, number = self.config, first_step + step
        is_open, steps_left = self._is_open(start), config.steps_per_block - step
        budget = None if config.parallel else self._share(is_open.sum(1), step)
        if self.revises:
            columns = torch.arange(self.block_length, device=is_open.device).expand_as(is_open)
        else:
            # Open positions first; rows with fewer of them than `width` are filled up with shown ones.
            columns = (~is_open).int().argsort(dim=1, stable=True)[:, :width]
            is_open = is_open.gather(1, columns)
        columns = columns + start
        at = columns + self.prompt_width
        begin = self.prompt_width + start
        logits = self.network.logits(self.ids, self.visible, at, slice(begin, begin + self.block_length))
        logits = logits.flatten(0, 1)
        if config.logits_eos_inf:
            logits.index_fill_(1, self.end_ids[:1], NEVER)
        noise = uniform(self.keys, number, columns).flatten() if config.temperature > 0 else None
        drawn = draw(logits, noise, config, self.mask_token_id, self.num_words)
        tokens, probs, entropy, order, kept_probs, kept_entropy = (value.view(columns.shape) for value in drawn)
        if config.remasking == "random":
            order = uniform(self.keys, number + _ORDER_STREAM, columns).float()
        elif config.remasking == "sequential":
            order = -columns.float()
        before = self.ids.gather(1, at)
        sight = Sight(
            ids=before,
            is_open=is_open,
            tokens=tokens,
            probs=kept_probs,
            entropy=kept_entropy,
            order=order,
            positions=columns,
            step=step,
            num_steps=config.steps_per_block,
            mask_token_id=self.mask_token_id,
            end_ids=self.end_ids,
        )
        may_change = is_open
        if self.policy is not commit:
            sight = sight._replace(noise=uniform(self.keys, number + _POLICY_STREAM, columns))
        if self.revises:
            place = self.rows[:, None], columns
            may_change = ~self.given[place]
            sight = sight._replace(confidence=self.confidence[place], given=~may_change)
        after = self.policy(sight, budget, config)
        if self.policy is not commit:
            self._check(after, sight)
        after = torch.where(may_change, after, before)
        if steps_left == 1:
            after = torch.where(after == self.mask_token_id, tokens, after)
        changed = after != before
        self.ids.scatter_(1, at, after)
        if self.revises:
            self.restless = (changed.any(1) | self.persists) & may_change.any(1)
            kept = self.confidence[place].where(~changed, probs)
            self.confidence[place] = kept.where(after != self.mask_token_id, 0.0)
        self.log.append((self.rows, columns, torch.where(changed, number, -1), after, probs, entropy))

    def _check(self, after: Tensor, sight: Sight) -> None:
        allowed = [sight.ids, sight.tokens, torch.full_like(sight.ids, sight.mask_token_id)]
        if after.shape != sight.ids.shape or not (torch.stack(allowed) == after).any(0).all():
            raise ValueError(
                f"sampler_policy={self.config.sampler_policy!r}: it must return ids {list(sight.ids.shape)}, each of "
                "them sight.ids, sight.tokens or sight.mask_token_id at its place."
            )

    def _record(self) -> None:
        """Turn the block's log into events (row, step, position, token) [k, 4] and (confidence, entropy) [k, 2]."""
        if not self.log:
            return
        rows, *rest = zip(*self.log, strict=True)
        per_event = [each[:, None].expand_as(columns) for each, columns in zip(rows, rest[0], strict=True)]
        row, position, step, token, probs, entropy = (
            torch.cat([each.flatten() for each in part]) for part in (per_event, *rest)
        )
        happened = (step >= 0).nonzero()[:, 0]
        token = token.masked_fill(token == self.mask_token_id, -1)
        events, values = torch.stack([row, step, position, token], 1), torch.stack([probs, entropy], 1)
        self.events.append((events[happened], values[happened]))
        self.log.clear()
