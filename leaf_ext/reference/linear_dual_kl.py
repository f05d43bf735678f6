"""`dual_kl` and `topk_kl` of linear heads, chunk by chunk of rows."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from leaf_ext.reference.dual_kl import DualKL, dual_kl
from leaf_ext.reference.topk_kl import topk_kl
from leaf_ext.reference.upcast import upcast
from leaf_ext.schema import hidden_grad_dtype

Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def linear_dual_kl(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_hidden: Tensor,
    teacher_head: Tensor,
    row_weight: Tensor,
    student_bias: Tensor | None,
    teacher_bias: Tensor | None,
    labels: Tensor | None,
    label_weight: Tensor | None,
    temperature: float,
    student_scale: float,
    teacher_scale: float,
    student_softcap: float,
    teacher_softcap: float,
    beta: float,
    need_hidden_grad: bool,
    head_grad_dtype: torch.dtype | None,
    need_bias_grad: bool,
    need_rows: bool,
    chunk_size: int,
) -> Gradients:
    """Compute `dual_kl` from hidden states, and add the cross-entropy of labels.

        z_s = h_s W_s^T + b_s,   z_t = h_t W_t^T + b_t
        nll_i = -log softmax(y_s)_label,   y_s = scaled, capped z_s over the common vocabulary
        loss  = dual_kl(z_s, z_t) + sum_i label_weight_i * nll_i

    A negative label has an nll of 0.
    """
    teacher_weight = upcast(teacher_head)
    vocabulary = min(student_head.shape[0], teacher_head.shape[0])
    options = (temperature, student_scale, teacher_scale, student_softcap, teacher_softcap, beta)

    def loss_of(z_s: Tensor, index: Tensor, need_grad: bool) -> DualKL:
        z_t = project(upcast(teacher_hidden[index]), teacher_weight, teacher_bias)
        result = dual_kl(z_s, z_t, row_weight[index], *options, need_grad, need_rows)
        if labels is None:
            return result
        weight = None if label_weight is None else label_weight[index]
        hard = cross_entropy(
            z_s[:, :vocabulary], labels[index], weight, student_scale, student_softcap, need_grad
        )
        if need_grad:
            result.grad[:, :vocabulary] += hard.grad
        rows = torch.cat((result.rows, hard.rows[:1])) if need_rows else result.rows
        return result._replace(loss=result.loss + hard.loss, rows=rows)

    live = row_weight != 0
    if label_weight is not None:
        live = live | (label_weight != 0)
    student = student_hidden, student_head, student_bias
    needs = need_hidden_grad, head_grad_dtype, need_bias_grad, need_rows
    return _linear(student, live, needs, 4 if labels is None else 5, chunk_size, loss_of)


def linear_topk_kl(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_ids: Tensor,
    teacher_logprobs: Tensor,
    teacher_tail: Tensor,
    row_weight: Tensor,
    student_bias: Tensor | None,
    temperature: float,
    scale: float,
    softcap: float,
    need_hidden_grad: bool,
    head_grad_dtype: torch.dtype | None,
    need_bias_grad: bool,
    need_rows: bool,
    chunk_size: int,
) -> Gradients:
    """Compute `topk_kl` from hidden states, z_s = h_s W_s^T + b_s."""

    def loss_of(z: Tensor, index: Tensor, need_grad: bool) -> DualKL:
        ids, logprobs, tail = teacher_ids[index], teacher_logprobs[index], teacher_tail[index]
        options = temperature, scale, softcap, need_grad, need_rows
        return topk_kl(z, ids, logprobs, tail, row_weight[index], *options)

    student = student_hidden, student_head, student_bias
    needs = need_hidden_grad, head_grad_dtype, need_bias_grad, need_rows
    return _linear(student, row_weight != 0, needs, 4, chunk_size, loss_of)


def cross_entropy(
    z: Tensor, labels: Tensor, weight: Tensor | None, scale: float, softcap: float, need_grad: bool
) -> DualKL:
    """Return the cross-entropy of hard labels: `topk_kl` with one id of probability 1.

    Its measures are those of all rows with a label, also if their weight is 0.
    """
    labelled = (labels >= 0).to(upcast(z).dtype)
    ids, certain = labels.clamp(min=0)[:, None], labelled.new_zeros(labels.shape[0], 1)
    teacher = ids, certain, torch.full_like(labelled, -torch.inf)
    measured = topk_kl(z, *teacher, labelled, 1.0, scale, softcap, False, True)
    counts = torch.zeros_like(labelled) if weight is None else weight * labelled
    weighted = topk_kl(z, *teacher, counts, 1.0, scale, softcap, need_grad, False)
    return weighted._replace(rows=measured.rows)


def _linear(
    student: tuple[Tensor, Tensor, Tensor | None],
    live: Tensor,
    needs: tuple[bool, torch.dtype | None, bool, bool],
    measures: int,
    chunk_size: int,
    loss_of: Callable[[Tensor, Tensor, bool], DualKL],
) -> Gradients:
    """Sum a loss of logits over chunks of the live rows.

        dloss/dh_s = g W_s,   dloss/dW_s = g^T h_s,   dloss/db_s = sum_i g_i,   g = dloss/dz_s

    At most `chunk_size` rows of logits exist at once; the parts are summed.
    """
    student_hidden, student_head, student_bias = student
    need_hidden_grad, head_grad_dtype, need_bias_grad, need_rows = needs
    head = upcast(student_head)
    need_grad = need_hidden_grad or head_grad_dtype is not None or need_bias_grad
    loss = head.new_zeros(())
    rows = head.new_zeros(measures, student_hidden.shape[0] if need_rows else 0)
    hidden_grad, head_grad, bias_grad = (head.new_zeros(0) for _ in range(3))
    if need_hidden_grad:
        dtype = hidden_grad_dtype(student_hidden.dtype)
        hidden_grad = student_hidden.new_zeros(student_hidden.shape, dtype=dtype)
    if head_grad_dtype is not None:
        head_grad = head.new_zeros(head.shape)
    if need_bias_grad:
        bias_grad = head.new_zeros(head.shape[0])
    with torch.autocast(student_hidden.device.type, enabled=False):
        for index in torch.split(live.nonzero().squeeze(1), chunk_size):
            hidden = upcast(student_hidden[index])
            part, slope, _, found = loss_of(project(hidden, head, student_bias), index, need_grad)
            loss += part
            if need_rows:
                rows[:, index] = found
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
