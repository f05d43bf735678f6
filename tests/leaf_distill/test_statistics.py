"""pass@k against enumeration, and the bootstrap against exact distributions."""

from __future__ import annotations

from itertools import combinations, product

import numpy as np
import pytest

from leaf_distill.statistics import bootstrap, paired_bootstrap, pass_at_k


@pytest.mark.parametrize("samples", range(1, 8))
def test_pass_at_k_is_the_share_of_choices_with_a_right_answer(samples: int) -> None:
    for right in range(samples + 1):
        answers = [at < right for at in range(samples)]
        for k in range(1, samples + 1):
            choices = [any(chosen) for chosen in combinations(answers, k)]
            assert pass_at_k(samples, right, k) == pytest.approx(np.mean(choices), abs=1e-12)


def test_pass_at_k_is_exact_for_many_samples() -> None:
    assert pass_at_k(10, 3, 10) == 1.0 and pass_at_k(10, 0, 10) == 0.0
    assert pass_at_k(1000, 1, 500) == pytest.approx(0.5, abs=1e-12)
    for wrong in ((3, 4, 1), (3, -1, 1), (3, 1, 0), (3, 1, 4)):
        with pytest.raises(ValueError, match="k: must be from 1 to samples"):
            pass_at_k(*wrong)


def test_the_bootstrap_draws_within_each_benchmark() -> None:
    parts = [np.array([0.0, 1.0]), np.array([0.0, 0.25, 1.0])]
    every = [
        (np.mean(one) + np.mean(two)) / 2
        for one in product(parts[0], repeat=2)
        for two in product(parts[1], repeat=3)
    ]
    value, low, high = bootstrap(parts, draws=200_000)
    assert value == pytest.approx((0.5 + 1.25 / 3) / 2)
    assert (low, high) == pytest.approx(tuple(np.quantile(every, (0.025, 0.975))), abs=1e-12)


def test_a_paired_bootstrap_takes_scores_between_right_and_wrong() -> None:
    reference, other = np.array([0.5, 0.2, 1.0]), np.array([0.7, 0.2, 0.4])
    every = [np.mean(one) for one in product(other - reference, repeat=3)]
    ends = np.quantile(every, (0.025, 0.975), method="inverted_cdf")
    difference, low, high = paired_bootstrap(reference, other, draws=200_000)
    assert difference == pytest.approx(-0.4 / 3)
    assert (low, high) == pytest.approx(tuple(ends))
