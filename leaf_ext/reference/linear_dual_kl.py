"""`dual_kl` of two linear heads, chunk by chunk of rows."""

from __future__ import annotations

import torch
from torch import Tensor

from leaf_ext.reference.dual_kl import dual_kl
from leaf_ext.reference.upcast import upcast
from leaf_ext.schema import hidden_grad_dtype


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
    head_grad_dtype: torch.dtype | None,
    need_bias_grad: bool,
    need_rows: bool,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute `dual_kl` from hidden states.

        z_s = h_s W_s^T + b_s,   z_t = h_t W_t^T + b_t
        dloss/dh_s = g W_s,   dloss/dW_s = g^T h_s,   dloss/db_s = sum_i g_i,   g = dloss/dz_s

    At most `chunk_size` rows of logits exist at once; the parts are summed.
    """
    live = row_weight.nonzero().squeeze(1)
    head, teacher_weight = upcast(student_head), upcast(teacher_head)
    need_grad = need_hidden_grad or head_grad_dtype is not None or need_bias_grad
    loss = head.new_zeros(())
    rows = head.new_zeros(4, row_weight.shape[0] if need_rows else 0)
    hidden_grad, head_grad, bias_grad = (head.new_zeros(0) for _ in range(3))
    if need_hidden_grad:
        dtype = hidden_grad_dtype(student_hidden.dtype)
        hidden_grad = student_hidden.new_zeros(student_hidden.shape, dtype=dtype)
    if head_grad_dtype is not None:
        head_grad = head.new_zeros(head.shape)
    if need_bias_grad:
        bias_grad = head.new_zeros(head.shape[0])
    with torch.autocast(student_hidden.device.type, enabled=False):
        for index in torch.split(live, chunk_size):
            hidden = upcast(student_hidden[index])
            part, slope, _, measures = dual_kl(
                project(hidden, head, student_bias),
                project(upcast(teacher_hidden[index]), teacher_weight, teacher_bias),
                row_weight[index],
                temperature,
                student_scale,
                teacher_scale,
                student_softcap,
                teacher_softcap,
                need_grad,
                need_rows,
            )
            loss += part
            if need_rows:
                rows[:, index] = measures
            if need_hidden_grad:
                hidden_grad[index] = (slope @ head).to(hidden_grad.dtype)
            if head_grad_dtype is not None:
                head_grad += slope.T @ hidden
            if need_bias_grad:
                bias_grad += slope.sum(0)
    if head_grad_dtype is not None:
        head_grad = head_grad.to(head_grad_dtype)
    return loss, hidden_grad, head_grad, bias_grad, rows


def project(hidden: Tensor, head: Tensor, bias: Tensor | None) -> Tensor:
    """Return hidden @ head^T + bias in the precision of `hidden`."""
    logits = hidden @ head.T
    return logits if bias is None else logits + bias.to(logits.dtype)
