"""Masked views: which positions of a rollout are hidden in each view, and how much each scored token counts.

Shapes: B rollouts, N views of each, P prompt tokens (padded on the left), C completion tokens, L = P + C.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from dgrpo.noise import stream


@dataclass(frozen=True)
class MaskedViews:
    """N masked views of B rollouts; log p_k = sum over n of weights[n, k] * log p(completion_k | view n).

    hidden [B, N, L] bool: positions shown as [MASK]. weights [B, N, C] float32: zero where a token is not scored in
    that view, nonzero only where it is hidden. Where tokens were written more than once: shown [B, N, C], the
    tokens that a view does not hide, and targets [B, N, C], the tokens that it scores; None is the
    completion's own. A token may then be scored over another one that the view shows.
    """

    hidden: Tensor
    weights: Tensor
    shown: Tensor | None = None
    targets: Tensor | None = None

    def __post_init__(self):
        num_completion = self.weights.shape[-1]
        if self.hidden.dtype != torch.bool or self.hidden.shape[:-1] != self.weights.shape[:-1]:
            raise ValueError(
                f"MaskedViews: hidden must be bool [B, N, L] beside weights [B, N, C]; got {self.hidden.dtype} "
                f"{list(self.hidden.shape)} and {list(self.weights.shape)}."
            )
        if self.hidden.shape[-1] < num_completion:
            raise ValueError(
                f"MaskedViews: {self.hidden.shape[-1]} positions cannot hold {num_completion} completion tokens."
            )
        for name in ("shown", "targets"):
            if (ids := getattr(self, name)) is not None and ids.shape != self.weights.shape:
                raise ValueError(f"MaskedViews: {name} {list(ids.shape)} must be {list(self.weights.shape)}.")

    def check(self, completion_ids: Tensor | None = None) -> "MaskedViews":
        """Self, or ValueError where a token that the view shows would be scored (it would predict itself).

        `completion_ids` [B, C] are needed where only one of `shown` and `targets` is given.
        """
        given = None if completion_ids is None else completion_ids[:, None]
        shown, targets = (given if ids is None else ids for ids in (self.shown, self.targets))
        wrong = (self.weights != 0) & ~self.hidden[..., -self.weights.shape[-1] :]
        if shown is not None and targets is not None:
            wrong &= shown == targets
        if wrong.any():
            raise ValueError(
                "MaskedViews: weights are nonzero at positions that are not hidden; score hidden tokens only, or "
                "other tokens than those shown."
            )
        return self

    def canvases(self, input_ids: Tensor, mask_token_id: int) -> Tensor:
        """The canvases [B, N, L] of prompt + completion `input_ids` [B, L]."""
        ids = input_ids[:, None]
        if self.shown is not None:
            prompt = ids[..., : -self.shown.shape[-1]].expand(-1, self.shown.shape[1], -1)
            ids = torch.cat([prompt, self.shown], 2)
        return torch.where(self.hidden, mask_token_id, ids)

    def each(self, change: Callable[[Tensor], Tensor]) -> "MaskedViews":
        """The same with every tensor changed."""
        return MaskedViews(**{name: change(value) for name, value in self.tensors().items()})

    def tensors(self) -> dict[str, Tensor]:
        """Those that are there, by name."""
        return {each.name: getattr(self, each.name) for each in fields(self) if getattr(self, each.name) is not None}


def views_of(estimator: Callable[..., MaskedViews], rollout: Any, generator: torch.Generator) -> MaskedViews:
    """The estimator's views of a rollout; of a block model, one view shows a noisy copy of each block.

    A block of the canvas is a canvas of its own, without what is given of the prompt in it: the estimator draws on
    each and need not know of the others. In view n every block shows its n-th copy behind the clean past, so
    log p_k is again the weighted sum over n. Steps are counted within the block. The number of views is that of a
    whole block; the others are filled up with views that show and score nothing.
    """
    size = rollout.block_length
    if size is None:
        return estimator(rollout, generator=generator)
    num_rows, num_blocks = len(rollout.completion_ids), rollout.completion_ids.shape[1] // size
    blocks = rollout.blocks()
    fields = {"completion_ids": blocks.ids, "completion_mask": blocks.open, "revealed_at": blocks.step}
    fields |= {name: getattr(rollout, name).reshape(-1, size) for name in ("confidence", "entropy")}
    num_given = torch.zeros(num_rows, num_blocks, dtype=torch.long)
    num_given[:, 0] = rollout.prompt_tail
    num_given = num_given.flatten()
    # Each block's own writes; other events of a row are as if there were none.
    step, position, token = rollout.history[:, None].repeat_interleave(num_blocks, 1).flatten(0, 1).unbind(2)
    block_of = torch.where(step >= 0, position // size, -1)
    is_own = block_of == (torch.arange(len(step), device=step.device) % num_blocks)[:, None]
    history = torch.stack([step % blocks.num_steps, position % size, token], 2).where(is_own[..., None], -1)
    parts = []
    # Also a whole block where there is none, for the number of views.
    for given in sorted({0, *num_given.tolist()}):
        rows = (num_given == given).nonzero()[:, 0]
        drawn = rows if len(rows) else torch.zeros(1, dtype=torch.long)
        texts = drawn.to(rollout.group.device) // num_blocks
        part = replace(
            rollout,
            **{name: value[drawn, given:] for name, value in fields.items()},
            prompt_ids=rollout.prompt_ids[texts, :0],
            prompt_mask=rollout.prompt_mask[texts, :0],
            prompt_tail=torch.zeros_like(texts),
            group=rollout.group[texts],
            num_steps=blocks.num_steps,
            history=history[drawn] - torch.tensor([0, given, 0], device=step.device) * is_own[drawn][..., None],
        )
        parts.append((rows, given, estimator(part, generator=generator)))
    num_views = max(views.weights.shape[1] for _, _, views in parts)
    ids = blocks.ids[:, None].repeat(1, num_views, 1)
    wholes = {"hidden": torch.zeros_like(ids, dtype=torch.bool), "weights": torch.zeros_like(ids, dtype=torch.float)}
    for rows, given, views in parts:
        for name, own in views.tensors().items():
            whole = wholes.setdefault(name, ids.clone())
            whole[rows, : own.shape[1], given:] = own[: len(rows)].to(whole.device)
    joined = {n: e.unflatten(0, (num_rows, num_blocks)).transpose(1, 2).flatten(2) for n, e in wholes.items()}
    joined["hidden"] = torch.nn.functional.pad(joined["hidden"], (rollout.prompt_ids.shape[1], 0))
    return MaskedViews(**joined)


def draw_views(
    estimator: Callable[..., MaskedViews], rollout: Any, unit: Tensor, key: tuple[int | str, ...], num_draws: int = 1
) -> MaskedViews:
    """`num_draws` (D) independent draws of every rollout's views: hidden [B, D, N, L], weights [B, D, N, C] and so on.

    Rows with the same number in `unit` [B] (a group, or a row of its own) are drawn together from a stream keyed by
    (key, unit number, draw), on their prompt without its padding, so a row's views depend on nothing else: not on the
    rest of the batch, its width, or the process that holds it.
    """
    prompt_width = rollout.prompt_mask.shape[1]
    row_views: dict[int, dict[str, Tensor]] = {}
    unit_numbers = unit.tolist()
    for number in dict.fromkeys(unit_numbers):
        rows = [row for row, other in enumerate(unit_numbers) if other == number]
        part = rollout.rows(rows)
        ids = part.completion_ids if rollout.block_length is None else part.trace_ids()
        padding = prompt_width - part.prompt_mask.shape[1]
        draws = [
            views_of(estimator, part, stream(*key, number, draw)).check(ids).tensors() for draw in range(num_draws)
        ]
        stacked = {name: torch.stack([views[name] for views in draws], 1) for name in draws[0]}
        stacked["hidden"] = torch.nn.functional.pad(stacked["hidden"], (padding, 0))
        for index, row in enumerate(rows):
            row_views[row] = {name: value[index] for name, value in stacked.items()}
    order = range(len(unit_numbers))
    return MaskedViews(**{name: torch.stack([row_views[row][name] for row in order]) for name in row_views[0]})
