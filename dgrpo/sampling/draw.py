"""Drawing tokens: counter-based noise, inverse-CDF draws, confidences, and which positions to commit."""

import torch
from torch import Tensor

from dgrpo.sampling.config import SamplerConfig
from dgrpo.views import stream


def _mix(x: Tensor) -> Tensor:
    """splitmix64's finalizer on int64 (multiplications wrap; the masks make its right shifts logical)."""
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


def uniform(keys: Tensor, step: int, positions: Tensor) -> Tensor:
    """Uniform noise in [0, 1), float64, a function of (row key, step, position) alone.

    keys [B] int64, positions [B, n]. A row draws the same numbers in any batch, in any order and on any process, which
    no sequential generator can promise. 53 bits: coarser noise cuts the tail off (bf16 has 256 levels).
    """
    step_key = (step + 1) * 0x1E3779B97F4A7C15 & (2**63 - 1)
    mixed = _mix(_mix(keys[:, None] + step_key) + positions * 0x3C6EF372FE94F82B)
    return ((mixed >> 11) & 0x1FFFFFFFFFFFFF).double() * 2.0**-53


def row_keys(rows: Tensor, *key: int | str) -> Tensor:
    """Noise keys [B] int64 of the rows with these global numbers [B], under a key such as (seed, round)."""
    base = int(torch.randint(2**62, (1,), generator=stream(*key)))
    return _mix(_mix(rows * 0x1E3779B97F4A7C15) + base)


def draw_tokens(logits: Tensor, temperature: float, noise: Tensor | None) -> Tensor:
    """Tokens [...] from softmax(logits / temperature) [..., V] by inverse CDF; the most likely ones at temperature 0.

    One uniform number per draw instead of one per vocabulary entry; float32 throughout.
    """
    if temperature == 0:
        return logits.argmax(-1)
    assert noise is not None
    cdf = logits - logits.amax(-1, keepdim=True)
    if temperature != 1:
        cdf /= temperature
    cdf = cdf.exp_().cumsum(-1)
    total = cdf[..., -1:]
    # Rounding must not carry the threshold up to the total: the entry found there could have probability zero.
    threshold = torch.minimum((noise[..., None] * total).float(), torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cdf, threshold, right=True).squeeze(-1)


def confidence_of(logits: Tensor, tokens: Tensor, config: SamplerConfig, noise: Tensor | None) -> Tensor:
    """What decides the order of commitment, higher first: [...] float32 for logits [..., V] and drawn tokens [...]."""
    if config.remasking == "random":
        assert noise is not None
        return noise.float()
    if config.remasking == "low_confidence":
        # log p / (1 - p), which orders as p does; p would round to 1 in float32 (the published code takes float64).
        token = tokens[..., None]
        others = logits.scatter(-1, token, -torch.inf).logsumexp(-1)
        return logits.gather(-1, token).squeeze(-1) - others
    probs = logits.softmax(-1)
    if config.remasking == "entropy":
        return torch.special.entr(probs).sum(-1).neg()
    first, second = probs.topk(2, dim=-1).values.unbind(-1)
    return first - second


def ranks(confidence: Tensor) -> Tensor:
    """Place of each entry in its row when sorted by falling confidence (ties: earlier position first), [B, n]."""
    order = confidence.argsort(dim=1, descending=True, stable=True)
    places = torch.arange(confidence.shape[1], device=confidence.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, places)


def commit_budget(confidence: Tensor, budget: Tensor, is_open: Tensor) -> Tensor:
    """The `budget` [B] open positions of highest confidence in each row, [B, n] bool."""
    return (ranks(confidence.masked_fill(~is_open, -torch.inf)) < budget[:, None]) & is_open


def commit_parallel(
    confidence: Tensor, probs: Tensor, entropy: Tensor, config: SamplerConfig, is_open: Tensor
) -> Tensor:
    """Open positions that one step may commit together under the config's rule, at least one a row, [B, n] bool.

    confidence orders the positions; probs and entropy [B, n] are those of the drawn tokens.
    """
    rank = ranks(confidence.masked_fill(~is_open, -torch.inf))
    if config.threshold is not None:
        safe = probs >= config.threshold
        return ((rank == 0) | safe) & is_open
    order = rank.argsort(1)
    if config.factor is not None:
        sorted_probs = probs.gather(1, order)
        count = torch.arange(1, probs.shape[1] + 1, device=probs.device)
        fine = (count + 1) * (1 - sorted_probs) < config.factor
    else:
        assert config.entropy_bound is not None
        sorted_entropy = entropy.gather(1, order)
        fine = sorted_entropy.cumsum(1) - sorted_entropy.cummax(1).values <= config.entropy_bound
    prefix = fine.int().cumprod(1).sum(1).clamp(min=1)
    return (rank < prefix[:, None]) & is_open
