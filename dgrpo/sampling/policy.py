"""Sampler policies: what one denoising step writes, given what the model said.

`policy(sight, budget, config) -> ids` is a pure function. `sight` shows positions of the current block; `budget` [b]
is how many tokens the fixed schedule commits now, None under a parallel rule; `ids` [b, n] is `sight.ids` after the
step: a drawn token where it writes, [MASK] where it hides a token again, all else as it was. Given tokens, the prompt
and finished blocks are out of its reach; the last step of a block fills what is still open.

A policy with the attribute `revises = False` is shown open positions only and is done with a row once they are filled.
Any other is shown the whole block, and asked again until a step leaves a full block as it was, or with
`persists = True` in each of the block's steps. One with `needs_budget = True` is refused beside a parallel rule.
Further parameters are given by `sampler_policy_kwargs`.

Shapes: b rows at work, n positions of the current block.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from dgrpo.sampling.config import SamplerConfig
from dgrpo.sampling.draw import NEVER


class Sight(NamedTuple):
    """What a policy decides on, each [b, n] unless said otherwise.

    Where a policy only sees open positions, rows with fewer of them than others are filled up with shown ones.
    """

    ids: Tensor  # tokens on the canvas, `mask_token_id` where open
    is_open: Tensor  # bool
    tokens: Tensor  # drawn by the model for this position, also where one is shown
    probs: Tensor  # of the drawn tokens, at temperature 1 and among the words that `top_k` and `top_p` leave
    entropy: Tensor  # of the model's distribution over these words, nats
    order: Tensor  # of commitment by the config's `remasking`, higher first
    positions: Tensor  # in the completion
    step: int  # of this block, from 0
    num_steps: int  # that a block may take
    mask_token_id: int
    end_ids: Tensor  # [k] tokens that end a completion
    noise: Tensor | None = None  # uniform, a function of (row, step, position); None for `commit`
    # For policies that revise, else None: the probability of a shown token when it was written (1 given, 0 open), and
    # which tokens were given.
    confidence: Tensor | None = None
    given: Tensor | None = None


def commit(sight: Sight, budget: Tensor | None, config: SamplerConfig) -> Tensor:
    """Commits the first `budget` open positions in the order of `remasking`, or as many as a parallel rule allows.

    LLaDA's procedure (arXiv:2502.09992, section 2.4) and the parallel rules of `may_commit`.
    """
    order, candidates = sight.order, sight.is_open
    if config.confidence_eos_eot_inf:
        is_end = torch.isin(sight.tokens, sight.end_ids)
        if budget is None:
            # However sure, they are no candidates while an ordinary token is: a rule must not see them beside it.
            candidates = candidates & (~is_end | ~(candidates & ~is_end).any(1, keepdim=True))
        else:
            order = order.masked_fill(is_end, NEVER)
    ranked = order.masked_fill(~candidates, -torch.inf).argsort(dim=1, descending=True, stable=True)
    if budget is None:
        probs, entropy, fit = (each.gather(1, ranked) for each in (sight.probs, sight.entropy, candidates))
        chosen = may_commit(probs, entropy, fit, config)
    else:
        chosen = torch.arange(ranked.shape[1], device=ranked.device) < budget[:, None]
    return torch.where(torch.empty_like(chosen).scatter_(1, ranked, chosen), sight.tokens, sight.ids)


commit.revises = False  # type: ignore[attr-defined] # a function's own attribute


def may_commit(probs: Tensor, entropy: Tensor, is_open: Tensor, config: SamplerConfig) -> Tensor:
    """Positions that one step commits together under the config's rule, [b, n] bool; at least the first `min_commit`.

    probs, entropy and is_open [b, n] are in the order of commitment, open positions first. The entropy bound holds in
    any such order.
    """
    count = torch.arange(1, probs.shape[1] + 1, device=probs.device)
    if config.threshold is not None:
        fine = (probs >= config.threshold) & is_open
    elif config.factor is not None:
        fine = ((count + 1) * (1 - probs) < config.factor).cumprod(1).bool()
    elif config.entropy_sum is not None:
        fine = entropy.cumsum(1) < config.entropy_sum
    else:
        assert config.entropy_bound is not None
        fine = (entropy.cumsum(1) - entropy.cummax(1).values <= config.entropy_bound).cumprod(1).bool()
    too_few = (fine & is_open).sum(1, keepdim=True) < config.min_commit
    return (fine | (too_few & (count <= config.min_commit))) & is_open
