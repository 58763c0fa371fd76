"""How likely a mask predictor finds a given completion: what multiple-choice evaluation compares.

Shapes: B sequences, P prompt tokens (padded on the left), C completion tokens.
"""

from types import SimpleNamespace

import torch
from torch import Tensor, nn

from dgrpo.estimators import elbo
from dgrpo.logprobs import per_token_logps
from dgrpo.sampling.denoise import evaluating
from dgrpo.sampling.rollout import check_prompts
from dgrpo.views import MaskedViews


def log_likelihood(
    model: nn.Module,
    prompt_ids: Tensor,
    completion_ids: Tensor,
    num_samples: int = 128,
    *,
    generator: torch.Generator,
    prompt_mask: Tensor | None = None,
    batch_size: int = 32,
    complementary: bool = False,
) -> Tensor:
    """Monte-Carlo lower bound of log p(completion | prompt) in nats, [B] float32, without gradient.

    LLaDA's likelihood (arXiv:2502.09992, eq. 6 and appendix B.5): the mean over `num_samples` masked pictures of
    C/l * sum over the l hidden tokens of log p(token | picture), l uniform in {1..C}; `complementary` draws pairs of a
    picture and its complement instead, twice as many pictures. prompt_ids [B, P]; `prompt_mask` [B, P] is False on
    the padding, which comes first, and has a token in each row where logits are shifted (Dream); completion_ids
    [B, C], every token of which is scored. `batch_size` pictures go through the network at a time; it does not change
    the result. Published: 128 samples; 1 is exact for a single token.
    """
    if prompt_ids.dim() != 2 or completion_ids.dim() != 2 or len(prompt_ids) != len(completion_ids):
        raise ValueError(
            f"prompt_ids {list(prompt_ids.shape)} and completion_ids {list(completion_ids.shape)} must be [B, P] and "
            "[B, C]."
        )
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: must be at least 1.")
    if prompt_mask is None:
        prompt_mask = torch.ones_like(prompt_ids, dtype=torch.bool)
    # Before anything is cut off: what is left of a row padded on the right could pass for a whole one.
    prompt_mask = check_prompts(prompt_ids, prompt_mask, may_be_empty=not getattr(model, "logit_shift", 0))
    rows = SimpleNamespace(
        prompt_mask=prompt_mask,
        completion_ids=completion_ids,
        completion_mask=torch.ones_like(completion_ids, dtype=torch.bool),
    )
    views = elbo(rows, generator=generator, num_samples=num_samples, complementary=complementary)
    num_views = views.weights.shape[1]
    results = []
    with evaluating(model):
        for part in torch.arange(len(prompt_ids), device=prompt_ids.device).split(max(1, batch_size // num_views)):
            skip = prompt_ids.shape[1] - int(prompt_mask[part].sum(1).max())
            logps = per_token_logps(
                model,
                prompt_ids[part, skip:],
                prompt_mask[part, skip:],
                completion_ids[part],
                MaskedViews(views.hidden[part, :, skip:], views.weights[part]),
                views_per_pass=max(1, batch_size // len(part)),
            )
            results.append(logps.sum(1))
    return torch.cat(results)
