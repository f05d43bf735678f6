"""`linear_dual_kl` of heads whose vocabulary is shared among the ranks of a process group."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from leaf_ext.ops import checks, linear_chunks
from leaf_ext.ops.dual_kl import DualKLRows
from leaf_ext.ops.first_order import refuse_forward_mode, refuse_second_order
from leaf_ext.ops.linear_autograd import autocast_model, check_model
from leaf_ext.ops.logit_options import Pair, PairOfCaps, logit_options
from leaf_ext.reference.dual_kl import apply_temperature, entropy_of_logs, kl_of_logs
from leaf_ext.reference.linear_dual_kl import project
from leaf_ext.reference.upcast import upcast
from leaf_ext.schema import LogitScalars, accum_dtype

if TYPE_CHECKING:  # a build of torch may lack it
    from torch.distributed import ProcessGroup

_OP = "vocab_parallel_dual_kl"


@overload
def vocab_parallel_dual_kl(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_hidden: Tensor,
    teacher_head: Tensor,
    row_weight: Tensor,
    *,
    group: ProcessGroup | None = ...,
    student_bias: Tensor | None = ...,
    teacher_bias: Tensor | None = ...,
    temperature: float = ...,
    logit_scale: float | Pair = ...,
    logit_softcap: float | PairOfCaps | None = ...,
    return_rows: Literal[False] = ...,
    chunk_size: int | None = ...,
) -> Tensor: ...


@overload
def vocab_parallel_dual_kl(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_hidden: Tensor,
    teacher_head: Tensor,
    row_weight: Tensor,
    *,
    group: ProcessGroup | None = ...,
    student_bias: Tensor | None = ...,
    teacher_bias: Tensor | None = ...,
    temperature: float = ...,
    logit_scale: float | Pair = ...,
    logit_softcap: float | PairOfCaps | None = ...,
    return_rows: Literal[True],
    chunk_size: int | None = ...,
) -> tuple[Tensor, DualKLRows]: ...


def vocab_parallel_dual_kl(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_hidden: Tensor,
    teacher_head: Tensor,
    row_weight: Tensor,
    *,
    group: ProcessGroup | None = None,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float | Pair = 1.0,
    logit_softcap: float | PairOfCaps | None = None,
    return_rows: bool = False,
    chunk_size: int | None = None,
) -> Tensor | tuple[Tensor, DualKLRows]:
    """Compute `linear_dual_kl` of heads that are split by rows over the ranks (tensor parallel).

    Rank r holds the rows of both heads for the r-th part of the vocabulary, and all ranks hold the
    same hidden states and row weights. For each chunk of rows the ranks exchange maxima, sums of
    exponentials and sums of the loss's terms, a few numbers a row; logits stay where they are.

    Every rank returns the loss of the whole vocabulary. The gradient of the student's hidden states
    is the whole one on every rank, so that no layer before it may sum it over this group again;
    those of head and bias are of the rank's own part.

    It is written in torch operations, multiplies in float32 (float64 for float64 inputs) and is not
    tuned for speed. torch.compile does not trace it.

    Args:
        student_hidden, teacher_hidden: [N, H_s], [N, H_t], the same on all ranks.
        student_head, teacher_head: [V_s_r, H_s], [V_t_r, H_t], this rank's parts. They must begin
            at the same token on each rank, and end at the same one as well, except that the last
            tokens of one model, which the other does not have, are left out.
        row_weight: [N], the same on all ranks.
        group: the ranks that share the vocabulary, in its order; None means all.
        student_bias, teacher_bias: [V_s_r], [V_t_r], this rank's parts.
        chunk_size: the largest number of rows of a chunk; the default as in `linear_dual_kl`.
        temperature, logit_scale, logit_softcap, return_rows: as in `dual_kl`.
    Returns:
        The loss, [] float32, in nats; with `return_rows` a pair (loss, rows). Both are the same on
        all ranks.
    Raises:
        ValueError: wrong dtype, shape, device or range, or parts that do not fit together.
        RuntimeError: there is no process group, or a second-order gradient or a forward-mode
            derivative was asked for.
    """
    options = logit_options(_OP, temperature, logit_scale, logit_softcap)
    student = autocast_model(_OP, "student", (student_hidden, student_head, student_bias))
    teacher = autocast_model(_OP, "teacher", (teacher_hidden, teacher_head, teacher_bias))
    check_model(_OP, "student", student, student[0], "reference")
    check_model(_OP, "teacher", teacher, student[0], "reference")
    checks.require_row_weight(_OP, row_weight, student[0].shape[0], student[0])
    refuse_forward_mode(_OP, *student, *teacher, row_weight)
    (student_hidden, student_head, student_bias) = student
    (teacher_hidden, teacher_head, teacher_bias) = teacher
    if chunk_size is None:
        rows = max(student_head.shape[0], teacher_head.shape[0])
        chunk_size = linear_chunks.default_chunk_size(rows, student_hidden.device, torch.float32)
    chunk_size = checks.require_integer(_OP, "chunk_size", chunk_size, 1)
    ranks = _Ranks.of(group)
    start, width = _own_tokens(ranks, student_head, teacher_head, row_weight.shape[0])
    call = _Call(
        hidden=teacher_hidden.detach(),
        head=teacher_head.detach()[:width],
        bias=None if teacher_bias is None else teacher_bias.detach()[:width],
        row_weight=row_weight,
        options=options,
        ranks=ranks,
        start=start,
        need_rows=return_rows,
        chunk_size=chunk_size,
    )
    if width < student_head.shape[0]:
        student_head = student_head[:width]
        student_bias = None if student_bias is None else student_bias[:width]
    loss, measures = _Loss.apply(student_hidden, student_head, student_bias, call)  # type: ignore[no-untyped-call]
    return (loss, DualKLRows.of(measures)) if return_rows else loss


@dataclass(frozen=True)
class _Ranks:
    """The ranks that share the vocabulary."""

    group: Any

    @staticmethod
    def of(group: object) -> _Ranks:
        from torch import distributed

        if not (distributed.is_available() and distributed.is_initialized()):
            raise RuntimeError(
                f"{_OP}: group must be of an initialized torch.distributed, got {group}; call "
                "torch.distributed.init_process_group first"
            )
        return _Ranks(group)

    def merged(self, values: Tensor, how: Literal["SUM", "MAX", "MIN"]) -> Tensor:
        """Return the sum, maximum or minimum over all ranks, in the memory of `values`."""
        from torch import distributed

        distributed.all_reduce(values, getattr(distributed.ReduceOp, how), group=self.group)
        return values

    def gathered(self, values: Tensor) -> tuple[int, list[list[int]]]:
        """Return this rank's number and the integers of all ranks."""
        from torch import distributed

        size = distributed.get_world_size(self.group)
        everywhere = [torch.empty_like(values) for _ in range(size)]
        distributed.all_gather(everywhere, values, group=self.group)
        return distributed.get_rank(self.group), torch.stack(everywhere).tolist()


class _Call(NamedTuple):
    """Everything but the student: the teacher's side and the settings."""

    hidden: Tensor
    head: Tensor
    bias: Tensor | None
    row_weight: Tensor
    options: LogitScalars
    ranks: _Ranks
    start: int  # the first token of this rank's part
    need_rows: bool
    chunk_size: int


def _own_tokens(ranks: _Ranks, student: Tensor, teacher: Tensor, rows: int) -> tuple[int, int]:
    """Return the first token of this rank's part, and how many of it both models have."""
    sizes = torch.tensor([student.shape[0], teacher.shape[0], rows], device=student.device)
    rank, everywhere = ranks.gathered(sizes)
    students, teachers, counts = zip(*everywhere, strict=True)
    needed = "[N, H] with the same N on all ranks"
    checks.require(len(set(counts)) == 1, _OP, "student_hidden", needed, f"N = {counts}")
    common = min(sum(students), sum(teachers))
    parts = [_ranges(sizes, common) for sizes in (students, teachers)]
    needed = "cut at the same tokens as student_head"
    got = f"parts of {teachers} rows for {students}"
    checks.require(parts[0] == parts[1], _OP, "teacher_head", needed, got)
    start, stop = parts[0][rank]
    return start, stop - start


def _ranges(sizes: tuple[int, ...], end: int) -> list[tuple[int, int]]:
    """Return the tokens before `end` of each part, as [start, stop)."""
    stops = [sum(sizes[: at + 1]) for at in range(len(sizes))]
    starts = [stop - size for stop, size in zip(stops, sizes, strict=True)]
    return [(min(one, end), min(two, end)) for one, two in zip(starts, stops, strict=True)]


class _Loss(torch.autograd.Function):
    """Computes the gradients in the forward; the backward multiplies them."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Tensor, bias: Tensor | None, call: _Call
    ) -> tuple[Tensor, Tensor]:
        wide = accum_dtype(hidden.dtype)
        grads = [
            torch.zeros_like(one, dtype=wide) if one is not None and needed else None
            for one, needed in zip((hidden, head, bias), ctx.needs_input_grad, strict=False)
        ]
        loss = torch.zeros((), dtype=torch.float64, device=hidden.device)
        rows = hidden.new_zeros(4, len(hidden) if call.need_rows else 0, dtype=wide)
        live = call.row_weight.nonzero().squeeze(1)
        with torch.autocast(hidden.device.type, enabled=False):
            for index in torch.split(live, call.chunk_size) if live.numel() else ():
                chunk = upcast(hidden[index])
                logits = project(chunk, upcast(head), bias)
                kl, slope, measures = _rows(logits, index, call, any(g is not None for g in grads))
                loss += call.options.temperature**2 * (call.row_weight[index] * kl).sum()
                if call.need_rows:
                    rows[:, index] = measures
                _add(grads, slope, chunk, upcast(head), index)
            if grads[0] is not None:
                call.ranks.merged(grads[0], "SUM")
        ctx.mark_non_differentiable(rows)
        ctx.set_materialize_grads(False)
        ctx.dtypes = [None if one is None else one.dtype for one in (hidden, head, bias)]
        ctx.save_for_backward(*grads)
        return loss.to(wide), rows

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, _: object) -> tuple[Tensor | None, ...]:
        refuse_second_order(_OP)
        grads = [
            None if grad is None or grad_loss is None else (grad * grad_loss).to(dtype)
            for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return (*grads, None)


def _add(
    grads: list[Tensor | None], slope: Tensor, hidden: Tensor, head: Tensor, index: Tensor
) -> None:
    """Add a chunk's part to the gradients of hidden states, head and bias that are asked for."""
    if grads[0] is not None:
        grads[0][index] = slope @ head
    if grads[1] is not None:
        grads[1].addmm_(slope.T, hidden)
    if grads[2] is not None:
        grads[2] += slope.sum(0)


def _rows(
    logits: Tensor, index: Tensor, call: _Call, need_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the KL of each row [n], the gradient of its logits [n, V_r], and measures [4, n]."""
    options = call.options
    temperature, scale, softcap = (
        options.temperature,
        options.student_scale,
        options.student_softcap,
    )
    theirs = project(upcast(call.hidden[index]), upcast(call.head), call.bias)
    log_s, log_t = _log_probabilities(
        apply_temperature(logits, scale, softcap, temperature),
        apply_temperature(theirs, options.teacher_scale, options.teacher_softcap, temperature),
        call.ranks,
    )
    sums = [kl_of_logs(log_t, log_s)]
    if call.need_rows:
        sums += [entropy_of_logs(log_s), entropy_of_logs(log_t)]
    kl, *entropies = call.ranks.merged(torch.stack(sums), "SUM")
    measures = logits.new_zeros(4, 0)
    if call.need_rows:
        same = _agreement(logits, theirs, call).to(kl.dtype)
        measures = torch.stack((kl, *entropies, torch.where(kl.isnan(), kl, same)))
    slope = logits.new_zeros(0)
    if need_grad:
        factor = temperature * scale * call.row_weight[index]
        slope = factor[:, None] * (log_s.exp() - log_t.exp())
        if softcap:
            slope = slope * (1 - torch.tanh(logits * scale / softcap) ** 2)
    return kl, slope, measures


def _log_probabilities(student: Tensor, teacher: Tensor, ranks: _Ranks) -> list[Tensor]:
    """Return both models' log-softmax over the parts of all ranks.

    A NaN need not survive a maximum over ranks, but it does survive the sum.
    """
    both = (student, teacher)
    top = ranks.merged(torch.stack([_largest(one) for one in both]), "MAX")
    shifted = [one - most[:, None] for one, most in zip(both, top, strict=True)]
    mass = ranks.merged(torch.stack([one.exp().sum(-1) for one in shifted]), "SUM")
    return [one - total.log()[:, None] for one, total in zip(shifted, mass, strict=True)]


def _largest(x: Tensor) -> Tensor:
    """Return the maximum of each row; -inf for one without entries, or with a NaN."""
    if not x.shape[1]:
        return x.new_full((len(x),), -torch.inf)
    return x.amax(-1).nan_to_num(-torch.inf, torch.inf, -torch.inf)


def _agreement(student: Tensor, teacher: Tensor, call: _Call) -> Tensor:
    """Return whether both have their largest logit at the same token, the lowest of ties."""
    both = (student, teacher)
    own = torch.stack([_largest(one) for one in both])
    most = call.ranks.merged(own.clone(), "MAX")
    none = torch.full_like(own, torch.iinfo(torch.int64).max, dtype=torch.int64)
    if student.shape[1]:
        at = torch.stack([one.argmax(-1) for one in both]) + call.start
        none = torch.where(own == most, at, none)
    first = call.ranks.merged(none, "MIN")
    return first[0] == first[1]
