"""Masked views: which positions of a rollout are hidden in each picture, and how much each scored token counts.

Shapes: B rollouts, N views of each, P prompt tokens (padded on the left), C completion tokens, L = P + C.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dgrpo.noise import stream


@dataclass(frozen=True)
class MaskedViews:
    """N masked pictures of B rollouts; log p_k = sum over n of weights[n, k] * log p(completion_k | picture n).

    hidden [B, N, L] bool: positions shown as [MASK]. weights [B, N, C] float32: zero where a token is not scored in
    that picture, nonzero only where it is hidden.
    """

    hidden: Tensor
    weights: Tensor

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

    def check(self) -> "MaskedViews":
        """Self, or ValueError where a token that the picture shows would be scored (it would predict itself)."""
        shown = (self.weights != 0) & ~self.hidden[..., -self.weights.shape[-1] :]
        if shown.any():
            raise ValueError(
                "MaskedViews: weights are nonzero at positions that are not hidden; score hidden tokens only."
            )
        return self

    def canvases(self, input_ids: Tensor, mask_token_id: int) -> Tensor:
        """The pictures [B, N, L] of prompt + completion `input_ids` [B, L]."""
        return torch.where(self.hidden, mask_token_id, input_ids[:, None])


def views_of(estimator: Callable[..., MaskedViews], rollout: Any, generator: torch.Generator) -> MaskedViews:
    """The estimator's views of a rollout; of a block model, one view shows a picture of each block.

    A block of the canvas is a canvas of its own, without what is given of the prompt in it: the estimator draws on
    each and need not know of the others. In view n every block shows its n-th picture behind the clean past, so
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
            history=None,
        )
        parts.append((rows, given, estimator(part, generator=generator)))
    num_views = max(views.weights.shape[1] for _, _, views in parts)
    hidden = torch.zeros(len(num_given), num_views, size, dtype=torch.bool, device=rollout.group.device)
    weights = torch.zeros(hidden.shape, device=hidden.device)
    for rows, given, views in parts:
        for whole, own in ((hidden, views.hidden), (weights, views.weights)):
            whole[rows, : own.shape[1], given:] = own[: len(rows)].to(whole.device)
    hidden, weights = (
        each.unflatten(0, (num_rows, num_blocks)).transpose(1, 2).flatten(2) for each in (hidden, weights)
    )
    return MaskedViews(torch.nn.functional.pad(hidden, (rollout.prompt_ids.shape[1], 0)), weights)


def draw_views(
    estimator: Callable[..., MaskedViews], rollout: Any, unit: Tensor, key: tuple[int | str, ...], num_draws: int = 1
) -> tuple[Tensor, Tensor]:
    """`num_draws` (D) independent draws of every rollout's views: hidden [B, D, N, L], weights [B, D, N, C].

    Rows with the same number in `unit` [B] (a group, or a row of its own) are drawn together from a stream keyed by
    (key, unit number, draw), on their prompt without its padding, so a row's views depend on nothing else: not on the
    rest of the batch, its width, or the process that holds it.
    """
    prompt_width = rollout.prompt_mask.shape[1]
    hidden: dict[int, Tensor] = {}
    weights: dict[int, Tensor] = {}
    unit_numbers = unit.tolist()
    for number in dict.fromkeys(unit_numbers):
        rows = [row for row, other in enumerate(unit_numbers) if other == number]
        part = rollout.rows(rows)
        padding = prompt_width - part.prompt_mask.shape[1]
        draws = [views_of(estimator, part, stream(*key, number, draw)).check() for draw in range(num_draws)]
        stacked = torch.stack([views.hidden for views in draws], 1)
        stacked = torch.nn.functional.pad(stacked, (padding, 0))
        stacked_weights = torch.stack([views.weights for views in draws], 1)
        for index, row in enumerate(rows):
            hidden[row], weights[row] = stacked[index], stacked_weights[index]
    order = range(len(unit_numbers))
    return torch.stack([hidden[row] for row in order]), torch.stack([weights[row] for row in order])
