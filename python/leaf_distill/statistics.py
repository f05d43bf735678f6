"""Accuracies from counts, and how far they may be from the truth."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

DRAWS = 10_000

Scores = NDArray[np.float64]
"""The share of each problem that a model has: 0 or 1 with one answer, pass@k with several."""


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


def pass_at_k(samples: int, right: int, k: int) -> float:
    """Return the chance that at least one is right of k answers taken from some samples.

        1 - C(n - c, k) / C(n, k)

    It estimates without bias how often k answers of the model hold a right one.

    Args:
        samples: n, the answers to one problem.
        right: c, how many of them are right.
        k: how many are taken, without replacement.
    """
    if not (0 <= right <= samples and 1 <= k <= samples):
        raise ValueError(
            f"k: must be from 1 to samples, and right from 0 to samples, got {k}, {right} and "
            f"{samples}"
        )
    return 1.0 - math.comb(samples - right, k) / math.comb(samples, k)


def bootstrap(
    parts: Sequence[NDArray[Any]], *, draws: int = DRAWS, seed: int = 0
) -> tuple[float, float, float]:
    """Return the mean of the means of some parts, with its 95 % percentile interval.

    Args:
        parts: a value for each problem, or what it changed by; an array [n] for each benchmark.
        draws: resamples of the problems, with replacement, within each part.
        seed: of the draws.

    Returns:
        The mean, and the lower and upper end of its interval.
    """
    random = np.random.default_rng(seed)
    means = np.zeros(draws)
    for part in parts:
        # A resample depends only on how many problems have each value.
        values, counts = np.unique(np.asarray(part, dtype=np.float64), return_counts=True)
        drawn = random.multinomial(len(part), counts / len(part), size=draws)
        means += drawn @ values / len(part)
    low, high = np.quantile(means / len(parts), (0.025, 0.975))
    return float(np.mean([np.mean(part) for part in parts])), float(low), float(high)


def paired_bootstrap(
    reference: NDArray[Any], other: NDArray[Any], *, draws: int = DRAWS, seed: int = 0
) -> tuple[float, float, float]:
    """Return the difference of two accuracies with its 95 % percentile interval.

    Args:
        reference, other: [n], whether each problem was answered correctly, or its score, in one
            order. A resample keeps both values of a problem together.
        draws, seed: as for `bootstrap`.
    """
    change = np.asarray(other, dtype=np.float64) - np.asarray(reference, dtype=np.float64)
    return bootstrap([change], draws=draws, seed=seed)
