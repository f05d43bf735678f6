"""From two models' norms to spans. One program processes a sequence, block by block.

    s_hat = (s - min s) / (max s - min s)       for teacher and student; 0 where max = min
    gap   = s_hat_teacher - weight s_hat_student
    score = (gap - min gap) / (max gap - min gap)
    confounder = prunable & (score <= cut) & (s_hat_teacher <= teacher_max)

A sequence may have any length. If it does not fit into one block, every pass reads it again from
the cache: both ranges; the gap's range; with the quantile rule four digits of the rank; marks and
spans. Each pass computes the values again from the norms, with IEEE 754 divisions and without fused
multiply-adds, so that all passes see the same bits. The host does not wait.

On the logarithmic scale the gap is log t - weight log s of the models' shares t and s of their
largest norm, at least LOG_FLOOR. From a weight of 1/2 on it is log(t / s) - (weight - 1) log s, so
that weights of 1 and 0 make no error in a gap that is equal everywhere.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from leaf_ext.schema import LOG_FLOOR
from leaf_ext.triton.grad_norm import grad_norm_pair
from leaf_ext.triton.launch import check, on_device_of, options

_BLOCK = 4096
_WARPS = 8
# If the gap varies by less over a whole sequence, its order is due to rounding: no spans.
_MIN_GAP_RANGE = tl.constexpr(1e-6)
_LOG_FLOOR = tl.constexpr(LOG_FLOOR)
# How the gap is made: of the normalized values t and s as t - weight s; of their shares of the
# largest norm as log t - weight log s, or as log(t / s) - weight log s.
_MINMAX, _LOG, _LOG_RATIO = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
_INFINITY = tl.constexpr(float("inf"))


@triton.jit
def _unit(x, low, width):
    """Return x normalized to [0, 1]; 0 if the width is 0."""
    varies = width > 0.0
    return tl.where(varies, tl.div_rn(x - low, tl.where(varies, width, 1.0)), 0.0)


@triton.jit
def _load(values, inside, positions):
    return tl.load(values + positions, mask=inside, other=0.0)


@triton.jit
def _share(x, high):
    """Return x as a share of the largest value, at least the floor; 1 if that is not positive."""
    positive = high > 0.0
    share = tl.maximum(tl.div_rn(x, tl.where(positive, high, 1.0)), _LOG_FLOOR)
    return tl.where(positive, share, 1.0)


@triton.jit
def _gap(
    teacher,
    student,
    inside,
    positions,
    low_t,
    high_t,
    low_s,
    high_s,
    weight,
    SCALE: tl.constexpr,
):
    """Return the gap and the teacher's normalized saliency; arbitrary outside the domain."""
    x_t = _load(teacher, inside, positions)
    x_s = _load(student, inside, positions)
    hat = _unit(x_t, low_t, high_t - low_t)
    if SCALE == _MINMAX:
        gap = hat - weight * _unit(x_s, low_s, high_s - low_s)
    else:
        t = _share(x_t, high_t)
        s = _share(x_s, high_s)
        if SCALE == _LOG_RATIO:
            t = tl.div_rn(t, s)
        gap = tl.log(t) - weight * tl.log(s)
    return gap, hat


@triton.jit
def _later(a_wall, a_before, a_mark, b_wall, b_before, b_mark):
    """Combine adjacent stretches: latest wall, latest mark before the last token, latest mark."""
    return tl.maximum(a_wall, b_wall), tl.maximum(a_mark, b_before), tl.maximum(a_mark, b_mark)


@triton.jit
def _later_start(a_before, a_start, b_before, b_start):
    return tl.maximum(a_start, b_before), tl.maximum(a_start, b_start)


@triton.jit
def spans_kernel(
    teacher,
    student,
    domain,
    prunable,
    borders,
    span,
    count,
    score,
    confounder,
    status,
    tokens,
    length,
    capacity,
    weight,
    threshold,
    share: tl.float64,
    cap,
    teacher_max,
    join_gap,
    min_length,
    PACKED: tl.constexpr,
    PRUNABLE: tl.constexpr,
    SCALE: tl.constexpr,
    QUANTILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sequence = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    begin = sequence * length
    stop = begin + length
    if PACKED:
        # Borders are checked on a CPU only; here they are clamped to the tensors.
        begin = tl.minimum(tl.maximum(tl.load(borders + sequence), 0), tokens)
        stop = tl.minimum(tl.maximum(tl.load(borders + sequence + 1), begin), tokens)
        stop = tl.minimum(stop, begin + length)
    size = (stop - begin).to(tl.int32)
    teacher += begin
    student += begin
    domain += begin
    prunable += begin
    score += begin
    confounder += begin
    span += sequence * capacity * 2

    # The ranges of both models, and whether all values are finite.
    low_t = tl.full([BLOCK], _INFINITY, tl.float32)
    high_t = tl.full([BLOCK], -_INFINITY, tl.float32)
    low_s = tl.full([BLOCK], _INFINITY, tl.float32)
    high_s = tl.full([BLOCK], -_INFINITY, tl.float32)
    broken_lanes = tl.full([BLOCK], 0, tl.int32)
    inside_lanes = tl.full([BLOCK], 0, tl.int32)
    for start in range(0, size, BLOCK):
        positions = start + lanes
        inside = tl.load(domain + positions, mask=positions < size, other=0) != 0
        x_t = _load(teacher, inside, positions)
        x_s = _load(student, inside, positions)
        broken_lanes |= tl.where(x_t - x_t == 0.0, 0, 1) | tl.where(x_s - x_s == 0.0, 0, 2)
        inside_lanes += inside.to(tl.int32)
        low_t = tl.minimum(low_t, tl.where(inside, x_t, _INFINITY))
        high_t = tl.maximum(high_t, tl.where(inside, x_t, -_INFINITY))
        low_s = tl.minimum(low_s, tl.where(inside, x_s, _INFINITY))
        high_s = tl.maximum(high_s, tl.where(inside, x_s, -_INFINITY))
    broken = tl.max(broken_lanes & 1) | tl.max(broken_lanes & 2)
    inside_count = tl.sum(inside_lanes)
    low_t = tl.min(low_t)
    high_t = tl.max(high_t)
    low_s = tl.min(low_s)
    high_s = tl.max(high_s)
    tl.store(status + sequence, broken.to(tl.int64))

    # The range of the gap.
    low_lanes = tl.full([BLOCK], _INFINITY, tl.float32)
    high_lanes = tl.full([BLOCK], -_INFINITY, tl.float32)
    for start in range(0, size, BLOCK):
        positions = start + lanes
        inside = tl.load(domain + positions, mask=positions < size, other=0) != 0
        gap, _hat = _gap(
            teacher, student, inside, positions, low_t, high_t, low_s, high_s, weight, SCALE
        )
        low_lanes = tl.minimum(low_lanes, tl.where(inside, gap, _INFINITY))
        high_lanes = tl.maximum(high_lanes, tl.where(inside, gap, -_INFINITY))
    low_gap = tl.min(low_lanes)
    width_gap = tl.max(high_lanes) - low_gap
    # Makes all scores of a sequence with NaN or inf NaN, so that no token is marked.
    poison = tl.where(broken == 0, 0.0, float("nan"))

    cut = threshold
    if QUANTILE:
        # Finds the score of a rank digit by digit: the bits of scores >= 0 are in their order.
        rank = tl.floor(share * inside_count.to(tl.float64)).to(tl.int32)
        rank = tl.maximum(tl.minimum(rank, inside_count - 1), 0)
        prefix = tl.full([], 0, tl.int32)
        bins = tl.arange(0, 256)
        for digit_of in tl.static_range(4):
            shift = 24 - 8 * digit_of
            histogram = tl.full([256], 0, tl.int32)
            for start in range(0, size, BLOCK):
                positions = start + lanes
                inside = tl.load(domain + positions, mask=positions < size, other=0) != 0
                gap, _hat = _gap(
                    teacher, student, inside, positions, low_t, high_t, low_s, high_s,
                    weight, SCALE,
                )  # fmt: skip
                bits = _unit(gap, low_gap, width_gap).to(tl.int32, bitcast=True) >> shift
                same = inside & ((bits >> 8) == prefix)
                histogram += tl.histogram(bits & 255, 256, mask=same)
            digit = tl.sum((tl.cumsum(histogram, 0) <= rank).to(tl.int32))
            rank -= tl.sum(tl.where(bins < digit, histogram, 0))
            prefix = (prefix << 8) | digit
        cut = tl.minimum(prefix.to(tl.float32, bitcast=True), cap)
    cut = tl.where(
        width_gap >= _MIN_GAP_RANGE, cut, -1.0
    )  # no token is marked if the gap's range is too small

    # Finds marks and their runs; a run is written when the next one starts.
    wall_before = tl.full([], -1, tl.int32)
    mark_before = tl.full([], -1, tl.int32)
    start_before = tl.full([], -1, tl.int32)
    found = tl.full([], 0, tl.int32)
    for start in range(0, size, BLOCK):
        positions = start + lanes
        here = positions < size
        inside = tl.load(domain + positions, mask=here, other=0) != 0
        gap, hat = _gap(
            teacher, student, inside, positions, low_t, high_t, low_s, high_s, weight, SCALE
        )
        value = _unit(gap, low_gap, width_gap) + poison
        tl.store(score + positions, tl.where(inside, value, float("nan")), mask=here)
        mark = inside & (value <= cut) & (hat <= teacher_max)
        if PRUNABLE:
            mark &= tl.load(prunable + positions, mask=here, other=0) != 0
        tl.store(confounder + positions, mark.to(tl.int8), mask=here)

        nowhere = tl.full([BLOCK], -1, tl.int32)
        walls, previous, marks = tl.associative_scan(
            (
                tl.where(here & ~inside, positions, -1),
                nowhere,
                tl.where(mark, positions, -1),
            ),
            0,
            _later,
        )
        walls = tl.maximum(walls, wall_before)
        previous = tl.maximum(previous, mark_before)
        joined = (previous >= 0) & (walls < previous) & (positions - previous - 1 <= join_gap)
        starts = mark & ~joined
        run_starts, all_starts = tl.associative_scan(
            (nowhere, tl.where(starts, positions, -1)), 0, _later_start
        )
        run_starts = tl.maximum(run_starts, start_before)
        closed = starts & (run_starts >= 0) & (previous + 1 - run_starts >= min_length)
        slots = found + tl.cumsum(closed.to(tl.int32), 0) - 1
        tl.store(span + 2 * slots, run_starts.to(tl.int64), mask=closed)
        tl.store(span + 2 * slots + 1, (previous + 1).to(tl.int64), mask=closed)

        found += tl.sum(closed.to(tl.int32))
        wall_before = tl.maximum(wall_before, tl.max(walls))
        mark_before = tl.maximum(mark_before, tl.max(marks))
        start_before = tl.maximum(start_before, tl.max(all_starts))
    if (start_before >= 0) & (mark_before + 1 - start_before >= min_length):
        tl.store(span + 2 * found, start_before.to(tl.int64))
        tl.store(span + 2 * found + 1, (mark_before + 1).to(tl.int64))
        found += 1
    tl.store(count + sequence, found.to(tl.int64))
    for start in range(2 * found, 2 * capacity, BLOCK):
        unused = start + lanes
        tl.store(span + unused, tl.full([BLOCK], -1, tl.int64), mask=unused < 2 * capacity)


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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Run the op, with one launch for norms and two for gradients."""
    _check(teacher, student, domain, prunable, cu_seqlens, max_seqlen)
    if teacher.dim() > domain.dim():
        teacher, student = grad_norm_pair(teacher, student)
    scale, weight = _MINMAX, student_weight
    if log_scale:
        scale, weight = (_LOG_RATIO, weight - 1) if weight >= 0.5 else (_LOG, weight)
    sequences = domain.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    capacity = (max_seqlen + 1) // 2
    where = {"device": domain.device}
    span = torch.empty((sequences, capacity, 2), dtype=torch.int64, **where)
    count, status = (torch.empty(sequences, dtype=torch.int64, **where) for _ in range(2))
    # Tokens outside all sequences (borders are unchecked on a GPU) are outside the domain.
    covered = cu_seqlens is None
    score = _filled(domain, torch.float32, math.nan, covered)
    confounder = _filled(domain, torch.bool, False, covered)
    if sequences:
        inside = domain.contiguous().view(torch.uint8)
        with on_device_of(domain):
            spans_kernel[(sequences,)](
                teacher.contiguous(), student.contiguous(), inside,
                inside if prunable is None else prunable.contiguous().view(torch.uint8),
                count if cu_seqlens is None else cu_seqlens.to(torch.int64).contiguous(),
                span, count, score, confounder.view(torch.int8), status,
                domain.numel(), max_seqlen, capacity, weight,
                threshold, threshold, cap, teacher_max, join_gap, min_length,
                PACKED=cu_seqlens is not None, PRUNABLE=prunable is not None,
                SCALE=scale.value, QUANTILE=quantile,
                BLOCK=min(_BLOCK, triton.next_power_of_2(max(1, max_seqlen))),
                **options(_WARPS, fused=False),
            )  # fmt: skip
    return span, count, score, confounder, status


def _filled(domain: Tensor, dtype: torch.dtype, value: float, overwritten: bool) -> Tensor:
    if overwritten:
        return torch.empty(domain.shape, dtype=dtype, device=domain.device)
    return torch.full(domain.shape, value, dtype=dtype, device=domain.device)


def _check(
    teacher: Tensor,
    student: Tensor,
    domain: Tensor,
    prunable: Tensor | None,
    cu_seqlens: Tensor | None,
    max_seqlen: int,
) -> None:
    shape = domain.shape
    for name, tensor in (("teacher", teacher), ("student", student)):
        norms = tensor.dim() == domain.dim() and tensor.dtype == torch.float32
        gradients = tensor.dim() == domain.dim() + 1
        check(
            tensor.shape[: domain.dim()] == shape
            and (norms or gradients)
            and tensor.dim() == teacher.dim(),
            f"detect_spans: {name} must be float32 norms or gradients like domain {tuple(shape)}, "
            f"got {tensor.dtype} {tuple(tensor.shape)}",
        )
    fits = prunable is None or (prunable.shape == shape and prunable.dtype == torch.bool)
    check(fits and domain.dtype == torch.bool, "detect_spans: domain, prunable must be bool alike")
    padded = cu_seqlens is None and domain.dim() == 2 and shape[-1] == max_seqlen
    packed = cu_seqlens is not None and domain.dim() == 1
    check(padded or packed, "detect_spans: domain must be [B, max_seqlen], or [N] with cu_seqlens")
