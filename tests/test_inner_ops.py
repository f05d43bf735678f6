"""Parts of the losses without a public function: narrow gradients, scaling, products."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from backends import BACKENDS, device_of
from test_ops import test_linear_dual_kl as check_linear_dual_kl
from test_ops import test_linear_topk_kl as check_linear_topk_kl
from torch import Tensor

import leaf_ext
from leaf_ext.ops import linear_chunks
from leaf_ext.schema import DTYPES, gradient_rows
from leaf_ext.testing import cases, inputs

SCALARS = (1.5, 1.0, 0.5, 0.0, 20.0)
BETAS = (0.0, 1.0, 0.3)
NARROW = (torch.float16, torch.bfloat16)


def logits(rows: int, student: int, teacher: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return float32 logits; the student's rows are not adjacent, every third row is NaN."""
    weight = (torch.arange(rows) % 3 != 1).float() / max(1, rows)
    z_s, z_t = torch.randn(rows, student) * 4, torch.randn(rows, teacher) * 4
    z_s[weight == 0] = float("nan")
    return inputs.strided(z_s), z_t, weight


def narrows(backend: str) -> bool:
    """Return whether a backend narrows in place; the CPU's threads share rows and cannot."""
    return backend != "cpu" or "cpu" not in leaf_ext.build_info()["backends"]


@pytest.mark.parametrize("sizes", [(4, 1, 1), (3, 9, 7), (5, 300, 340), (2, 4103, 4099), (0, 8, 8)])
@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("beta", BETAS)
def test_a_narrow_gradient_is_the_wide_one_rounded(
    backend: str, namespace: str, sizes: tuple[int, int, int], dtype: torch.dtype, beta: float
) -> None:
    ops: Any = getattr(torch.ops, namespace)
    student, teacher, weight = logits(*sizes)
    scalars = (*SCALARS, beta)
    loss, wide, _, rows = ops.dual_kl(student, teacher, weight, *scalars, True, True)
    if not narrows(backend):
        with pytest.raises(RuntimeError, match="dual_kl_: grad_dtype must be the student's"):
            ops.dual_kl_(student, teacher, weight, *scalars, True, True, dtype)
        return
    found, scale, measures = ops.dual_kl_(student, teacher, weight, *scalars, True, True, dtype)
    gradient = gradient_rows(student, dtype)
    assert gradient.dtype == dtype and gradient.shape == wide.shape
    assert gradient.data_ptr() == student.data_ptr()
    assert torch.equal(gradient, (wide * scale).to(dtype))
    assert torch.equal(found, loss) and torch.equal(measures, rows)
    assert (scale == 1) == (dtype != torch.float16 or sizes[0] == 0)


@pytest.mark.parametrize(("vocabulary", "k"), [(1, 1), (9, 4), (300, 300), (4103, 70)])
@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_a_narrow_gradient_of_topk_kl_is_the_wide_one_rounded(
    backend: str, namespace: str, vocabulary: int, k: int, dtype: torch.dtype
) -> None:
    ops: Any = getattr(torch.ops, namespace)
    student, teacher, weight = logits(5, vocabulary, vocabulary)
    given = (*inputs.stored_teacher(teacher, 1.0, k), weight, 1.5, 0.5, 20.0, True, True)
    loss, wide, _, rows = ops.topk_kl(student, *given)
    if not narrows(backend):
        with pytest.raises(RuntimeError, match="topk_kl_: grad_dtype must be the student's"):
            ops.topk_kl_(student, *given, dtype)
        return
    found, scale, measures = ops.topk_kl_(student, *given, dtype)
    gradient = gradient_rows(student, dtype)
    assert torch.equal(gradient, (wide * scale).to(dtype))
    assert torch.equal(found, loss) and torch.equal(measures, rows)
    assert (scale == 1) == (dtype != torch.float16)


@pytest.mark.parametrize("factor", [1.0, -0.3])
@pytest.mark.parametrize("width", [0, 1, 7, 8, 1000, 8193])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scaling_rounds_once(namespace: str, dtype: torch.dtype, width: int, factor: float) -> None:
    ops: Any = getattr(torch.ops, namespace)
    by = torch.tensor(factor)
    grad = inputs.strided(torch.randn(3, width).to(dtype))
    kept = grad.clone()
    for result_dtype in DTYPES:
        result = ops.scaled(grad, by, result_dtype)
        assert result.is_contiguous() and torch.equal(grad, kept)
        assert torch.equal(result, (kept.float() * factor).to(result_dtype))
    ops.scale_(grad, by)
    assert torch.equal(grad, (kept.float() * factor).to(dtype))
    between = grad.as_strided((2, 11), (width + 11, 1), grad.storage_offset() + width)
    assert between.isnan().all()


def test_scaling_of_any_number_of_dimensions(namespace: str) -> None:
    ops: Any = getattr(torch.ops, namespace)
    for shape in ((), (5,), (2, 3, 4), (0, 4)):
        grad = torch.randn(shape)
        assert torch.equal(ops.scaled(grad, torch.tensor(0.5), torch.float32), grad / 2)


PRODUCT_BACKENDS = [
    b for b in BACKENDS if b != "reference" and narrows(b) and device_of(b).type == "cpu"
]


@pytest.fixture
def products_into_float32(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """Give a CPU the products into float32 of a GPU's library, and record their shapes."""
    made: list[torch.Size] = []

    def of(function: Any) -> Any:
        def product(*tensors: Tensor, out: Tensor, out_dtype: Any = None) -> Tensor:
            *first, a, b = tensors
            assert a.dtype == b.dtype
            if out_dtype is None:
                return function(*tensors, out=out)
            assert out_dtype == out.dtype == torch.float32 and a.dtype in NARROW
            made.append(out.shape)
            return function(*first, a.float(), b.float(), out=out)

        return product

    monkeypatch.setattr(torch, "mm", of(torch.mm))
    monkeypatch.setattr(torch, "addmm", of(torch.addmm))
    monkeypatch.setattr(
        linear_chunks, "_multiplies_to_float32", lambda device, dtype: dtype in NARROW
    )
    return made


@pytest.mark.parametrize(
    "case",
    [case for case in cases.LINEAR_CASES + cases.LINEAR_LABEL_CASES if case.logits.dtype in NARROW],
    ids=str,
)
@pytest.mark.parametrize("backend", PRODUCT_BACKENDS)
def test_linear_dual_kl_with_products_into_float32(
    case: cases.LinearCase, backend: str, products_into_float32: list[torch.Size]
) -> None:
    check_linear_dual_kl(case, backend)
    assert bool(products_into_float32) == (case.logits.live > 0 and case.logits.rows > 0)


@pytest.mark.parametrize(
    "case", [case for case in cases.LINEAR_TOPK_CASES if case.logits.dtype in NARROW], ids=str
)
@pytest.mark.parametrize("backend", PRODUCT_BACKENDS)
def test_linear_topk_kl_with_products_into_float32(
    case: cases.LinearCase, backend: str, products_into_float32: list[torch.Size]
) -> None:
    check_linear_topk_kl(case, backend)
    assert products_into_float32


BFLOAT16_CASES = [case for case in cases.LINEAR_CASES if case.logits.dtype == torch.bfloat16]


@pytest.mark.parametrize("multiplies_bfloat16", [True, False], ids=["native", "emulated"])
@pytest.mark.parametrize("case", BFLOAT16_CASES, ids=str)
def test_linear_dual_kl_on_processors_with_and_without_bfloat16_products(
    case: cases.LinearCase, multiplies_bfloat16: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without bfloat16 products the baseline of the budget is float32 throughout."""
    monkeypatch.setattr(linear_chunks, "_multiplies_bfloat16", lambda: multiplies_bfloat16)
    monkeypatch.setattr(linear_chunks, "has_amx", lambda: False)
    check_linear_dual_kl(case, "cpu")


def test_emulated_bfloat16_products_are_made_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradients differ from the reference's by the rounding of their dtype at most."""
    monkeypatch.setattr(linear_chunks, "_multiplies_bfloat16", lambda: False)
    shapes = ((40, 16), (700, 16), (40, 24), (720, 24))
    tensors = [torch.randn(shape).bfloat16() for shape in shapes]
    gradients = []
    for backend in ("cpu", "reference"):
        leaves = [tensor.clone().requires_grad_() for tensor in tensors[:2]]
        weight = torch.full((40,), 1 / 40)
        loss = leaf_ext.linear_dual_kl(
            *leaves, *tensors[2:], weight, chunk_size=16, backend=backend
        )
        gradients.append(torch.autograd.grad(loss, leaves))
    for ours, reference in zip(*gradients, strict=True):
        assert ours.dtype == torch.bfloat16
        distance = (ours.double() - reference.double()).norm() / reference.double().norm()
        assert distance < 2**-9


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="Linux describes the processor")
def test_the_check_of_the_processor_agrees_with_linux() -> None:
    text = Path("/proc/cpuinfo").read_text()
    flags = set(re.findall(r"\w+", text))
    known = {"avx512_bf16", "amx_bf16", "avx10_2", "bf16", "svebf16"}
    assert linear_chunks._multiplies_bfloat16() == bool(flags & known)


@pytest.mark.parametrize("case", cases.LINEAR_CASES, ids=str)
def test_linear_dual_kl_in_small_pieces_and_slabs(
    case: cases.LinearCase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Large vocabularies on a CPU have pieces; here a chunk has two and a smaller one."""
    monkeypatch.setattr(linear_chunks, "_SLAB", 37)
    monkeypatch.setattr(linear_chunks, "_piece_size", lambda vocabulary: 2)
    vocabulary = case.logits.student_vocabulary
    if vocabulary > 1000:
        monkeypatch.setattr(linear_chunks, "_SLAB", vocabulary // 3)
    for chunk_size in (5, 1000):
        check_linear_dual_kl(replace(case, chunk_size=chunk_size), "auto")
