"""The scores that are made of both models' norms, or of nothing at all."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import get_args

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from aligned_rows import aligned, config_of
from detect_run import run

import leaf_ext
from leaf_distill.detection.config import Score
from leaf_distill.detection.judge import Judge
from leaf_distill.detection.suspicion import (
    FLOOR,
    OF_NORMS,
    STUDENT_WEIGHT,
    logs,
    ranks,
    set_suspicion,
)

STUDENT = np.array([1.0, 4.0, 2.0, 0.0, 2.0], dtype=np.float32)
TEACHER = np.array([2.0, 1.0, 8.0, 4.0, 0.5], dtype=np.float32)


def test_scores_of_norms() -> None:
    low = np.log(4e-4)
    student = np.array([0.0, np.log(4), np.log(2), low, np.log(2)])
    teacher = np.log([2.0, 1.0, 8.0, 4.0, 0.5])
    assert FLOOR == 1e-4
    expected = {
        "log_gap": 0.5 * student - teacher,
        "log_ratio": student - teacher,
        "rank": [1 - 2, 4 - 1, 2.5 - 4, 0 - 3, 2.5 - 0],
        "student": STUDENT,
        "teacher": -TEACHER,
    }
    assert expected.keys() == OF_NORMS.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(OF_NORMS[name](STUDENT, TEACHER), values, rtol=1e-6)


@pytest.mark.parametrize(("name", "weight"), [("log_gap", STUDENT_WEIGHT), ("log_ratio", 1.0)])
def test_the_op_has_the_scores_of_logarithms(name: str, weight: float) -> None:
    suspicion = OF_NORMS[name](STUDENT, TEACHER)
    domain = torch.ones(1, len(STUDENT), dtype=torch.bool)
    teacher, student = (torch.from_numpy(one)[None] for one in (TEACHER, STUDENT))
    found = leaf_ext.detect_spans(teacher, student, domain, scale="log", student_weight=weight)
    expected = (suspicion.max() - suspicion) / (suspicion.max() - suspicion.min())
    np.testing.assert_allclose(found.score[0].numpy(), expected, atol=1e-6)


def test_a_constant_factor_of_a_models_norms_changes_no_order() -> None:
    for name in ("log_gap", "log_ratio", "rank"):
        values = OF_NORMS[name](STUDENT, TEACHER)
        for factor in (1e-20, 1e20):
            scaled = OF_NORMS[name](STUDENT * np.float32(factor), TEACHER)
            np.testing.assert_array_equal(np.argsort(scaled), np.argsort(values))


def test_norms_of_zero_and_ties() -> None:
    np.testing.assert_array_equal(logs(np.zeros(3, np.float32)), np.zeros(3))
    np.testing.assert_array_equal(ranks(np.array([5, 1, 5, 5, 9], np.float32)), [2, 0, 2, 2, 4])
    assert logs(np.array([], np.float32)).shape == (0,)


def test_random_scores_are_drawn_for_each_row(pair: dict[str, str], tmp_path: Path) -> None:
    with aligned(pair, tmp_path) as (models, examples, cache):

        def draw(seed: int) -> list[list[float]]:
            config = config_of(score="random", seed=seed)
            judge = Judge(models, config, cache, lambda stage: nullcontext())
            set_suspicion(judge, examples, config)
            return [one.suspicion.tolist() for one in examples if one.suspicion is not None]

        first = draw(0)
        assert draw(0) == first != draw(1)
        assert len({tuple(row[:3]) for row in first}) == len(examples)


@pytest.mark.parametrize("score", get_args(Score))
def test_every_score_makes_an_arm(score: str, pair: dict[str, str], tmp_path: Path) -> None:
    found = run(pair, tmp_path, score=score, strategy="cumulative", max_rows=12)
    samples = pq.read_table(found.samples).to_pylist()
    assert samples
    for sample in samples:
        values = np.array(sample["score"])
        assert values.min() == 0 and values.max() == 1
        assert 1 <= len(sample["candidates"]) <= 3
