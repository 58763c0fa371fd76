"""Drawing tokens: counter-based noise, inverse-CDF draws, and how sure the model was."""

from typing import NamedTuple

import torch
from torch import Tensor

from dgrpo.sampling.config import SamplerConfig
from dgrpo.vocabulary import chunk_bytes, first_argmax, inverse_cdf, row_products

# Logits are drawn from in chunks of rows; a handful of temporaries of this size (on a GPU: more) lives at once.
MAX_DRAW_BYTES = 16 * 2**20
# A logit far below any other, yet finite: its product with a probability of 0 is 0.
NEVER = -1e30
# Beyond these a temperature changes nothing: logits are equal or infinitely far apart, and NEVER must stay far below.
TEMPERATURES = (1e-20, 1e20)


class Drawn(NamedTuple):
    """What was drawn at n positions, and how the model saw it, all [n]."""

    tokens: Tensor
    probs: Tensor  # of the drawn tokens, at temperature 1
    entropy: Tensor  # of the model's distribution, nats
    order: Tensor  # of commitment by the config's `remasking`, higher first; others are left to the caller
    # The same two among the words that `top_k` and `top_p` leave.
    kept_probs: Tensor
    kept_entropy: Tensor


def draw(logits: Tensor, noise: Tensor | None, config: SamplerConfig, mask_token_id: int, num_words: int) -> Drawn:
    """One token from each row of `logits` [n, V] float32 (overwritten), by `noise` [n]; None: the most likely ones.

    Never [MASK], nor an embedding row beyond the `num_words` of the vocabulary. [MASK] keeps its share of the
    distribution by which confidences and entropies are measured, as in the published code.
    """
    rows = max(1, chunk_bytes(logits.device, MAX_DRAW_BYTES) // (4 * logits.shape[1]))
    noises = [None] * len(logits) if noise is None else noise.split(rows)
    parts = [
        _draw(part, noises[index], config, mask_token_id, num_words) for index, part in enumerate(logits.split(rows))
    ]
    return parts[0] if len(parts) == 1 else Drawn(*(torch.cat(column) for column in zip(*parts, strict=True)))


def _draw(logits: Tensor, noise: Tensor | None, config: SamplerConfig, mask_token_id: int, num_words: int) -> Drawn:
    logits[:, num_words:] = NEVER
    mask_logit = logits[:, mask_token_id, None].clamp(min=NEVER)
    logits[:, mask_token_id] = NEVER
    best = logits.amax(-1, keepdim=True)
    logits -= best
    mask_logit -= best
    mass, kept = logits.exp(), None
    if noise is None:
        tokens = first_argmax(logits)[:, None]
        scaled = mass
    else:
        temperature = min(max(config.temperature, TEMPERATURES[0]), TEMPERATURES[1])
        scaled = mass if temperature == 1 else (logits / temperature).exp_()
    if config.top_k or config.top_p < 1:
        kept = _kept(scaled, config)
        scaled = scaled.where(kept, 0)
    if noise is not None:
        tokens = inverse_cdf(scaled, noise)[:, None]
    log_odds, entropy = _sureness(logits, mask_logit, mass, tokens)
    kept_odds, kept_entropy = log_odds, entropy
    if kept is not None:
        logits.masked_fill_(~kept, NEVER)
        mask_logit.fill_(NEVER)
        kept_odds, kept_entropy = _sureness(logits, mask_logit, logits.exp(), tokens)
    # log p / (1 - p) orders as p does; p would round to 1 in float32 (the published code takes float64).
    order = kept_odds
    if config.remasking == "entropy":
        order = -kept_entropy
    elif config.remasking == "topk_margin":
        # -log(1 - margin), for the same reason: what all but the likeliest have, and the second once more.
        logits[:, mask_token_id] = mask_logit[:, 0]
        top, likeliest = logits.topk(2)
        rest = logits.sub_(top[:, :1]).exp_().scatter_(-1, likeliest[:, :1], 0).sum(-1, keepdim=True)
        order = rest.log1p() - (rest + top.diff().exp()).log()
    columns = (log_odds.sigmoid(), entropy, order, kept_odds.sigmoid(), kept_entropy)
    return Drawn(tokens[:, 0], *(each[:, 0] for each in columns))


def _kept(mass: Tensor, config: SamplerConfig) -> Tensor:
    """The words that `top_k` and then `top_p` leave, [n, V] bool, by their unnormalized probabilities."""
    ranked, words = mass.topk(min(config.top_k or mass.shape[1], mass.shape[1]))
    # A word stays where those before it have less than the share: the first one always does.
    fine = ranked.cumsum(-1) - ranked < config.top_p * ranked.sum(-1, keepdim=True)
    return torch.zeros_like(mass, dtype=torch.bool).scatter_(-1, words, fine)


def _sureness(logits: Tensor, mask_logit: Tensor, mass: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """log p / (1 - p) of `tokens` and the entropy, [n, 1] each; mass [n, V] is exp(logits), and is overwritten."""
    token_logit = logits.gather(-1, tokens)
    # Sum the other tokens' mass directly: 1 - p cancels in float32 when p is near 1.
    mass.scatter_(-1, tokens, 0)
    log_others = torch.logaddexp(mass.sum(-1, keepdim=True).log(), mask_logit)
    log_total = torch.logaddexp(token_logit, log_others)
    mean_logit = row_products(mass, logits)[:, None] / log_total.exp()
    for each in (token_logit, mask_logit):
        mean_logit += (each - log_total).exp() * each
    return token_logit - log_others, log_total - mean_logit
