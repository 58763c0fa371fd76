"""Estimators of a completion's log-probability: each is a distribution over masked views.

estimator(rollout, *, generator, **settings) -> MaskedViews. Of the rollout an estimator may read `prompt_mask` [B, P],
`completion_ids`, `completion_mask`, `revealed_at`, `entropy` [B, C] and `group` [B]. Tokens after the first
end-of-text token get weight 0; hidden positions are drawn over the whole canvas, or its open part would tell the
answer's length.

Shapes: B rollouts, N views of each, P prompt tokens (padded on the left), C completion tokens, L = P + C.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from dgrpo.views import MaskedViews


def _prompt_noise(rollout, generator: torch.Generator, scope: str) -> Tensor:
    """Uniform noise [B, P] for the prompt, one draw per group or per row; position counted from the prompt's end."""
    num_rows, width = rollout.prompt_mask.shape
    if scope not in ("group", "row"):
        raise ValueError(
            f"prompt_mask_scope={scope!r}: choose 'group' (one prompt mask for all rollouts of a prompt) or 'row'."
        )
    unit = torch.arange(num_rows) if scope == "row" else rollout.group.cpu().unique(return_inverse=True)[1]
    # The last prompt token is drawn first: padding on the left then only lengthens the stream.
    noise = torch.rand(width, int(unit.max()) + 1, generator=generator)
    return noise.flip(0).t()[unit].to(rollout.prompt_mask.device)


def one_step(
    rollout, *, generator: torch.Generator, p_mask_prompt: float = 0.15, prompt_mask_scope: str = "group"
) -> MaskedViews:
    """One view: the whole completion hidden, each prompt token hidden with probability `p_mask_prompt`, weight 1.

    d1 (arXiv:2504.12216, section 3.1): log p_k = log softmax f(q', [MASK]...[MASK])_k at o_k. The picture does not
    contain the completion, so with `prompt_mask_scope="group"` all rollouts of a prompt share one.
    """
    if not 0 <= p_mask_prompt <= 1:
        raise ValueError(f"p_mask_prompt={p_mask_prompt}: must be a probability.")
    prompt_hidden = (_prompt_noise(rollout, generator, prompt_mask_scope) < p_mask_prompt) & rollout.prompt_mask.bool()
    hidden = torch.cat([prompt_hidden, torch.ones_like(rollout.completion_mask, dtype=torch.bool)], 1)
    return MaskedViews(hidden[:, None], rollout.completion_mask.float()[:, None])


ESTIMATORS: dict[str, Callable[..., MaskedViews]] = {"one_step": one_step}
