"""A block of both models' logits in either pass of dual_kl; the mathematics is in dual_kl.py."""

from __future__ import annotations

import triton
import triton.language as tl

from leaf_ext.triton.divergence import kl_of_logs, terms_and_ratio
from leaf_ext.triton.narrow import narrow
from leaf_ext.triton.softmax import add, capped, sums_of_threads


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
def _logs(
    student, teacher, softmaxes, start, end, MASKED: tl.constexpr,
    STUDENT_CAPPED: tl.constexpr, TEACHER_CAPPED: tl.constexpr,
    BLOCK: tl.constexpr, POLICY: tl.constexpr,
):  # fmt: skip
    """Return log2 of both models' probabilities and the slope of the student's softcap."""
    row_s, scale_s, softcap_s, exponent_s = student
    row_t, scale_t, softcap_t, exponent_t = teacher
    top_s, total_s, top_t, total_t = softmaxes
    columns = start + tl.arange(0, BLOCK)
    inside = columns < end
    y_s = _load(row_s, columns, end, MASKED, POLICY)
    y_t = _load(row_t, columns, end, MASKED, POLICY)
    slope = 1.0
    if STUDENT_CAPPED:
        y_s, slope = capped(y_s, inside, scale_s, softcap_s)
    if TEACHER_CAPPED:
        y_t, _slope = capped(y_t, inside, scale_t, softcap_t)
    log_s = (y_s - top_s) * exponent_s - total_s
    log_t = (y_t - top_t) * exponent_t - total_t
    return log_s, log_t, slope


@triton.jit
def _store(grad, value, start, end, MASKED: tl.constexpr, BLOCK: tl.constexpr):
    columns = start + tl.arange(0, BLOCK)
    value = narrow(value, grad.dtype.element_ty)
    if MASKED:
        tl.store(grad + columns, value, mask=columns < end, eviction_policy="evict_first")
    else:
        tl.store(grad + columns, value, eviction_policy="evict_first")


@triton.jit
def _entropies(p_s, p_t, log_s, log_t, THREADS: tl.constexpr, GROUP: tl.constexpr):
    """Return each thread's -sum p log2 p of both models; p may be 0 and its logarithm -inf."""
    entropy_s = -sums_of_threads(p_s * tl.maximum(log_s, -1000.0), THREADS, GROUP)
    entropy_t = -sums_of_threads(p_t * tl.maximum(log_t, -1000.0), THREADS, GROUP)
    return entropy_s, entropy_t


@triton.jit
def kl_with_block(
    sums, student, teacher, softmaxes, grad, factor, start, end, MASKED: tl.constexpr,
    NEED_GRAD: tl.constexpr, NEED_ROWS: tl.constexpr,
    STUDENT_CAPPED: tl.constexpr, TEACHER_CAPPED: tl.constexpr, NARROWED: tl.constexpr,
    BLOCK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Add the terms of KL(p_t, p_s) to each thread's sums, and write the block's gradient."""
    bits, rest, entropy_s, entropy_t = sums
    THREADS: tl.constexpr = bits.shape[0]
    log_s, log_t, slope = _logs(
        student, teacher, softmaxes, start, end, MASKED,
        STUDENT_CAPPED, TEACHER_CAPPED, BLOCK, "evict_first",
    )  # fmt: skip
    p_s, p_t, term_bits, term_rest = kl_of_logs(log_s, log_t)
    bits += sums_of_threads(term_bits, THREADS, GROUP)
    rest += sums_of_threads(term_rest, THREADS, GROUP)
    if NEED_ROWS:
        more_s, more_t = _entropies(p_s, p_t, log_s, log_t, THREADS, GROUP)
        entropy_s += more_s
        entropy_t += more_t
    if NARROWED:
        tl.debug_barrier()
    if NEED_GRAD:
        _store(grad, factor * (p_s - p_t) * slope, start, end, MASKED, BLOCK)
    return bits, rest, entropy_s, entropy_t


@triton.jit
def sums_with_block(
    sums, means, student, teacher, softmaxes, mixture, start, end, MASKED: tl.constexpr,
    DIVERGENCE: tl.constexpr, NEED_ROWS: tl.constexpr,
    STUDENT_CAPPED: tl.constexpr, TEACHER_CAPPED: tl.constexpr,
    BLOCK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Add the terms of another divergence to the sums, and p_s r and p_s to the means."""
    bits, rest, entropy_s, entropy_t = sums
    ratio, mass = means
    THREADS: tl.constexpr = bits.shape[0]
    log_s, log_t, _slope = _logs(
        student, teacher, softmaxes, start, end, MASKED,
        STUDENT_CAPPED, TEACHER_CAPPED, BLOCK, "evict_last",
    )  # fmt: skip
    p_s = tl.exp2(log_s)
    p_t = tl.exp2(log_t)
    term_bits, term_rest, r = terms_and_ratio(
        p_s, p_t, log_s, log_t, mixture[0], mixture[1], DIVERGENCE
    )
    bits += sums_of_threads(term_bits, THREADS, GROUP)
    rest += sums_of_threads(term_rest, THREADS, GROUP)
    ratio += sums_of_threads(p_s * r, THREADS, GROUP)
    mass += sums_of_threads(p_s, THREADS, GROUP)
    if NEED_ROWS:
        more_s, more_t = _entropies(p_s, p_t, log_s, log_t, THREADS, GROUP)
        entropy_s += more_s
        entropy_t += more_t
    return (bits, rest, entropy_s, entropy_t), (ratio, mass)


@triton.jit
def write_gradient(
    student, teacher, softmaxes, mixture, mean, grad, factor, start, end, MASKED: tl.constexpr,
    DIVERGENCE: tl.constexpr, STUDENT_CAPPED: tl.constexpr, TEACHER_CAPPED: tl.constexpr,
    NARROWED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write a block's gradient of another divergence, p_s (r - mean)."""
    log_s, log_t, slope = _logs(
        student, teacher, softmaxes, start, end, MASKED,
        STUDENT_CAPPED, TEACHER_CAPPED, BLOCK, "evict_first",
    )  # fmt: skip
    p_s = tl.exp2(log_s)
    _bits, _rest, r = terms_and_ratio(
        p_s, tl.exp2(log_t), log_s, log_t, mixture[0], mixture[1], DIVERGENCE
    )
    if NARROWED:
        tl.debug_barrier()
    _store(grad, factor * p_s * (r - mean) * slope, start, end, MASKED, BLOCK)
