"""What one round of sampling produced, and how."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Blocks(NamedTuple):
    """Canvases of B rollouts cut into blocks of b tokens, [R = B * C / b, b]; `view(B, C)` joins them again."""

    ids: Tensor  # what stood on the canvas at last, also behind the first end-of-text token
    open: Tensor  # bool, of the completion up to the end of text
    written: Tensor  # bool, drawn by the sampler, also behind the end of text
    step: Tensor  # of the last write, from 0 in each block; -1 given in advance, `num_steps` never
    num_steps: int  # of a block


@dataclass(frozen=True)
class Rollout:
    """B sampled completions on full canvases, with the trace of their denoising.

    Of a model that attends in blocks of b tokens prompts are whole blocks: the last tokens of one that is not begin
    its canvas, as given in advance, and no token of the completion.

    Shapes: B rollouts, P prompt tokens (padded on the left), C canvas positions.
    """

    prompt_ids: Tensor  # [B, P]
    prompt_mask: Tensor  # [B, P] bool, False on padding
    completion_ids: Tensor  # [B, C], no [MASK] left; EOS after the first end-of-text token
    completion_mask: Tensor  # [B, C] bool, True behind the prompt's tail up to and with the first end-of-text token
    revealed_at: Tensor  # [B, C] denoising step that last committed the token; -1 given in advance, `num_steps` never
    confidence: Tensor  # [B, C] float32, probability of the token when it was committed (0 if never, 1 if given)
    entropy: Tensor  # [B, C] float32, entropy of the model's distribution at that moment (0 if never or given)
    group: Tensor  # [B] rows of one prompt share a number
    num_forwards: int  # passes through the network
    num_steps: int  # denoising steps of a full-length completion
    # [B, E, 3] every write in order of time: (step, position, token id), -1 as token where one was hidden again. Also
    # writes behind the end, which nothing else keeps. Rows with fewer of them than others are filled up with -1. Left
    # out: every token was written once, as `revealed_at` says.
    history: Tensor = None  # type: ignore[assignment] # a tensor once built
    prompt_tail: Tensor = None  # type: ignore[assignment] # [B] tokens of the prompt that begin the canvas; left out: 0
    block_length: int | None = None  # of the model's attention; None where every token sees every other one

    def __post_init__(self):
        if self.history is None:
            object.__setattr__(self, "history", _written_once(self.completion_ids, self.revealed_at, self.num_steps))
        if self.prompt_tail is None:
            object.__setattr__(self, "prompt_tail", self.revealed_at.new_zeros(len(self.revealed_at)))

    def _last_write(self, value: Tensor, given: Tensor, never: Tensor | int) -> Tensor:
        """`value` [B, E] of each position's last event, [B, C]; `given` or `never` where there is none."""
        step, position, _ = self.history.unbind(2)
        number = torch.arange(step.shape[1], device=step.device).where(step >= 0, -1)
        last = torch.full_like(self.revealed_at, -1).scatter_reduce(1, position.clamp(min=0), number, "amax")
        none = given.where(self.revealed_at == -1, never)
        return torch.nn.functional.pad(value, (0, 1)).gather(1, last.clamp(min=0)).where(last >= 0, none)

    def trace_ids(self) -> Tensor:
        """What stood on the canvas at last, [B, C]: also what was drawn behind the first end-of-text token."""
        return self._last_write(self.history[:, :, 2], self.completion_ids, self.completion_ids)

    def written_at(self) -> Tensor:
        """The step that last wrote each token of `trace_ids`, [B, C]; -1 given in advance, `num_steps` never."""
        return self._last_write(self.history[:, :, 0], self.revealed_at, self.num_steps)

    def blocks(self) -> Blocks:
        """The canvases cut into the blocks of the model's attention; ValueError where that is full attention."""
        if (size := self.block_length) is None:
            raise ValueError("block_length=None: every token of this model sees every other one; there are no blocks.")
        num_steps, step = self.num_steps * size // self.completion_ids.shape[1], self.written_at()
        written = (step >= 0) & (step < self.num_steps)
        local = torch.where(written, step % num_steps, step.clamp(max=num_steps))
        ids, is_open, written, local = (
            part.unflatten(1, (-1, size)).flatten(0, 1)
            for part in (self.trace_ids(), self.completion_mask.bool(), written, local)
        )
        return Blocks(ids, is_open, written, local, num_steps)

    def states(self) -> tuple[Tensor, Tensor]:
        """The completion as it stood before each step that changed it.

        Returns:
            states [B, S, C]: token ids, -1 where hidden; S is the most such steps of a row, and a row with fewer of
            them is filled up with -1. steps [B, S]: their numbers, -1 where filled up.
        """
        step, position, token = self.history.unbind(2)
        begins = (step >= 0) & (step != torch.nn.functional.pad(step, (1, 0), value=-1)[:, :-1])
        number = begins.long().cumsum(1) - 1
        num_states = int(begins.sum(1).max()) if begins.numel() else 0
        canvas = self.completion_ids.where(self.revealed_at == -1, -1)
        states = canvas[:, None].repeat(1, num_states, 1).fill_(-1)
        steps = step.new_full(states.shape[:2], -1)
        for event in range(step.shape[1]):
            rows = begins[:, event].nonzero()[:, 0]
            states[rows, number[rows, event]] = canvas[rows]
            steps[rows, number[rows, event]] = step[rows, event]
            rows = (step[:, event] >= 0).nonzero()[:, 0]
            canvas[rows, position[rows, event]] = token[rows, event]
        return states, steps

    def rows(self, index: list[int]) -> "Rollout":
        """The chosen rows, without padding that all of them share."""
        picked = self._each(lambda value: value[index])
        skip = picked.prompt_mask.shape[1] - int(picked.prompt_mask.sum(1).max())
        return replace(picked, prompt_ids=picked.prompt_ids[:, skip:], prompt_mask=picked.prompt_mask[:, skip:])

    def to(self, device: torch.device | str) -> "Rollout":
        """The same on another device."""
        return self._each(lambda value: value.to(device))

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Rollout":
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        changed: dict[str, Any] = {n: change(value) for n, value in values.items() if isinstance(value, Tensor)}
        return replace(self, **changed)


def _written_once(completion_ids: Tensor, revealed_at: Tensor, num_steps: int) -> Tensor:
    """The history [B, C, 3] in which each token was written at `revealed_at`."""
    written = (revealed_at >= 0) & (revealed_at < num_steps)
    position = torch.arange(revealed_at.shape[1], device=revealed_at.device).expand_as(revealed_at)
    events = torch.stack([revealed_at, position, completion_ids], 2).where(written[..., None], -1)
    order = revealed_at.where(written, num_steps).argsort(dim=1, stable=True)
    return events.gather(1, order[..., None].expand_as(events))


def replay(events: Tensor, values: Tensor, given: Tensor, num_steps: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the events of B rows say: history [B, E, 3], and revealed_at, confidence, entropy [B, C] of last writes.

    events [k, 4]: (row, step, position, token), each row's in order of time; values [k, 2]: (confidence, entropy);
    given [B, C] bool: what was not written but there from the start.
    """
    num_rows, width = given.shape
    row, step, position, _ = events.unbind(1)
    number = torch.arange(len(events), device=events.device)
    last = number.new_full((num_rows * width,), -1).scatter_reduce(0, row * width + position, number, "amax")
    last = last.view(num_rows, width)
    # Index -1 is the row that stands for no write at all.
    revealed_at = torch.cat([step, step.new_full((1,), num_steps)])[last].masked_fill(given, -1)
    confidence, entropy = torch.cat([values, values.new_zeros(1, 2)])[last].unbind(2)
    count = row.bincount(minlength=num_rows)
    history = events.new_full((num_rows, int(count.max()), 3), -1)
    by_row = row.argsort(stable=True)
    history[row[by_row], number - (count.cumsum(0) - count)[row[by_row]]] = events[by_row, 1:]
    return history, revealed_at, confidence.masked_fill(given, 1.0), entropy


def check_prompts(prompt_ids: Tensor, prompt_mask: Tensor, may_be_empty: bool = False) -> Tensor:
    """The mask [B, P] as bool, or ValueError where prompts are not padded on the left, or empty and may not be."""
    if prompt_ids.shape != prompt_mask.shape or prompt_ids.dim() != 2:
        raise ValueError(
            f"prompt_ids {list(prompt_ids.shape)} and prompt_mask {list(prompt_mask.shape)} must be equal [B, P]."
        )
    prompt_mask = prompt_mask.bool()
    if (prompt_mask[:, :-1] & ~prompt_mask[:, 1:]).any():
        raise ValueError("prompt_mask: prompts must be padded on the left.")
    if not may_be_empty and not prompt_mask.any(1).all():
        raise ValueError(
            "prompt_mask: a prompt is empty; give each at least one token, such as the one that begins a text."
        )
    return prompt_mask


def align(
    prompt_ids: Tensor, prompt_mask: Tensor, completion_ids: Tensor, block_length: int, width: int, fill: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same texts with prompts of whole blocks of b tokens, counted from each text's first token.

    Args:
        prompt_ids: [B, P], padded on the left, as prompt_mask [B, P] bool says.
        completion_ids: [B, C] what follows the prompt.
        width: of the canvas, C'; what does not fit on it is cut off.
        fill: the token on padding, and behind the completion.

    Returns:
        prompt_ids and prompt_mask [B, P'], where P' is a multiple of b and may be 0; the canvas [B, C'], which begins
        with the last r tokens of the prompt; and r [B], the prompt's length modulo b.
    """
    num_prompt, lengths = prompt_mask.shape[1], prompt_mask.sum(1)
    tail = lengths % block_length
    aligned = int((lengths - tail).max())
    text = torch.cat([prompt_ids, completion_ids], 1)
    column = torch.arange(aligned + width, device=text.device) + (num_prompt - aligned) - tail[:, None]
    inside = (column >= (num_prompt - lengths)[:, None]) & (column < text.shape[1])
    text = text.gather(1, column.clamp(0, text.shape[1] - 1)).where(inside, fill)
    return text[:, :aligned], inside[:, :aligned], text[:, aligned:], tail


def completion_mask_of(completion_ids: Tensor, end_ids: Tensor, prompt_tail: Tensor | None = None) -> Tensor:
    """True up to and including the first end-of-text token, [B, C] bool, and behind the prompt's last tokens [B]."""
    tail = completion_ids.new_zeros(len(completion_ids)) if prompt_tail is None else prompt_tail
    behind = torch.arange(completion_ids.shape[1], device=completion_ids.device) >= tail[:, None]
    is_end = torch.isin(completion_ids, end_ids) & behind
    return (is_end.int().cumsum(1) - is_end.int() == 0) & behind
