"""Checks and scaling that the backward passes of the losses share."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from leaf_ext.dispatch import implementation
from leaf_ext.schema import LIBRARIES


def refuse_second_order(op: str) -> None:
    """Raise if a graph of the gradient is built: it would silently lack this op's part."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"{op}: only first-order gradients exist; the backward was asked for a graph of the "
            "gradient (create_graph=True), which this loss does not have"
        )


def refuse_forward_mode(op: str, *tensors: Tensor | None) -> None:
    """Raise for an input with a tangent: a custom op drops it, and the derivative would be 0."""
    given = (tensor for tensor in tensors if tensor is not None)
    if any(unpack_dual(tensor).tangent is not None for tensor in given):  # type: ignore[no-untyped-call]
        raise RuntimeError(
            f"{op}: forward-mode derivatives (torch.func.jvp, torch.autograd.forward_ad) must not "
            "be asked for, got an input with a tangent; use the backward (torch.autograd.grad)"
        )


def scaled(grad: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return grad * factor, computed in float32 and rounded once to `dtype`.

    The factor is on the device, and the host does not wait for it. In a backward that frees its
    graph the memory of `grad`, which no second backward can ask for, becomes the result: new memory
    would cost a CPU more than the loss itself.
    """
    if grad.dtype == dtype and grad.dim() == 2 and _graph_is_freed(grad):
        return scale_(grad.detach(), factor)
    result: Tensor = implementation("scaled", grad.device, "auto", grad.dtype)(grad, factor, dtype)
    return result


def scale_(grad: Tensor, factor: Tensor) -> Tensor:
    """Multiply in place and return `grad`; a factor of 1 leaves the memory untouched."""
    implementation("scale_", grad.device, "auto", grad.dtype)(grad, factor)
    return grad


def _graph_is_freed(saved: Tensor) -> bool:
    """Return whether the backward that runs now is the last one through its graph."""
    if type(saved) is not Tensor or torch.compiler.is_compiling():
        return False  # a tracer records the backward, and decides about its memory itself
    # It is no public function: without it the gradient is scaled into new memory.
    keeps = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return keeps is not None and not keeps()


def _fake(grad: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(grad, dtype=dtype, memory_format=torch.contiguous_format)


def _fake_inplace(grad: Tensor, factor: Tensor) -> None:
    return None


for _namespace, _library in LIBRARIES.items():
    torch.library.register_fake(f"{_namespace}::scaled", _fake, lib=_library)
    torch.library.register_fake(f"{_namespace}::scale_", _fake_inplace, lib=_library)
