"""The precision in which the reference computes."""

from __future__ import annotations

import torch
from torch import Tensor


def upcast(tensor: Tensor) -> Tensor:
    """Return float64 as it is and every other dtype as float32."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()
