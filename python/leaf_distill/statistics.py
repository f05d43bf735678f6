"""Confidence intervals."""

from __future__ import annotations

import math


def wilson_interval(right: int, total: int, *, z: float = 1.959964) -> tuple[float, float]:
    """Return Wilson's score interval of a proportion.

        (p + z^2/2n +- z sqrt(p (1 - p) / n + z^2/4n^2)) / (1 + z^2/n)

    Unlike p +- z sqrt(p (1 - p) / n), it stays in [0, 1] and has a width at 0 and 1.

    Args:
        right, total: counts.
        z: quantile of the normal distribution; 1.96 gives 95 %.

    Returns:
        The lower and the upper end, as shares.
    """
    if not 0 <= right <= total or total < 1:
        raise ValueError(f"right: must be from 0 to total, and total >= 1, got {right}, {total}")
    share = right / total
    center = share + z * z / (2 * total)
    half = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    scale = 1 + z * z / total
    return max(0.0, (center - half) / scale), min(1.0, (center + half) / scale)
