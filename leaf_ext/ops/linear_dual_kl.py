"""Public `linear_dual_kl`: arguments and their checks."""

from __future__ import annotations

from typing import Literal, overload

import torch
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
from leaf_ext.ops.linear_losses import make_linear_dual_kl
from leaf_ext.ops.logit_options import Divergence, Pair, PairOfCaps, logit_options

_OP = "linear_dual_kl"


@overload
def linear_dual_kl(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_hidden: Tensor,
    teacher_head: Tensor,
    row_weight: Tensor,
    *,
    student_bias: Tensor | None = ...,
    teacher_bias: Tensor | None = ...,
    labels: Tensor | None = ...,
    label_weight: Tensor | None = ...,
    temperature: float = ...,
    logit_scale: float | Pair = ...,
    logit_softcap: float | PairOfCaps | None = ...,
    divergence: Divergence = ...,
    return_rows: Literal[False] = ...,
    chunk_size: int | None = ...,
    backend: Backend = ...,
) -> Tensor: ...


@overload
def linear_dual_kl(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_hidden: Tensor,
    teacher_head: Tensor,
    row_weight: Tensor,
    *,
    student_bias: Tensor | None = ...,
    teacher_bias: Tensor | None = ...,
    labels: Tensor | None = ...,
    label_weight: Tensor | None = ...,
    temperature: float = ...,
    logit_scale: float | Pair = ...,
    logit_softcap: float | PairOfCaps | None = ...,
    divergence: Divergence = ...,
    return_rows: Literal[True],
    chunk_size: int | None = ...,
    backend: Backend = ...,
) -> tuple[Tensor, DualKLRows]: ...


def linear_dual_kl(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_hidden: Tensor,
    teacher_head: Tensor,
    row_weight: Tensor,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    labels: Tensor | None = None,
    label_weight: Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float | Pair = 1.0,
    logit_softcap: float | PairOfCaps | None = None,
    divergence: Divergence = "kl",
    return_rows: bool = False,
    chunk_size: int | None = None,
    backend: Backend = "auto",
) -> Tensor | tuple[Tensor, DualKLRows]:
    """Compute `dual_kl` of two linear heads with the logits of at most `chunk_size` rows at a time.

        z_s = student_hidden @ student_head^T + student_bias,     z_t likewise
        loss = dual_kl(z_s, z_t, row_weight) + sum_i label_weight_i * nll_i

    nll_i is the cross-entropy of the label: that of the student's softmax at temperature 1, with
    its scale and softcap, over the common vocabulary. It is 0 without labels.

    The forward computes the gradients; the backward multiplies them by the gradient of the loss.
    Rows of weight 0 (both weights, with labels) are dropped before the first product (one host
    synchronization). A frozen head costs no product, and without gradients only the loss is
    computed.

    Precision: on a GPU the products give float32 logits. On a CPU logits have the inputs' dtype,
    except that float16 inputs, and bfloat16 inputs on a processor without bfloat16 products, are
    multiplied in float32, with a float32 copy of the head. backend="reference" multiplies in
    float32. The head's gradient accumulates over chunks in float32.

    Memory: besides a few numbers a row, only the gradient of the hidden states grows with N. It is
    kept until the backward (in float32 for float16 inputs), which returns a second copy only where
    the dtypes differ or the graph is retained.

    Args:
        student_hidden, student_head: [N, H_s], [V_s, H_s] of one dtype: float32, float16 or
            bfloat16 (float64 with backend="reference"). Under autocast they are cast to its dtype,
            as torch.nn.functional.linear would.
        teacher_hidden, teacher_head: [N, H_t], [V_t, H_t] of one dtype. If the vocabularies differ
            (by padding), the first min(V_s, V_t) logits are used.
        row_weight: [N] float32 (float64 for float64 inputs), see `row_weights`.
        student_bias, teacher_bias: [V_s], [V_t], of their head's dtype.
        labels: [N] int64 ids of the common vocabulary; a negative one is no label and has an nll
            of 0. On a CPU the labels of rows that count are checked.
        label_weight: [N], of the dtype of `row_weight`; the default only measures the nll.
        chunk_size: the largest number of rows of a chunk. The default on a CPU is 512 rows, up to
            4096 for vocabularies below 2^15, and fewer above 2^18 (2^27 logits of the student). On
            a GPU it is 32 to 4096 rows: with bfloat16 inputs 2^29 logits of the student and a
            quarter as many of the teacher (2.5 GiB in float32), otherwise 2^28 of each (2 GiB). The
            head's gradient is read and written once a chunk. If all N rows are one chunk, a CPU
            with bfloat16 products keeps the head's gradient of bfloat16 inputs in bfloat16.
        temperature, logit_scale, logit_softcap, divergence, return_rows, backend: as in `dual_kl`.
    Returns:
        The loss, [] float32, in nats; with `return_rows` a pair (loss, rows).
    Raises:
        ValueError: wrong dtype, shape, device or range; a `row_weight` that requires grad.
        RuntimeError: the backend is not available (says why), or a second-order gradient or a
            forward-mode derivative was asked for.
    """
    options = logit_options(_OP, temperature, logit_scale, logit_softcap, divergence)
    student = autocast_model(_OP, "student", (student_hidden, student_head, student_bias))
    teacher = autocast_model(_OP, "teacher", (teacher_hidden, teacher_head, teacher_bias))
    check_model(_OP, "student", student, student[0], backend)
    check_model(_OP, "teacher", teacher, student[0], backend)
    checks.require_row_weight(_OP, row_weight, student[0].shape[0], student[0])
    refuse_forward_mode(_OP, *student, *teacher, row_weight, label_weight)
    sizes = student[1].shape[0], teacher[1].shape[0]
    labels, label_weight = _checked_labels(labels, label_weight, row_weight, min(sizes))
    run = implementation(_OP, student[0].device, backend, student[0].dtype)
    loss, _, _, _, rows = run(
        student[0],
        student[1],
        teacher[0].detach(),
        teacher[1].detach(),
        row_weight.contiguous(),
        student[2],
        None if teacher[2] is None else teacher[2].detach(),
        labels,
        label_weight,
        *options,
        *needs_of(_OP, student, max(sizes), return_rows, chunk_size, backend),
    )
    return (loss, DualKLRows.of(rows)) if return_rows else loss


def _checked_labels(
    labels: Tensor | None, label_weight: Tensor | None, row_weight: Tensor, vocabulary: int
) -> tuple[Tensor | None, Tensor | None]:
    rows = row_weight.shape[0]
    if label_weight is not None:
        checks.require(labels is not None, _OP, "labels", "given with label_weight", None)
        checks.require_row_weight(_OP, label_weight, rows, row_weight, "label_weight")
        label_weight = label_weight.contiguous()
    if labels is None:
        return None, None
    checks.require_tensor(_OP, "labels", labels)
    checks.require(labels.dtype == torch.int64, _OP, "labels", "torch.int64", labels.dtype)
    checks.require_shape(_OP, "labels", labels, (rows,), f"[N] with N = {rows} rows")
    checks.require_device(_OP, "labels", labels, row_weight.device)
    if labels.device.type == "cpu" and not torch.compiler.is_compiling():
        live = row_weight != 0
        live = live if label_weight is None else live | (label_weight != 0)
        largest = int(labels[live].max()) if live.any() else 0
        needed = f"below the common vocabulary, {vocabulary}, in rows that count"
        checks.require(largest < vocabulary, _OP, "labels", needed, largest)
    return labels.contiguous(), label_weight


register_linear_loss(_OP, make_linear_dual_kl)
