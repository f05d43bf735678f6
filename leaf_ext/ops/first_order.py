"""What the backwards of the losses share."""

from __future__ import annotations

import torch
from torch import Tensor

from leaf_ext.native import prefer_huge_pages

# Elements that are scaled at once: large enough to share among threads, and reused memory.
_BLOCK = 2**22


def refuse_second_order(op: str) -> None:
    """A graph of the gradient itself (create_graph=True) would silently lack this op's part."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"{op}: only first-order gradients exist; the backward was asked for a graph of the "
            "gradient (create_graph=True), which this loss does not have"
        )


def scaled(grad: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """grad * factor in float32, rounded once to `dtype`; `grad` itself stays as it is."""
    large = type(grad) is Tensor and grad.numel() > _BLOCK
    if grad.device.type == "cpu" and large and grad.dtype != dtype:
        return _scaled_in_blocks(grad, factor, dtype)
    if grad.device.type == "cpu":
        # On a CPU torch multiplies a 16-bit tensor by a 0-dim float32 one in float32: one pass.
        return (grad * factor).to(dtype)
    return (grad.to(factor.dtype) * factor).to(dtype)


def _scaled_in_blocks(grad: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """The same without a second float32 tensor of the whole size."""
    result = prefer_huge_pages(torch.empty(grad.shape, dtype=dtype))
    buffer = torch.empty(_BLOCK, dtype=torch.promote_types(grad.dtype, factor.dtype))
    parts = (torch.split(flat, _BLOCK) for flat in (grad.reshape(-1), result.view(-1)))
    for part, target in zip(*parts, strict=True):
        target.copy_(torch.mul(part, factor, out=buffer[: part.numel()]))
    return result


def scale_(grad: Tensor, factor: Tensor) -> Tensor:
    """The same in place."""
    if grad.device.type == "cpu":
        return grad.mul_(factor)
    return grad.copy_(grad.to(factor.dtype) * factor)
