"""A block of the student's logits in either pass of topk_kl; the mathematics is in topk_kl.py."""

from __future__ import annotations

import triton
import triton.language as tl

from leaf_ext.triton.narrow import narrow
from leaf_ext.triton.softmax import add_capped, capped, sums_of_threads


@triton.jit
def capped_logits(z, inside, scale, softcap, CAPPED: tl.constexpr):
    """Return y and dy/d(scale * z); without a softcap the scale is part of the exponent."""
    slope = tl.full([z.shape[0]], 1.0, tl.float32)
    y = z
    if CAPPED:
        y, slope = capped(z, inside, scale, softcap)
    return y, slope


@triton.jit
def _load(row, columns, end, POLICY: tl.constexpr):
    """Load logits as float32; -inf from `end` on, so that p is 0 there."""
    z = tl.load(row + columns, mask=columns < end, other=float("-inf"), eviction_policy=POLICY)
    return z.to(tl.float32)


@triton.jit
def part_with_block(
    part, student, ids, listed, start, end, CAPPED: tl.constexpr,
    BLOCK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Add the logits of a block that are not at the ids to each thread's part of the row."""
    row, scale, softcap, exponent = student
    columns = start + tl.arange(0, BLOCK)
    z = _load(row, columns, end, "evict_last")
    y, _slope = capped_logits(z, columns < end, scale, softcap, CAPPED)
    here = listed & (ids >= start) & (ids < start + BLOCK)
    if tl.sum(here.to(tl.int32)) > 0:
        taken = tl.histogram((ids - start).to(tl.int32), BLOCK, mask=here) > 0
        z = tl.where(taken, float("-inf"), z)
        y = tl.where(taken, float("-inf"), y)
    return add_capped(part, z, y, start, exponent, GROUP)


@triton.jit
def entropy_with_block(
    entropy, student, whole, others, grad, factor, start, end,
    NEED_GRAD: tl.constexpr, NEED_ROWS: tl.constexpr, CAPPED: tl.constexpr,
    NARROWED: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Add a block's part of the entropy, in bits, to each thread's, and write its gradient.

    The gradient is right where no id is. `whole` and `others` are the largest y and the log2 of the
    sum of powers, of the row and of the row without the ids.
    """
    row, scale, softcap, exponent = student
    columns = start + tl.arange(0, BLOCK)
    inside = columns < end
    z = _load(row, columns, end, "evict_first")
    y, slope = capped_logits(z, inside, scale, softcap, CAPPED)
    if NEED_ROWS:  # p may be 0 and its logarithm -inf
        log_p = (y - whole[0]) * exponent - whole[1]
        entropy -= sums_of_threads(
            tl.exp2(log_p) * tl.maximum(log_p, -1000.0), entropy.shape[0], GROUP
        )
    if NARROWED:
        tl.debug_barrier()
    if NEED_GRAD:
        share = tl.exp2((y - others[0]) * exponent - others[1])
        value = narrow(factor * share * slope, grad.dtype.element_ty)
        tl.store(grad + columns, value, mask=inside, eviction_policy="evict_first")
    return entropy
