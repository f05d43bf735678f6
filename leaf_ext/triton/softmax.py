"""Scaled, capped logits and the online softmax of a row, element by element of a block."""

from __future__ import annotations

import triton
import triton.language as tl

# Stands for the maximum of no logits: finite, so that no -inf - (-inf) arises.
LOWEST = tl.constexpr(-3.4028234663852886e38)
# Below this magnitude tanh is its series, whose next term is 1e-8 of the value.
_SMALL = tl.constexpr(0.25)


@triton.jit
def tanh_and_slope(a):
    """tanh(a) and 1 - tanh(a)^2, neither of which cancels."""
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
def capped(z, scale, softcap, CAPPED: tl.constexpr):
    """y = softcap * tanh(scale * z / softcap), and the softcap's chain factor."""
    y = z * scale
    slope = 1.0
    if CAPPED:
        tanh, slope = tanh_and_slope(y / softcap)
        y = softcap * tanh
    return y, slope


@triton.jit
def online(largest, total, y, inv_temperature):
    """Adds exp(y / T) to total * exp(largest / T), each lane by itself, with one exponential."""
    distance = y - largest
    e = tl.exp(-tl.abs(distance) * inv_temperature)
    total = tl.where(distance > 0, total * e + 1.0, total + e)
    return tl.maximum(largest, y), total


@triton.jit
def fold(largest, total, inv_temperature):
    """The row's maximum and sum of exp((y - maximum) / T). No logit above -inf: a sum of 0."""
    top = tl.max(largest)
    return top, tl.sum(total * tl.exp((largest - top) * inv_temperature))


@triton.jit
def first_of_largest(best, where, limit):
    """The lowest index among the lanes that hold the largest value."""
    return tl.min(tl.where(best == tl.max(best), where, limit))
