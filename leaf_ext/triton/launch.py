"""Functions shared by the host functions: device of a launch, checks of memory safety."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def on_device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Make the tensor's device current, because Triton launches on the current device."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def options(warps: int, *, fused: bool = True) -> dict[str, int]:
    """Return launch options. Fused multiply-adds are explicit: Triton's default will change."""
    return {"num_warps": warps, "enable_fp_fusion": fused}


def check(condition: bool, message: str) -> None:
    """Raise if a direct call of the op would read memory outside its tensors."""
    if not condition:
        raise RuntimeError(message)


def check_adjacent(op: str, argument: str, tensor: Tensor) -> None:
    check(
        tensor.shape[-1] <= 1 or tensor.stride(-1) == 1,
        f"{op}: {argument} must have a contiguous last dimension, got stride {tensor.stride(-1)}",
    )
