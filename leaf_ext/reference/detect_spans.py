"""From two models' gradient norms to the spans of confounding tokens."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from leaf_ext.reference.grad_norm import grad_norm
from leaf_ext.reference.upcast import upcast
from leaf_ext.schema import LOG_FLOOR

# If the gap varies by less over a whole sequence, its order is due to rounding: no spans.
MIN_GAP_RANGE = 1e-6
# Bits of `status`.
TEACHER_NOT_FINITE, STUDENT_NOT_FINITE = 1, 2


class SpanTensors(NamedTuple):
    """span [B, ceil(T/2), 2], count [B], status [B]: int64; score, confounder: like domain."""

    span: Tensor
    count: Tensor  # type: ignore[assignment]  # a field, where tuple has a method
    score: Tensor
    confounder: Tensor
    status: Tensor


def detect_spans(
    teacher: Tensor,
    student: Tensor,
    domain: Tensor,
    prunable: Tensor | None,
    log_scale: bool,
    student_weight: float,
    threshold: float,
    quantile: bool,
    cap: float,
    teacher_max: float,
    join_gap: int,
    min_length: int,
    cu_seqlens: Tensor | None,
    max_seqlen: int,
) -> SpanTensors:
    """Detect spans of tokens to which the student reacts far more than the teacher.

        s_hat = (s - min s) / (max s - min s)   over the domain     (LeaF, arXiv:2506.07851, Eq. 3)
        gap   = s_hat_teacher - student_weight * s_hat_student                              (Eq. 4)
        score = (gap - min gap) / (max gap - min gap)                                       (Eq. 5)
        confounder = domain & prunable & (score <= cut) & (s_hat_teacher <= teacher_max)

    cut = threshold, or with `quantile` min(cap, sorted(score)[min(n-1, floor(threshold * n))]).
    With `log_scale` the gap is that of s_hat = log(max(s, LOG_FLOOR max s)), 0 where max s is 0.
    """
    if teacher.dim() > domain.dim():
        teacher, student = grad_norm(teacher), grad_norm(student)
    prunable = domain if prunable is None else domain & prunable
    position = _positions(domain, cu_seqlens, max_seqlen)

    def padded(values: Tensor, fill: float | bool) -> Tensor:
        flat = torch.cat((values.reshape(-1), values.new_full((1,), fill)))
        return flat[position]

    inside, may_cut = padded(domain, False), padded(prunable, False)
    s_teacher, s_student = padded(upcast(teacher), 0.0), padded(upcast(student), 0.0)
    teacher_broken = (inside & ~s_teacher.isfinite()).any(1)
    student_broken = (inside & ~s_student.isfinite()).any(1)
    status = teacher_broken * TEACHER_NOT_FINITE + student_broken * STUDENT_NOT_FINITE
    broken = status > 0

    s_hat_teacher, _ = min_max(s_teacher, inside)
    if log_scale:
        gap = log_gap(s_teacher, s_student, inside, student_weight)
    else:
        s_hat_student, _ = min_max(s_student, inside)
        gap = s_hat_teacher - student_weight * s_hat_student
    score, gap_range = min_max(gap, inside)
    score = score.masked_fill(~inside | broken[:, None], math.nan)

    cut = _cut(score, inside, threshold, cap) if quantile else torch.full_like(gap_range, threshold)
    confounder = (
        may_cut
        & (score <= cut)
        & (s_hat_teacher <= teacher_max)
        & (gap_range >= MIN_GAP_RANGE)
        & ~broken[:, None]
    )
    span, count = spans_of(confounder, inside, join_gap, min_length)

    def unpadded(values: Tensor, fill: float | bool) -> Tensor:
        flat = values.new_full((domain.numel() + 1,), fill)
        flat[position] = values
        return flat[:-1].view(domain.shape)

    return SpanTensors(span, count, unpadded(score, math.nan), unpadded(confounder, False), status)


def _positions(domain: Tensor, cu_seqlens: Tensor | None, length: int) -> Tensor:
    """Return the index of each [B, T] position in the flat input, or its size if there is none."""
    step = torch.arange(length, device=domain.device)
    if cu_seqlens is None:
        sequences = torch.arange(domain.shape[0], device=domain.device)
        return sequences[:, None] * length + step
    start, stop = cu_seqlens[:-1, None], cu_seqlens[1:, None]
    return torch.where(step < stop - start, start + step, domain.numel())


def min_max(values: Tensor, inside: Tensor) -> tuple[Tensor, Tensor]:
    """Return the values normalized over the tokens inside (0 if all are equal), and max - min."""
    if values.shape[1] == 0:
        return values, values.new_zeros(values.shape[0], 1)
    lowest = values.masked_fill(~inside, math.inf).amin(1, keepdim=True)
    highest = values.masked_fill(~inside, -math.inf).amax(1, keepdim=True)
    spread = torch.where(highest > lowest, highest - lowest, torch.zeros_like(lowest))
    shifted = torch.where(inside & (spread > 0), values - lowest, torch.zeros_like(values))
    return shifted / torch.where(spread > 0, spread, torch.ones_like(spread)), spread


def log_gap(teacher: Tensor, student: Tensor, inside: Tensor, student_weight: float) -> Tensor:
    """Return log t - student_weight * log s, t and s being shares of the sequence's largest norm.

    Dividing by the largest norm shifts the gap of a sequence by a constant, which cancels in the
    score. Weights of 1 and 0 make no rounding error in a gap that is equal everywhere.
    """
    t, s = (_shares(values, inside) for values in (teacher, student))
    if student_weight < 0.5:
        return t.log() - student_weight * s.log()
    return (t / s).log() - (student_weight - 1) * s.log()


def _shares(values: Tensor, inside: Tensor) -> Tensor:
    """Return the values divided by the largest one inside, at least LOG_FLOOR; 1 if that is 0."""
    if values.shape[1] == 0:
        return values
    highest = values.masked_fill(~inside, 0.0).amax(1, keepdim=True).clamp(min=0.0)
    counted = inside & (highest > 0)
    share = values / torch.where(highest > 0, highest, torch.ones_like(highest))
    return torch.where(counted, share.clamp(min=LOG_FLOOR), torch.ones_like(share))


def _cut(score: Tensor, inside: Tensor, threshold: float, cap: float) -> Tensor:
    """Apply the authors' rank rule: the score at rank floor(threshold * n), at most `cap`."""
    if score.shape[1] == 0:
        return score.new_zeros(score.shape[0], 1)
    tokens = inside.sum(1, keepdim=True)
    rank = (tokens.double() * threshold).floor().long()
    rank = torch.minimum(rank, tokens - 1).clamp(min=0)
    ascending = score.masked_fill(~inside, math.inf).sort(1).values
    return ascending.gather(1, rank).clamp(max=cap)


def spans_of(
    confounder: Tensor, inside: Tensor, join_gap: int, min_length: int
) -> tuple[Tensor, Tensor]:
    """Return the maximal runs of confounders as [start, stop), unused rows -1, and their number.

    A confounder continues the run of the one before it when at most `join_gap` tokens lie between
    them and none of these is outside the domain.
    """
    sequences, length = confounder.shape
    capacity = (length + 1) // 2
    position = torch.arange(length, device=confounder.device).expand(sequences, length)
    nowhere = -(length + join_gap + 2)
    latest = torch.where(confounder, position, nowhere)
    before = torch.cat((latest.new_full((sequences, 1), nowhere), latest), 1)
    before = before.cummax(1).values[:, :length]
    outside = torch.nn.functional.pad((~inside).long().cumsum(1), (1, 0))
    same_stretch = outside[:, :length] == outside.gather(1, before.clamp(min=0))
    starts = confounder & ~((position - before - 1 <= join_gap) & same_stretch)

    run = torch.where(confounder, starts.long().cumsum(1) - 1, capacity)
    first = position.new_full((sequences, capacity + 1), length)
    first = first.scatter_reduce(1, run, position, "amin")
    last = position.new_full((sequences, capacity + 1), -1)
    last = last.scatter_reduce(1, run, position, "amax")
    bounds = torch.stack((first, last + 1), -1)[:, :capacity]
    kept = (bounds[..., 1] > 0) & (bounds[..., 1] - bounds[..., 0] >= min_length)
    slot = torch.where(kept, kept.long().cumsum(1) - 1, capacity)
    span = bounds.new_full((sequences, capacity + 1, 2), -1)
    span = span.scatter(1, slot[..., None].expand(-1, -1, 2), bounds)[:, :capacity]
    return span.contiguous(), kept.sum(1)
