"""Inputs on which plausible kernels go wrong, for every backend."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import leaf_ext
from leaf_ext.testing.budget import assert_within_budget, error
from leaf_ext.testing.eager import eager_dual_kl


@pytest.mark.parametrize("shape", [(1, 2, 3, 5), (1, 4, 8, 16), (2, 1, 3, 4)])
def test_norms_do_not_trust_the_strides_of_single_elements(
    shape: tuple[int, ...], backend: str
) -> None:
    """A contiguous tensor may have any stride along a dimension of size 1."""
    grad = torch.randn(shape).transpose(0, 1)
    expected = leaf_ext.grad_norm(grad.double(), backend="reference").float()
    torch.testing.assert_close(leaf_ext.grad_norm(grad, backend=backend), expected)


@pytest.mark.parametrize("offset", [0.0, 50.0, -1000.0])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_an_offset_between_nearly_equal_models_costs_no_digits(
    offset: float, temperature: float, backend: str
) -> None:
    """Logits are defined up to a constant, which must not cost the loss accuracy."""
    torch.manual_seed(0)
    teacher = torch.randn(8, 3001)
    student = teacher + 1.4e-3 * torch.randn(8, 3001) + offset
    options = {"temperature": temperature, "return_rows": True}
    weight = torch.ones(8)
    _, rows = leaf_ext.dual_kl(student, teacher, weight, **options, backend=backend)
    exact = (student.double(), teacher.double(), weight.double())
    _, truth = leaf_ext.dual_kl(*exact, **options, backend="reference")
    assert 1e-7 < float(truth.kl.min()) < float(truth.kl.max()) < 2e-6
    torch.testing.assert_close(rows.kl.double(), truth.kl, rtol=1e-3, atol=0)


def test_agreement_looks_at_the_logits_that_a_softcap_makes_equal(backend: str) -> None:
    student, teacher = torch.tensor([[10.0, 60.0, 90.0]]), torch.tensor([[0.0, 1.0, 2.0]])
    for cap, scale in ((5.0, 1.0), (5.0, 3.0), (None, 1.0)):
        _, rows = leaf_ext.dual_kl(
            student,
            teacher,
            torch.ones(1),
            logit_softcap=(cap, None),
            logit_scale=scale,
            return_rows=True,
            backend=backend,
        )
        assert rows.agreement.tolist() == [1.0]
    wide = 20 * torch.randn(16, 5003)
    _, rows = leaf_ext.dual_kl(
        wide, 1.001 * wide, torch.ones(16), logit_softcap=5.0, return_rows=True, backend=backend
    )
    assert rows.agreement.tolist() == [1.0] * 16


@pytest.mark.parametrize("offset", [0.0, 10.0, 60.0])
@pytest.mark.parametrize("return_rows", [False, True])
def test_confident_models_that_nearly_agree_have_the_right_small_gradient(
    offset: float, return_rows: bool, backend: str
) -> None:
    """The difference of two probabilities near 1 is exact to float32, also from 16-bit logits."""
    torch.manual_seed(0)
    teacher = 2 * torch.randn(16, 3000)
    teacher[:, 7] = 18.0
    student = teacher.clone()
    student[:, :300] += 0.02 * torch.randn(16, 300)
    logits = [(z + offset).bfloat16() for z in (student, teacher)]
    weight = torch.full((16,), 1 / 16)

    def gradient(loss: Callable[..., Any], dtype: torch.dtype) -> Tensor:
        leaf, other = (z.to(dtype) for z in logits)
        found = loss(
            leaf.requires_grad_(), other, weight.to(torch.promote_types(dtype, weight.dtype))
        )
        (found[0] if isinstance(found, tuple) else found).backward()
        assert leaf.grad is not None
        return leaf.grad

    run = functools.partial(leaf_ext.dual_kl, return_rows=return_rows, backend=backend)
    exact = gradient(functools.partial(leaf_ext.dual_kl, backend="reference"), torch.float64)
    torch_error = error(gradient(eager_dual_kl, torch.float32), exact)
    assert_within_budget("dual_kl", "gradient", gradient(run, torch.bfloat16), exact, torch_error)
