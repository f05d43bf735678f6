"""Multiplication of a gradient by a factor on the device."""

from __future__ import annotations

import torch
from torch import Tensor


def scaled(grad: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return grad * factor in the factor's dtype, float32 or float64, rounded once to `dtype`."""
    return (grad.to(factor.dtype) * factor).to(dtype)


def scale_(grad: Tensor, factor: Tensor) -> None:
    """Multiply `grad` in place."""
    grad.copy_(scaled(grad, factor, grad.dtype))
