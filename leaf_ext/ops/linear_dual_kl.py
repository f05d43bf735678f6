"""Public `linear_dual_kl`: checks, autograd, fake kernels."""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor

from leaf_ext.dispatch import Backend, implementation, resolve
from leaf_ext.ops import checks, linear_chunks
from leaf_ext.ops.dual_kl import DualKLRows
from leaf_ext.ops.first_order import refuse_forward_mode, refuse_second_order, scaled
from leaf_ext.ops.logit_options import Pair, PairOfCaps, logit_options
from leaf_ext.schema import LIBRARIES, REFERENCE, accum_dtype, hidden_grad_dtype

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
    temperature: float = ...,
    logit_scale: float | Pair = ...,
    logit_softcap: float | PairOfCaps | None = ...,
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
    temperature: float = ...,
    logit_scale: float | Pair = ...,
    logit_softcap: float | PairOfCaps | None = ...,
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
    temperature: float = 1.0,
    logit_scale: float | Pair = 1.0,
    logit_softcap: float | PairOfCaps | None = None,
    return_rows: bool = False,
    chunk_size: int | None = None,
    backend: Backend = "auto",
) -> Tensor | tuple[Tensor, DualKLRows]:
    """Compute `dual_kl` of two linear heads with the logits of at most `chunk_size` rows at a time.

        z_s = student_hidden @ student_head^T + student_bias,     z_t likewise
        loss = dual_kl(z_s, z_t, row_weight)

    The forward computes the gradients; the backward multiplies them by the gradient of the loss.
    Rows of weight 0 are dropped before the first product (one host synchronization). A frozen head
    costs no product, and without gradients only the loss is computed.

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
        chunk_size: the largest number of rows of a chunk. The default on a CPU is 512 rows, up to
            4096 for vocabularies below 2^15, and fewer above 2^18 (2^27 logits of the student). On
            a GPU it is 32 to 4096 rows: with bfloat16 inputs 2^29 logits of the student and a
            quarter as many of the teacher (2.5 GiB in float32), otherwise 2^28 of each (2 GiB). The
            head's gradient is read and written once a chunk. If all N rows are one chunk, a CPU
            with bfloat16 products keeps the head's gradient of bfloat16 inputs in bfloat16.
        temperature, logit_scale, logit_softcap, return_rows, backend: as in `dual_kl`.
    Returns:
        The loss, [] float32, in nats; with `return_rows` a pair (loss, rows).
    Raises:
        ValueError: wrong dtype, shape, device or range; a `row_weight` that requires grad.
        RuntimeError: the backend is not available (says why), or a second-order gradient or a
            forward-mode derivative was asked for.
    """
    options = logit_options(_OP, temperature, logit_scale, logit_softcap)
    student = _autocast("student", student_hidden, student_head, student_bias)
    teacher = _autocast("teacher", teacher_hidden, teacher_head, teacher_bias)
    _check_model("student", student, student[0], backend)
    _check_model("teacher", teacher, student[0], backend)
    checks.require_row_weight(_OP, row_weight, student[0].shape[0], student[0])
    refuse_forward_mode(_OP, *student, *teacher, row_weight)
    if chunk_size is None:
        vocabulary = max(student[1].shape[0], teacher[1].shape[0])
        chunk_size = linear_chunks.default_chunk_size(
            vocabulary, student[0].device, student[0].dtype
        )
    chunk_size = checks.require_integer(_OP, "chunk_size", chunk_size, 1)
    need_hidden, need_head, need_bias = (
        torch.is_grad_enabled() and tensor is not None and tensor.requires_grad
        for tensor in student
    )
    run = implementation(_OP, student[0].device, backend, student[0].dtype)
    head_dtype = None
    if need_head and resolve(_OP, student[0].device, backend, student[0].dtype) == REFERENCE:
        head_dtype = accum_dtype(student[0].dtype)
    elif need_head:
        head_dtype = linear_chunks.kept_head_dtype(student[0], chunk_size)
    loss, _, _, _, rows = run(
        student[0],
        student[1],
        teacher[0].detach(),
        teacher[1].detach(),
        row_weight.contiguous(),
        student[2],
        None if teacher[2] is None else teacher[2].detach(),
        *options,
        need_hidden,
        head_dtype,
        need_bias,
        return_rows,
        chunk_size,
    )
    return (loss, DualKLRows(*rows.detach().unbind(0))) if return_rows else loss


Model = tuple[Tensor, Tensor, Tensor | None]


def _autocast(side: str, hidden: Tensor, head: Tensor, bias: Tensor | None) -> Model:
    """Cast the three tensors as a linear layer under the current autocast would."""
    named = (("hidden", hidden), ("head", head), *(() if bias is None else (("bias", bias),)))
    for name, tensor in named:
        checks.require_tensor(_OP, f"{side}_{name}", tensor)
    device = hidden.device.type
    if not torch.is_autocast_enabled(device) or hidden.dtype == torch.float64:
        return hidden, head, bias
    dtype = torch.get_autocast_dtype(device)
    return hidden.to(dtype), head.to(dtype), None if bias is None else bias.to(dtype)


def _check_model(side: str, model: Model, first: Tensor, backend: str) -> None:
    hidden, head, bias = model
    for name, tensor, layout in (("hidden", hidden, "[N, H]"), ("head", head, "[V, H]")):
        argument = f"{side}_{name}"
        checks.require_float(_OP, argument, tensor, backend)
        checks.require_matrix(_OP, argument, tensor, layout)
        checks.require_device(_OP, argument, tensor, first.device)
    checks.require_same_width(_OP, f"{side}_hidden", hidden, first)
    got = f"shape {tuple(hidden.shape)}"
    needed = f"[N, H] with N = {first.shape[0]} rows like student_hidden"
    checks.require(hidden.shape[0] == first.shape[0], _OP, f"{side}_hidden", needed, got)
    needed = f"{hidden.dtype} like {side}_hidden"
    checks.require(head.dtype == hidden.dtype, _OP, f"{side}_head", needed, head.dtype)
    width = hidden.shape[1]
    needed = f"[V, H] with V >= 1 and H = {width} like {side}_hidden"
    fits = head.shape[1] == width and head.shape[0] >= 1
    checks.require(fits, _OP, f"{side}_head", needed, f"shape {tuple(head.shape)}")
    if bias is not None:
        argument = f"{side}_bias"
        checks.require_tensor(_OP, argument, bias)
        checks.require(bias.dtype == head.dtype, _OP, argument, str(head.dtype), bias.dtype)
        vocabulary = head.shape[0]
        checks.require_shape(_OP, argument, bias, (vocabulary,), f"[V] with V = {vocabulary}")
        checks.require_device(_OP, argument, bias, first.device)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, *grads, rows = output
    ctx.mark_non_differentiable(*grads, rows)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*grads)
    ctx.dtypes = inputs[0].dtype, inputs[1].dtype
    hidden, head_dtype, bias = inputs[-5:-2]
    ctx.needed = hidden, head_dtype is not None, bias


def _backward(ctx: Any, grad_loss: Tensor | None, *_: object) -> tuple[Tensor | None, ...]:
    result: list[Tensor | None] = [None] * 17
    if grad_loss is None:
        return tuple(result)
    refuse_second_order(_OP)
    refuse_forward_mode(_OP, grad_loss)
    hidden_dtype, head_dtype = ctx.dtypes
    dtypes = (hidden_dtype, head_dtype, head_dtype)
    for slot, grad, dtype, needed in zip(
        (0, 1, 5), ctx.saved_tensors, dtypes, ctx.needed, strict=True
    ):
        if needed:
            result[slot] = scaled(grad, grad_loss, dtype)
    return tuple(result)


def _fake(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_hidden: Tensor,
    teacher_head: Tensor,
    row_weight: Tensor,
    student_bias: Tensor | None,
    teacher_bias: Tensor | None,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    need_hidden_grad, head_grad_dtype, need_bias_grad, need_rows, _ = options[-5:]
    dtype = accum_dtype(student_hidden.dtype)
    new = student_hidden.new_empty
    hidden_shape = student_hidden.shape if need_hidden_grad else (0,)
    hidden_dtype = hidden_grad_dtype(student_hidden.dtype)
    return (
        new((), dtype=dtype),
        new(hidden_shape, dtype=hidden_dtype if need_hidden_grad else dtype),
        new(student_head.shape if head_grad_dtype else (0,), dtype=head_grad_dtype or dtype),
        new((student_head.shape[0] if need_bias_grad else 0,), dtype=dtype),
        new((4, student_hidden.shape[0] if need_rows else 0), dtype=dtype),
    )


for _namespace, _library in LIBRARIES.items():
    _name = f"{_namespace}::{_OP}"
    if _namespace != REFERENCE:
        _library.impl(
            _OP, linear_chunks.make_linear_dual_kl(_namespace), "CompositeExplicitAutograd"
        )  # type: ignore[no-untyped-call]
    torch.library.register_fake(_name, _fake, lib=_library)
    torch.library.register_autograd(_name, _backward, setup_context=_setup_context, lib=_library)
