"""loss = T^2 sum_i w_i D(p_t, p_s) over the common vocabulary, and its gradient.

One program computes a row, in two passes over blocks of its logits. The first pass computes, for
both models, the maximum m of the scaled, capped logits y and the sum d = sum_v exp((y - m) / T).
The second pass computes, with p = exp((y - m) / T) / d, the terms of loss and gradient, here of KL:

    l    = log p_t - log p_s = ((y_t - m_t) - (y_s - m_s)) / T + log d_s - log d_t
    KL   = sum_v p_s - p_t + p_t l
    grad = w T (p_s - p_t) dy_s/dz_s

If l is small, the term of the sum is p_t phi; the series of phi = exp(-l) - 1 + l >= 0 avoids
cancellation. p_s, p_t and l are computed from the same two logarithms to base 2 (log2 d is rounded
once), so that the error of a model's d cancels in the sum of the terms. The maxima are subtracted
first, so that an offset between the two models does not cost accuracy. The gradients of the other
divergences (divergence.py) take a third pass, because they need a sum over the row.

The first pass goes backwards, so that the second begins with blocks that are still in the cache.
The pass that writes goes forwards, because a narrower gradient may overwrite the student's logits:
the logits that a block overwrites were read in this block or before. A barrier separates reads and
writes.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from leaf_ext.schema import LogitScalars, gradient_rows, slope_bound
from leaf_ext.triton.divergence import JENSEN_SHANNON, KL, REVERSE_KL
from leaf_ext.triton.dual_kl_block import (
    kl_with_block,
    parts_with_block,
    sums_with_block,
    write_gradient,
)
from leaf_ext.triton.launch import check, check_adjacent, on_device_of, options
from leaf_ext.triton.softmax import first_of_largest, fold, no_logits

_LONG = 2**16
# The most registers that 16 warps can have. Without the limit ptxas uses fewer, and spills.
REGISTERS = 128
_SUM_BLOCK = 1024
_SUM_WARPS = 4

_LOG2E = tl.constexpr(1.4426950408889634)
_LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _zero(row, begin, end, BLOCK: tl.constexpr):
    lanes = tl.arange(0, BLOCK)
    for start in range(begin, end, BLOCK):
        columns = start + lanes
        zeros = tl.full([BLOCK], 0.0, tl.float32).to(row.dtype.element_ty)
        tl.store(row + columns, zeros, mask=columns < end)


@triton.jit
def rows_kernel(
    student,
    teacher,
    row_weight,
    grad,
    grad_scale,
    kl,
    measures,
    student_stride,
    teacher_stride,
    grad_stride,
    rows,
    student_vocabulary,
    vocabulary,
    temperature,
    inv_temperature,
    student_scale,
    teacher_scale,
    student_softcap,
    teacher_softcap,
    beta,
    rest,
    DIVERGENCE: tl.constexpr,
    NEED_GRAD: tl.constexpr,
    NEED_ROWS: tl.constexpr,
    STUDENT_CAPPED: tl.constexpr,
    TEACHER_CAPPED: tl.constexpr,
    NARROWED: tl.constexpr,
    BLOCK: tl.constexpr,
    THREADS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    student += row * student_stride
    teacher += row * teacher_stride
    grad += row * grad_stride
    measures += row
    weight = tl.load(row_weight + row)
    if weight == 0.0:
        tl.store(kl + row, 0.0)
        if NEED_ROWS:
            for i in tl.static_range(4):
                tl.store(measures + i * rows, 0.0)
        if NEED_GRAD:
            _zero(grad, 0, student_vocabulary, BLOCK)
        return

    # A thread loads a group of logits, 16 bytes, at once.
    GROUP: tl.constexpr = min(128 // student.dtype.element_ty.primitive_bitwidth, BLOCK // THREADS)
    exponent = inv_temperature * _LOG2E
    # Without a softcap y is the logit itself, and the scale is part of the exponent.
    exponent_s = exponent if STUDENT_CAPPED else exponent * student_scale
    exponent_t = exponent if TEACHER_CAPPED else exponent * teacher_scale
    model_s = (student, student_scale, student_softcap, exponent_s)
    model_t = (teacher, teacher_scale, teacher_softcap, exponent_t)
    blocks = vocabulary // BLOCK
    tail = blocks * BLOCK
    parts = (no_logits(THREADS), no_logits(THREADS))
    if tail < vocabulary:
        parts = parts_with_block(
            parts, model_s, model_t, tail, vocabulary, True,
            STUDENT_CAPPED, TEACHER_CAPPED, BLOCK, GROUP,
        )  # fmt: skip
    for block in range(blocks):
        parts = parts_with_block(
            parts, model_s, model_t, tail - (block + 1) * BLOCK, vocabulary, False,
            STUDENT_CAPPED, TEACHER_CAPPED, BLOCK, GROUP,
        )  # fmt: skip
    top_s, sum_s = fold(parts[0], exponent_s)
    top_t, sum_t = fold(parts[1], exponent_t)
    if NEED_ROWS:
        index_s = first_of_largest(parts[0], student, vocabulary, BLOCK)
        index_t = first_of_largest(parts[1], teacher, vocabulary, BLOCK)
        agreement = tl.where(index_s == index_t, 1.0, 0.0)

    factor = weight * temperature * student_scale
    if NEED_GRAD and grad.dtype.element_ty == tl.float16:
        factor *= tl.load(grad_scale)
    softmaxes = (top_s, tl.log2(sum_s), top_t, tl.log2(sum_t))
    zeros = tl.full([THREADS], 0.0, tl.float32)
    sums = (zeros, zeros, zeros, zeros)
    if DIVERGENCE == KL:
        for block in range(blocks):
            sums = kl_with_block(
                sums, model_s, model_t, softmaxes, grad, factor, block * BLOCK, vocabulary, False,
                NEED_GRAD, NEED_ROWS, STUDENT_CAPPED, TEACHER_CAPPED, NARROWED, BLOCK, GROUP,
            )  # fmt: skip
        if tail < vocabulary:
            sums = kl_with_block(
                sums, model_s, model_t, softmaxes, grad, factor, tail, vocabulary, True,
                NEED_GRAD, NEED_ROWS, STUDENT_CAPPED, TEACHER_CAPPED, NARROWED, BLOCK, GROUP,
            )  # fmt: skip
    else:
        mixture = (beta, rest)
        means = (zeros, zeros)
        for block in range(blocks):
            sums, means = sums_with_block(
                sums, means, model_s, model_t, softmaxes, mixture, block * BLOCK, vocabulary,
                False, DIVERGENCE, NEED_ROWS, STUDENT_CAPPED, TEACHER_CAPPED, BLOCK, GROUP,
            )  # fmt: skip
        if tail < vocabulary:
            sums, means = sums_with_block(
                sums, means, model_s, model_t, softmaxes, mixture, tail, vocabulary,
                True, DIVERGENCE, NEED_ROWS, STUDENT_CAPPED, TEACHER_CAPPED, BLOCK, GROUP,
            )  # fmt: skip
        if NEED_GRAD:
            mean = tl.sum(means[0]) / tl.sum(means[1])
            for block in range(blocks):
                write_gradient(
                    model_s, model_t, softmaxes, mixture, mean, grad, factor,
                    block * BLOCK, vocabulary, False,
                    DIVERGENCE, STUDENT_CAPPED, TEACHER_CAPPED, NARROWED, BLOCK,
                )  # fmt: skip
            if tail < vocabulary:
                write_gradient(
                    model_s, model_t, softmaxes, mixture, mean, grad, factor,
                    tail, vocabulary, True,
                    DIVERGENCE, STUDENT_CAPPED, TEACHER_CAPPED, NARROWED, BLOCK,
                )  # fmt: skip
    divergence = tl.sum(sums[0] * _LN2 + sums[1])
    tl.store(kl + row, divergence)
    if NEED_GRAD:
        _zero(grad, vocabulary, student_vocabulary, BLOCK)
    if NEED_ROWS:
        tl.store(measures, divergence)
        tl.store(measures + rows, tl.sum(sums[2]) * _LN2)
        tl.store(measures + 2 * rows, tl.sum(sums[3]) * _LN2)
        known = divergence == divergence
        tl.store(measures + 3 * rows, tl.where(known, agreement, float("nan")))


@triton.jit
def loss_kernel(row_weight, kl, loss, rows, temperature: tl.float64, BLOCK: tl.constexpr):
    """Compute temperature^2 * sum_i row_weight_i * kl_i in float64, in a fixed order."""
    lanes = tl.arange(0, BLOCK)
    total = tl.full([BLOCK], 0.0, tl.float64)
    for start in range(0, rows, BLOCK):
        index = (start + lanes).to(tl.int64)
        inside = index < rows
        weight = tl.load(row_weight + index, mask=inside, other=0.0).to(tl.float64)
        term = weight * tl.load(kl + index, mask=inside, other=0.0).to(tl.float64)
        total += tl.where(weight != 0.0, term, 0.0)
    tl.store(loss, (tl.sum(total) * temperature * temperature).to(tl.float32))


@triton.jit
def scale_kernel(row_weight, grad_scale, rows, bound, BLOCK: tl.constexpr):
    """Compute the power of two that scales the bound of a float16 gradient into (2^14, 2^15]."""
    lanes = tl.arange(0, BLOCK)
    largest = tl.full([BLOCK], 0.0, tl.float32)
    for start in range(0, rows, BLOCK):
        index = (start + lanes).to(tl.int64)
        weight = tl.load(row_weight + index, mask=index < rows, other=0.0)
        largest = tl.maximum(largest, tl.abs(weight))
    most = tl.max(largest) * bound
    bits = most.to(tl.int32, bitcast=True)
    ceiling = (bits >> 23) - 127 + tl.where((bits & 0x7FFFFF) != 0, 1, 0)  # of log2(most)
    exponent = tl.minimum(tl.maximum(15 - ceiling, -126), 126)
    scale = ((exponent + 127) << 23).to(tl.float32, bitcast=True)
    tl.store(grad_scale, tl.where((most > 0.0) & (most < float("inf")), scale, 1.0))


def dual_kl(
    student: Tensor,
    teacher: Tensor,
    row_weight: Tensor,
    *arguments: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run the op with a gradient in new memory."""
    *scalars, need_grad, need_rows = arguments
    size = student.shape if need_grad else (0,)
    grad = torch.empty(size, dtype=student.dtype, device=student.device)
    target = grad if need_grad else None
    values = LogitScalars(*scalars)
    loss, scale, rows = _run("dual_kl", student, teacher, row_weight, target, values, need_rows)
    return loss, grad, scale, rows


def dual_kl_(
    student: Tensor,
    teacher: Tensor,
    row_weight: Tensor,
    *arguments: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the op with a gradient that overwrites the student's logits (see `gradient_rows`)."""
    scalars = LogitScalars(*arguments[: len(LogitScalars._fields)])
    need_grad, need_rows, *rest = arguments[len(scalars) :]
    grad_dtype = rest[0] if rest else None  # the dispatcher leaves a default out
    separate = student.shape[0] <= 1 or student.stride(0) >= student.shape[1]
    check(separate, f"dual_kl_: rows of student must not overlap, got strides {student.stride()}")
    narrower = grad_dtype in (None, student.dtype) or student.dtype == torch.float32
    check(narrower, f"dual_kl_: grad_dtype must be no wider than the student's, got {grad_dtype}")
    target = gradient_rows(student, grad_dtype) if need_grad else None
    return _run("dual_kl_", student, teacher, row_weight, target, scalars, need_rows)


def divergence_of(beta: float) -> int:
    return int((KL if beta == 0 else REVERSE_KL if beta == 1 else JENSEN_SHANNON).value)


def block_of(
    vocabulary: int, itemsize: int, need_rows: bool, capped: bool, lanes: int, *, is_kl: bool = True
) -> tuple[int, int]:
    """Return the elements of a block and its warps of `lanes`, which leave each value a register.

    A softcap takes more registers a value, and another divergence than KL still more. Where
    measures of the rows are kept, few values a thread are the fastest of the sizes that were tried
    on an H100. Without them, three rows of up to _LONG logits share a multiprocessor, and a longer
    row has it alone, so that more of it stays in the L2 cache.
    """
    if not is_kl:
        block, warps = 2048, 16
    elif capped or lanes != 32:
        block, warps = 4096, 16
    elif need_rows:
        block, warps = (2048, 16) if itemsize == 4 else (4096, 8)
    else:
        block, warps = (8192, 32) if vocabulary > _LONG else (4096, 16)
    block = min(block, triton.next_power_of_2(vocabulary))
    # No element is in two threads: one could read what the other has written in place.
    return block, max(1, min(warps, block // lanes))


def _run(
    op: str,
    student: Tensor,
    teacher: Tensor,
    row_weight: Tensor,
    grad: Tensor | None,
    scalars: LogitScalars,
    need_rows: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return loss, grad_scale and rows; write the gradient to `grad`."""
    _check(op, student, teacher, row_weight)
    rows, vocabulary = student.shape[0], min(student.shape[1], teacher.shape[1])
    wide = {"dtype": torch.float32, "device": student.device}
    loss, kl = torch.empty((), **wide), torch.empty(rows, **wide)
    grad_scale = torch.ones((), **wide)
    measures = torch.empty((4, rows if need_rows else 0), **wide)
    target = student if grad is None else grad  # not written to without NEED_GRAD
    with on_device_of(student):
        if grad is not None and grad.dtype == torch.float16:
            bound = scalars.temperature * scalars.student_scale
            bound *= slope_bound(scalars.beta)
            scale_kernel[(1,)](
                row_weight, grad_scale, rows, bound, BLOCK=_SUM_BLOCK, **options(_SUM_WARPS)
            )
        if rows:
            student_capped, teacher_capped = (cap != 0 for cap in scalars[3:5])
            capped, is_kl = student_capped or teacher_capped, scalars.beta == 0
            lanes = 32 if torch.version.hip is None else 64
            block, warps = block_of(
                vocabulary, student.element_size(), need_rows, capped, lanes, is_kl=is_kl
            )
            limited = lanes == 32 and (capped or not is_kl)
            registers = {"maxnreg": REGISTERS} if limited else {}
            rows_kernel[(rows,)](
                student, teacher, row_weight, target, grad_scale, kl, measures,
                student.stride(0), teacher.stride(0), target.stride(0),
                rows, student.shape[1], vocabulary,
                scalars.temperature, 1.0 / scalars.temperature, *scalars[1:],
                1.0 - scalars.beta, DIVERGENCE=divergence_of(scalars.beta),
                NEED_GRAD=grad is not None, NEED_ROWS=need_rows,
                STUDENT_CAPPED=student_capped, TEACHER_CAPPED=teacher_capped,
                NARROWED=target.dtype != student.dtype,
                BLOCK=block, THREADS=min(lanes * warps, block), **options(warps), **registers,
            )  # fmt: skip
        loss_kernel[(1,)](
            row_weight, kl, loss, rows, scalars.temperature, BLOCK=_SUM_BLOCK, **options(_SUM_WARPS)
        )
    return loss, grad_scale, measures


def _check(op: str, student: Tensor, teacher: Tensor, row_weight: Tensor) -> None:
    for name, logits in (("student", student), ("teacher", teacher)):
        shape = tuple(logits.shape)
        check(
            logits.dim() == 2 and shape[1] >= 1 and shape[0] == student.shape[0],
            f"{op}: {name} must be [N, V] with V >= 1 and the student's N, got shape {shape}",
        )
        check_adjacent(op, name, logits)
    check(
        row_weight.dtype == torch.float32
        and row_weight.shape == student.shape[:1]
        and row_weight.is_contiguous(),
        f"{op}: row_weight must be contiguous float32 [N], got {row_weight.dtype} "
        f"{tuple(row_weight.shape)}",
    )
