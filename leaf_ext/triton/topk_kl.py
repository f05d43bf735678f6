"""loss = T^2 sum_i w_i KL(p_t, p_s) over k + 1 outcomes, and its gradient.

The outcomes of a row are its k ids and all others together. One program computes a row, in two
passes over blocks of the logits. The first pass computes the maximum m and the sum d of powers,
exp((y - m) / T), of the logits that are not at the ids, so that the student's mass u outside of the
ids is a sum and not a difference. The logits at the ids are gathered before. The second pass writes
the gradient of the others,

    grad = w T (u - t) exp((y - m) / T) / d * dy/dz

and values without a meaning at the ids, which their own gradient w T (p_s - p_t) dy/dz overwrites
after a barrier. The passes' directions and a narrower gradient's barriers are as in dual_kl.py.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from leaf_ext.schema import StudentScalars, gradient_rows
from leaf_ext.triton import dual_kl as rows_of
from leaf_ext.triton.divergence import kl_of_logs
from leaf_ext.triton.dual_kl import _zero, loss_kernel, scale_kernel
from leaf_ext.triton.launch import check, check_adjacent, on_device_of, options
from leaf_ext.triton.narrow import narrow
from leaf_ext.triton.softmax import LOWEST, first_of_largest, fold, no_logits
from leaf_ext.triton.topk_kl_block import capped_logits, entropy_with_block, part_with_block

_LOG2E = tl.constexpr(1.4426950408889634)
_LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _agreement(student, teacher_log, ids, z, listed, end):
    """Return 1 if the first of the student's largest logits is at the teacher's likeliest id.

    `student` is a pair of the largest logit at no id and its index.
    """
    value, first = student
    largest = tl.maximum(value, tl.max(z))
    of_ids = tl.min(tl.where(listed & (z == largest), ids, end))
    found = tl.minimum(of_ids, tl.where(value == largest, first, end))
    likeliest = listed & (teacher_log == tl.max(teacher_log))
    return tl.where(found == tl.min(tl.where(likeliest, ids, end)), 1.0, 0.0)


@triton.jit
def topk_rows_kernel(
    student,
    teacher_ids,
    teacher_logprobs,
    teacher_tail,
    row_weight,
    grad,
    grad_scale,
    kl,
    measures,
    student_stride,
    grad_stride,
    rows,
    vocabulary,
    k,
    temperature,
    inv_temperature,
    scale,
    softcap,
    NEED_GRAD: tl.constexpr,
    NEED_ROWS: tl.constexpr,
    CAPPED: tl.constexpr,
    NARROWED: tl.constexpr,
    BLOCK: tl.constexpr,
    THREADS: tl.constexpr,
    K: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    student += row * student_stride
    grad += row * grad_stride
    measures += row
    weight = tl.load(row_weight + row)
    if weight == 0.0:
        tl.store(kl + row, 0.0)
        if NEED_ROWS:
            for i in tl.static_range(4):
                tl.store(measures + i * rows, 0.0)
        if NEED_GRAD:
            _zero(grad, 0, vocabulary, BLOCK)
        return

    GROUP: tl.constexpr = min(128 // student.dtype.element_ty.primitive_bitwidth, BLOCK // THREADS)
    exponent = inv_temperature * _LOG2E
    if not CAPPED:
        exponent *= scale
    model = (student, scale, softcap, exponent)
    lanes = tl.arange(0, K)
    given = tl.load(teacher_ids + row * k + lanes, mask=lanes < k, other=-1)
    listed = (given >= 0) & (given < vocabulary)  # an id elsewhere is left out
    ids = tl.where(listed, given, 0).to(tl.int32)
    log_t = tl.load(teacher_logprobs + row * k + lanes, mask=listed, other=float("-inf")) * _LOG2E
    tail_t = tl.load(teacher_tail + row) * _LOG2E
    z = tl.load(student + ids, mask=listed, other=float("-inf")).to(tl.float32)
    y, slope = capped_logits(z, listed, scale, softcap, CAPPED)

    part = no_logits(THREADS)
    blocks = tl.cdiv(vocabulary, BLOCK)
    for block in range(blocks):
        part = part_with_block(
            part, model, ids, listed, (blocks - 1 - block) * BLOCK, vocabulary, CAPPED, BLOCK, GROUP
        )
    top, total = fold(part, exponent)
    top_ids = tl.maximum(tl.max(y), LOWEST)
    total_ids = tl.sum(tl.exp2((y - top_ids) * exponent))
    top_all = tl.maximum(top, top_ids)
    total_all = total * tl.exp2((top - top_all) * exponent)
    log_all = tl.log2(total_all + total_ids * tl.exp2((top_ids - top_all) * exponent))

    p_s, p_t, bits, rest = kl_of_logs((y - top_all) * exponent - log_all, log_t)
    tail_s = (top - top_all) * exponent + tl.log2(total) - log_all
    u, t, tail_bits, tail_rest = kl_of_logs(tail_s, tail_t)
    divergence = (tl.sum(bits) + tail_bits) * _LN2 + (tl.sum(rest) + tail_rest)
    tl.store(kl + row, divergence)
    if NEED_ROWS:
        best = first_of_largest(part, student, vocabulary, BLOCK)
        agreement = _agreement((tl.max(part[2]), best), log_t, ids, z, listed, vocabulary)
        bits_t = tl.sum(p_t * tl.maximum(log_t, -1000.0)) + t * tl.maximum(tail_t, -1000.0)
        # The product with log2(e) was rounded, and all p_t are off by much the same factor.
        entropy_t = -bits_t / (tl.sum(p_t) + t)

    factor = weight * temperature * scale
    if NEED_GRAD and grad.dtype.element_ty == tl.float16:
        factor *= tl.load(grad_scale)
    entropy = tl.full([THREADS], 0.0, tl.float32)
    if NEED_GRAD or NEED_ROWS:
        tl.debug_barrier()  # the logits at the ids are read before they are overwritten
        whole = (top_all, log_all)
        others = (top, tl.where(total == 0.0, 0.0, tl.log2(total)))
        for block in range(blocks):
            entropy = entropy_with_block(
                entropy, model, whole, others, grad, factor * (u - t), block * BLOCK, vocabulary,
                NEED_GRAD, NEED_ROWS, CAPPED, NARROWED, BLOCK, GROUP,
            )  # fmt: skip
    if NEED_GRAD:
        tl.debug_barrier()
        value = narrow(factor * (p_s - p_t) * slope, grad.dtype.element_ty)
        tl.store(grad + ids, value, mask=listed)
    if NEED_ROWS:
        tl.store(measures, divergence)
        tl.store(measures + rows, tl.sum(entropy) * _LN2)
        tl.store(measures + 2 * rows, entropy_t * _LN2)
        known = divergence == divergence
        tl.store(measures + 3 * rows, tl.where(known, agreement, float("nan")))


def topk_kl(
    student: Tensor,
    *arguments: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run the op with a gradient in new memory."""
    *given, need_grad, need_rows = arguments
    size = student.shape if need_grad else (0,)
    grad = torch.empty(size, dtype=student.dtype, device=student.device)
    loss, scale, rows = _run("topk_kl", student, given, grad if need_grad else None, need_rows)
    return loss, grad, scale, rows


def topk_kl_(
    student: Tensor,
    *arguments: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the op with a gradient that overwrites the student's logits (see `gradient_rows`)."""
    given, (need_grad, need_rows, *rest) = arguments[:7], arguments[7:]
    grad_dtype = rest[0] if rest else None  # the dispatcher leaves a default out
    separate = student.shape[0] <= 1 or student.stride(0) >= student.shape[1]
    check(separate, f"topk_kl_: rows of student must not overlap, got strides {student.stride()}")
    narrower = grad_dtype in (None, student.dtype) or student.dtype == torch.float32
    check(narrower, f"topk_kl_: grad_dtype must be no wider than the student's, got {grad_dtype}")
    target = gradient_rows(student, grad_dtype) if need_grad else None
    return _run("topk_kl_", student, given, target, need_rows)


def _run(
    op: str, student: Tensor, arguments: Any, grad: Tensor | None, need_rows: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return loss, grad_scale and rows; write the gradient to `grad`."""
    *teacher, row_weight = arguments[:4]
    scalars = StudentScalars(*arguments[4:])
    _check(op, student, *teacher, row_weight)
    (rows, vocabulary), k = student.shape, teacher[0].shape[1]
    wide = {"dtype": torch.float32, "device": student.device}
    loss, kl = torch.empty((), **wide), torch.empty(rows, **wide)
    grad_scale = torch.ones((), **wide)
    measures = torch.empty((4, rows if need_rows else 0), **wide)
    target = student if grad is None else grad  # not written to without NEED_GRAD
    sums = {"BLOCK": rows_of._SUM_BLOCK} | options(rows_of._SUM_WARPS)
    with on_device_of(student):
        if grad is not None and grad.dtype == torch.float16:
            bound = scalars.temperature * scalars.scale
            scale_kernel[(1,)](row_weight, grad_scale, rows, bound, **sums)
        if rows:
            capped = scalars.softcap != 0
            lanes = 32 if torch.version.hip is None else 64
            size = student.element_size()
            # The blocks of long rows would leave a thread too few registers.
            length = min(vocabulary, rows_of._LONG)
            block, warps = rows_of.block_of(length, size, need_rows, capped, lanes)
            registers = {"maxnreg": rows_of.REGISTERS} if capped and lanes == 32 else {}
            topk_rows_kernel[(rows,)](
                student, *teacher, row_weight, target, grad_scale, kl, measures,
                student.stride(0), target.stride(0), rows, vocabulary, k,
                scalars.temperature, 1.0 / scalars.temperature, *scalars[1:],
                NEED_GRAD=grad is not None, NEED_ROWS=need_rows, CAPPED=capped,
                NARROWED=target.dtype != student.dtype, BLOCK=block,
                THREADS=min(lanes * warps, block), K=triton.next_power_of_2(k),
                **options(warps), **registers,
            )  # fmt: skip
        loss_kernel[(1,)](row_weight, kl, loss, rows, scalars.temperature, **sums)
    return loss, grad_scale, measures


def _check(
    op: str, student: Tensor, ids: Tensor, logprobs: Tensor, tail: Tensor, row_weight: Tensor
) -> None:
    shape = tuple(student.shape)
    check(
        student.dim() == 2 and shape[1] >= 1,
        f"{op}: student must be [N, V] with V >= 1, got shape {shape}",
    )
    check_adjacent(op, "student", student)
    rows = student.shape[0]
    check(
        ids.dim() == 2 and ids.shape[0] == rows and ids.shape[1] >= 1 and ids.dtype == torch.int64,
        f"{op}: teacher_ids must be int64 [N, k] with k >= 1, got {ids.dtype} {tuple(ids.shape)}",
    )
    for name, tensor, needed in (
        ("teacher_ids", ids, ids.shape),
        ("teacher_logprobs", logprobs, ids.shape),
        ("teacher_tail", tail, (rows,)),
        ("row_weight", row_weight, (rows,)),
    ):
        dtype = torch.int64 if name == "teacher_ids" else torch.float32
        check(
            tensor.dtype == dtype and tensor.shape == needed and tensor.is_contiguous(),
            f"{op}: {name} must be contiguous {dtype} {tuple(needed)}, got {tensor.dtype} "
            f"{tuple(tensor.shape)}",
        )
