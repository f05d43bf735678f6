"""Argument checks. An error is one sentence, "op: argument must be X, got Y"."""

from __future__ import annotations

import math
import numbers

import torch
from torch import Tensor

from leaf_ext.schema import DTYPES, REFERENCE_DTYPES


def require(condition: bool, op: str, argument: str, needed: str, got: object) -> None:
    if not condition:
        raise ValueError(f"{op}: {argument} must be {needed}, got {got}")


def require_tensor(op: str, argument: str, value: object) -> None:
    require(isinstance(value, Tensor), op, argument, "a tensor", type(value).__name__)


def require_float(op: str, argument: str, tensor: Tensor, backend: str) -> None:
    """Require a dtype of the ops; float64 is allowed if the reference may run."""
    require_tensor(op, argument, tensor)
    allowed = REFERENCE_DTYPES if backend in ("auto", "reference") else DTYPES
    names = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
    needed = f"{names} (or float64 with backend='reference')"
    require(tensor.dtype in allowed, op, argument, needed, tensor.dtype)


def require_shape(op: str, argument: str, tensor: Tensor, shape: tuple[int, ...], why: str) -> None:
    require(tuple(tensor.shape) == shape, op, argument, why, f"shape {tuple(tensor.shape)}")


def require_matrix(op: str, argument: str, tensor: Tensor, layout: str) -> None:
    require(tensor.dim() == 2, op, argument, f"2-D {layout}", f"shape {tuple(tensor.shape)}")


def require_device(op: str, argument: str, tensor: Tensor, device: torch.device) -> None:
    require(
        tensor.device == device, op, argument, f"on {device} like the first argument", tensor.device
    )


def require_same_width(op: str, argument: str, tensor: Tensor, first: Tensor) -> None:
    """Require float64 of both models or of none, so that the result has one precision."""
    wide = first.dtype == torch.float64
    needed = "float64 like the other model's" if wide else "no wider than the other model's"
    require((tensor.dtype == torch.float64) == wide, op, argument, needed, tensor.dtype)


def require_row_weight(
    op: str, weight: Tensor, rows: int, like: Tensor, argument: str = "row_weight"
) -> None:
    """Require float32 [N] (float64 for float64 inputs) that needs no gradient."""
    require_tensor(op, argument, weight)
    wanted = torch.float64 if like.dtype == torch.float64 else torch.float32
    require(weight.dtype == wanted, op, argument, str(wanted), weight.dtype)
    require_shape(op, argument, weight, (rows,), f"[N] with N = {rows} rows")
    require_device(op, argument, weight, like.device)
    needed = "a constant (its gradient is not computed; detach it)"
    require(not weight.requires_grad, op, argument, needed, "one that requires grad")


def require_number(
    op: str, argument: str, value: object, low: float, high: float, *, strict: bool = False
) -> float:
    """Return a finite number in [low, high], or above `low` if `strict`, as a float."""
    number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    bound = f"> {low:g}" if strict else f"in [{low:g}, {high:g}]"
    needed = f"a finite number {bound}"
    if not number:  # torch.compile cannot trace the repr of a number
        require(
            False, op, argument, needed, "a Tensor" if isinstance(value, Tensor) else repr(value)
        )
    assert isinstance(value, numbers.Real)
    converted = float(value)
    inside = converted > low if strict else low <= converted <= high
    require(inside and abs(converted) < math.inf, op, argument, needed, value)
    return converted


def require_integer(op: str, argument: str, value: object, low: int) -> int:
    ok = isinstance(value, (numbers.Integral, torch.SymInt)) and not isinstance(value, bool)
    require(ok, op, argument, f"an integer >= {low}", value)
    number: int = int(value) if isinstance(value, numbers.Integral) else value  # type: ignore[assignment]  # a SymInt stands for an int
    require(bool(number >= low), op, argument, f"an integer >= {low}", value)
    return number


def share_memory(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors on one device have a byte in common.

    The answer is exact for contiguous tensors and for matrices whose rows are contiguous. Otherwise
    every byte between a tensor's first and last element counts as its own.
    """
    if a.numel() == 0 or b.numel() == 0 or a.is_meta:
        return False
    try:
        (first_a, end_a), (first_b, end_b) = _byte_range(a), _byte_range(b)
    except RuntimeError:  # a tensor of a trace has no address
        return False
    if end_a <= first_b or end_b <= first_a:
        return False
    if not (a.dim() == b.dim() == 2 and a.stride(1) == b.stride(1) == 1):
        return True
    step = a.stride(0) * a.itemsize
    if step == 0 or step != b.stride(0) * b.itemsize:
        return True
    # Columns of one larger matrix: the rows interleave, and may do so without an overlap.
    offset = (first_b - first_a) % step
    return offset < a.shape[1] * a.itemsize or offset + b.shape[1] * b.itemsize > step


def _byte_range(tensor: Tensor) -> tuple[int, int]:
    """Return the addresses of the first byte and of the one after the last."""
    last = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.itemsize


def unit_stride(tensor: Tensor) -> Tensor:
    """Return the tensor with contiguous rows, copied only if they are not contiguous."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
