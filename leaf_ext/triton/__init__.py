"""Triton kernels: for GPUs, and in Triton's interpreter for a CPU.

Importing this package implements the namespace `leaf_ext_triton`. The first op that runs imports
triton and the kernels.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable
from typing import Any

from leaf_ext.schema import LIBRARIES, TRITON

_INSTALLED = importlib.util.find_spec("triton") is not None
# Triton reads the variable when it decorates a function, also for its own library at import.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")
_DEVICES = ("cuda", "cpu") if INTERPRETED else ("cuda",)


def missing(device: str) -> str | None:
    """Return why the kernels cannot run on this type of device, or None if they can."""
    if device in _DEVICES:
        return None if _INSTALLED else "triton is not installed (`pip install triton`)"
    if device == "cpu":
        return (
            "it runs on a GPU; on CPU tensors only in Triton's interpreter (for tests: set "
            "TRITON_INTERPRET=1 before Python starts)"
        )
    return f"it runs on CUDA and ROCm GPUs, got {device} tensors"


def _lazily(module: str, op: str) -> Callable[..., Any]:
    """Return the op's host function, which is imported when it is first called."""

    def run(*arguments: Any) -> Any:
        return getattr(importlib.import_module(f"leaf_ext.triton.{module}"), op)(*arguments)

    return run


for _op, _module in {
    "grad_norm": "grad_norm",
    "detect_spans": "detect_spans",
    "dual_kl": "dual_kl",
    "dual_kl_": "dual_kl",
    "topk_kl": "topk_kl",
    "topk_kl_": "topk_kl",
    "scaled": "scale",
    "scale_": "scale",
}.items():
    LIBRARIES[TRITON].impl(_op, _lazily(_module, _op), "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
