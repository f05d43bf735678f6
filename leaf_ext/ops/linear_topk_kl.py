"""Public `linear_topk_kl`: arguments and their checks."""

from __future__ import annotations

from typing import Literal, overload

from torch import Tensor

from leaf_ext.dispatch import Backend, implementation
from leaf_ext.ops import checks
from leaf_ext.ops.dual_kl import DualKLRows
from leaf_ext.ops.first_order import refuse_forward_mode
from leaf_ext.ops.linear_autograd import (
    autocast_model,
    check_model,
    needs_of,
    register_linear_loss,
)
from leaf_ext.ops.linear_losses import make_linear_topk_kl
from leaf_ext.ops.logit_options import student_options
from leaf_ext.ops.topk_kl import Teacher, checked_teacher

_OP = "linear_topk_kl"


@overload
def linear_topk_kl(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_ids: Tensor,
    teacher_logprobs: Tensor,
    row_weight: Tensor,
    *,
    teacher_tail_logprob: Tensor | None = ...,
    student_bias: Tensor | None = ...,
    temperature: float = ...,
    logit_scale: float = ...,
    logit_softcap: float | None = ...,
    return_rows: Literal[False] = ...,
    chunk_size: int | None = ...,
    backend: Backend = ...,
) -> Tensor: ...


@overload
def linear_topk_kl(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_ids: Tensor,
    teacher_logprobs: Tensor,
    row_weight: Tensor,
    *,
    teacher_tail_logprob: Tensor | None = ...,
    student_bias: Tensor | None = ...,
    temperature: float = ...,
    logit_scale: float = ...,
    logit_softcap: float | None = ...,
    return_rows: Literal[True],
    chunk_size: int | None = ...,
    backend: Backend = ...,
) -> tuple[Tensor, DualKLRows]: ...


def linear_topk_kl(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_ids: Tensor,
    teacher_logprobs: Tensor,
    row_weight: Tensor,
    *,
    teacher_tail_logprob: Tensor | None = None,
    student_bias: Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    return_rows: bool = False,
    chunk_size: int | None = None,
    backend: Backend = "auto",
) -> Tensor | tuple[Tensor, DualKLRows]:
    """Compute `topk_kl` of a linear head with the logits of at most `chunk_size` rows at a time.

        z = student_hidden @ student_head^T + student_bias
        loss = topk_kl(z, teacher_ids, teacher_logprobs, row_weight)

    Dropped rows, precision and memory are as in `linear_dual_kl`.

    Args:
        student_hidden, student_head, student_bias: as in `linear_dual_kl`.
        teacher_ids, teacher_logprobs, teacher_tail_logprob: as in `topk_kl`.
        row_weight: [N] float32 (float64 for float64 inputs), see `row_weights`.
        chunk_size: the largest number of rows of a chunk; the default is that of `linear_dual_kl`.
        temperature, logit_scale, logit_softcap, return_rows, backend: as in `topk_kl`.
    Returns:
        The loss, [] float32, in nats; with `return_rows` a pair (loss, rows).
    Raises:
        ValueError: wrong dtype, shape, device or range; a `row_weight` that requires grad.
        RuntimeError: the backend is not available (says why), or a second-order gradient or a
            forward-mode derivative was asked for.
    """
    options = student_options(_OP, temperature, logit_scale, logit_softcap)
    student = autocast_model(_OP, "student", (student_hidden, student_head, student_bias))
    check_model(_OP, "student", student, student[0], backend)
    checks.require_row_weight(_OP, row_weight, student[0].shape[0], student[0])
    refuse_forward_mode(_OP, *student, teacher_logprobs, teacher_tail_logprob, row_weight)
    vocabulary = student[1].shape[0]
    given = Teacher(teacher_ids, teacher_logprobs, teacher_tail_logprob)
    teacher = checked_teacher(_OP, given, row_weight, vocabulary)
    run = implementation(_OP, student[0].device, backend, student[0].dtype)
    loss, _, _, _, rows = run(
        student[0],
        student[1],
        *teacher,
        row_weight.contiguous(),
        student[2],
        *options,
        *needs_of(_OP, student, vocabulary, return_rows, chunk_size, backend),
    )
    return (loss, DualKLRows.of(rows)) if return_rows else loss


register_linear_loss(_OP, make_linear_topk_kl)
