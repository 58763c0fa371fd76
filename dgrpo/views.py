"""Masked views: which positions of a rollout are hidden in each picture, and how much each scored token counts.

Shapes: B rollouts, N views of each, P prompt tokens (padded on the left), C completion tokens, L = P + C.
"""

from collections.abc import Callable
from dataclasses import dataclass
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
        draws = [estimator(part, generator=stream(*key, number, draw)).check() for draw in range(num_draws)]
        stacked = torch.stack([views.hidden for views in draws], 1)
        stacked = torch.nn.functional.pad(stacked, (padding, 0))
        stacked_weights = torch.stack([views.weights for views in draws], 1)
        for index, row in enumerate(rows):
            hidden[row], weights[row] = stacked[index], stacked_weights[index]
    order = range(len(unit_numbers))
    return torch.stack([hidden[row] for row in order]), torch.stack([weights[row] for row in order])
