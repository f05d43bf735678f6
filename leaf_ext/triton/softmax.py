"""Scaled, capped logits and the online softmax of a row, element by element of a block."""

from __future__ import annotations

import triton
import triton.language as tl

# The maximum of an empty set of logits. It is finite, so that -inf - (-inf) does not arise.
LOWEST = tl.constexpr(-3.4028234663852886e38)
# Below this magnitude tanh is computed by its series, whose next term is 1e-8 of the value.
_SMALL = tl.constexpr(0.25)


@triton.jit
def tanh_and_slope(a):
    """Return tanh(a) and 1 - tanh(a)^2, both without cancellation."""
    e = tl.exp(-2.0 * tl.abs(a))
    outer = 1.0 - 2.0 * e / (1.0 + e)
    a2 = a * a
    series = 62.0 / 2835 * a2 - 17.0 / 315
    series = series * a2 + 2.0 / 15
    series = series * a2 - 1.0 / 3
    inner = a + a * a2 * series
    tanh = tl.where(tl.abs(a) < _SMALL, inner, tl.where(a < 0, -outer, outer))
    return tanh, 4.0 * e / ((1.0 + e) * (1.0 + e))


@triton.jit
def capped(z, inside, scale, softcap):
    """Return y = softcap * tanh(scale * z / softcap), -inf outside, and dy/d(scale * z)."""
    tanh, slope = tanh_and_slope(z * scale / softcap)
    return tl.where(inside, softcap * tanh, float("-inf")), slope


@triton.jit
def by_threads(x, THREADS: tl.constexpr, GROUP: tl.constexpr):
    """Return the register layout of a block: [groups of a thread, threads, elements of a group].

    A reduction over the first and the last dimension stays within a thread.
    """
    return tl.reshape(x, [x.shape[0] // (THREADS * GROUP), THREADS, GROUP])


@triton.jit
def sums_of_threads(x, THREADS: tl.constexpr, GROUP: tl.constexpr):
    return tl.sum(tl.sum(by_threads(x, THREADS, GROUP), 2), 0)


@triton.jit
def largest_of_threads(x, THREADS: tl.constexpr, GROUP: tl.constexpr):
    return tl.max(tl.max(by_threads(x, THREADS, GROUP), 2), 0)


@triton.jit
def no_logits(THREADS: tl.constexpr):
    """Return the initial part: the largest y, the sum, the largest z, the block it is in."""
    lowest = tl.full([THREADS], LOWEST, tl.float32)
    nothing = tl.full([THREADS], float("-inf"), tl.float32)
    return lowest, tl.full([THREADS], 0.0, tl.float32), nothing, tl.full([THREADS], 0, tl.int32)


@triton.jit
def add(part, z, start, end, scale, softcap, exponent, CAPPED: tl.constexpr, GROUP: tl.constexpr):
    """Add a block of logits, which are -inf from `end` on, to each thread's part of a row."""
    y = z
    if CAPPED:
        y, _slope = capped(z, start + tl.arange(0, z.shape[0]) < end, scale, softcap)
    return add_capped(part, z, y, start, exponent, GROUP)


@triton.jit
def add_capped(part, z, y, start, exponent, GROUP: tl.constexpr):
    """Add a block of logits z and of their capped values y to each thread's part of a row.

    A thread finds its largest y first, so that each of its logits takes one exponential,
    exp2((y - largest) * exponent), and no select. Blocks must come in descending order.
    """
    top, total, best, first = part
    THREADS: tl.constexpr = top.shape[0]
    raised = tl.maximum(top, largest_of_threads(y, THREADS, GROUP))
    e = tl.exp2((by_threads(y, THREADS, GROUP) - raised[None, :, None]) * exponent)
    total = total * tl.exp2((top - raised) * exponent) + tl.sum(tl.sum(e, 2), 0)
    largest = largest_of_threads(z, THREADS, GROUP)
    first = tl.where(largest >= best, start, first)
    return raised, total, tl.maximum(best, largest), first


@triton.jit
def fold(part, exponent):
    """Return the row's largest y and sum of exp2((y - largest) * exponent), 0 if all are -inf."""
    top, total, _best, _first = part
    largest = tl.max(top)
    return largest, tl.sum(total * tl.exp2((top - largest) * exponent))


@triton.jit
def first_of_largest(part, row, end, BLOCK: tl.constexpr):
    """Return the lowest index of the row's largest z."""
    _top, _total, best, first = part
    largest = tl.max(best)
    columns = tl.min(tl.where(best == largest, first, end)) + tl.arange(0, BLOCK)
    z = tl.load(row + columns, mask=columns < end, other=float("-inf")).to(tl.float32)
    return tl.min(tl.where(z == largest, columns, end))
