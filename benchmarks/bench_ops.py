"""Every op against the reference, eager PyTorch and torch.compile, forward and backward.

No result is timed before it has been compared with the reference in float64.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import pytest
import torch
from memory import peak_extra_mib
from torch import Tensor

import leaf_ext
from leaf_ext.schema import OPS
from leaf_ext.testing import cases, eager, inputs

# Rounds of a line of the table: as many as fit into the seconds, 2 to 7 (the call is warm by then).
ROUNDS, SECONDS = 7, 6.0


@dataclass(frozen=True)
class Job:
    """One line of the table. `prepare` makes fresh arguments of `step`, and is not timed."""

    op: str
    case: str
    dtype: torch.dtype
    variant: str
    sizes: dict[str, int]
    prepare: Callable[[], tuple[Any, ...]]
    step: Callable[..., Any]


def measure(benchmark: Any, job: Job, copy_bandwidth: float, tiny: bool) -> None:
    start = time.perf_counter()
    peak = peak_extra_mib(job.step, *job.prepare())
    seconds = time.perf_counter() - start
    benchmark.group = f"{job.op} {job.case}"
    benchmark.extra_info.update(
        op=job.op,
        case=job.case,
        variant=job.variant,
        bytes=OPS[job.op].bytes_moved(job.sizes),
        copy_gbps=copy_bandwidth,
        peak_extra_mib=peak,
    )
    benchmark.pedantic(
        job.step,
        setup=lambda: (job.prepare(), {}),
        rounds=1 if tiny else max(2, min(ROUNDS, int(SECONDS / seconds))),
    )


def compiled(function: Callable[..., Any], tiny: bool) -> Callable[..., Any]:
    torch.compiler.reset()
    return torch.compile(function, backend="aot_eager" if tiny else "inductor")


def on_backend(function: Callable[..., Any], backend: str, **options: Any) -> Callable[..., Any]:
    return lambda *arguments: function(*arguments, backend=backend, **options)


def relative(result: Tensor, truth: Tensor) -> float:
    return float((result.double() - truth.double()).norm() / truth.double().norm())


def refuse_unless(close: float, bound: float, what: str) -> None:
    assert close <= bound, f"{what} is off by {close:.2g} (bound {bound:.2g}): no speed for it"


@pytest.mark.parametrize("variant", ["cpu", "reference", "eager", "compiled"])
@pytest.mark.parametrize("case", cases.BENCH_NORM_CASES, ids=str)
def bench_grad_norm(
    benchmark: Any, case: cases.NormCase, variant: str, copy_bandwidth: float, tiny: bool
) -> None:
    case = replace(case, shape=(2, 8, 32)) if tiny else case
    grad = inputs.norm_inputs(case)
    run = {
        "cpu": lambda: on_backend(leaf_ext.grad_norm, "cpu"),
        "reference": lambda: on_backend(leaf_ext.grad_norm, "reference"),
        "eager": lambda: eager.eager_grad_norm,
        "compiled": lambda: compiled(eager.eager_grad_norm, tiny),
    }[variant]()
    truth = leaf_ext.grad_norm(grad.double(), backend="reference")
    refuse_unless(relative(run(grad), truth), 1e-5, "norm")
    sizes = {
        "rows": grad.shape[:-1].numel(),
        "H": grad.shape[-1],
        "itemsize": grad.element_size(),
    }
    job = Job("grad_norm", str(case), case.dtype, variant, sizes, lambda: (grad,), run)
    measure(benchmark, job, copy_bandwidth, tiny)


@pytest.mark.parametrize("variant", ["cpu", "reference", "eager", "compiled"])
@pytest.mark.parametrize("case", cases.BENCH_SPANS_CASES, ids=str)
def bench_detect_spans(
    benchmark: Any, case: cases.SpansCase, variant: str, copy_bandwidth: float, tiny: bool
) -> None:
    """Eager makes the spans by cumulative sums; compiled stops at the scores."""
    case = replace(case, batch=2, length=32) if tiny else case
    given = inputs.spans_inputs(case)
    tensors = (given.teacher, given.student, given.domain)
    run = {
        "cpu": lambda: on_backend(leaf_ext.detect_spans, "cpu"),
        "reference": lambda: on_backend(leaf_ext.detect_spans, "reference"),
        "eager": lambda: eager.eager_spans,
        "compiled": lambda: compiled(eager.eager_scores, tiny),
    }[variant]()
    wide = (given.teacher.double(), given.student.double(), given.domain)
    truth = leaf_ext.detect_spans(*wide, backend="reference").score
    result = run(*tensors)
    if isinstance(result, leaf_ext.Spans):
        result = (result.score, result.span, result.count)
    score, *spans = result if isinstance(result, tuple) else (result,)
    expected = leaf_ext.detect_spans(*tensors, backend="reference")
    found = (expected.span, expected.count)[: len(spans)]
    assert all(map(torch.equal, spans, found)), "other spans than the reference's: no speed for it"
    refuse_unless(relative(score[given.domain], truth[given.domain]), 1e-5, "score")
    sizes = {"tokens": given.domain.numel(), "B": case.batch, "T": case.length}
    job = Job("detect_spans", str(case), case.dtype, variant, sizes, lambda: tensors, run)
    measure(benchmark, job, copy_bandwidth, tiny)


def backward(loss: Callable[..., Tensor], trained: int) -> Callable[..., Tensor]:
    """Forward and backward, with the first `trained` arguments as leaves."""

    def step(*tensors: Tensor) -> Tensor:
        for tensor in tensors[:trained]:
            tensor.grad = None
        value = loss(*tensors)
        value.backward()
        return value.detach()

    return step


@lru_cache(maxsize=1)
def exact_kl(case: cases.KLCase) -> tuple[inputs.KLInputs, float, Tensor]:
    """Inputs, the loss in float64, and the gradient of all rows; a few rows at a time."""
    given, total, gradients = inputs.kl_inputs(case), 0.0, []
    for start in range(0, case.rows, 16):
        rows = slice(start, start + 16)
        student = given.student[rows].double().requires_grad_()
        weight = given.row_weight[rows].double()
        loss = leaf_ext.dual_kl(student, given.teacher[rows].double(), weight, backend="reference")
        total += float(loss.detach())
        loss.backward()
        assert student.grad is not None
        gradients.append(student.grad.to(given.student.dtype))
    return given, total, torch.cat(gradients)


_KL_VARIANTS = ("cpu", "cpu inplace", "reference", "eager", "compiled")


@pytest.mark.parametrize(
    ("case", "variant"),
    [
        *((case, variant) for case in cases.BENCH_KL_CASES for variant in _KL_VARIANTS),
        (cases.BENCH_HALF_CASE, "cpu inplace"),
    ],
    ids=str,
)
def bench_dual_kl(
    benchmark: Any, case: cases.KLCase, variant: str, copy_bandwidth: float, tiny: bool
) -> None:
    if tiny:
        case = replace(case, rows=4, student_vocabulary=64, teacher_vocabulary=64)
    given, total, exact = exact_kl(case)
    loss = {
        "cpu": lambda: on_backend(leaf_ext.dual_kl, "cpu"),
        "cpu inplace": lambda: on_backend(leaf_ext.dual_kl, "cpu", inplace_grad=True),
        "reference": lambda: on_backend(leaf_ext.dual_kl, "reference"),
        "eager": lambda: eager.eager_dual_kl,
        "compiled": lambda: compiled(eager.eager_dual_kl, tiny),
    }[variant]()
    step = backward(loss, 1)

    def prepare() -> tuple[Tensor, ...]:
        return given.student.clone().requires_grad_(), given.teacher, given.row_weight

    arguments = prepare()
    value = float(step(*arguments))
    refuse_unless(abs(value - total) / abs(total), 1e-5, "loss")
    grad = arguments[0].grad
    assert grad is not None
    # By blocks of rows: the whole of it in float64 would take gigabytes.
    bound = max(1e-5, torch.finfo(case.dtype).eps)
    for ours, theirs in zip(grad.split(64), exact.split(64), strict=True):
        refuse_unless(relative(ours, theirs), bound, "gradient")
    del arguments, grad
    sizes = {
        "N": case.rows,
        "V_s": case.student_vocabulary,
        "V_t": case.teacher_vocabulary,
        "itemsize": given.student.element_size(),
    }
    job = Job("dual_kl", str(case), case.dtype, variant, sizes, prepare, step)
    measure(benchmark, job, copy_bandwidth, tiny)


@pytest.mark.parametrize("variant", ["cpu", "reference", "eager", "compiled"])
@pytest.mark.parametrize("case", cases.BENCH_LINEAR_CASES, ids=str)
def bench_linear_dual_kl(
    benchmark: Any, case: cases.LinearCase, variant: str, copy_bandwidth: float, tiny: bool
) -> None:
    if tiny:
        logits = replace(case.logits, rows=8, student_vocabulary=64, teacher_vocabulary=64)
        case = replace(case, logits=logits, student_hidden=16, teacher_hidden=16)
    given = inputs.linear_inputs(case)
    tensors = (
        given.student_hidden,
        given.student_head,
        given.teacher_hidden,
        given.teacher_head,
        given.row_weight,
    )
    loss = {
        "cpu": lambda: on_backend(leaf_ext.linear_dual_kl, "cpu"),
        "reference": lambda: on_backend(leaf_ext.linear_dual_kl, "reference"),
        "eager": lambda: eager.eager_linear_dual_kl,
        "compiled": lambda: compiled(eager.eager_linear_dual_kl, tiny),
    }[variant]()
    step = backward(loss, 2)

    def prepare() -> tuple[Tensor, ...]:
        return (*(t.clone().requires_grad_() for t in tensors[:2]), *tensors[2:])

    arguments = prepare()
    value = float(step(*arguments))
    exact = tuple(t.double() for t in tensors)
    exact = (*(t.requires_grad_() for t in exact[:2]), *exact[2:])
    truth = float(backward(on_backend(leaf_ext.linear_dual_kl, "reference"), 2)(*exact))
    refuse_unless(abs(value - truth) / abs(truth), 1e-3, "loss")
    for ours, theirs in zip(arguments[:2], exact[:2], strict=True):
        assert ours.grad is not None and theirs.grad is not None
        # bfloat16 logits: their rounding, up to 2^-8 of a logit of 10, is the library's.
        refuse_unless(relative(ours.grad, theirs.grad), 0.03, "gradient")
    del arguments, exact
    sizes = {
        "N": case.logits.rows,
        "V_s": case.logits.student_vocabulary,
        "V_t": case.logits.teacher_vocabulary,
        "H_s": case.student_hidden,
        "H_t": case.teacher_hidden,
        "itemsize": given.student_head.element_size(),
    }
    job = Job("linear_dual_kl", str(case), case.logits.dtype, variant, sizes, prepare, step)
    measure(benchmark, job, copy_bandwidth, tiny)
