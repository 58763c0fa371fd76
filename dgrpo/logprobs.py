"""Log-probabilities of completions under masked views: scored positions only, equal canvases once, float32.

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

from dgrpo.estimators import draw_masks, elbo
from dgrpo.models.predictor import EVERYWHERE, Scores, ScoringPass
from dgrpo.sampling.denoise import evaluating
from dgrpo.sampling.rollout import align, check_prompts
from dgrpo.views import MaskedViews

# Columns of a block model's views that go through the network together: attention computes all pairs of them with
# the keys before, so narrow chunks save pairs and cost calls. Measured on the 435 k-parameter shape (see RESULTS).
CHUNK = 32


class ViewScores(NamedTuple):
    """What the model says of the scored tokens in every view, all [B, N, C] float32, 0 where the weight is 0."""

    logps: Tensor  # log p(completion_k | view n)
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
    # Canvases without a scored token skip the network: they count as equal to one of the others, or to the first row
    # where there is no other, since a pass is made in any case.
    asked_rows = scored.any(1)
    row_of = torch.where(asked_rows, torch.arange(len(key), device=key.device), asked_rows.int().argmax())
    distinct, number = key[row_of].unique(dim=0, return_inverse=True)
    # The first row of each distinct canvas stands for all of them.
    first = row_of.new_full((len(distinct),), len(key)).scatter_reduce_(0, number, row_of, "amin")
    row, column = scored.nonzero(as_tuple=True)
    positions, target_index = (number[row] * canvases.shape[1] + column).unique(return_inverse=True)
    by_position = target_index.argsort(stable=True)
    row, column = row[by_position], column[by_position]
    attention_mask = None if attention_mask is None else attention_mask[first]
    asked = ScoringPass(
        canvases[first], attention_mask, positions, target_index[by_position], input_ids[row, column], columns
    )
    return asked, row * canvases.shape[1] + column


def copies_pass(
    input_ids: Tensor,
    attention_mask: Tensor | None,
    copies: Tensor,
    scored: Tensor,
    chunk: int | None = None,
    recompute: bool = False,
    targets: Tensor | None = None,
) -> tuple[ScoringPass, Tensor]:
    """One pass of a block model: clean texts [U, L] and noisy copies [U, N, C] of their last C columns.

    It asks for `targets` [U, N, C] (None: the clean tokens) where `scored` [U, N, C]; returned as by `scoring_pass`,
    with indices into [U, N, C]. `chunk` columns of the copies go through the network together (None: all), see
    models/blocks.py.
    """
    answer = scored.flatten().nonzero()[:, 0]
    if targets is None:
        targets = input_ids[:, None, -copies.shape[2] :].expand_as(copies)
    targets = targets.reshape(-1)[answer]
    index = torch.arange(len(answer), device=answer.device)
    asked = ScoringPass(input_ids, attention_mask, answer, index, targets, copies=copies)
    return asked._replace(chunk=chunk or copies.shape[2], recompute=recompute), answer


def block_length_of(model: Any) -> int | None:
    """`block_length` of a model that may be wrapped by DDP or DeepSpeed; None where attention is full."""
    return getattr(getattr(model, "module", model), "block_length", None)


def text_passes(
    model: Any, input_ids: Tensor, attention_mask: Tensor | None, hidden: Tensor, mask_token_id: int
) -> tuple[list[ScoringPass], list[Tensor]]:
    """A pass for each of N views of whole texts [R, L] that asks for all it hides [R, N, L], as `scoring_pass`.

    Texts of a block model begin in the first column and have whole blocks.
    """
    passes, answers = [], []
    for is_hidden in hidden.unbind(1):
        canvas = input_ids.masked_fill(is_hidden, mask_token_id)
        if block_length_of(model) is None:
            asked, answer = scoring_pass(canvas, attention_mask, input_ids, is_hidden)
        else:
            asked, answer = copies_pass(input_ids, attention_mask, canvas[:, None], is_hidden[:, None])
        passes.append(asked)
        answers.append(answer)
    return passes, answers


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
    """log p(completion_k | view n) and the entropy there, [B, N, C] float32; 0 where the weight is 0.

    `as_reference()` is a context within which `model` is the reference model: its hidden states, of one more pass
    without gradient, give the exact KL; the head must be the same and not be trained.
    The network gets `views_per_pass` views of every rollout at a time (None: all at once), each
    such pass checkpointed, so memory does not grow with N and the number of passes depends on N alone. Within a pass
    equal canvases are computed once, forward and backward: they answer for all the rollouts that they stand for.

    A model that attends block by block takes a rollout's aligned prompts and its `trace_ids()`. The clean texts go
    through once, the prompts' once for each distinct one; then the views in chunks of columns. Where there are more
    than `views_per_pass`, the activations of one chunk live at a time, for one more forward pass of each.
    """
    num_rows, num_views, num_completion = views.weights.shape
    size, is_scored, prompt_mask = block_length_of(model), views.weights != 0, prompt_mask.bool()
    if mask_token_id is None:
        mask_token_id = model.config.mask_token_id
    if size is not None and prompt_ids.shape[1] == 0:
        # A block of padding: all processes pass equally often, whether their prompts fill a block or not.
        prompt_ids, prompt_mask = F.pad(prompt_ids, (size, 0)), F.pad(prompt_mask, (size, 0))
    input_ids, attention_mask = torch.cat([prompt_ids, completion_ids], 1), None
    if not prompt_mask.all():
        attention_mask = torch.cat([prompt_mask, prompt_mask.new_ones(completion_ids.shape)], 1)
    targets = views.targets if views.targets is not None else completion_ids[:, None].expand_as(views.weights)
    views_per_pass = views_per_pass or num_views
    chunks, width, passes, answers = [num_views], num_completion, [], []
    if size is not None:
        copies = views.each(lambda value: value[..., -num_completion:]).canvases(completion_ids, mask_token_id)
        # No more tokens at a time than `views_per_pass` views have.
        columns = max(size, min(CHUNK, views_per_pass * num_completion // num_views))
        asked, answer = copies_pass(
            input_ids, attention_mask, copies, is_scored, columns, num_views > views_per_pass, targets
        )
        passes.append(asked)
        answers.append(answer)
    else:
        canvases, width = views.canvases(input_ids, mask_token_id), input_ids.shape[1]
        scored, targets = (F.pad(each, (prompt_ids.shape[1], 0)) for each in (is_scored, targets))
        chunks = [min(views_per_pass, num_views - first) for first in range(0, num_views, views_per_pass)]
        parts = (each.split(chunks, 1) for each in (canvases, targets, scored))
        for part, asked_for, mine, repeats in zip(*parts, chunks, strict=True):
            asked, answer = scoring_pass(
                part.flatten(0, 1),
                None if attention_mask is None else attention_mask.repeat_interleave(repeats, 0),
                asked_for.flatten(0, 1),
                mine.flatten(0, 1),
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
        shape = (num_rows, chunk, width)
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

    Args:
        model: A mask predictor of `dgrpo.models`.
        prompt_ids: Token ids [B, P], padded on the left; none is empty where logits are shifted (Dream). Of a block
            model whole blocks, as in a `Rollout`.
        prompt_mask: [B, P], False on padding.
        completion_ids: Token ids [B, C]; of a block model the rollout's `trace_ids()`.
        views: What is hidden, [B, N, P + C], and what each token weighs, [B, N, C].
        reduce: None gives the unweighted log-probabilities of every view, [B, N, C].
        **settings: Those of `score_views` (temperature, views_per_pass, ...).

    Raises:
        ValueError: Prompts that cannot be scored, or views that score a token which they show.
    """
    if reduce not in ("sum", None):
        raise ValueError(f"reduce={reduce!r}: choose 'sum' (weighted sum over views) or None (all views).")
    # A shifted model reads the first token from the prompt's last one. Here and not in score_views: this waits for
    # the device, as does views.check().
    size = block_length_of(model)
    lengths = check_prompts(prompt_ids, prompt_mask, size is not None or not getattr(model, "logit_shift", 0)).sum(1)
    if size is not None and (strange := lengths[lengths % size != 0].tolist()):
        raise ValueError(
            f"prompt_mask: a prompt has {strange[0]} tokens, but the blocks of block_length={size} count from "
            "the text's first token: give whole blocks and begin the completion with the rest, as a Rollout does."
        )
    logps = score_views(model, prompt_ids, prompt_mask, completion_ids, views.check(completion_ids), **settings).logps
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

    LLaDA's likelihood (arXiv:2502.09992, eq. 6 and appendix B.5): the mean over `num_samples` masked views of
    C/l * sum over the l hidden tokens of log p(token | view), l uniform in {1..C}; `complementary` draws pairs of a
    view and its complement instead, twice as many views. prompt_ids [B, P]; `prompt_mask` [B, P] is False on
    the padding, which comes first, and has a token in each row where logits are shifted (Dream); completion_ids
    [B, C], every token of which is scored. `batch_size` views go through the network at a time; it does not change
    the result. Published: 128 samples; 1 is exact for a single token.

    Of a model that attends block by block: the sum of its blocks' bounds, each behind the clean past. What may follow
    the completion in its last block stays hidden.
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
    if (size := block_length_of(model)) is None:
        rows = SimpleNamespace(
            prompt_mask=prompt_mask,
            completion_ids=completion_ids,
            completion_mask=torch.ones_like(completion_ids, dtype=torch.bool),
        )
        views = elbo(rows, generator=generator, num_samples=num_samples, complementary=complementary)
    else:
        config: Any = model.config
        length, mask_token_id = completion_ids.shape[1], config.mask_token_id
        width = -(-(length + int((prompt_mask.sum(1) % size).max())) // size) * size
        prompt_ids, prompt_mask, completion_ids, tail = align(
            prompt_ids, prompt_mask, completion_ids, size, width, mask_token_id
        )
        column = torch.arange(width, device=tail.device) - tail[:, None]
        hidden, weights = draw_masks(
            (column >= 0) & (column < length), num_samples, generator, block_length=size, complementary=complementary
        )
        # Nothing is known of what follows in the last block.
        hidden = hidden | (column >= length)[:, None]
        views = MaskedViews(F.pad(hidden, (prompt_ids.shape[1], 0)), weights.float())
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
