"""Terms of the divergences of a block of tokens, from log2 of both models' probabilities.

With l = log p_t - log p_s and m = beta p_t + (1 - beta) p_s:

    KL                D = sum_v p_s - p_t + p_t l          dD/dx_s = p_s - p_t
    REVERSE_KL        D = sum_v p_t - p_s - p_s l          r = -l
    JENSEN_SHANNON    D = beta KL(p_t, m) + (1 - beta) KL(p_s, m)
                                                           r = (1 - beta) log(p_s / m)

The gradient of the last two, dD/dx_s = p_s (r - sum_v p_s r), needs a sum over the row first.
"""

from __future__ import annotations

import triton
import triton.language as tl

KL = tl.constexpr(0)
REVERSE_KL = tl.constexpr(1)
JENSEN_SHANNON = tl.constexpr(2)

# phi = ln(2) r^2 (_LINE + _SQUARE r + _CUBE r^2), r = l / ln(2); relative error 3e-6 below _NEAR.
_NEAR = tl.constexpr(0.125)
_LINE = tl.constexpr(0.34657359027997264)
_SQUARE = tl.constexpr(-0.08009804480979624)
_CUBE = tl.constexpr(0.013876027166205394)

_LOG2E = tl.constexpr(1.4426950408889634)
_LN2 = tl.constexpr(0.6931471805599453)
# In a gradient a larger log(p_s / p_t) counts as this: it is infinite where the teacher excludes a
# token.
_LARGEST_RATIO = tl.constexpr(1000.0)


@triton.jit
def kl_terms(p, q, ratio):
    """Return q - p + p l in two parts, the first in bits; `ratio` is log2(p / q)."""
    series = _CUBE * ratio + _SQUARE
    series = series * ratio + _LINE
    near = tl.abs(ratio) < _NEAR
    far = tl.where(p == 0.0, 0.0, ratio)  # otherwise NaN or infinite
    slope = tl.where(near, series * ratio * ratio, far)
    return p * slope, tl.where(near, 0.0, q - p)


@triton.jit
def kl_of_logs(log_s, log_t):
    """Return p_s, p_t (from their log2), and the terms of KL(p_t, p_s) as `kl_terms` does."""
    p_s = tl.exp2(log_s)
    p_t = tl.exp2(log_t)
    bits, excess = kl_terms(p_t, p_s, log_t - log_s)
    return p_s, p_t, bits, excess


@triton.jit
def _expm1(x, decay):
    """Return e^x - 1 for x <= 0 from decay = e^x, to full precision also near 0."""
    series = x * (1.0 / 5040) + 1.0 / 720
    series = series * x + 1.0 / 120
    series = series * x + 1.0 / 24
    series = series * x + 1.0 / 6
    series = series * x + 0.5
    return tl.where(x > -0.35, x + x * x * series, decay - 1.0)


@triton.jit
def _log2_of_mixture(own, other, bits):
    """Return log2(own + other 2^bits), own + other = 1, bits <= 0, to full precision near 0."""
    decay = tl.exp2(bits)
    below = other * _expm1(bits * _LN2, decay)
    z = below / (2.0 + below)  # log(1 + below) = 2 atanh(z)
    square = z * z
    series = square * (1.0 / 7) + 1.0 / 5
    series = series * square + 1.0 / 3
    near = 2.0 * _LOG2E * (z + z * square * series)
    return tl.where(below > -0.25, near, tl.log2(own + other * decay))


@triton.jit
def terms_and_ratio(p_s, p_t, log_s, log_t, beta, rest, DIVERGENCE: tl.constexpr):
    """Return the terms as `kl_terms` does, and r, 0 where p_s is 0; not for KL.

    `beta` and `rest` are the shares of teacher and student in the mixture.
    """
    ratio = log_t - log_s
    if DIVERGENCE == REVERSE_KL:
        bits, excess = kl_terms(p_s, p_t, -ratio)
        r = -ratio * _LN2
        r = tl.where(r > _LARGEST_RATIO, _LARGEST_RATIO, r)
    else:
        more = ratio > 0.0
        own = tl.where(more, beta, rest)
        log_m = _log2_of_mixture(own, tl.where(more, rest, beta), -tl.abs(ratio))
        below_t = tl.where(more, -log_m, ratio - log_m)  # log2(p_t / m)
        below_s = tl.where(more, -log_m - ratio, -log_m)
        m = beta * p_t + rest * p_s
        bits_t, excess_t = kl_terms(p_t, m, below_t)
        bits_s, excess_s = kl_terms(p_s, m, below_s)
        bits = beta * bits_t + rest * bits_s
        excess = beta * excess_t + rest * excess_s
        r = rest * _LN2 * below_s
    return bits, excess, tl.where(p_s == 0.0, 0.0, r)
