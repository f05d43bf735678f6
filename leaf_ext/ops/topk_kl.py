"""Public `topk_kl`: checks, autograd, fake kernels."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from leaf_ext.dispatch import Backend, implementation
from leaf_ext.ops import checks
from leaf_ext.ops.dual_kl import DualKLRows
from leaf_ext.ops.first_order import refuse_forward_mode
from leaf_ext.ops.logit_options import student_options
from leaf_ext.ops.loss_autograd import Overwrite, check_overwritten, fake_loss, register_loss
from leaf_ext.reference.topk_kl import tail_logprob
from leaf_ext.schema import LIBRARIES, StudentScalars

MOST_IDS = 1024


@overload
def topk_kl(
    student_logits: Tensor,
    teacher_ids: Tensor,
    teacher_logprobs: Tensor,
    row_weight: Tensor,
    *,
    teacher_tail_logprob: Tensor | None = ...,
    temperature: float = ...,
    logit_scale: float = ...,
    logit_softcap: float | None = ...,
    inplace_grad: bool = ...,
    return_rows: Literal[False] = ...,
    backend: Backend = ...,
) -> Tensor: ...


@overload
def topk_kl(
    student_logits: Tensor,
    teacher_ids: Tensor,
    teacher_logprobs: Tensor,
    row_weight: Tensor,
    *,
    teacher_tail_logprob: Tensor | None = ...,
    temperature: float = ...,
    logit_scale: float = ...,
    logit_softcap: float | None = ...,
    inplace_grad: bool = ...,
    return_rows: Literal[True],
    backend: Backend = ...,
) -> tuple[Tensor, DualKLRows]: ...


def topk_kl(
    student_logits: Tensor,
    teacher_ids: Tensor,
    teacher_logprobs: Tensor,
    row_weight: Tensor,
    *,
    teacher_tail_logprob: Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    inplace_grad: bool = False,
    return_rows: bool = False,
    backend: Backend = "auto",
) -> Tensor | tuple[Tensor, DualKLRows]:
    """Compute `dual_kl` for a teacher of which k ids and their log-probabilities are known.

        loss = temperature^2 * sum_i row_weight_i * (sum_j p_j log(p_j / q_j) + t log(t / u))

    p_j is the teacher's probability of its j-th id and q_j the student's; t and u are the
    probabilities of all other ids together. The loss equals that of `dual_kl` if k = V, and is
    below it otherwise, since what is outside of the ids is one outcome. With k = 1, a
    log-probability of 0 and none left it is the cross-entropy of hard labels.

    Args:
        student_logits: [N, V] float32, float16 or bfloat16 (float64 with backend="reference").
        teacher_ids: [N, k] int64 or int32, 1 <= k <= 1024, distinct ids of each row in [0, V). On a
            CPU they are checked in the rows that count. On a GPU, and under torch.compile, the
            result of other ids is undefined, but no memory outside of the tensors is touched.
        teacher_logprobs: [N, k] float32 (float64 for float64 logits), natural logarithms, at the
            temperature of the loss: they are not divided by `temperature`, so store the teacher at
            the temperature that you train with. -inf is a probability of 0.
        row_weight: [N] float32 (float64 for float64 logits), see `row_weights`. A row of weight 0
            has no effect, whatever it contains, and gets a gradient of 0.
        teacher_tail_logprob: [N], of the dtype of `teacher_logprobs`, the logarithm of t. The
            default is t = 1 - sum_j p_j, at least 0, and 0 if k = V. The k + 1 probabilities are
            then divided by their sum, which makes up for rounding.
        temperature: > 0, divides the student's logits after scale and softcap.
        logit_scale, logit_softcap: of the student, as in `dual_kl`.
        inplace_grad: overwrites the student's logits with the gradient, as in `dual_kl`.
        return_rows: also returns a `DualKLRows`: the KL and the teacher's entropy are those of the
            k + 1 outcomes, the student's entropy that of its V logits, and models agree if the
            student's largest logit is at the teacher's id of the largest log-probability.
        backend: "auto", "cpu", "cuda", "triton" or "reference".
    Returns:
        The loss, [] float32, in nats; with `return_rows` a pair (loss, rows). First-order
        differentiable with respect to `student_logits`; nothing flows to the teacher. It is +inf
        with a finite gradient if t > 0 and u = 0, or if p_j > 0 and q_j = 0.
    Raises:
        ValueError: wrong dtype, shape, device or range; a `row_weight` that requires grad.
        RuntimeError: the backend is not available (says why), or a second-order gradient or a
            forward-mode derivative was asked for.
    """
    op = "topk_kl"
    options = student_options(op, temperature, logit_scale, logit_softcap)
    _check_logits(op, student_logits, backend)
    checks.require_row_weight(op, row_weight, student_logits.shape[0], student_logits)
    refuse_forward_mode(op, student_logits, teacher_logprobs, teacher_tail_logprob, row_weight)
    given = Teacher(teacher_ids, teacher_logprobs, teacher_tail_logprob)
    teacher = checked_teacher(op, given, row_weight, student_logits.shape[1])
    student, weight = student_logits, row_weight.contiguous()
    need_grad = torch.is_grad_enabled() and student.requires_grad
    if inplace_grad:
        others = {"teacher_ids": teacher_ids, "teacher_logprobs": teacher_logprobs}
        others |= {"row_weight": row_weight}
        if teacher_tail_logprob is not None:
            others |= {"teacher_tail_logprob": teacher_tail_logprob}
        check_overwritten(op, student, others)
    name = f"{op}_" if inplace_grad and need_grad else op
    run = implementation(name, student.device, backend, student.dtype)
    arguments = (*teacher, weight, *options)
    if name == op:
        student = checks.unit_stride(student)
        loss, _, _, rows = run(student, *arguments, need_grad, return_rows)
    else:
        loss, rows = Overwrite.apply(student, op, run, *arguments, True, return_rows)  # type: ignore[no-untyped-call]
    return (loss, DualKLRows.of(rows)) if return_rows else loss


class Teacher(NamedTuple):
    """Ids [N, k], their log-probabilities [N, k], and that of all others together [N]."""

    ids: Tensor
    logprobs: Tensor
    tail: Tensor | None


def _check_logits(op: str, student: Tensor, backend: str) -> None:
    checks.require_float(op, "student_logits", student, backend)
    checks.require_matrix(op, "student_logits", student, "[N, V]")
    needed = "over a vocabulary of at least 1"
    got = f"shape {tuple(student.shape)}"
    checks.require(student.shape[1] >= 1, op, "student_logits", needed, got)


def checked_teacher(
    op: str, teacher: Teacher, row_weight: Tensor, vocabulary: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Check a stored teacher; return int64 ids and normalized log-probabilities, all contiguous."""
    ids, logprobs, tail = teacher
    rows = row_weight.shape[0]
    checks.require_tensor(op, "teacher_ids", ids)
    checks.require(
        ids.dtype in (torch.int64, torch.int32), op, "teacher_ids", "int64 or int32", ids.dtype
    )
    most = min(MOST_IDS, vocabulary)
    needed = f"[N, k] with N = {rows} rows like row_weight and 1 <= k <= {most}"
    fits = ids.dim() == 2 and ids.shape[0] == rows and 1 <= ids.shape[1] <= most
    checks.require(fits, op, "teacher_ids", needed, f"shape {tuple(ids.shape)}")
    shape = tuple(ids.shape)
    _check_logprobs(op, "teacher_logprobs", logprobs, shape, row_weight)
    if tail is not None:
        _check_logprobs(op, "teacher_tail_logprob", tail, (rows,), row_weight)
    for argument, tensor in (("teacher_ids", ids), ("teacher_logprobs", logprobs)):
        checks.require_device(op, argument, tensor, row_weight.device)
    if ids.device.type == "cpu" and not torch.compiler.is_compiling():
        _check_ids(op, ids[row_weight != 0], vocabulary)
    exact = logprobs.detach().double()
    exact_tail = tail_logprob(exact, vocabulary) if tail is None else tail.detach().double()
    total = torch.logaddexp(exact.logsumexp(-1), exact_tail)
    dtype = row_weight.dtype
    normalized = (exact - total[:, None]).to(dtype), (exact_tail - total).to(dtype)
    first, second, third = (t.contiguous() for t in (ids.to(torch.int64), *normalized))
    return first, second, third


def _check_logprobs(
    op: str, argument: str, logprobs: Tensor, shape: tuple[int, ...], row_weight: Tensor
) -> None:
    checks.require_tensor(op, argument, logprobs)
    dtype = row_weight.dtype
    checks.require(logprobs.dtype == dtype, op, argument, str(dtype), logprobs.dtype)
    layout = "[N, k] like teacher_ids" if len(shape) == 2 else f"[N] with N = {shape[0]} rows"
    checks.require_shape(op, argument, logprobs, shape, layout)
    checks.require_device(op, argument, logprobs, row_weight.device)


def _check_ids(op: str, ids: Tensor, vocabulary: int) -> None:
    ascending = ids.sort(dim=1).values
    if ascending.numel() == 0:
        return
    low, high = int(ascending[:, 0].min()), int(ascending[:, -1].max())
    needed = f"in [0, V = {vocabulary}) in rows that count"
    checks.require(low >= 0, op, "teacher_ids", needed, low)
    checks.require(high < vocabulary, op, "teacher_ids", needed, high)
    twice = ascending[:, 1:][ascending.diff(dim=1) == 0]
    if twice.numel():
        checks.require(False, op, "teacher_ids", "distinct in a row", f"{int(twice[0])} twice")


def _fake(student: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    need_grad, need_rows, *_ = rest[4 + len(StudentScalars._fields) :]
    return fake_loss(student, need_grad, need_rows)


def _fake_overwrite(student: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    loss, _, scale, rows = _fake(student, *rest)
    return loss, scale, rows


register_loss("topk_kl", _fake)
for _namespace, _library in LIBRARIES.items():
    torch.library.register_fake(f"{_namespace}::topk_kl_", _fake_overwrite, lib=_library)
