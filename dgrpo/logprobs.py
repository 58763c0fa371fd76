"""Log-probabilities of completions under masked views: scored positions only, equal pictures once, float32.

Shapes: B rollouts, N views of each, P prompt tokens, C completion tokens, L = P + C.
"""

import torch
from torch import Tensor, nn

from dgrpo.models.predictor import Scores, ScoringPass
from dgrpo.views import MaskedViews


def _scoring_pass(
    canvases: Tensor, attention_mask: Tensor | None, completion_ids: Tensor, scored: Tensor
) -> tuple[ScoringPass, Tensor]:
    """One pass over the distinct rows of `canvases` [R, L] that asks for the tokens where `scored` [R, C].

    Returns the pass and, for each of its targets, the flat index into [R, C] that it answers.
    """
    num_prompt = canvases.shape[1] - completion_ids.shape[1]
    key = canvases if attention_mask is None else canvases.masked_fill(~attention_mask, -1)
    _, picture = key.unique(dim=0, return_inverse=True)
    # One row stands for each distinct picture: its first.
    order = torch.arange(len(canvases), device=canvases.device)
    first = torch.full_like(order, len(order)).scatter_reduce_(0, picture, order, "amin")
    first = first[: int(picture.max()) + 1]
    row, column = scored.nonzero(as_tuple=True)
    asked = picture[row] * canvases.shape[1] + num_prompt + column
    positions, target_index = asked.unique(return_inverse=True)
    by_position = target_index.argsort(stable=True)
    row, column = row[by_position], column[by_position]
    attention_mask = None if attention_mask is None else attention_mask[first]
    one_pass = ScoringPass(
        canvases[first], attention_mask, positions, target_index[by_position], completion_ids[row, column]
    )
    return one_pass, row * scored.shape[1] + column


def score_views(
    model: nn.Module,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    completion_ids: Tensor,
    views: MaskedViews,
    *,
    mask_token_id: int | None = None,
    temperature: float = 1.0,
    views_per_pass: int | None = None,
    entropy_grad: bool = False,
) -> tuple[Tensor, Tensor]:
    """log p(completion_k | picture n) and the entropy there, two [B, N, C] float32; 0 where the weight is 0.

    The pictures go through the network `views_per_pass` views of every rollout at a time (None: all at once), each
    such pass checkpointed, so memory does not grow with N and the number of passes depends on N alone. Within a pass
    equal pictures are computed once, forward and backward: they answer for all the rollouts that they stand for.
    """
    num_rows, num_views, num_completion = views.weights.shape
    input_ids = torch.cat([prompt_ids, completion_ids], 1)
    canvases = views.canvases(input_ids, model.config.mask_token_id if mask_token_id is None else mask_token_id)
    attention_mask = None
    if not prompt_mask.all():
        attention_mask = torch.cat([prompt_mask.bool(), prompt_mask.new_ones(completion_ids.shape).bool()], 1)
    chunks = torch.arange(num_views, device=input_ids.device).split(views_per_pass or num_views)
    passes, answers = [], []
    for chunk in chunks:
        one_pass, answer = _scoring_pass(
            canvases[:, chunk].flatten(0, 1),
            None if attention_mask is None else attention_mask.repeat_interleave(len(chunk), 0),
            completion_ids.repeat_interleave(len(chunk), 0),
            views.weights[:, chunk].flatten(0, 1) != 0,
        )
        passes.append(one_pass)
        answers.append(answer)
    scores: list[Scores] = model(passes=passes, temperature=temperature, entropy_grad=entropy_grad)
    logps, entropies = [], []
    for chunk, one_pass, answer, (logp, entropy) in zip(chunks, passes, answers, scores, strict=True):
        blank = logp.new_zeros(num_rows * len(chunk) * num_completion)
        shape = (num_rows, len(chunk), num_completion)
        logps.append(blank.index_put((answer,), logp).view(shape))
        entropies.append(blank.index_put((answer,), entropy[one_pass.target_index]).view(shape))
    return torch.cat(logps, 1), torch.cat(entropies, 1)


def per_token_logps(
    model: nn.Module,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    completion_ids: Tensor,
    views: MaskedViews,
    *,
    reduce: str | None = "sum",
    **settings,
) -> Tensor:
    """The estimate of log p(completion_k | prompt), [B, C] float32: the views' weighted sum (see MaskedViews).

    `reduce=None` gives the unweighted log-probabilities of every view, [B, N, C]. `settings` are those of score_views.
    """
    if reduce not in ("sum", None):
        raise ValueError(f"reduce={reduce!r}: choose 'sum' (weighted sum over views) or None (all views).")
    logps, _ = score_views(model, prompt_ids, prompt_mask, completion_ids, views, **settings)
    return logps if reduce is None else (views.weights * logps).sum(1)


def mean_entropy(entropies: Tensor, views: MaskedViews) -> Tensor:
    """Entropy of each completion token, averaged over the views that score it, [B, C]."""
    scored = (views.weights != 0).to(entropies.dtype)
    return (entropies * scored).sum(1) / scored.sum(1).clamp(min=1)
