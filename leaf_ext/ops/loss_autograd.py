"""Autograd of the losses over logits: the forward computes the gradient, the backward scales it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from leaf_ext.ops import checks
from leaf_ext.ops.first_order import refuse_forward_mode, refuse_second_order, scale_, scaled
from leaf_ext.schema import LIBRARIES, accum_dtype


def register_loss(op: str, fake: Callable[..., Any]) -> None:
    """Register fake kernel and autograd of an op that returns loss, grad, grad_scale and rows.

    The gradient is that of its first argument.
    """

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _, grad, scale, rows = output
        ctx.mark_non_differentiable(grad, scale, rows)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(grad, scale)
        ctx.others = len(inputs) - 1

    def backward(ctx: Any, grad_loss: Tensor | None, *_: object) -> tuple[Tensor | None, ...]:
        nothing = (None,) * ctx.others
        if grad_loss is None:
            return (None, *nothing)
        refuse_second_order(op)
        refuse_forward_mode(op, grad_loss)
        grad, scale = ctx.saved_tensors
        return (scaled(grad, grad_loss / scale, grad.dtype), *nothing)

    for namespace, library in LIBRARIES.items():
        name = f"{namespace}::{op}"
        torch.library.register_fake(name, fake, lib=library)
        torch.library.register_autograd(name, backward, setup_context=setup_context, lib=library)


def fake_loss(
    student: Tensor, need_grad: bool, need_rows: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return loss, grad, grad_scale and rows without values."""
    dtype = accum_dtype(student.dtype)
    loss = student.new_empty((), dtype=dtype)
    grad = student.new_empty(student.shape if need_grad else (0,))
    rows = student.new_empty((4, student.shape[0] if need_rows else 0), dtype=dtype)
    return loss, grad, torch.empty_like(loss), rows


def check_overwritten(op: str, student: Tensor, others: dict[str, Tensor]) -> None:
    """Check that nothing else needs the logits that `inplace_grad` overwrites."""
    strides = student.stride()
    separate = strides[1] == 1 and (student.shape[0] <= 1 or strides[0] >= student.shape[1])
    needed = "rows of adjacent elements that share no memory (inplace_grad overwrites them)"
    checks.require(separate, op, "student_logits", needed, f"strides {strides}")
    leaf = student.is_leaf and student.requires_grad and torch.is_grad_enabled()
    needed = "the output of an operation (inplace_grad overwrites it)"
    checks.require(not leaf, op, "student_logits", needed, "a leaf tensor that requires grad")
    if torch.compiler.is_compiling():  # a tensor of a graph has no address
        return
    for argument, other in others.items():
        shared = checks.share_memory(student, other)
        needed = "in other memory than student_logits (inplace_grad overwrites them)"
        checks.require(not shared, op, argument, needed, "a tensor in the same memory")


class Overwrite(torch.autograd.Function):
    """Calls `run(student, *arguments)`, which overwrites the logits with their gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        op: str,
        run: Callable[..., tuple[Tensor, Tensor, Tensor]],
        *arguments: Any,
    ) -> tuple[Tensor, Tensor]:
        loss, scale, rows = run(student, *arguments)
        if not torch.compiler.is_compiling():
            # A node that saved the logits for its own backward must detect that they have changed.
            torch.autograd.graph.increment_version(student)
        ctx.save_for_backward(student, scale)
        ctx.mark_non_differentiable(rows)
        ctx.op, ctx.spent, ctx.others = op, False, 2 + len(arguments)
        return loss, rows

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_order(ctx.op)
        refuse_forward_mode(ctx.op, grad_loss)
        nothing = (None,) * ctx.others
        if torch.compiler.is_compiling():  # a graph cannot store whether it has run
            grad, scale = ctx.saved_tensors
            return (scaled(grad.detach(), grad_loss / scale, grad.dtype), *nothing)
        if ctx.spent:
            raise RuntimeError(
                f"{ctx.op}: a second backward through a loss with inplace_grad=True; the first one "
                "has used up the gradient (call with inplace_grad=False to keep it)"
            )
        grad, scale = ctx.saved_tensors
        ctx.spent = True
        return (scale_(grad.detach(), grad_loss / scale), *nothing)
