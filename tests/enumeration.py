"""Rollouts of a few positions, and the exact law of every estimator's draws on them."""

import itertools
import math

import numpy as np
import pytest
import torch

from dgrpo.sampling import Rollout

WORDS, MASK, EOS = 6, 5, 4


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rows_of(
    num_rows: int, num_completion: int, length: int | None = None, num_prompt: int = 2, seed: int = 0
) -> Rollout:
    """Equal rollouts, each a group of its own; tokens from `length` on lie behind the end of text."""
    tokens = torch.randint(0, EOS, (num_prompt + num_completion,), generator=seeded(seed)).expand(num_rows, -1)
    shape = (num_rows, num_completion)
    return Rollout(
        prompt_ids=tokens[:, :num_prompt],
        prompt_mask=torch.ones(num_rows, num_prompt, dtype=torch.bool),
        completion_ids=tokens[:, num_prompt:].clone(),
        completion_mask=(torch.arange(num_completion) < (length or num_completion)).expand(shape),
        revealed_at=torch.arange(num_completion).expand(shape),
        confidence=torch.ones(shape),
        entropy=torch.ones(shape),
        group=torch.arange(num_rows),
        num_forwards=num_completion,
        num_steps=num_completion,
    )


def subsets(positions) -> list[tuple[int, ...]]:
    positions = list(positions)
    return [s for size in range(len(positions) + 1) for s in itertools.combinations(positions, size)]


# The exact law of each estimator's draws, written from the papers' definitions: (probability, views), a view being
# (hidden positions, weight of a hidden token). Prompt positions are negative.


def uniform_counts(num_completion, counts_of_start, weight):
    """A uniform start fixes the counts; every subset of a count is equally likely; `weight(count)` in each view."""
    starts = range(len(counts_of_start))
    for start in starts:
        choices = [list(itertools.combinations(range(num_completion), count)) for count in counts_of_start[start]]
        for picked in itertools.product(*choices):
            yield (
                1 / len(starts) / math.prod(map(len, choices)),
                [(hidden, weight(len(hidden)) if hidden else 0.0) for hidden in picked],
            )


def elbo_law(num_completion, num_samples, lowest=1, highest=None):
    highest = highest or num_completion
    values = range(lowest, highest + 1)
    # n counts, evenly spread over the values: a start and whole steps from it.
    counts = [
        [values[(start + i * len(values) // num_samples) % len(values)] for i in range(num_samples)]
        for start in range(len(values))
    ]
    yield from uniform_counts(num_completion, counts, lambda count: num_completion / (num_samples * count))


def complementary_law(num_completion, num_samples=1):
    size = num_completion + 1
    counts = [[(start + i * size // num_samples) % size for i in range(num_samples)] for start in range(size)]
    for probability, drawn in uniform_counts(num_completion, counts, lambda _: 0):
        pictures = [hidden for hidden, _ in drawn]
        rests = [tuple(k for k in range(num_completion) if k not in hidden) for hidden in pictures]
        scale = size / (2 * num_samples)
        yield probability, [(part, scale / len(part) if part else 0.0) for part in pictures + rests]


GAUSS = {
    2: [((1 - 3**-0.5) / 2, 1 / 2), ((1 + 3**-0.5) / 2, 1 / 2)],
    3: [((1 - 0.6**0.5) / 2, 5 / 18), (1 / 2, 8 / 18), ((1 + 0.6**0.5) / 2, 5 / 18)],
}


def quadrature_law(num_completion, num_nodes):
    for picked in itertools.product(subsets(range(num_completion)), repeat=num_nodes):
        chances = [
            t ** len(s) * (1 - t) ** (num_completion - len(s))
            for s, (t, _) in zip(picked, GAUSS[num_nodes], strict=True)
        ]
        yield math.prod(chances), [(s, w / t) for s, (t, w) in zip(picked, GAUSS[num_nodes], strict=True)]


def one_step_law(num_completion, chance):
    for noise in subsets((-2, -1)):
        probability = chance ** len(noise) * (1 - chance) ** (2 - len(noise))
        yield probability, [(noise + tuple(range(num_completion)), 1.0)]


def block_pictures(num_completion, block, block_length, chance):
    """The pictures of one block: a uniform count of its positions, all that is later, some of what is earlier."""
    start = block * block_length
    later = tuple(range(start + block_length, num_completion))
    for count in range(1, block_length + 1):
        for part in itertools.combinations(range(start, start + block_length), count):
            for noise in subsets(range(-2, start)):
                probability = chance ** len(noise) * (1 - chance) ** (start + 2 - len(noise))
                yield probability / (block_length * math.comb(block_length, count)), noise + part + later


def block_random_law(num_completion, length, block_length, chance, num_samples=1):
    """Each view has a block of its own among those up to the end of text."""
    orders = list(itertools.permutations(range(-(-length // block_length)), num_samples))
    for blocks in orders:
        choices = [list(block_pictures(num_completion, block, block_length, chance)) for block in blocks]
        for picked in itertools.product(*choices):
            probability = math.prod(each for each, _ in picked) / len(orders)
            tokens = [sum(0 <= k < length for k in hidden) for _, hidden in picked]
            scale = length / max(1, sum(count > 0 for count in tokens))
            yield (
                probability,
                [(hidden, scale / count if count else 0.0) for (_, hidden), count in zip(picked, tokens, strict=True)],
            )


def coupled_law(num_completion):
    """The ratio integrated out (exactly: the integrand is a polynomial of it)."""
    nodes, weights = np.polynomial.legendre.leggauss(8)
    whole = tuple(range(num_completion))
    for x, w in zip(nodes, weights, strict=True):
        t = 0.5 + 0.3 * x
        for part in subsets(whole):
            rest = tuple(k for k in whole if k not in part)
            probability = w / 2 * t ** len(part) * (1 - t) ** len(rest)
            yield probability, [(whole, 1 / 2), (part, 1 / (2 * t)), (rest, 1 / (2 * (1 - t)))]


def code(hidden: torch.Tensor) -> torch.Tensor:
    """A number for each row's views [B, N, L]."""
    bits = hidden.flatten(1).long()
    return (bits << torch.arange(bits.shape[1])).sum(1)


def expected_views(views, num_completion: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    hidden = torch.zeros(len(views), 2 + num_completion, dtype=torch.bool)
    weights = torch.zeros(len(views), num_completion)
    for index, (positions, weight) in enumerate(views):
        hidden[index, [2 + k for k in positions]] = True
        weights[index, [k for k in positions if 0 <= k < length]] = weight
    return hidden, weights


def assert_frequencies(counts: torch.Tensor, probabilities: torch.Tensor) -> None:
    """Pearson's chi-square within four deviations (Wilson-Hilferty) of what `probabilities` predict."""
    total = counts.sum()
    assert probabilities.sum().item() == pytest.approx(1)
    assert (total * probabilities).min() > 5, "draw more rows"
    statistic = ((counts - total * probabilities) ** 2 / (total * probabilities)).sum().item()
    freedom = len(counts) - 1
    deviations = ((statistic / freedom) ** (1 / 3) - 1 + 2 / (9 * freedom)) / (2 / (9 * freedom)) ** 0.5
    assert deviations < 4, f"chi-square {statistic:.1f} on {freedom} degrees of freedom"
