"""A block of both models' logits in either pass of dual_kl; the mathematics is in dual_kl.py."""

from __future__ import annotations

import triton
import triton.language as tl

from leaf_ext.triton.narrow import narrow
from leaf_ext.triton.softmax import add, capped, sums_of_threads

# phi = ln(2) r^2 (_LINE + _SQUARE r + _CUBE r^2), r = l / ln(2); relative error 3e-6 below _NEAR.
_NEAR = tl.constexpr(0.125)
_LINE = tl.constexpr(0.34657359027997264)
_SQUARE = tl.constexpr(-0.08009804480979624)
_CUBE = tl.constexpr(0.013876027166205394)


@triton.jit
def _load(row, columns, end, MASKED: tl.constexpr, POLICY: tl.constexpr):
    """Load logits as float32; -inf from `end` on, so that p and all terms are 0 there."""
    if MASKED:
        inside = columns < end
        z = tl.load(row + columns, mask=inside, other=float("-inf"), eviction_policy=POLICY)
    else:
        z = tl.load(row + columns, eviction_policy=POLICY)
    return z.to(tl.float32)


@triton.jit
def parts_with_block(
    parts, student, teacher, start, end, MASKED: tl.constexpr,
    STUDENT_CAPPED: tl.constexpr, TEACHER_CAPPED: tl.constexpr,
    BLOCK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Add a block to both models' parts of each thread. A model: row, scale, softcap, exponent."""
    part_s, part_t = parts
    row_s, scale_s, softcap_s, exponent_s = student
    row_t, scale_t, softcap_t, exponent_t = teacher
    columns = start + tl.arange(0, BLOCK)
    z_s = _load(row_s, columns, end, MASKED, "evict_last")
    z_t = _load(row_t, columns, end, MASKED, "evict_last")
    part_s = add(part_s, z_s, start, end, scale_s, softcap_s, exponent_s, STUDENT_CAPPED, GROUP)
    part_t = add(part_t, z_t, start, end, scale_t, softcap_t, exponent_t, TEACHER_CAPPED, GROUP)
    return part_s, part_t


@triton.jit
def _terms(log_s, log_t):
    """Return p_s, p_t (from their log2), and p_s - p_t + p_t l in two parts, the first in bits."""
    p_s = tl.exp2(log_s)
    p_t = tl.exp2(log_t)
    ratio = log_t - log_s
    series = _CUBE * ratio + _SQUARE
    series = series * ratio + _LINE
    near = tl.abs(ratio) < _NEAR
    far = tl.where(p_t == 0.0, 0.0, ratio)  # otherwise NaN or infinite
    slope = tl.where(near, series * ratio * ratio, far)
    return p_s, p_t, p_t * slope, tl.where(near, 0.0, p_s - p_t)


@triton.jit
def sums_with_block(
    sums, student, teacher, softmaxes, grad, factor, start, end, MASKED: tl.constexpr,
    NEED_GRAD: tl.constexpr, NEED_ROWS: tl.constexpr,
    STUDENT_CAPPED: tl.constexpr, TEACHER_CAPPED: tl.constexpr, NARROWED: tl.constexpr,
    BLOCK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Add the terms of a block to each thread's sums, and write its gradient."""
    bits, rest, entropy_s, entropy_t = sums
    row_s, scale_s, softcap_s, exponent_s = student
    row_t, scale_t, softcap_t, exponent_t = teacher
    top_s, total_s, top_t, total_t = softmaxes
    THREADS: tl.constexpr = bits.shape[0]
    columns = start + tl.arange(0, BLOCK)
    inside = columns < end
    y_s = _load(row_s, columns, end, MASKED, "evict_first")
    y_t = _load(row_t, columns, end, MASKED, "evict_first")
    slope = 1.0
    if STUDENT_CAPPED:
        y_s, slope = capped(y_s, inside, scale_s, softcap_s)
    if TEACHER_CAPPED:
        y_t, _slope = capped(y_t, inside, scale_t, softcap_t)
    log_s = (y_s - top_s) * exponent_s - total_s
    log_t = (y_t - top_t) * exponent_t - total_t
    p_s, p_t, term_bits, term_rest = _terms(log_s, log_t)
    bits += sums_of_threads(term_bits, THREADS, GROUP)
    rest += sums_of_threads(term_rest, THREADS, GROUP)
    if NEED_ROWS:  # p may be 0 and its logarithm -inf
        entropy_s -= sums_of_threads(p_s * tl.maximum(log_s, -1000.0), THREADS, GROUP)
        entropy_t -= sums_of_threads(p_t * tl.maximum(log_t, -1000.0), THREADS, GROUP)
    if NARROWED:
        tl.debug_barrier()
    if NEED_GRAD:
        value = narrow(factor * (p_s - p_t) * slope, grad.dtype.element_ty)
        if MASKED:
            tl.store(grad + columns, value, mask=inside, eviction_policy="evict_first")
        else:
            tl.store(grad + columns, value, eviction_policy="evict_first")
    return bits, rest, entropy_s, entropy_t
