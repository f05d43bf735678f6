"""`dual_kl` of two linear heads, with the full logits written out."""

from __future__ import annotations

import torch
from torch import Tensor

from leaf_ext.reference.dual_kl import dual_kl
from leaf_ext.reference.widen import widen


def linear_dual_kl(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_hidden: Tensor,
    teacher_head: Tensor,
    row_weight: Tensor,
    student_bias: Tensor | None,
    teacher_bias: Tensor | None,
    temperature: float,
    student_scale: float,
    teacher_scale: float,
    student_softcap: float,
    teacher_softcap: float,
    need_hidden_grad: bool,
    need_head_grad: bool,
    need_bias_grad: bool,
    need_rows: bool,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The same loss from hidden states.

        z_s = h_s W_s^T + b_s,   z_t = h_t W_t^T + b_t
        dloss/dh_s = g W_s,   dloss/dW_s = g^T h_s,   dloss/db_s = sum_i g_i,   g = dloss/dz_s

    `chunk_size` is an upper bound of memory for other backends; here all logits exist at once.
    """
    live = row_weight.nonzero().squeeze(1)
    hidden, head = widen(student_hidden[live]), widen(student_head)
    with torch.autocast(student_hidden.device.type, enabled=False):
        student = project(hidden, head, student_bias)
        teacher = project(widen(teacher_hidden[live]), widen(teacher_head), teacher_bias)
        loss, slope, _, live_rows = dual_kl(
            student,
            teacher,
            row_weight[live],
            temperature,
            student_scale,
            teacher_scale,
            student_softcap,
            teacher_softcap,
            need_hidden_grad or need_head_grad or need_bias_grad,
            need_rows,
        )
        hidden_grad, head_grad, bias_grad = (loss.new_empty(0) for _ in range(3))
        if need_hidden_grad:
            dtype = hidden_grad_dtype(student_hidden.dtype)
            hidden_grad = torch.zeros_like(
                student_hidden, dtype=dtype, memory_format=torch.contiguous_format
            )
            hidden_grad[live] = (slope @ head).to(dtype)
        if need_head_grad:
            head_grad = slope.T @ hidden
        if need_bias_grad:
            bias_grad = slope.sum(0)
    rows = loss.new_zeros(4, row_weight.shape[0] if need_rows else 0)
    if need_rows:
        rows[:, live] = live_rows
    return loss, hidden_grad, head_grad, bias_grad, rows


def project(hidden: Tensor, head: Tensor, bias: Tensor | None) -> Tensor:
    """hidden @ head^T + bias in the precision of `hidden`."""
    logits = hidden @ head.T
    return logits if bias is None else logits + bias.to(logits.dtype)


def hidden_grad_dtype(dtype: torch.dtype) -> torch.dtype:
    """A float16 gradient stays float32 until the backward has multiplied it.

    Rounded before, most of its entries (about 1/N) would vanish.
    """
    return torch.float32 if dtype == torch.float16 else dtype
