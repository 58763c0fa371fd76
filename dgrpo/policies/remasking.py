"""Sampler policies that hide committed tokens again, and those that they are to be compared with.

    --sampler_policy dgrpo.policies.remasking:remdm_cap --sampler_policy_kwargs '{"eta": 0.1}'

Each takes one pass a step, as many as `diffusion_steps` says, and none touches given tokens, the prompt or finished
blocks. What they gain over even steps is mostly a matter of schedule: compare with `back_loaded` and `ancestral` at
equal passes.

ReMDM (arXiv:2503.00307) tosses a coin for each token. With alpha = step / steps the share that is shown, a step from
alpha to beta hides a shown token with probability sigma <= min(1, (1 - beta) / alpha), and writes an open one with
(beta - (1 - sigma) alpha) / (1 - alpha): each token is then shown with probability beta. All but `remdm_conf` toss
coins that do not depend on the weights, so the estimator `every_write` is exact for them at `temperature` 1.
"""

import torch
from torch import Tensor

from dgrpo.sampling.config import SamplerConfig
from dgrpo.sampling.policy import Sight, commit


def _toss(sight: Sight, alpha: float, beta: float, write_sigma: float, sigma: Tensor | float) -> Tensor:
    """ReMDM's step from share `alpha` to `beta`: hides with `sigma`, writes by the formula for `write_sigma`."""
    assert sight.noise is not None
    assert sight.given is not None
    write = (beta - (1 - write_sigma) * alpha) / (1 - alpha)
    ids = torch.where(sight.is_open & (sight.noise < write), sight.tokens, sight.ids)
    return ids.masked_fill(~sight.is_open & ~sight.given & (sight.noise < sigma), sight.mask_token_id)


def _even(sight: Sight) -> tuple[float, float, float]:
    """Shares shown before and after an even step, and the largest sigma there."""
    alpha, beta = sight.step / sight.num_steps, (sight.step + 1) / sight.num_steps
    return alpha, beta, min(1.0, (1 - beta) / max(alpha, 1e-9))


def remdm_cap(sight: Sight, budget: Tensor | None, config: SamplerConfig, *, eta: float = 0.008) -> Tensor:
    """ReMDM-cap: sigma = min(eta, largest). Published: eta 0.008 at 1024 steps; fewer steps want more."""
    alpha, beta, most = _even(sight)
    return _toss(sight, alpha, beta, min(eta, most), min(eta, most))


def remdm_rescale(sight: Sight, budget: Tensor | None, config: SamplerConfig, *, eta: float = 0.015) -> Tensor:
    """ReMDM-rescale: sigma = eta times the largest. Published: eta 0.015 at 1024 steps."""
    alpha, beta, most = _even(sight)
    return _toss(sight, alpha, beta, eta * most, eta * most)


def remdm_conf(sight: Sight, budget: Tensor | None, config: SamplerConfig) -> Tensor:
    """ReMDM-conf: sigma = the largest times the softmax, over shown tokens, of minus their recorded probability."""
    assert sight.confidence is not None
    assert sight.given is not None
    alpha, beta, most = _even(sight)
    share = (-sight.confidence).masked_fill(sight.is_open | sight.given, -torch.inf).softmax(1)
    return _toss(sight, alpha, beta, 0.0, most * share)


def remdm_loop(
    sight: Sight,
    budget: Tensor | None,
    config: SamplerConfig,
    *,
    eta: float = 0.02,
    on: float = 0.55,
    off: float = 0.05,
    shown: float = 0.9,
) -> Tensor:
    """ReMDM-loop: up to the share `shown` at time `on`, there until `off` with sigma = min(eta, largest), then to 1.

    Time runs from 1 to 0. Published at 1024 steps.
    """

    def share(time: float) -> float:
        return shown * min(1.0, (1 - time) / (1 - on)) if time >= off else 1 - (1 - shown) * time / off

    now, then = 1 - sight.step / sight.num_steps, 1 - (sight.step + 1) / sight.num_steps
    alpha, beta = share(now), share(then)
    sigma = min(eta, (1 - beta) / max(alpha, 1e-9)) if now <= on and then >= off else 0.0
    return _toss(sight, alpha, beta, sigma, sigma)


def _hide(ids: Tensor, sureness: Tensor, count: Tensor, mask_token_id: int) -> Tensor:
    """`ids` [b, n] with the `count` [b] tokens of least `sureness` hidden."""
    least = sureness.argsort(dim=1, stable=True).argsort(1) < count[:, None]
    return ids.masked_fill(least, mask_token_id)


def _recorded(sight: Sight) -> Tensor:
    """Probability of each token when it was written, in this step or before; 2 for given ones."""
    assert sight.confidence is not None
    assert sight.given is not None
    return sight.probs.where(sight.is_open, sight.confidence).masked_fill(sight.given, 2)


def rcr(sight: Sight, budget: Tensor | None, config: SamplerConfig) -> Tensor:
    """Writes every open token, then hides the least sure ones until as many are shown as scheduled.

    Running confidence remasking (MDPO, arXiv:2508.13148): a token's sureness is its probability when it was written.
    """
    assert budget is not None
    filled = sight.tokens.where(sight.is_open, sight.ids)
    return _hide(filled, _recorded(sight), sight.is_open.sum(1) - budget, sight.mask_token_id)


def redraw(
    sight: Sight,
    budget: Tensor | None,
    config: SamplerConfig,
    *,
    num_tokens: int = 4,
    num_rounds: int = 1,
    one_by_one: bool = True,
    by: str = "confidence",
) -> Tensor:
    """Fills the block in even steps, then hides `num_tokens` and draws them again, `num_rounds` times.

    By "confidence" the least sure are hidden, by "random" any. One by one a round takes `num_tokens` steps; with
    "random" this leaves the law of a consistent model as it is (Gibbs sampling). In one pass together, as ReMDM does
    on LLaDA, a round takes one step and bends that law. The steps before are what is left of `diffusion_steps`.
    """
    if by not in ("confidence", "random"):
        raise ValueError(f"by={by!r}: choose 'confidence' or 'random'.")
    num_filling = sight.num_steps - num_rounds * (num_tokens if one_by_one else 1)
    if num_filling < 1 or num_tokens < 1 or num_rounds < 1:
        raise ValueError(
            f"num_tokens={num_tokens}, num_rounds={num_rounds}: must be at least 1, and leave one of the "
            f"{sight.num_steps} steps of a block for filling it; raise diffusion_steps."
        )
    num_open, left = sight.is_open.sum(1), num_filling - sight.step
    share = -(-num_open // left) if left > 0 else num_open.clamp(max=1) if one_by_one else num_open
    after = commit(sight, share, config)
    later = sight.num_steps - 1 - sight.step
    if left > 1 or later == 0:
        return after
    assert sight.noise is not None
    assert sight.given is not None
    sureness = _recorded(sight) if by == "confidence" else sight.noise.masked_fill(sight.given, 2)
    is_full = (after != sight.mask_token_id).all(1)
    return _hide(after, sureness, is_full * min(num_tokens, later if one_by_one else num_tokens), sight.mask_token_id)


for _policy in (remdm_cap, remdm_rescale, remdm_conf, remdm_loop, redraw):
    vars(_policy)["persists"] = True


def back_loaded(sight: Sight, budget: Tensor | None, config: SamplerConfig, *, num_single: int = 4) -> Tensor:
    """Hides nothing: the last `num_single` steps commit one token each, those before share the rest evenly.

    The control of `redraw` and its kin: as many passes, as many of them on a nearly complete text.
    """
    num_open, left = sight.is_open.sum(1), sight.num_steps - num_single - sight.step
    share = -(-(num_open - num_single) // left) if left > 0 else torch.ones_like(num_open)
    return commit(sight, share.clamp(min=1).minimum(num_open), config)


def ancestral(sight: Sight, budget: Tensor | None, config: SamplerConfig) -> Tensor:
    """MDLM's ancestral sampler (arXiv:2406.07524): each open token is written with probability 1 / (steps left).

    `remdm_cap` with eta 0. In one step it draws all tokens at once, as `one_step` scores them; with ever more steps it
    draws them in random order, as the ELBO does.
    """
    assert sight.noise is not None
    return sight.tokens.where(sight.is_open & (sight.noise * (sight.num_steps - sight.step) < 1), sight.ids)


for _policy in (back_loaded, ancestral):
    vars(_policy)["revises"] = False
for _policy in (remdm_cap, remdm_rescale, remdm_conf, remdm_loop, rcr, redraw, back_loaded, ancestral):
    vars(_policy)["needs_budget"] = True
