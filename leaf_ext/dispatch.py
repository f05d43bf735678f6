"""Choice of the implementation of an op: `resolve(op, device, backend, dtype)`."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Literal, get_args

import torch

from leaf_ext import native, triton
from leaf_ext import reference as reference  # implements the namespace leaf_ext_reference
from leaf_ext.schema import REFERENCE, TRITON

Backend = Literal["auto", "reference", "cpu", "cuda", "triton"]
BACKENDS: tuple[str, ...] = get_args(Backend)

# The compiled kernels of all devices share a namespace: torch picks by the tensors.
_NAMESPACE = {"reference": REFERENCE, "cpu": "leaf_ext", "cuda": "leaf_ext", "triton": TRITON}
# The order of preference of "auto" on a device type; the reference runs on all others.
_PREFERENCE = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}
_log = logging.getLogger("leaf_ext")
_said: set[str] = set()


def missing(backend: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Return why a backend cannot run on this device and dtype, or None if it can."""
    if backend == "reference":
        return None
    elsewhere = backend == "triton"
    reason = triton.missing(device.type) if elsewhere else native.missing(backend, device)
    if reason is None and dtype == torch.float64:
        return "float64 exists only in backend='reference'"
    return reason


def resolve(op: str, device: torch.device, backend: str, dtype: torch.dtype) -> str:
    """Return the namespace under torch.ops in which `op` runs.

    "auto" falls back to the reference and logs it once. float64, which only the reference supports,
    is not logged.

    Raises:
        ValueError: the backend is unknown.
        RuntimeError: a backend that was requested by name is not available; the message says why.
    """
    if backend not in BACKENDS:
        raise ValueError(f"{op}: backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend != "auto":
        reason = missing(backend, device, dtype)
        if reason is not None:
            raise RuntimeError(f"{op}: backend={backend!r} is not available: {reason}")
        return _NAMESPACE[backend]
    if dtype == torch.float64:
        return REFERENCE
    if device.type not in _PREFERENCE:
        _say_once(f"running the slower reference: no other backend runs on {device.type!r}")
    for candidate in _PREFERENCE.get(device.type, ()):
        reason = missing(candidate, device, dtype)
        if reason is None:
            return _NAMESPACE[candidate]
        _say_once(f"{candidate!r} is not available, a slower backend runs instead: {reason}")
    return REFERENCE


def backends(device: str | torch.device = "cpu") -> dict[str, str | None]:
    """Return the backends of a kind of device, and why those that cannot run there cannot.

        leaf_ext.backends("cuda")   # {'cuda': None, 'triton': None, 'reference': None}

    Args:
        device: "cpu", "cuda" or another device of torch; it need not be there.
    Returns:
        For each backend None, or the sentence that says what is missing. The first that can run is
        the one of `backend="auto"`. float64 runs in the reference alone.
    """
    place = torch.device(device)
    names = (*_PREFERENCE.get(place.type, ()), "reference")
    return {name: missing(name, place, torch.float32) for name in names}


def implementation(
    op: str, device: torch.device, backend: str, dtype: torch.dtype
) -> Callable[..., Any]:
    """Return the op of the resolved namespace."""
    packet: Callable[..., Any] = getattr(
        getattr(torch.ops, resolve(op, device, backend, dtype)), op
    )
    return packet


def _say_once(message: str) -> None:
    if torch.compiler.is_compiling() or message in _said:
        return
    _said.add(message)
    _log.warning(message)
