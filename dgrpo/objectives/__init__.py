"""Objectives: each maps the scores of a micro-batch to its loss and its metrics.

objective(batch: ObjectiveInputs, **settings) -> (loss, metrics). The loss is a scalar to minimise, a mean over the
micro-batch; the trainer divides it by the number of accumulated micro-batches. A metric is a detached scalar, which is
averaged over processes, or a pair [total, count], whose sums over processes are divided (nothing is logged where the
count is 0). A keyword that is one of SHARED gets that setting of the config, `objective_kwargs` sets the others.

What the trainer must know of a function are its attributes (`Facts`); a function of one's own sets them after its
definition, `my_loss.whole_groups = True`, or not at all where the defaults fit.

Shapes: B rollouts, N views of each, C completion tokens, V vocabulary.
"""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from dgrpo.objectives.inputs import KL_FORMS, Metrics, ObjectiveInputs, kl_exact, kl_k1, kl_k2, kl_k3
from dgrpo.objectives.loss_types import LOSS_TYPES, grpo
from dgrpo.objectives.sequences import bgpo, espo, evidence_bounds, spg, stable_drl, wd1

__all__ = [
    "KL_FORMS",
    "LOSS_TYPES",
    "OBJECTIVES",
    "SHARED",
    "Facts",
    "Metrics",
    "ObjectiveInputs",
    "bgpo",
    "check_combination",
    "espo",
    "evidence_bounds",
    "facts_of",
    "grpo",
    "kl_exact",
    "kl_k1",
    "kl_k2",
    "kl_k3",
    "name_of",
    "spg",
    "stable_drl",
    "wd1",
]

# Settings of the config, TRL's names but for `kl`, that reach an objective which takes a keyword of that name.
SHARED = (
    "loss_type",
    "importance_sampling_level",
    "epsilon",
    "epsilon_high",
    "delta",
    "beta",
    "kl",
    "use_bias_correction_kl",
    "top_entropy_quantile",
    "entropy_coef",
    "sapo_temperature_pos",
    "sapo_temperature_neg",
    "vespo_k_pos",
    "vespo_lambda_pos",
    "vespo_k_neg",
    "vespo_lambda_neg",
)


@dataclass(frozen=True)
class Facts:
    """What the trainer knows of an objective or an estimator beside its result: attributes of the function."""

    # Estimators: views are independent draws of one integral, so a token's weighted terms mean something once summed.
    draws: bool = False
    # Estimators: a view speaks of several blocks, so it cannot be drawn on each block of a block model.
    whole_canvas: bool = False
    # Objectives: the bound averages over such draws of the same tokens.
    needs_draws: bool = False
    # Objectives: a rollout is weighed against the others of its prompt, so a micro-batch must hold whole groups.
    whole_groups: bool = False
    # Objectives: which log-probabilities of the rollout's policy are read: "summed" over views, "per_view", or None.
    old_policy: str | None = "summed"
    # Objectives: the KL over the whole vocabulary is read (`divergences`), so kl="exact" has a meaning.
    exact_kl: bool = False
    # Objectives: the policy term is a multiple of each rollout's advantage; where it is 0 nothing need be scored.
    advantage_is_factor: bool = False


def facts_of(function: Callable) -> Facts:
    """The attributes of a function, or of the one inside a functools.partial, that are fields of `Facts`."""
    while isinstance(function, functools.partial):
        function = function.func
    given = {name: getattr(function, name) for name in Facts.__dataclass_fields__ if hasattr(function, name)}
    facts = Facts(**given)
    if facts.old_policy not in ("summed", "per_view", None):
        raise ValueError(f"old_policy={facts.old_policy!r} of {function}: say 'summed', 'per_view' or None.")
    return facts


OBJECTIVES: dict[str, Callable[..., tuple[Tensor, Metrics]]] = {
    "grpo": grpo,
    "spg": spg,
    "bgpo": bgpo,
    "wd1": wd1,
    "stable_drl": stable_drl,
    "espo": espo,
}
# As `wd1.old_policy = None` would, in a way that type checkers read.
vars(grpo).update(exact_kl=True, advantage_is_factor=True)
vars(spg).update(needs_draws=True, old_policy=None)
vars(bgpo).update(needs_draws=True, old_policy="per_view")
vars(wd1).update(whole_groups=True, old_policy=None)
vars(stable_drl).update(whole_groups=True)


def check_combination(estimator: Callable, objective: Callable, settings: dict[str, Any]) -> None:
    """ValueError where an estimator, an objective and its `settings` (by name) do not go together.

    Sums of importance-weighted draws have a ratio per sequence, none per token; and bounds that average over draws
    need an estimator that draws.
    """
    draws, needs = facts_of(estimator).draws, facts_of(objective).needs_draws
    accepted = inspect.signature(objective).parameters
    names = f"estimator={name_of(estimator)!r} with objective={name_of(objective)!r}"
    if (beta := settings.get("beta", 0.0)) != 0 and "beta" not in accepted:
        raise ValueError(f"beta={beta} with objective={name_of(objective)!r}: it has no KL term; set beta to 0.")
    if needs and not draws:
        raise ValueError(
            f"{names}: its bound averages over draws of the same tokens; choose elbo, quadrature or block_random, or "
            "say `draws = True` of an estimator of your own."
        )
    # What takes a level of the ratio works on single tokens unless it is told otherwise, its KL always.
    if not draws or "importance_sampling_level" not in accepted:
        return
    if (level := settings.get("importance_sampling_level")) != "sequence":
        raise ValueError(
            f"estimator={name_of(estimator)!r} with importance_sampling_level={level!r}: its terms are weighted "
            "draws, whose ratio makes sense per sequence only; set importance_sampling_level='sequence'."
        )
    if beta != 0:
        raise ValueError(
            f"estimator={name_of(estimator)!r} with beta={beta}: this KL is per token, these terms make sense per "
            "sequence only; set beta to 0, or objective to 'espo'."
        )


def name_of(function: Callable) -> str:
    """How a function is called in messages."""
    while isinstance(function, functools.partial):
        function = function.func
    return getattr(function, "__name__", type(function).__name__)
