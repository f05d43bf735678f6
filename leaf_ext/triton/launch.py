"""What the host functions share: the device of a launch, and checks of memory safety."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def on_device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device; the tensors' may be another one."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def options(warps: int) -> dict[str, int]:
    """Launch options; fused multiply-adds are said explicitly, as Triton's default will change."""
    return {"num_warps": warps, "enable_fp_fusion": True}


def check(condition: bool, message: str) -> None:
    """The public functions check meaning; this keeps a direct call from reading foreign memory."""
    if not condition:
        raise RuntimeError(message)


def check_adjacent(op: str, argument: str, tensor: Tensor) -> None:
    check(
        tensor.shape[-1] <= 1 or tensor.stride(-1) == 1,
        f"{op}: {argument} must have a contiguous last dimension, got stride {tensor.stride(-1)}",
    )
