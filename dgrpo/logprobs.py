"""Log-probabilities of completions under masked views: scored positions only, equal pictures once, float32.

Shapes: B rollouts, N views of each, P prompt tokens, C completion tokens, L = P + C.
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dgrpo.estimators import elbo
from dgrpo.models.predictor import EVERYWHERE, Scores, ScoringPass
from dgrpo.sampling.denoise import evaluating
from dgrpo.sampling.rollout import check_prompts, refuse_blocks
from dgrpo.views import MaskedViews


class ViewScores(NamedTuple):
    """What the model says of the scored tokens in every view, all [B, N, C] float32, 0 where the weight is 0."""

    logps: Tensor  # log p(completion_k | picture n)
    entropies: Tensor  # of the distribution there, nats
    divergences: Tensor | None = None  # KL from the reference's distribution there, over the whole vocabulary


def scoring_pass(
    canvases: Tensor,
    attention_mask: Tensor | None,
    input_ids: Tensor,
    scored: Tensor,
    columns: slice = EVERYWHERE,
) -> tuple[ScoringPass, Tensor]:
    """One pass over the distinct rows of `canvases` [R, L] that asks for the tokens `input_ids` where `scored` [R, L].

    Everything scored lies in `columns` of L. Returns the pass and, for each of its targets, the flat index into [R, L]
    that it answers.
    """
    key = canvases if attention_mask is None else canvases.masked_fill(~attention_mask, -1)
    # Pictures on which nothing is asked do not pass through the network; all of them count as equal to one of the
    # others, or to the first row when there is no other: a pass is made in any case.
    asked_rows = scored.any(1)
    row_of = torch.where(asked_rows, torch.arange(len(key), device=key.device), asked_rows.int().argmax())
    pictures, picture = key[row_of].unique(dim=0, return_inverse=True)
    # One row stands for each distinct picture: its first.
    first = row_of.new_full((len(pictures),), len(key)).scatter_reduce_(0, picture, row_of, "amin")
    row, column = scored.nonzero(as_tuple=True)
    positions, target_index = (picture[row] * canvases.shape[1] + column).unique(return_inverse=True)
    by_position = target_index.argsort(stable=True)
    row, column = row[by_position], column[by_position]
    attention_mask = None if attention_mask is None else attention_mask[first]
    asked = ScoringPass(
        canvases[first], attention_mask, positions, target_index[by_position], input_ids[row, column], columns
    )
    return asked, row * canvases.shape[1] + column


def score_views(
    model: Any,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    completion_ids: Tensor,
    views: MaskedViews,
    *,
    mask_token_id: int | None = None,
    temperature: float = 1.0,
    views_per_pass: int | None = None,
    entropy_grad: bool = False,
    as_reference: Callable[[], AbstractContextManager] | None = None,
) -> ViewScores:
    """log p(completion_k | picture n) and the entropy there, [B, N, C] float32; 0 where the weight is 0.

    `as_reference()` is a context within which `model` is the reference model: its hidden states, of one more pass
    without gradient, give the exact KL; the head must be the same and not be trained.
    The pictures go through the network `views_per_pass` views of every rollout at a time (None: all at once), each
    such pass checkpointed, so memory does not grow with N and the number of passes depends on N alone. Within a pass
    equal pictures are computed once, forward and backward: they answer for all the rollouts that they stand for.
    """
    refuse_blocks(model)
    num_rows, num_views, num_completion = views.weights.shape
    input_ids = torch.cat([prompt_ids, completion_ids], 1)
    canvases = views.canvases(input_ids, model.config.mask_token_id if mask_token_id is None else mask_token_id)
    attention_mask = None
    if not prompt_mask.all():
        attention_mask = torch.cat([prompt_mask.bool(), prompt_mask.new_ones(completion_ids.shape).bool()], 1)
    scored = F.pad(views.weights != 0, (prompt_ids.shape[1], 0))
    chunks = torch.arange(num_views, device=input_ids.device).split(views_per_pass or num_views)
    passes, answers = [], []
    for chunk in chunks:
        repeats = len(chunk)
        asked, answer = scoring_pass(
            canvases[:, chunk].flatten(0, 1),
            None if attention_mask is None else attention_mask.repeat_interleave(repeats, 0),
            input_ids.repeat_interleave(repeats, 0),
            scored[:, chunk].flatten(0, 1),
            slice(prompt_ids.shape[1], input_ids.shape[1]),
        )
        passes.append(asked)
        answers.append(answer)
    if as_reference is not None:
        with as_reference(), torch.no_grad():
            hidden = model(passes=passes, hidden_only=True)
        passes = [asked._replace(reference=rows) for asked, rows in zip(passes, hidden, strict=True)]
    scores: list[Scores] = model(passes=passes, temperature=temperature, entropy_grad=entropy_grad)
    found: list[list[Tensor]] = [[], [], []]
    for chunk, asked, answer, score in zip(chunks, passes, answers, scores, strict=True):
        shape = (num_rows, len(chunk), input_ids.shape[1])
        blank = score.logps.new_zeros(math.prod(shape))
        per_target = [score.logps, score.entropy[asked.target_index]]
        if score.divergence is not None:
            per_target.append(score.divergence[asked.target_index])
        for column, values in zip(found, per_target, strict=False):
            column.append(blank.index_put((answer,), values).view(shape)[..., -num_completion:])
    return ViewScores(*(torch.cat(column, 1) for column in found if column))


def per_token_logps(
    model: Any,
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
    Prompts are padded on the left, and none is empty where logits are shifted (Dream).
    """
    if reduce not in ("sum", None):
        raise ValueError(f"reduce={reduce!r}: choose 'sum' (weighted sum over views) or None (all views).")
    # A shifted model reads the first token from the prompt's last one. Here and not in score_views: this waits for
    # the device, as does views.check().
    check_prompts(prompt_ids, prompt_mask, may_be_empty=not getattr(model, "logit_shift", 0))
    logps = score_views(model, prompt_ids, prompt_mask, completion_ids, views.check(), **settings).logps
    return logps if reduce is None else (views.weights * logps).sum(1)


def mean_entropy(entropies: Tensor, views: MaskedViews) -> Tensor:
    """Entropy of each completion token, averaged over the views that score it, [B, C]."""
    scored = (views.weights != 0).to(entropies.dtype)
    return (entropies * scored).sum(1) / scored.sum(1).clamp(min=1)


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
