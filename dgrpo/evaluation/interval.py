"""Intervals of shares."""

import math

Z_95 = 1.959963984540054


def wilson_interval(accuracy: float, n: int) -> tuple[float, float]:
    """The 95 % interval of a share of n independent trials (Wilson 1927)."""
    if n == 0:
        return 0.0, 1.0
    center = accuracy + Z_95**2 / (2 * n)
    width = Z_95 * math.sqrt(accuracy * (1 - accuracy) / n + Z_95**2 / (4 * n**2))
    scale = 1 + Z_95**2 / n
    return max((center - width) / scale, 0.0), min((center + width) / scale, 1.0)
