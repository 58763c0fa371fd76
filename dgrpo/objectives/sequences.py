"""Objectives on whole sequences: bounds of the likelihood, weighted likelihoods, ratios of sequences.

Shapes: B rollouts, N views of each, C completion tokens.
"""

import math

import torch
from torch import Tensor

from dgrpo.objectives.inputs import KL_FORMS, Metrics, ObjectiveInputs


def evidence_bounds(batch: ObjectiveInputs, eubo_beta: float = 1.5) -> tuple[Tensor, Tensor]:
    """Lower and upper bound of log p(completion) per token, two [B] in nats.

    SPG (arXiv:2510.09541, section 3): ELBO = 1/L sum_k sum_n w_nk log p_nk; EUBO = mean over tokens k of
    1/b log sum_n w_nk p_nk^b, b = `eubo_beta` >= 1, up to the paper's constant. With few views log-mean-exp is
    biased low (Jensen), and tokens that no view hides are skipped: take several views.
    """
    scored = batch.weights > 0
    covered = scored.any(1)
    # Tokens that no view scores would be log 0: they take part as log 1 and are masked out again.
    terms = torch.where(scored, batch.weights, 1.0).log() + eubo_beta * batch.logps_per_view
    terms = terms.masked_fill(~scored & covered[:, None], -torch.inf)
    upper = torch.where(covered, terms.logsumexp(1), 0.0).sum(1) / (eubo_beta * covered.sum(1).clamp(min=1))
    return batch.logps.sum(1) / batch.lengths, upper


def _sandwich(batch: ObjectiveInputs, eubo_beta: float, eubo_weight: float) -> tuple[Tensor, Metrics]:
    """ELBO for positive advantages, eubo_weight * EUBO + (1 - eubo_weight) * ELBO for the others, per token, [B]."""
    if eubo_beta < 1 or not 0 <= eubo_weight <= 1:
        raise ValueError(f"eubo_beta={eubo_beta} must be at least 1 and eubo_weight={eubo_weight} within [0, 1].")
    lower, upper = evidence_bounds(batch, eubo_beta)
    bound = torch.where(batch.advantages > 0, lower, eubo_weight * upper + (1 - eubo_weight) * lower)
    return bound, {"elbo": lower.detach().mean(), "eubo": upper.detach().mean()}


def spg(batch: ObjectiveInputs, *, eubo_beta: float = 1.5, eubo_weight: float = 0.5) -> tuple[Tensor, Metrics]:
    """Sandwiched policy gradient: -sum_i L_i A_i bound_i / sum_i L_i, without ratio and without KL.

    SPG (arXiv:2510.09541, section 3): bound_i is the ELBO per token where A_i > 0, else the mixture of EUBO and
    ELBO with `eubo_weight` (published: 0.5), so that what is pushed down is bounded from above. `eubo_beta`:
    published 1.5, for Sudoku 1.
    """
    bound, metrics = _sandwich(batch, eubo_beta, eubo_weight)
    loss = -(batch.lengths * batch.advantages * bound).sum() / batch.lengths.sum()
    return loss, metrics


def bgpo(batch: ObjectiveInputs) -> tuple[Tensor, Metrics]:
    """A lower bound of A exp(d) that is a sum over views, so each view's gradient stands alone: -mean_i A_i g_i.

    BGPO (arXiv:2510.11683): with d_n = N sum_k w_nk (log p_nk - log p_nk^old) / L the log-ratio per token seen by view
    n and d its mean over views: g = 1 + d <= exp(d) where A >= 0; g = mean_n exp(d_n) >= exp(d) where A < 0. Value and
    gradient are those of A exp(d) where the policy has not moved. Not clipped.
    """
    old = batch.old_logps_per_view
    if old is None:
        if batch.old_logps is not None:
            raise ValueError("bgpo: give the old policy's log-probabilities of every view (old_logps_per_view).")
        old = batch.logps_per_view.detach()
    per_view = (batch.weights * (batch.logps_per_view - old)).sum(2) * batch.weights.shape[1]
    log_ratio = per_view / batch.lengths[:, None]
    bound = torch.where(batch.advantages >= 0, 1 + log_ratio.mean(1), log_ratio.exp().mean(1))
    metrics = {"ratio_bound": bound.detach().mean(), "max_abs_log_ratio": log_ratio.detach().abs().max()}
    return -(batch.advantages * bound).mean(), metrics


def _group_softmax(scores: Tensor, group: Tensor) -> tuple[Tensor, int]:
    """Softmax of `scores` [B] within each group, and the number of groups."""
    numbers, index = group.unique(return_inverse=True)
    peak = scores.new_full((len(numbers),), -torch.inf).scatter_reduce_(0, index, scores, "amax")
    raised = (scores - peak[index]).exp()
    return raised / raised.new_zeros(len(numbers)).index_add_(0, index, raised)[index], len(numbers)


def wd1(batch: ObjectiveInputs, *, temperature: float = 1.0) -> tuple[Tensor, Metrics]:
    """Weighted log-likelihood, no ratio and no KL: mean over groups of sum_i (w-_i - w+_i) log p(o_i).

    wd1 (arXiv:2507.08838): w+ = softmax(A / `temperature`), w- = softmax(-A / `temperature`), each within the
    group of one prompt (the published code takes them over the micro-batch). log p(o_i) is summed over tokens.
    """
    if temperature <= 0:
        raise ValueError(f"temperature={temperature}: must be positive.")
    up, num_groups = _group_softmax(batch.advantages / temperature, batch.group)
    down, _ = _group_softmax(-batch.advantages / temperature, batch.group)
    loss = ((down - up) * batch.logps.sum(1)).sum() / num_groups
    return loss, {"max_weight": up.max(), "log_likelihood": batch.logps.detach().sum(1).mean()}


def stable_drl(
    batch: ObjectiveInputs, *, clip: float = 5.0, eubo_beta: float = 1.5, eubo_weight: float = 0.5
) -> tuple[Tensor, Metrics]:
    """Self-normalised, always clipped importance weights: mean over groups of -sum_i w_i A_i bound_i.

    StableDRL (arXiv:2603.06743): w = softmax within the group of min(log r_i, log `clip`), without gradient, r_i the
    ratio per token of new to old policy; clipped whatever the sign of A_i (the published code takes the softmax over
    the micro-batch). bound_i is SPG's.
    """
    if clip <= 0:
        raise ValueError(f"clip={clip}: the largest importance weight must be positive.")
    bound, metrics = _sandwich(batch, eubo_beta, eubo_weight)
    log_ratio = _log_ratio(batch).detach()
    weight, num_groups = _group_softmax(log_ratio.clamp(max=math.log(clip)), batch.group)
    loss = -(weight * batch.advantages * bound).sum() / num_groups
    clipped = (log_ratio > math.log(clip)).float().mean()
    return loss, metrics | {"max_ratio": log_ratio.max().exp(), "clip_ratio/region_mean": clipped}


def _log_ratio(batch: ObjectiveInputs) -> Tensor:
    """log of the sequence's ratio of new to old policy, per scored token, [B]."""
    logps = batch.logps
    old = logps.detach() if batch.old_logps is None else batch.old_logps
    return (logps - old).sum(1) / batch.lengths


def espo(
    batch: ObjectiveInputs,
    *,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    beta: float = 0.0,
    kl: str = "k2",
    per_token: bool = True,
) -> tuple[Tensor, Metrics]:
    """Clipped ratio of sequences and a KL of whole sequences: mean_i of -min(r A, clip(r) A) + beta KL_i / L_i.

    ESPO (arXiv:2512.03759): r_i = exp((B_new - B_old) / L_i) with B the ELBO; `kl` is a form of KL_FORMS on B_new and
    B_ref before the division by L_i (published: k2). TRL's importance_sampling_level="sequence" has the same ratio but
    its KL is k3 per token. L_i counts the tokens up to the end of text, as B does; the published code sums and divides
    over the whole canvas, which there weakens the ratio of short answers. `per_token=False`: the undivided
    ratio exp(B_new - B_old), as EBPO's is (arXiv:2602.08676).
    """
    if kl not in KL_FORMS:
        raise ValueError(f"kl={kl!r}: choose one of {', '.join(KL_FORMS)}.")
    ratio = (_log_ratio(batch) * (1 if per_token else batch.lengths)).exp()
    clipped = ratio.clamp(1 - epsilon, 1 + (epsilon if epsilon_high is None else epsilon_high))
    loss = -torch.minimum(ratio * batch.advantages, clipped * batch.advantages)
    is_clipped = clipped.detach() * batch.advantages < ratio.detach() * batch.advantages
    metrics = {"ratio": ratio.detach().mean(), "clip_ratio/region_mean": is_clipped.float().mean()}
    if beta != 0:
        if batch.ref_logps is None:
            raise ValueError(f"beta={beta}: the KL needs the reference policy's log-probabilities (ref_logps).")
        divergence = KL_FORMS[kl](batch.logps.sum(1), batch.ref_logps.sum(1)) / batch.lengths
        loss = loss + beta * divergence
        metrics["kl"] = divergence.detach().mean()
    return loss.mean(), metrics
