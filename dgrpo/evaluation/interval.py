"""Intervals of shares and of means."""

import math
from collections.abc import Sequence

import numpy as np

RESAMPLES = 2000  # of the bootstrap: its ends are then good to about a tenth of the interval
Z_95 = 1.959963984540054


def wilson_interval(accuracy: float, n: int) -> tuple[float, float]:
    """The 95 % interval of a share of n independent trials (Wilson 1927)."""
    if n == 0:
        return 0.0, 1.0
    center = accuracy + Z_95**2 / (2 * n)
    width = Z_95 * math.sqrt(accuracy * (1 - accuracy) / n + Z_95**2 / (4 * n**2))
    scale = 1 + Z_95**2 / n
    return max((center - width) / scale, 0.0), min((center + width) / scale, 1.0)


def bootstrap_interval(values: Sequence[float]) -> tuple[float, float]:
    """The 95 % percentile interval of the mean, over problems drawn with replacement; a function of the values."""
    drawn = np.random.default_rng(0).integers(len(values), size=(RESAMPLES, len(values)))
    low, high = np.quantile(np.asarray(values)[drawn].mean(1), [0.025, 0.975])
    return float(low), float(high)


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """The 95 % interval of a mean: Wilson's where all values are 0 or 1, else a bootstrap."""
    if set(values) <= {0.0, 1.0}:
        return wilson_interval(sum(values) / len(values), len(values))
    return bootstrap_interval(values)
