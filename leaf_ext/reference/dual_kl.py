"""Weighted divergence of two sets of logits, with its gradient."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from leaf_ext.reference.upcast import upcast
from leaf_ext.schema import gradient_rows, slope_bound

# Below this difference of two log-probabilities the `expm1` form is the accurate one.
_CLOSE = 0.5
# A float16 gradient is scaled so that its bound is 2**15, one binade below overflow.
_FLOAT16_EXPONENT = 15
# In the gradient of the reverse KL a larger log(p_s / p_t) counts as this: it is infinite where the
# teacher excludes a token.
_LARGEST_RATIO = 1000.0


class DualKL(NamedTuple):
    """loss []; grad like the student's logits; grad_scale []; rows [4, N]."""

    loss: Tensor
    grad: Tensor
    grad_scale: Tensor
    rows: Tensor


def apply_temperature(logits: Tensor, scale: float, softcap: float, temperature: float) -> Tensor:
    """Return x = softcap * tanh(scale * z / softcap) / temperature; a softcap of 0 means none."""
    scaled = upcast(logits) * scale
    if softcap:
        scaled = softcap * torch.tanh(scaled / softcap)
    return scaled / temperature


def divergence_rows(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
    """Return the divergence D(p_t, p_s) of each row of logits x, differentiable.

    beta is 0: KL(p_t, p_s);  1: KL(p_s, p_t);  between them, the generalized Jensen-Shannon
    divergence beta KL(p_t, m) + (1 - beta) KL(p_s, m) with m = beta p_t + (1 - beta) p_s.
    """
    log_s, log_t = student.log_softmax(-1), teacher.log_softmax(-1)
    p_s, p_t = log_s.exp(), log_t.exp()
    if beta == 0:
        return _kl(p_t, p_s, log_t - log_s)
    if beta == 1:
        return _kl(p_s, p_t, log_s - log_t)
    mixture = beta * p_t + (1 - beta) * p_s
    ratio_s, ratio_t = mixture_ratios(log_s, log_t, beta)
    return beta * _kl(p_t, mixture, ratio_t) + (1 - beta) * _kl(p_s, mixture, ratio_s)


def kl_rows(student: Tensor, teacher: Tensor) -> Tensor:
    """Return KL(p_t, p_s) of each row of logits x, differentiable."""
    return divergence_rows(student, teacher, 0.0)


def kl_of_logs(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return KL(p, q) of each row of log-probabilities, differentiable."""
    return _kl(log_p.exp(), log_q.exp(), log_p - log_q)


def _kl(p: Tensor, q: Tensor, log_ratio: Tensor) -> Tensor:
    """Return KL(p, q) of each row from the probabilities and l = log p - log q.

        kl[i] = sum_v (q - p + p * l)

    Each term is at least 0, so nothing cancels between terms. Within a term
    q - p = p * (e^-l - 1), which `expm1` computes to full precision if l is small.
    """
    shared = (p > 0) | p.isnan()
    ratio = torch.where(shared, log_ratio, torch.zeros_like(log_ratio))
    close = ratio.abs() < _CLOSE
    near = torch.where(close, ratio, torch.zeros_like(ratio))
    far = torch.where(close, torch.ones_like(ratio), ratio)
    terms = torch.where(close, p * (torch.expm1(-near) + near), q - p + p * far)
    return torch.where(shared, terms, q).sum(-1)


def mixture_ratios(log_s: Tensor, log_t: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Return log(p_s / m) and log(p_t / m), m = beta p_t + (1 - beta) p_s.

    m is divided by the larger of p_s and p_t: log(1 + other * (e^-|l| - 1)) with `expm1` keeps its
    digits if l = log p_t - log p_s is small, log(own + other * e^-|l|) if it is not.
    """
    ratio = torch.where(log_s == log_t, torch.zeros_like(log_s), log_t - log_s)  # both may be -inf
    more = ratio > 0
    below = torch.where(more, -ratio, ratio)
    shares = ratio.new_full((), beta), ratio.new_full((), 1 - beta)
    own, other = torch.where(more, *shares), torch.where(more, *shares[::-1])
    near, far = torch.log1p(other * torch.expm1(below)), torch.log(own + other * below.exp())
    log_m = torch.where(below > -_CLOSE, near, far)
    return torch.where(more, -log_m - ratio, -log_m), torch.where(more, -log_m, ratio - log_m)


def slope_rows(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
    """Return dD/dx_s of each row of logits x.

        KL(p_t, p_s)      p_s - p_t
        KL(p_s, p_t)      p_s (r - sum_v p_s r),                 r = log p_s - log p_t
        Jensen-Shannon    (1 - beta) p_s (r - sum_v p_s r),      r = log p_s - log m

    r is at most 1000, which makes the gradient of an infinite KL(p_s, p_t) finite.
    """
    if beta == 0:
        return student.softmax(-1) - teacher.softmax(-1)
    log_s, log_t = student.log_softmax(-1), teacher.log_softmax(-1)
    p_s = log_s.exp()
    ratio = log_s - log_t if beta == 1 else mixture_ratios(log_s, log_t, beta)[0]
    ratio = torch.where(p_s == 0, torch.zeros_like(ratio), ratio.clamp(max=_LARGEST_RATIO))
    mean = (p_s * ratio).sum(-1, keepdim=True) / p_s.sum(-1, keepdim=True)
    return (1.0 if beta == 1 else 1 - beta) * p_s * (ratio - mean)


def dual_kl(
    student: Tensor,
    teacher: Tensor,
    row_weight: Tensor,
    temperature: float,
    student_scale: float,
    teacher_scale: float,
    student_softcap: float,
    teacher_softcap: float,
    beta: float,
    need_grad: bool,
    need_rows: bool,
) -> DualKL:
    """Compute both terms of LeaF's loss as one divergence with a weight on each row.

        loss         = temperature^2 * sum_i row_weight_i * D(p_t, p_s)
        dloss/dz_s   = row_weight_i * temperature * dD/dx_s * dx/dz,     dD/dx_s = p_s - p_t for KL

    p = softmax of the logits x over the common vocabulary (LeaF, arXiv:2506.07851, the objective of
    section 3; the weights include lambda and both denominators).
    """
    student_options = (student_scale, student_softcap, temperature)
    teacher_options = (teacher_scale, teacher_softcap, temperature)
    dtype = student.dtype if need_grad else None
    return _dual_kl(
        student, teacher, row_weight, student_options, teacher_options, beta, dtype, need_rows
    )


def dual_kl_(
    student: Tensor,
    teacher: Tensor,
    row_weight: Tensor,
    temperature: float,
    student_scale: float,
    teacher_scale: float,
    student_softcap: float,
    teacher_softcap: float,
    beta: float,
    need_grad: bool,
    need_rows: bool,
    grad_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `dual_kl`, but the gradient overwrites the student's logits (see `gradient_rows`)."""
    student_options = (student_scale, student_softcap, temperature)
    teacher_options = (teacher_scale, teacher_softcap, temperature)
    dtype = (grad_dtype or student.dtype) if need_grad else None
    result = _dual_kl(
        student, teacher, row_weight, student_options, teacher_options, beta, dtype, need_rows
    )
    if need_grad:
        gradient_rows(student, grad_dtype).copy_(result.grad)
    return result.loss, result.grad_scale, result.rows


def _dual_kl(
    student: Tensor,
    teacher: Tensor,
    row_weight: Tensor,
    student_options: tuple[float, float, float],
    teacher_options: tuple[float, float, float],
    beta: float,
    grad_dtype: torch.dtype | None,
    need_rows: bool,
) -> DualKL:
    rows, vocabulary = student.shape[0], min(student.shape[1], teacher.shape[1])
    live = row_weight.nonzero().squeeze(1)
    # Indexing comes first: a dropped row may contain anything, also NaN, and is never read.
    raw_s, raw_t = student[live, :vocabulary], teacher[live, :vocabulary]
    x_s, x_t = (
        apply_temperature(raw_s, *student_options),
        apply_temperature(raw_t, *teacher_options),
    )
    weight = row_weight[live]
    kl = divergence_rows(x_s, x_t, beta)
    scale, softcap, temperature = student_options
    loss = temperature**2 * (weight * kl).sum()

    grad_scale = torch.ones_like(loss)
    grad = student.new_empty(0)
    if grad_dtype is not None:
        factor = temperature * scale
        if grad_dtype == torch.float16:
            grad_scale = float16_scale(weight, factor * slope_bound(beta))
        slope = factor * (weight * grad_scale)[:, None] * slope_rows(x_s, x_t, beta)
        if softcap:
            slope = slope * (1 - torch.tanh(upcast(raw_s) * scale / softcap) ** 2)
        grad = student.new_zeros(student.shape, dtype=grad_dtype)
        grad[live, :vocabulary] = slope.to(grad_dtype)
    metrics = loss.new_zeros(4, rows if need_rows else 0)
    if need_rows:
        metrics[:, live] = torch.stack(
            (kl, entropy(x_s), entropy(x_t), agreement(raw_s, raw_t, kl))
        )
    return DualKL(loss, grad, grad_scale, metrics)


def float16_scale(weight: Tensor, bound: float) -> Tensor:
    """Return the power of two that scales a float16 gradient of at most max|weight| * bound."""
    if weight.numel() == 0:
        return weight.new_ones(())
    exponent = _FLOAT16_EXPONENT - (weight.abs().amax() * bound).log2().ceil()
    scale = exponent.clamp(-126, 126).exp2()
    return torch.where(exponent.isfinite(), scale, torch.ones_like(scale))


def entropy(x: Tensor) -> Tensor:
    """Return -sum_v p log p of each row of logits x, in nats; 0 log 0 = 0."""
    return entropy_of_logs(x.log_softmax(-1))


def entropy_of_logs(log_p: Tensor) -> Tensor:
    """Return -sum_v p log p of each row of log-probabilities."""
    p = log_p.exp()
    return -torch.where(p == 0, torch.zeros_like(p), p * log_p).sum(-1)


def agreement(student: Tensor, teacher: Tensor, kl: Tensor) -> Tensor:
    """Return 1 if both have their largest logit at the same index (the lowest of ties), else 0.

    NaN where `kl` is NaN.
    """
    same = (student.argmax(-1) == teacher.argmax(-1)).to(kl.dtype)
    return torch.where(kl.isnan(), torch.full_like(kl, math.nan), same)
