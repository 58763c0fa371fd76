"""What an objective reads, and forms of the KL.

Shapes: B rollouts, N views of each, C completion tokens, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

Metrics = dict[str, Tensor]


@dataclass(frozen=True)
class ObjectiveInputs:
    """What an objective may read. A token's score is the sum over views of weight * log-probability."""

    logps_per_view: Tensor  # [B, N, C] log p(token | view) of the current policy, with gradient; 0 where not scored
    weights: Tensor  # [B, N, C]
    # [B, C] the weighted sum over views under the rollout's policy; None: it is the current one, or not asked for.
    old_logps: Tensor | None
    ref_logps: Tensor | None  # [B, C] the same under the reference policy
    advantages: Tensor  # [B]
    completion_mask: Tensor  # [B, C] bool
    group: Tensor  # [B] rows of one prompt share a number
    old_logps_per_view: Tensor | None = None  # [B, N, C] the same in each view; given where facts ask for it
    entropies: Tensor | None = None  # [B, C] nats, averaged over the views that score a token; 0 where none does
    divergences: Tensor | None = None  # [B, C] exact KL from the reference there, with gradient; given for kl="exact"
    # Kept tokens of a micro-batch, in the mean over the generation batch and all processes; None: this one's.
    tokens_per_batch: Tensor | None = None
    gather: Callable[[Tensor], Tensor] = lambda values: values  # values [n] of this process -> those of all processes

    @property
    def logps(self) -> Tensor:
        """The score of each token, [B, C]."""
        return (self.weights * self.logps_per_view).sum(1)

    @property
    def lengths(self) -> Tensor:
        """Scored tokens of each rollout, [B], at least 1."""
        return self.completion_mask.sum(1).clamp(min=1)


def kl_k1(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """log p - log q: unbiased for KL(p || q) under samples of p, but its gradient is zero in the mean."""
    return logps - ref_logps


def kl_k2(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """(log p - log q)^2 / 2: biased, but its gradient is that of KL(p || q) in the mean (used by ESPO)."""
    return (logps - ref_logps).square() / 2


def kl_k3(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """q/p - 1 - log(q/p): unbiased for KL(p || q) and never negative; its gradient is that of KL(q || p) in the mean.

    The three are Schulman's (http://joschu.net/blog/kl-approx.html); TRL's `beta` uses this one per token.
    """
    log_ratio = ref_logps - logps
    return log_ratio.exp() - 1 - log_ratio


def kl_exact(log_probs: Tensor, ref_log_probs: Tensor) -> Tensor:
    """KL(p || q) [...] in nats of two distributions given by their log-softmax [..., V]."""
    return (log_probs.exp() * (log_probs - ref_log_probs)).sum(-1)


# Kinds of KL from sampled tokens; "exact", over the whole vocabulary, is measured while scoring.
KL_FORMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"k1": kl_k1, "k2": kl_k2, "k3": kl_k3}
