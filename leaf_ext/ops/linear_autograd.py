"""The losses of linear heads share these: checks of a model, autograd, fake kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from leaf_ext.dispatch import resolve
from leaf_ext.ops import checks, linear_chunks
from leaf_ext.ops.first_order import refuse_forward_mode, refuse_second_order, scaled
from leaf_ext.ops.linear_chunks import Gradients, Model, Needs
from leaf_ext.schema import LIBRARIES, OPS, REFERENCE, accum_dtype, hidden_grad_dtype


def autocast_model(op: str, side: str, model: Model) -> Model:
    """Cast hidden states, head and bias as a linear layer under the current autocast would."""
    hidden, head, bias = model
    named = (("hidden", hidden), ("head", head), *(() if bias is None else (("bias", bias),)))
    for name, tensor in named:
        checks.require_tensor(op, f"{side}_{name}", tensor)
    device = hidden.device.type
    if not torch.is_autocast_enabled(device) or hidden.dtype == torch.float64:
        return model
    dtype = torch.get_autocast_dtype(device)
    return hidden.to(dtype), head.to(dtype), None if bias is None else bias.to(dtype)


def check_model(op: str, side: str, model: Model, first: Tensor, backend: str) -> None:
    hidden, head, bias = model
    for name, tensor, layout in (("hidden", hidden, "[N, H]"), ("head", head, "[V, H]")):
        argument = f"{side}_{name}"
        checks.require_float(op, argument, tensor, backend)
        checks.require_matrix(op, argument, tensor, layout)
        checks.require_device(op, argument, tensor, first.device)
    checks.require_same_width(op, f"{side}_hidden", hidden, first)
    got = f"shape {tuple(hidden.shape)}"
    needed = f"[N, H] with N = {first.shape[0]} rows like student_hidden"
    checks.require(hidden.shape[0] == first.shape[0], op, f"{side}_hidden", needed, got)
    needed = f"{hidden.dtype} like {side}_hidden"
    checks.require(head.dtype == hidden.dtype, op, f"{side}_head", needed, head.dtype)
    width = hidden.shape[1]
    needed = f"[V, H] with V >= 1 and H = {width} like {side}_hidden"
    fits = head.shape[1] == width and head.shape[0] >= 1
    checks.require(fits, op, f"{side}_head", needed, f"shape {tuple(head.shape)}")
    if bias is not None:
        argument = f"{side}_bias"
        checks.require_tensor(op, argument, bias)
        checks.require(bias.dtype == head.dtype, op, argument, str(head.dtype), bias.dtype)
        vocabulary = head.shape[0]
        checks.require_shape(op, argument, bias, (vocabulary,), f"[V] with V = {vocabulary}")
        checks.require_device(op, argument, bias, first.device)


def needs_of(
    op: str,
    student: Model,
    vocabulary: int,
    return_rows: bool,
    chunk_size: int | None,
    backend: str,
) -> Needs:
    """Return what a call needs; `vocabulary` is the largest of both models."""
    hidden, device = student[0], student[0].device
    if chunk_size is None:
        chunk_size = linear_chunks.default_chunk_size(vocabulary, device, hidden.dtype)
    chunk_size = checks.require_integer(op, "chunk_size", chunk_size, 1)
    need_hidden, need_head, need_bias = (
        torch.is_grad_enabled() and tensor is not None and tensor.requires_grad
        for tensor in student
    )
    head_dtype = None
    if need_head and resolve(op, device, backend, hidden.dtype) == REFERENCE:
        head_dtype = accum_dtype(hidden.dtype)
    elif need_head:
        head_dtype = linear_chunks.kept_head_dtype(hidden, chunk_size)
    return Needs(need_hidden, head_dtype, need_bias, return_rows, chunk_size)


def register_linear_loss(op: str, make: Callable[[str], Callable[..., Gradients]]) -> None:
    """Implement an op by `make(namespace)`, and register its fake kernel and autograd."""
    names = OPS[op].argument_names
    # Gradients flow to the student's hidden states, head and bias.
    slots = tuple(names.index(f"student_{name}") for name in ("hidden", "head", "bias"))

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _, *grads, rows = output
        ctx.mark_non_differentiable(*grads, rows)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*grads)
        hidden, head = inputs[0].dtype, inputs[1].dtype
        ctx.dtypes = hidden, head, head
        needs = Needs(*inputs[-len(Needs._fields) :])
        ctx.needed = needs.hidden_grad, needs.head_grad_dtype is not None, needs.bias_grad

    def backward(ctx: Any, grad_loss: Tensor | None, *_: object) -> tuple[Tensor | None, ...]:
        result: list[Tensor | None] = [None] * len(names)
        if grad_loss is None:
            return tuple(result)
        refuse_second_order(op)
        refuse_forward_mode(op, grad_loss)
        for slot, grad, dtype, needed in zip(
            slots, ctx.saved_tensors, ctx.dtypes, ctx.needed, strict=True
        ):
            if needed:
                result[slot] = scaled(grad, grad_loss, dtype)
        return tuple(result)

    def fake(*arguments: Any) -> Gradients:
        given = dict(zip(names, arguments, strict=True))
        needs = Needs(*arguments[-len(Needs._fields) :])
        return _fake(
            given["student_hidden"],
            given["student_head"],
            needs,
            4 if given.get("labels") is None else 5,
        )

    for namespace, library in LIBRARIES.items():
        name = f"{namespace}::{op}"
        if namespace != REFERENCE:
            library.impl(op, make(namespace), "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
        torch.library.register_fake(name, fake, lib=library)
        torch.library.register_autograd(name, backward, setup_context=setup_context, lib=library)


def _fake(hidden: Tensor, head: Tensor, needs: Needs, measures: int) -> Gradients:
    dtype, new = accum_dtype(hidden.dtype), hidden.new_empty
    hidden_dtype = hidden_grad_dtype(hidden.dtype) if needs.hidden_grad else dtype
    return (
        new((), dtype=dtype),
        new(hidden.shape if needs.hidden_grad else (0,), dtype=hidden_dtype),
        new(head.shape if needs.head_grad_dtype else (0,), dtype=needs.head_grad_dtype or dtype),
        new((head.shape[0] if needs.bias_grad else 0,), dtype=dtype),
        new((measures, hidden.shape[0] if needs.rows else 0), dtype=dtype),
    )
