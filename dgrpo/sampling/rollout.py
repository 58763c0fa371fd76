"""What one round of sampling produced, and how."""

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rollout:
    """B sampled completions on full canvases, with the trace of their denoising.

    Shapes: B rollouts, P prompt tokens (padded on the left), C completion tokens.
    """

    prompt_ids: Tensor  # [B, P]
    prompt_mask: Tensor  # [B, P] bool, False on padding
    completion_ids: Tensor  # [B, C], no [MASK] left; EOS after the first end-of-text token
    completion_mask: Tensor  # [B, C] bool, True up to and including the first end-of-text token
    revealed_at: Tensor  # [B, C] denoising step that committed the token; -1 given in advance, `num_steps` never
    confidence: Tensor  # [B, C] float32, probability of the token when it was committed (0 if never, 1 if given)
    entropy: Tensor  # [B, C] float32, entropy of the model's distribution at that moment (0 if never or given)
    group: Tensor  # [B] rows of one prompt share a number
    num_forwards: int  # passes through the network
    num_steps: int  # denoising steps of a full-length completion

    def rows(self, index: list[int]) -> "Rollout":
        """The chosen rows, without padding that all of them share."""
        picked: dict[str, Any] = {
            field.name: value[index]
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        width = int(picked["prompt_mask"].sum(1).max())
        for name in ("prompt_ids", "prompt_mask"):
            picked[name] = picked[name][:, picked[name].shape[1] - width :]
        return replace(self, **picked)


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


def ended(completion_ids: Tensor, end_ids: Tensor) -> Tensor:
    """True up to and including the first end-of-text token, [B, C] bool."""
    is_end = torch.isin(completion_ids, end_ids)
    return is_end.int().cumsum(1) - is_end.int() == 0
