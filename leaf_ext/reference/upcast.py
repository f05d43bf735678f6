"""The precision in which the reference computes."""

from __future__ import annotations

import torch
from torch import Tensor


def upcast(tensor: Tensor) -> Tensor:
    """float64 stays float64; everything else becomes float32."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()
