"""Public `dual_kl`: checks, autograd, fake kernels."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from leaf_ext.dispatch import Backend, implementation
from leaf_ext.ops import checks
from leaf_ext.ops.first_order import refuse_forward_mode
from leaf_ext.ops.logit_options import Divergence, Pair, PairOfCaps, logit_options
from leaf_ext.ops.loss_autograd import Overwrite, check_overwritten, fake_loss, register_loss
from leaf_ext.schema import LIBRARIES, LogitScalars


class DualKLRows(NamedTuple):
    """Measures of each row, [N] float32 each, detached; 0 on rows of weight 0.

    Attributes:
        kl: the divergence that was asked for, by default KL(teacher, student), in nats.
        student_entropy: of the student's softmax at the temperature, in nats.
        teacher_entropy: of the teacher's softmax at the temperature, in nats.
        agreement: 1 if both models have their largest logit at the same index, otherwise 0.
        nll: of the label given the student's softmax at temperature 1, in nats; 0 without a label
            (only `linear_dual_kl` takes labels).
    """

    kl: Tensor
    student_entropy: Tensor
    teacher_entropy: Tensor
    agreement: Tensor
    nll: Tensor

    @staticmethod
    def of(rows: Tensor) -> DualKLRows:
        """Name the rows [4, N] or, with labels, [5, N] of an op."""
        first, *others = rows.detach().unbind(0)
        nll = () if len(others) == 4 else (torch.zeros_like(first),)
        return DualKLRows(first, *others, *nll)


@overload
def dual_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    row_weight: Tensor,
    *,
    temperature: float = ...,
    logit_scale: float | Pair = ...,
    logit_softcap: float | PairOfCaps | None = ...,
    divergence: Divergence = ...,
    inplace_grad: bool = ...,
    return_rows: Literal[False] = ...,
    backend: Backend = ...,
) -> Tensor: ...


@overload
def dual_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    row_weight: Tensor,
    *,
    temperature: float = ...,
    logit_scale: float | Pair = ...,
    logit_softcap: float | PairOfCaps | None = ...,
    divergence: Divergence = ...,
    inplace_grad: bool = ...,
    return_rows: Literal[True],
    backend: Backend = ...,
) -> tuple[Tensor, DualKLRows]: ...


def dual_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    row_weight: Tensor,
    *,
    temperature: float = 1.0,
    logit_scale: float | Pair = 1.0,
    logit_softcap: float | PairOfCaps | None = None,
    divergence: Divergence = "kl",
    inplace_grad: bool = False,
    return_rows: bool = False,
    backend: Backend = "auto",
) -> Tensor | tuple[Tensor, DualKLRows]:
    """Compute both terms of LeaF's loss as one divergence with a weight on each row.

        loss = temperature^2 * sum_i row_weight_i * D(p_teacher_i, p_student_i)

        kl          D = KL(p_t, p_s)
        reverse_kl  D = KL(p_s, p_t)
        beta        D = beta KL(p_t, m) + (1 - beta) KL(p_s, m),   m = beta p_t + (1 - beta) p_s

    The last is the generalized Jensen-Shannon divergence of GKD (arXiv:2306.13649). D / beta tends
    to KL(p_t, p_s) for beta -> 0, and D / (1 - beta) to KL(p_s, p_t) for beta -> 1.

    A token with p_s > 0 that the teacher excludes (a logit of -inf) makes the reverse KL +inf; in
    its gradient a log(p_s / p_t) above 1000 counts as 1000.
    On a CPU probabilities and entries of a float32 gradient below 2^-126 count as 0.

    Args:
        student_logits, teacher_logits: [N, V_s], [N, V_t], each float32, float16 or bfloat16 (both
            float64 with backend="reference"). p is the softmax over the common vocabulary,
            min(V_s, V_t): vocabularies may differ by padding.
        row_weight: [N] float32 (float64 for float64 inputs), see `row_weights`. A row of weight 0
            is never read and gets a gradient of 0.
        temperature: > 0, divides the logits after scale and softcap.
        logit_scale: > 0, multiplies the logits; a number, or a pair (student, teacher).
        logit_softcap: > 0, z becomes softcap * tanh(z / softcap), or None; a number, or a pair.
        divergence: "kl", "reverse_kl", "jsd" (beta = 0.5), or beta, strictly between 0 and 1 (at
            least 1e-6 from both). All but "kl" take one more pass over a row that gets a gradient.
        inplace_grad: overwrites the student's logits with the gradient. They must not be a leaf
            that requires grad, nor share memory with another argument. The backward scales the
            gradient in place, so that a second backward raises. Inside torch.compile the backward
            scales into new memory, and a second one is right.
        return_rows: also returns a `DualKLRows`, computed in the same pass.
        backend: "auto", "cpu", "cuda", "triton" or "reference".
    Returns:
        The loss, [] float32, in nats; with `return_rows` a pair (loss, rows). First-order
        differentiable with respect to `student_logits`; nothing flows to the teacher.
    Raises:
        ValueError: wrong dtype, shape, device or range; a `row_weight` that requires grad.
        RuntimeError: the backend is not available (says why), or a second-order gradient or a
            forward-mode derivative was asked for.
    """
    options = logit_options("dual_kl", temperature, logit_scale, logit_softcap, divergence)
    _check(student_logits, teacher_logits, row_weight, backend)
    refuse_forward_mode("dual_kl", student_logits, teacher_logits, row_weight)
    if inplace_grad:
        others = {"teacher_logits": teacher_logits, "row_weight": row_weight}
        check_overwritten("dual_kl", student_logits, others)
    student, teacher = student_logits, checks.unit_stride(teacher_logits.detach())
    weight = row_weight.contiguous()
    need_grad = torch.is_grad_enabled() and student.requires_grad
    name = "dual_kl_" if inplace_grad and need_grad else "dual_kl"
    run = implementation(name, student.device, backend, student.dtype)
    if name == "dual_kl_":
        arguments = (teacher, weight, *options, True, return_rows)
        loss, rows = Overwrite.apply(student, "dual_kl", run, *arguments)  # type: ignore[no-untyped-call]
    else:
        student = checks.unit_stride(student)
        loss, _, _, rows = run(student, teacher, weight, *options, need_grad, return_rows)
    return (loss, DualKLRows.of(rows)) if return_rows else loss


def _check(student: Tensor, teacher: Tensor, row_weight: Tensor, backend: str) -> None:
    op = "dual_kl"
    checks.require_float(op, "student_logits", student, backend)
    checks.require_float(op, "teacher_logits", teacher, backend)
    checks.require_matrix(op, "student_logits", student, "[N, V_s]")
    checks.require_matrix(op, "teacher_logits", teacher, "[N, V_t]")
    checks.require_same_width(op, "teacher_logits", teacher, student)
    checks.require_device(op, "teacher_logits", teacher, student.device)
    rows = student.shape[0]
    needed = f"[N, V_t] with N = {rows} rows like student_logits"
    checks.require(
        teacher.shape[0] == rows, op, "teacher_logits", needed, f"shape {tuple(teacher.shape)}"
    )
    for argument, logits in (("student_logits", student), ("teacher_logits", teacher)):
        needed = "over a vocabulary of at least 1"
        checks.require(logits.shape[1] >= 1, op, argument, needed, f"shape {tuple(logits.shape)}")
    checks.require_row_weight(op, row_weight, rows, student)


def _fake(
    student: Tensor,
    teacher: Tensor,
    row_weight: Tensor,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    need_grad, need_rows, *_ = options[len(LogitScalars._fields) :]
    return fake_loss(student, need_grad, need_rows)


def _fake_overwrite(student: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    loss, _, scale, rows = _fake(student, *rest)
    return loss, scale, rows


register_loss("dual_kl", _fake)
for _namespace, _library in LIBRARIES.items():
    torch.library.register_fake(f"{_namespace}::dual_kl_", _fake_overwrite, lib=_library)
