"""GRPO and its kin: TRL's loss types on the scores of masked views.

Shapes: B rollouts, C completion tokens.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from dgrpo.objectives.inputs import KL_FORMS, Metrics, ObjectiveInputs


class _Policy(NamedTuple):
    """What the policy term of a loss type reads; the ratio is [B, C], or [B, 1] where it is the sequence's."""

    ratio: Tensor
    log_ratio: Tensor  # [B, C], of each token
    logps: Tensor  # [B, C]
    advantages: Tensor  # [B, 1]
    mask: Tensor  # [B, C] float


def _mean(values: Tensor, mask: Tensor) -> Tensor:
    """The metric [total, count] of `values` [B, C] over the mask, or of [B, 1] over rows."""
    mask = torch.ones_like(values) if values.shape[1] == 1 else mask
    return torch.stack([(values * mask).sum(), mask.sum()]).detach()


def _clipped(
    p: _Policy, *, epsilon: float, epsilon_high: float, delta: float | None, **unused
) -> tuple[Tensor, Metrics]:
    """-min(r A, clip(r) A) (PPO); `delta` also bounds the ratio where A < 0 (INTELLECT-2, arXiv:2505.07291)."""
    ratio = p.ratio if delta is None else p.ratio.clamp(max=delta)
    loss = -torch.min(ratio * p.advantages, p.ratio.clamp(1 - epsilon, 1 + epsilon_high) * p.advantages)
    low = ((ratio < 1 - epsilon) & (p.advantages < 0)).float()
    high = ((ratio > 1 + epsilon_high) & (p.advantages > 0)).float()
    shares = {
        "low_mean": _mean(low, p.mask),
        "high_mean": _mean(high, p.mask),
        "region_mean": _mean(low + high, p.mask),
    }
    return loss, {f"clip_ratio/{name}": value for name, value in shares.items()}


def _cispo(p: _Policy, *, epsilon_high: float, **unused) -> tuple[Tensor, Metrics]:
    """-min(r, epsilon_high) A log p, the ratio without gradient (MiniMax-M1, arXiv:2506.13585)."""
    clipped = ((p.ratio > epsilon_high) & (p.advantages > 0)).float()
    loss = -p.ratio.clamp(max=epsilon_high).detach() * p.advantages * p.logps
    return loss, {"cispo_clip_ratio": _mean(clipped, p.mask)}


def _sapo(p: _Policy, *, sapo_temperature_pos: float, sapo_temperature_neg: float, **unused) -> tuple[Tensor, Metrics]:
    """-4/t sigmoid(t (r - 1)) A, a soft clip (SAPO, arXiv:2511.20347)."""
    temperature = torch.where(p.advantages > 0, sapo_temperature_pos, sapo_temperature_neg)
    return -torch.sigmoid(temperature * (p.ratio - 1)) * 4 / temperature * p.advantages, {}


def _vespo(
    p: _Policy,
    *,
    vespo_k_pos: float,
    vespo_lambda_pos: float,
    vespo_k_neg: float,
    vespo_lambda_neg: float,
    **unused,
) -> tuple[Tensor, Metrics]:
    """-phi(w) A log p, phi = e^l w^k e^(-l w) of the sequence's ratio, without gradient (VESPO, arXiv:2602.10693)."""
    log_w = (p.log_ratio.detach().clamp(-20, 20) * p.mask).sum(1, keepdim=True).clamp(math.log(1e-8), 20)
    k = torch.where(p.advantages >= 0, vespo_k_pos, vespo_k_neg)
    scale = torch.where(p.advantages >= 0, vespo_lambda_pos, vespo_lambda_neg).clamp(min=1e-4)
    phi = (scale + k * log_w - scale * log_w.exp()).exp().nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
    return -phi * p.advantages * p.logps, {"vespo/phi_seq_mean": _mean(phi, p.mask)}


# How the loss of tokens [B, C], 0 where the mask is, becomes a scalar.
def _mean_of_rows(losses: Tensor, batch: ObjectiveInputs) -> Tensor:
    return (losses.sum(1) / batch.lengths).mean()


def _mean_of_tokens(losses: Tensor, batch: ObjectiveInputs) -> Tensor:
    return losses.sum() / batch.completion_mask.sum().clamp(min=1)


def _mean_of_canvas(losses: Tensor, batch: ObjectiveInputs) -> Tensor:
    return losses.sum() / losses.numel()


def _mean_of_all_tokens(losses: Tensor, batch: ObjectiveInputs) -> Tensor:
    return losses.sum() / (batch.completion_mask.sum() if batch.tokens_per_batch is None else batch.tokens_per_batch)


def _sum_of_rows(losses: Tensor, batch: ObjectiveInputs) -> Tensor:
    return losses.sum(1).mean()


# TRL's names for what a token's loss is and what it is divided by.
LOSS_TYPES: dict[str, tuple[Callable[..., tuple[Tensor, Metrics]], Callable[[Tensor, ObjectiveInputs], Tensor]]] = {
    "grpo": (_clipped, _mean_of_rows),
    "bnpo": (_clipped, _mean_of_tokens),
    "dr_grpo": (_clipped, _mean_of_canvas),
    "dapo": (_clipped, _mean_of_all_tokens),
    "luspo": (_clipped, _sum_of_rows),
    "cispo": (_cispo, _mean_of_all_tokens),
    "sapo": (_sapo, _mean_of_rows),
    "vespo": (_vespo, _mean_of_all_tokens),
}


def grpo(
    batch: ObjectiveInputs,
    *,
    loss_type: str = "bnpo",
    importance_sampling_level: str = "token",
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    delta: float | None = None,
    beta: float = 0.0,
    kl: str = "k3",
    use_bias_correction_kl: bool = True,
    top_entropy_quantile: float = 1.0,
    entropy_coef: float | None = None,
    sapo_temperature_pos: float = 1.0,
    sapo_temperature_neg: float = 1.05,
    vespo_k_pos: float = 2.0,
    vespo_lambda_pos: float = 3.0,
    vespo_k_neg: float = 3.0,
    vespo_lambda_neg: float = 2.0,
) -> tuple[Tensor, Metrics]:
    """GRPO (arXiv:2402.03300) and its kin, with TRL's settings: policy term + beta KL - entropy_coef entropy.

    The ratio r of new to old policy is each token's or, at level "sequence", exp of its mean log over the sequence
    (GSPO, arXiv:2507.18071). `loss_type` is a row of LOSS_TYPES. `kl`: a form of KL_FORMS on each token, or "exact";
    `use_bias_correction_kl` multiplies the former by r. `top_entropy_quantile` keeps the policy term of that share of
    tokens with the highest entropy (arXiv:2506.01939); the entropy of the bonus is a mean over the same tokens,
    measured only where `entropy_coef` is 0.
    """
    mask, logps, advantages = batch.completion_mask.float(), batch.logps, batch.advantages[:, None]
    log_ratio = logps - (logps.detach() if batch.old_logps is None else batch.old_logps)
    ratio = log_ratio.exp()
    if importance_sampling_level == "sequence":
        ratio = ((log_ratio * mask).sum(1) / batch.lengths).exp()[:, None]
    policy_term, reduce = LOSS_TYPES[loss_type]
    losses, metrics = policy_term(
        _Policy(ratio, log_ratio, logps, advantages, mask),
        epsilon=epsilon,
        epsilon_high=epsilon if epsilon_high is None else epsilon_high,
        delta=delta,
        sapo_temperature_pos=sapo_temperature_pos,
        sapo_temperature_neg=sapo_temperature_neg,
        vespo_k_pos=vespo_k_pos,
        vespo_lambda_pos=vespo_lambda_pos,
        vespo_k_neg=vespo_k_neg,
        vespo_lambda_neg=vespo_lambda_neg,
    )
    chosen = mask
    if top_entropy_quantile < 1:
        chosen = mask * _highest(batch, 1 - top_entropy_quantile)
        losses = losses * chosen
    if beta != 0:
        divergence = _divergence(batch, kl)
        if use_bias_correction_kl and kl != "exact":
            divergence = divergence * ratio
        metrics["kl"] = _mean(divergence, mask)
        losses = losses + beta * divergence
    loss = reduce(losses * mask, batch)
    if entropy_coef is not None and batch.entropies is not None:
        bonus = torch.stack([(batch.entropies * chosen).sum(), chosen.sum()])
        metrics |= {"policy_loss": loss.detach(), "bonus_entropy": bonus.detach()}
        loss = loss - entropy_coef * bonus[0] / bonus[1].clamp(min=1)
    return loss, metrics


def _divergence(batch: ObjectiveInputs, kl: str) -> Tensor:
    """The KL from the reference policy of each token, [B, C]."""
    divergence = batch.divergences if kl == "exact" else batch.ref_logps
    if divergence is None:
        raise ValueError(f"kl={kl!r}: the reference policy was not scored (ref_logps, or divergences for 'exact').")
    return divergence if kl == "exact" else KL_FORMS[kl](batch.logps, divergence)


def _highest(batch: ObjectiveInputs, share: float) -> Tensor:
    """1 where a token's entropy is at least the `share` quantile of that of all processes' tokens, [B, C]."""
    assert batch.entropies is not None
    found = batch.gather(batch.entropies[batch.completion_mask].detach())
    if len(found) == 0:
        return torch.zeros_like(batch.entropies)
    return (batch.entropies >= torch.quantile(found, share)).float()
