"""Constants of the definitions that callers rely on, each tested from both sides."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch

import leaf_ext
from leaf_ext.dispatch import Backend
from leaf_ext.ops.linear_chunks import default_chunk_size


@pytest.mark.parametrize(("gap", "expected"), [(0.9e-6, []), (1.1e-6, [(1, 2)])])
def test_a_gap_is_evidence_from_a_range_of_1e_6(
    backend: str, gap: float, expected: list[tuple[int, int]]
) -> None:
    teacher, student = torch.tensor([[0.0, 0.25, 1.0]]), torch.tensor([[0.0, 0.25 + gap, 1.0]])
    domain = torch.ones(1, 3, dtype=torch.bool)
    found = leaf_ext.detect_spans(teacher, student, domain, backend=cast(Backend, backend))
    assert found.tolist() == [expected]


@pytest.mark.parametrize(("gap", "expected"), [(0.8e-6, []), (1.2e-6, [(1, 2)])])
def test_a_gap_of_logarithms_is_evidence_from_the_same_range(
    backend: str, gap: float, expected: list[tuple[int, int]]
) -> None:
    teacher, student = torch.tensor([[0.1, 0.5, 1.0]]), torch.tensor([[0.1, 0.5 * (1 + gap), 1.0]])
    domain = torch.ones(1, 3, dtype=torch.bool)
    found = leaf_ext.detect_spans(
        teacher, student, domain, scale="log", backend=cast(Backend, backend)
    )
    assert found.tolist() == [expected]


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_logarithms_that_cancel_are_no_evidence(backend: str, weight: float) -> None:
    """Their rounding alone would be: near the floor it is up to 5e-7 for each."""
    student, domain = 1e-4 + 2e-4 * torch.rand(1, 1000), torch.ones(1, 1000, dtype=torch.bool)
    student[0, 0] = 1.0
    teacher = torch.full_like(student, 0.3) if weight == 0 else 3 * student
    found = leaf_ext.detect_spans(
        teacher,
        student,
        domain,
        scale="log",
        student_weight=weight,
        backend=cast(Backend, backend),
    )
    assert found.tolist() == [[]]


def test_a_logarithm_has_a_floor_at_1e_4_of_the_largest_norm(backend: str) -> None:
    """The third token's score of log(floor) - log(s) is 0 at the floor, and 1 at the top."""
    student, domain = torch.tensor([[7.0, 7.0, 7.0]]), torch.ones(1, 3, dtype=torch.bool)
    for factor, share in ((-1.0, 0.0), (0.0, 0.0), (0.5, 0.0), (0.999, 0.0), (2.0, 0.0752575)):
        teacher = 3e-20 * torch.tensor([[1.0, 0.0, factor * 1e-4]])
        found = leaf_ext.detect_spans(
            teacher, student, domain, scale="log", backend=cast(Backend, backend)
        )
        expected = torch.tensor([[1.0, 0.0, share]])
        torch.testing.assert_close(found.score, expected, rtol=0, atol=1e-6)


def confounders(tokens: int, backend: str, **options: Any) -> int:
    """Return how many of n tokens with the scores 0, 1 / (n - 1), ..., 1 the options cut."""
    teacher, domain = torch.arange(tokens)[None].float(), torch.ones(1, tokens, dtype=torch.bool)
    spans = leaf_ext.detect_spans(
        teacher, torch.zeros_like(teacher), domain, backend=cast(Backend, backend), **options
    )
    return int(spans.confounder.sum())


def test_the_rank_of_a_quantile_is_a_float64_product(backend: str) -> None:
    """0.29 * 100 is 28.999999999999996, in float32 29."""
    assert confounders(100, backend, rule="quantile", threshold=0.29) == 28 + 1


def test_the_default_threshold_is_a_tenth(backend: str) -> None:
    assert confounders(1002, backend) == confounders(1002, backend, threshold=0.1) == 101
    assert confounders(1002, backend, threshold=0.099) == 100
    assert confounders(1002, backend, threshold=0.101) == 102


def test_the_default_cap_of_a_quantile_is_a_half(backend: str) -> None:
    options = {"rule": "quantile", "threshold": 0.9}
    assert confounders(1002, backend, **options) == 501
    assert confounders(1002, backend, cap=0.5, **options) == 501
    assert confounders(1002, backend, cap=0.499, **options) == 500
    assert confounders(1002, backend, cap=0.501, **options) == 502


@pytest.mark.parametrize(
    ("vocabulary", "on_cpu", "on_gpu"),
    [
        *((151936, 512, 3328), (128256, 512, 4096)),
        *((1, 4096, 4096), (2**12, 4096, 4096), (2**14, 1024, 4096), (20000, 832, 4096)),
        *((2**18, 512, 2048), (2**20, 128, 512), (2**30, 32, 32)),
    ],
)
def test_the_default_chunk_is_fast_and_bounded(vocabulary: int, on_cpu: int, on_gpu: int) -> None:
    cpu, cuda, dtype = torch.device("cpu"), torch.device("cuda"), torch.bfloat16
    assert default_chunk_size(vocabulary, cpu, dtype) == on_cpu
    assert default_chunk_size(vocabulary, cuda, dtype) == on_gpu
    # float16 has half as many logits, because the teacher's take as much memory.
    half = default_chunk_size(vocabulary // 2, cuda, torch.float16)
    assert default_chunk_size(vocabulary, cuda, dtype) == half
