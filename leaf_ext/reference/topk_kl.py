"""Weighted KL divergence of a student from a teacher known by its k largest probabilities."""

from __future__ import annotations

import torch
from torch import Tensor

from leaf_ext.reference.dual_kl import (
    DualKL,
    apply_temperature,
    entropy,
    float16_scale,
    kl_rows,
)
from leaf_ext.reference.upcast import upcast
from leaf_ext.schema import gradient_rows


def topk_kl(
    student: Tensor,
    teacher_ids: Tensor,
    teacher_logprobs: Tensor,
    teacher_tail: Tensor,
    row_weight: Tensor,
    temperature: float,
    scale: float,
    softcap: float,
    need_grad: bool,
    need_rows: bool,
) -> DualKL:
    """Compute the KL divergence over k + 1 outcomes: the k ids, and all other ids together.

        loss       = temperature^2 * sum_i row_weight_i * (sum_j p_t log(p_t / p_s) + t log(t / u))
        dloss/dz_s = row_weight_i * temperature * (p_s - p_t) * dx/dz           on the ids
        dloss/dz_s = row_weight_i * temperature * p_s (1 - t / u) * dx/dz       elsewhere

    p_s is the softmax of the student's logits x, u its mass outside the k ids. The teacher's p_t
    and t, given as logarithms, are divided by their sum.
    """
    dtype = student.dtype if need_grad else None
    teacher = teacher_ids, teacher_logprobs, teacher_tail
    return _topk_kl(student, teacher, row_weight, (scale, softcap, temperature), dtype, need_rows)


def topk_kl_(
    student: Tensor,
    teacher_ids: Tensor,
    teacher_logprobs: Tensor,
    teacher_tail: Tensor,
    row_weight: Tensor,
    temperature: float,
    scale: float,
    softcap: float,
    need_grad: bool,
    need_rows: bool,
    grad_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `topk_kl`, but the gradient overwrites the student's logits (see `gradient_rows`)."""
    dtype = (grad_dtype or student.dtype) if need_grad else None
    teacher = teacher_ids, teacher_logprobs, teacher_tail
    options = (scale, softcap, temperature)
    result = _topk_kl(student, teacher, row_weight, options, dtype, need_rows)
    if need_grad:
        gradient_rows(student, grad_dtype).copy_(result.grad)
    return result.loss, result.grad_scale, result.rows


def tail_logprob(logprobs: Tensor, vocabulary: int) -> Tensor:
    """Return log(1 - sum_j exp(logprobs_j)) of each row; -inf if nothing is left of 1.

    If the k ids are the whole vocabulary, there are no others, whatever the rounding of the sum.
    """
    if logprobs.shape[1] >= vocabulary:
        return torch.full_like(logprobs[:, 0], -torch.inf)
    return (-torch.expm1(logprobs.logsumexp(-1).clamp(max=0.0))).log()


def _topk_kl(
    student: Tensor,
    teacher: tuple[Tensor, Tensor, Tensor],
    row_weight: Tensor,
    options: tuple[float, float, float],
    grad_dtype: torch.dtype | None,
    need_rows: bool,
) -> DualKL:
    live = row_weight.nonzero().squeeze(1)
    # Indexing comes first: a dropped row may contain anything, also NaN, and is never read.
    raw, weight = student[live], row_weight[live]
    ids, logprobs, tail = (tensor[live] for tensor in teacher)
    x = apply_temperature(raw, *options)
    x = x - x.amax(-1, keepdim=True)  # an offset of the logits costs no digits
    others = x.scatter(1, ids, -torch.inf)
    # The logarithms of the k + 1 probabilities, up to a constant of the row. The student's mass
    # outside the ids is summed directly, because 1 minus the mass on them would cancel.
    x_s = torch.cat((x.gather(1, ids), others.logsumexp(-1, keepdim=True)), 1)
    x_t = torch.cat((upcast(logprobs), upcast(tail)[:, None]), 1)
    kl = kl_rows(x_s, x_t)
    scale, softcap, temperature = options
    loss = temperature**2 * (weight * kl).sum()

    grad_scale = torch.ones_like(loss)
    grad = student.new_empty(0)
    if grad_dtype is not None:
        bound = temperature * scale
        grad_scale = float16_scale(weight, bound) if grad_dtype == torch.float16 else grad_scale
        difference = x_s.softmax(-1) - x_t.softmax(-1)
        # p_s (1 - t / u) = (u - t) p_s / u, in which p_s / u is a softmax without the ids.
        share = others.softmax(-1).where(others != -torch.inf, torch.zeros_like(others))
        slope = (share * difference[:, -1:]).scatter(1, ids, difference[:, :-1])
        slope = bound * (weight * grad_scale)[:, None] * slope
        if softcap:
            slope = slope * (1 - torch.tanh(upcast(raw) * scale / softcap) ** 2)
        grad = student.new_zeros(student.shape, dtype=grad_dtype)
        grad[live] = slope.to(grad_dtype)
    metrics = loss.new_zeros(4, student.shape[0] if need_rows else 0)
    if need_rows:
        agree = (raw.argmax(-1) == largest_id(ids, logprobs)).to(kl.dtype)
        agree = agree.where(~kl.isnan(), kl)
        metrics[:, live] = torch.stack((kl, entropy(x), entropy(x_t), agree))
    return DualKL(loss, grad, grad_scale, metrics)


def largest_id(ids: Tensor, logprobs: Tensor) -> Tensor:
    """Return the id of the largest log-probability of each row, the lowest id of equal ones."""
    largest = logprobs == logprobs.amax(-1, keepdim=True)
    return ids.masked_fill(~largest, torch.iinfo(ids.dtype).max).amin(-1)
