"""Results of the compiled kernels do not depend on the number of threads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import leaf_ext
from leaf_ext.schema import DTYPES


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(37, 5003), (3, 100_003)], ids=["many_rows", "few_rows"])
def test_losses_are_bitwise_the_same_for_any_number_of_threads(
    dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    """Many rows are divided among threads; the few left over are split along the vocabulary."""
    student, teacher = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    weight = torch.rand(shape[0])

    def run() -> Iterator[Tensor]:
        for inplace_grad, softcap in ((False, None), (False, 5.0), (True, 5.0)):
            leaf = student.clone().requires_grad_()
            loss, rows = leaf_ext.dual_kl(
                leaf.view_as(leaf),
                teacher,
                weight,
                logit_softcap=softcap,
                inplace_grad=inplace_grad,
                return_rows=True,
                backend="cpu",
            )
            loss.backward()
            assert leaf.grad is not None
            yield from (loss.detach(), leaf.grad, *rows)

    assert_the_same_for_any_number_of_threads(run)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_detection_is_bitwise_the_same_for_any_number_of_threads(dtype: torch.dtype) -> None:
    """There are enough rows and sequences to divide them among threads."""
    grad, domain = torch.randn(40, 600, 64).to(dtype), torch.rand(400, 50) > 0.1
    pair = torch.randn(400, 50, 32).to(dtype), torch.randn(400, 50, 16).to(dtype)

    def run() -> Iterator[Tensor]:
        yield leaf_ext.grad_norm(grad, backend="cpu")
        for gap in ({}, {"scale": "log", "student_weight": 0.8}):
            options: Any = {"threshold": 0.4, "backend": "cpu", **gap}
            spans = leaf_ext.detect_spans(*pair, domain, **options)
            # NaN outside the domain is not equal to itself.
            yield from (spans.span, spans.count, spans.confounder, spans.score.nan_to_num(-1.0))

    assert_the_same_for_any_number_of_threads(run)


def assert_the_same_for_any_number_of_threads(run: Callable[[], Iterator[Tensor]]) -> None:
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 1, 2, 8):
            torch.set_num_threads(threads)
            results.append(list(run()))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
