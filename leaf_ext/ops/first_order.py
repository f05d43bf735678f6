"""What the backwards of the losses share."""

from __future__ import annotations

import torch
from torch import Tensor


def refuse_second_order(op: str) -> None:
    """A graph of the gradient itself (create_graph=True) would silently lack this op's part."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"{op}: only first-order gradients exist; the backward was asked for a graph of the "
            "gradient (create_graph=True), which this loss does not have"
        )


def scaled(grad: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """grad * factor in float32, rounded once to `dtype`; `grad` itself stays as it is."""
    if grad.device.type == "cpu":
        # On a CPU torch multiplies a 16-bit tensor by a 0-dim float32 one in float32.
        return (grad * factor).to(dtype)
    return (grad.to(factor.dtype) * factor).to(dtype)


def scale_(grad: Tensor, factor: Tensor) -> Tensor:
    """The same in place."""
    if grad.device.type == "cpu":
        return grad.mul_(factor)
    return grad.copy_(grad.to(factor.dtype) * factor)
