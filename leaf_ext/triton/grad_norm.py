"""L2 norm of each token's embedding gradient. One program computes a row and reads it once.

The plain sum of squares is right unless it leaves the range of float32. Such a row is computed
again, scaled by the power of two that brings its largest entry into [1, 2).
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from leaf_ext.triton.launch import check, check_adjacent, on_device_of, options

_BLOCK = 2048
_WARPS = 4
# Outside of this range, squares that underflowed or overflowed could matter. An underflowed one is
# below 2^-126, so that 2^17 of them are 2^-29 of the smallest plain sum.
_SMALLEST_PLAIN_SUM = tl.constexpr(2.0**-80)
_LARGEST_PLAIN_SUM = tl.constexpr(2.0**127)
_LARGEST_EXPONENT = tl.constexpr(126)


@triton.jit
def _power_of_two(exponent):
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _sum_of_squares(row, width, factor, BLOCK: tl.constexpr):
    """Return the sum of (factor * x)^2, and the largest |x|, which ignores NaN unlike the sum."""
    lanes = tl.arange(0, BLOCK)
    total = tl.full([BLOCK], 0.0, tl.float32)
    largest = tl.full([BLOCK], 0.0, tl.float32)
    for start in range(0, width, BLOCK):
        columns = start + lanes
        x = tl.load(row + columns, mask=columns < width, other=0.0).to(tl.float32)
        scaled = x * factor
        total += scaled * scaled
        largest = tl.maximum(largest, tl.abs(x))
    return tl.sum(total), tl.max(largest)


@triton.jit
def _row_norm(row, width, BLOCK: tl.constexpr):
    total, largest = _sum_of_squares(row, width, 1.0, BLOCK)
    norm = tl.sqrt_rn(total)
    plain = (total >= _SMALLEST_PLAIN_SUM) & (total <= _LARGEST_PLAIN_SUM)
    # The sum is too small, too large, zero, inf or NaN; the last three are right.
    if (~plain) & (largest > 0) & (largest < float("inf")) & (total == total):
        exponent = (largest.to(tl.int32, bitcast=True) >> 23) - 127
        exponent = tl.minimum(tl.maximum(exponent, -_LARGEST_EXPONENT), _LARGEST_EXPONENT)
        total, largest = _sum_of_squares(row, width, _power_of_two(-exponent), BLOCK)
        norm = tl.sqrt_rn(total) * _power_of_two(exponent)
    return norm


@triton.jit
def norm_kernel(grad, norm, inner, outer_stride, inner_stride, width, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64)
    row = grad + (i // inner) * outer_stride + (i % inner) * inner_stride
    tl.store(norm + i, _row_norm(row, width, BLOCK))


@triton.jit
def norm_pair_kernel(
    teacher,
    student,
    teacher_norm,
    student_norm,
    inner,
    teacher_outer_stride,
    teacher_inner_stride,
    teacher_width,
    student_outer_stride,
    student_inner_stride,
    student_width,
    BLOCK: tl.constexpr,
):
    """Compute the rows of both models in one launch; the second grid axis is the model."""
    i = tl.program_id(0).to(tl.int64)
    outer = i // inner
    step = i % inner
    if tl.program_id(1) == 0:
        row = teacher + outer * teacher_outer_stride + step * teacher_inner_stride
        tl.store(teacher_norm + i, _row_norm(row, teacher_width, BLOCK))
    else:
        other = student + outer * student_outer_stride + step * student_inner_stride
        tl.store(student_norm + i, _row_norm(other, student_width, BLOCK))


def grad_norm(grad: Tensor) -> Tensor:
    """Run the op on one tensor."""
    check_adjacent("grad_norm", "grad", grad)
    norm = torch.empty(grad.shape[:-1], dtype=torch.float32, device=grad.device)
    rows = _rows_of(grad)
    if norm.numel():
        with on_device_of(grad):
            norm_kernel[(norm.numel(),)](
                rows, norm, rows.shape[1], *rows.stride()[:2], rows.shape[2],
                BLOCK=min(_BLOCK, triton.next_power_of_2(max(1, rows.shape[2]))), **options(_WARPS),
            )  # fmt: skip
    return norm


def grad_norm_pair(teacher: Tensor, student: Tensor) -> tuple[Tensor, Tensor]:
    """Run the op on both models' gradients of the same tokens, in one launch."""
    shape = teacher.shape[:-1]
    check(student.shape[:-1] == shape, "detect_spans: both models must have the same tokens")
    for name, tensor in (("teacher", teacher), ("student", student)):
        check_adjacent("detect_spans", name, tensor)
    norms = [torch.empty(shape, dtype=torch.float32, device=teacher.device) for _ in range(2)]
    pair = [_rows_of(tensor) for tensor in (teacher, student)]
    if norms[0].numel():
        sizes = [size for rows in pair for size in (*rows.stride()[:2], rows.shape[2])]
        with on_device_of(teacher):
            norm_pair_kernel[(norms[0].numel(), 2)](
                *pair, *norms, pair[0].shape[1], *sizes, BLOCK=_BLOCK, **options(_WARPS)
            )
    return norms[0], norms[1]


def _rows_of(grad: Tensor) -> Tensor:
    """Return the view [outer, inner, H]; more than three dimensions are flattened."""
    shape = grad.shape[:-1]
    outer = math.prod(shape[:-1])
    return grad.reshape(outer, shape[-1] if shape else 1, grad.shape[-1])
