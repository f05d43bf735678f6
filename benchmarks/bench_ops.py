"""Times every op, the reference, eager PyTorch and torch.compile, forward and backward.

No result is timed before it has been compared with the reference in float64.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import pytest
import torch
from checked import (
    backward,
    compiled,
    exact_kl,
    exact_linear,
    exact_topk,
    on_backend,
    refuse_unless,
    relative,
    worst_relative,
)
from memory import peak_extra_mib
from torch import Tensor

import leaf_ext
from leaf_ext.schema import OPS
from leaf_ext.testing import cases, eager, inputs

# Rounds of a line of the table: as many as fit into the seconds, 2 to 7, after a warm-up.
ROUNDS, SECONDS = 7, 6.0


@dataclass(frozen=True)
class Job:
    """One line of the table. `prepare` makes fresh arguments for `step` and is not timed."""

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
    """Eager PyTorch makes spans by cumulative sums; the compiled variant stops at the scores."""
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


@lru_cache(maxsize=1)
def kl_truth(case: cases.KLCase) -> tuple[inputs.KLInputs, float, Tensor]:
    """Return inputs, the loss in float64, and the gradient of all rows."""
    given = inputs.kl_inputs(case)
    tensors = (given.student, given.teacher, given.row_weight)
    return given, *exact_kl(*tensors, at_once=16, divergence=case.divergence)


_KL_VARIANTS = ("cpu", "cpu inplace", "reference", "eager", "compiled")


@pytest.mark.parametrize(
    ("case", "variant"),
    [
        *((case, variant) for case in cases.BENCH_KL_CASES for variant in _KL_VARIANTS),
        *((case, variant) for case in cases.BENCH_OTHER_CASES for variant in _KL_VARIANTS),
        (cases.BENCH_HALF_CASE, "cpu inplace"),
    ],
    ids=str,
)
def bench_dual_kl(
    benchmark: Any, case: cases.KLCase, variant: str, copy_bandwidth: float, tiny: bool
) -> None:
    if tiny:
        case = replace(case, rows=4, student_vocabulary=64, teacher_vocabulary=64)
    given, total, exact = kl_truth(case)
    options: dict[str, Any] = {"divergence": case.divergence}
    plain = functools.partial(eager.eager_dual_kl, **options)
    loss = {
        "cpu": lambda: on_backend(leaf_ext.dual_kl, "cpu", **options),
        "cpu inplace": lambda: on_backend(leaf_ext.dual_kl, "cpu", inplace_grad=True, **options),
        "reference": lambda: on_backend(leaf_ext.dual_kl, "reference", **options),
        "eager": lambda: plain,
        "compiled": lambda: compiled(plain, tiny),
    }[variant]()
    step = backward(loss, 1)

    def prepare() -> tuple[Tensor, ...]:
        return given.student.clone().requires_grad_(), given.teacher, given.row_weight

    arguments = prepare()
    value = float(step(*arguments))
    refuse_unless(abs(value - total) / abs(total), 1e-5, "loss")
    grad = arguments[0].grad
    assert grad is not None
    bound = max(1e-5, torch.finfo(case.dtype).eps)
    refuse_unless(worst_relative(grad, exact, rows=64), bound, "gradient")
    del arguments, grad
    sizes = {
        "N": case.rows,
        "V_s": case.student_vocabulary,
        "V_t": case.teacher_vocabulary,
        "itemsize": given.student.element_size(),
    }
    job = Job("dual_kl", str(case), case.dtype, variant, sizes, prepare, step)
    measure(benchmark, job, copy_bandwidth, tiny)


@lru_cache(maxsize=1)
def topk_truth(case: cases.TopkCase) -> tuple[inputs.TopkInputs, float, Tensor]:
    """Return inputs, the loss in float64, and the gradient of all rows."""
    given = inputs.topk_inputs(case)
    teacher = given.ids, given.logprobs, given.row_weight
    return given, *exact_topk(given.student, *teacher, at_once=16)


@pytest.mark.parametrize("variant", _KL_VARIANTS)
@pytest.mark.parametrize("case", cases.BENCH_TOPK_CASES, ids=str)
def bench_topk_kl(
    benchmark: Any, case: cases.TopkCase, variant: str, copy_bandwidth: float, tiny: bool
) -> None:
    if tiny:
        logits = replace(case.logits, rows=4, student_vocabulary=64, teacher_vocabulary=64)
        case = replace(case, logits=logits, k=5)
    given, total, exact = topk_truth(case)
    loss = {
        "cpu": lambda: on_backend(leaf_ext.topk_kl, "cpu"),
        "cpu inplace": lambda: on_backend(leaf_ext.topk_kl, "cpu", inplace_grad=True),
        "reference": lambda: on_backend(leaf_ext.topk_kl, "reference"),
        "eager": lambda: eager.eager_topk_kl,
        "compiled": lambda: compiled(eager.eager_topk_kl, tiny),
    }[variant]()
    step = backward(loss, 1)

    def prepare() -> tuple[Tensor, ...]:
        student = given.student.clone().requires_grad_()
        return student, given.ids, given.logprobs, given.row_weight

    arguments = prepare()
    value = float(step(*arguments))
    refuse_unless(abs(value - total) / abs(total), 1e-5, "loss")
    grad = arguments[0].grad
    assert grad is not None
    bound = max(1e-5, torch.finfo(case.logits.dtype).eps)
    refuse_unless(worst_relative(grad, exact, rows=64), bound, "gradient")
    del arguments, grad
    sizes = {
        "N": case.logits.rows,
        "V_s": case.logits.student_vocabulary,
        "k": case.k,
        "itemsize": given.student.element_size(),
    }
    job = Job("topk_kl", str(case), case.logits.dtype, variant, sizes, prepare, step)
    measure(benchmark, job, copy_bandwidth, tiny)


def bare_products(*tensors: Tensor) -> Callable[..., Tensor]:
    """Compute only the four products that the mathematics needs, each of all rows at once."""
    hidden, head, teacher_hidden, teacher_head, _ = tensors
    student, teacher = (head.new_empty(hidden.shape[0], head.shape[0]) for _ in range(2))
    hidden_grad, head_grad = torch.empty_like(hidden), torch.empty_like(head)

    def step(*_: Tensor) -> Tensor:
        torch.mm(hidden, head.T, out=student)
        torch.mm(teacher_hidden, teacher_head.T, out=teacher)
        torch.mm(student, head, out=hidden_grad)
        return torch.mm(student.T, hidden, out=head_grad)

    return step


_LINEAR_VARIANTS = (
    *("cpu", "cpu frozen head", "reference", "eager"),
    *("eager frozen head", "compiled", "bare products"),
)


@pytest.mark.parametrize(
    ("case", "variant"),
    [
        *((case, variant) for case in cases.BENCH_LINEAR_CASES for variant in _LINEAR_VARIANTS),
        *(
            (case, variant)
            for case in cases.BENCH_LARGE_LINEAR_CASES
            for variant in ("cpu", "eager", "bare products")
        ),
        *(
            (case, variant)
            for case in cases.BENCH_LONG_LINEAR_CASES
            for variant in ("cpu", "cpu frozen head")
        ),
    ],
    ids=str,
)
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
    sizes = {
        "N": case.logits.rows,
        "V_s": case.logits.student_vocabulary,
        "V_t": case.logits.teacher_vocabulary,
        "H_s": case.student_hidden,
        "H_t": case.teacher_hidden,
        "itemsize": given.student_head.element_size(),
    }
    kind, _, how = variant.partition(" ")
    job = Job("linear_dual_kl", str(case), case.logits.dtype, variant, sizes, tuple, tuple)
    if kind == "bare":
        job = replace(job, step=bare_products(*tensors))
        measure(benchmark, job, copy_bandwidth, tiny)
        return
    loss = {
        "cpu": lambda: on_backend(leaf_ext.linear_dual_kl, "cpu"),
        "reference": lambda: on_backend(leaf_ext.linear_dual_kl, "reference"),
        "eager": lambda: eager.eager_linear_dual_kl,
        "compiled": lambda: compiled(eager.eager_linear_dual_kl, tiny),
    }[kind]()
    trained = 1 if how else 2
    step = backward(loss, trained)

    def prepare() -> tuple[Tensor, ...]:
        return (*(t.clone().requires_grad_() for t in tensors[:trained]), *tensors[trained:])

    arguments = prepare()
    value = float(step(*arguments))
    truth, exact = exact_linear(tensors, at_once=64)
    refuse_unless(abs(value - truth) / abs(truth), 1e-3, "loss")
    for ours, theirs in zip(arguments[:trained], exact, strict=False):
        assert ours.grad is not None
        # The library rounds bfloat16 logits: by up to 2^-8 of a logit of 10.
        refuse_unless(relative(ours.grad, theirs), 0.03, "gradient")
    del arguments, exact
    products = bare_products(*tensors)
    alternating: list[float] = []

    def prepare_after_products() -> tuple[Tensor, ...]:
        """Time bare products and the op in turn, because the machine's speed varies."""
        start = time.perf_counter()
        products()
        alternating.append(time.perf_counter() - start)
        return prepare()

    products()
    measure(
        benchmark, replace(job, prepare=prepare_after_products, step=step), copy_bandwidth, tiny
    )
    if trained == 2:
        benchmark.extra_info["bare_products_s"] = min(alternating)
