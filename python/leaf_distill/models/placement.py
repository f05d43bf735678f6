"""Resolves the dtype and the device of a model."""

from __future__ import annotations

import os
from typing import Any, Final

import torch

DTYPES: Final = ("auto", "float32", "bfloat16", "float16", "float64")
BALANCED: Final = "balanced"
_NATIVE: Final = {
    "bfloat16": ("avx512_bf16", "amx_bf16", "avx10_2", "bf16", "sve_bf16"),
    "float16": ("avx512_fp16", "amx_fp16", "avx10_2", "fp16_arith"),
}  # the instructions of a CPU that multiply in a dtype, as torch.cpu.get_capabilities names them


def check_dtype(dtype: str) -> None:
    """Raise ValueError unless `load_model` knows the dtype."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype: must be one of {', '.join(DTYPES)}, got {dtype!r:.60}")


def resolve_dtype(dtype: str, config: Any, device: torch.device) -> str:
    """Return the name of the dtype that weights are loaded in.

    Args:
        dtype: a name of DTYPES. "auto" is the checkpoint's dtype, or float32 if it names none or
            the CPU has no instructions for products in it: they are slower and less accurate.
        config: the model's configuration.
        device: the device that the model will run on.
    """
    if dtype != "auto":
        return dtype
    stored = getattr(config.get_text_config(), "dtype", None) or getattr(config, "dtype", None)
    name = str(stored).removeprefix("torch.")
    if name not in DTYPES:
        return "float32"
    if device.type == "cpu" and name in _NATIVE:
        capabilities = torch.cpu.get_capabilities()
        if not any(capabilities.get(instructions, False) for instructions in _NATIVE[name]):
            return "float32"
    return name


def resolve_device(device: str) -> torch.device:
    """Return the device of a name.

    Args:
        device: "cpu", "cuda:1" and so on; "cuda" is this process's GPU (LOCAL_RANK says which), and
            "auto" the same, or the CPU if there is none. "balanced" is the first GPU, or the CPU:
            `load_model` goes on from there to the others. Several GPUs are untested.

    Raises:
        ValueError: the device is unknown, a GPU that is not there, or "balanced" for one of several
            processes.
    """
    own = os.environ.get("LOCAL_RANK")
    if device == BALANCED:
        if int(os.environ.get("WORLD_SIZE") or 1) > 1:
            raise ValueError(
                "device: must be one device for each of several processes, got 'balanced', which "
                "takes all GPUs; start a single process, or give --device auto"
            )
        device = "cuda:0" if torch.cuda.is_available() else "cpu"
    if device == "auto":
        if not torch.cuda.is_available():
            return torch.device("cpu")
        device = f"cuda:{own or 0}"
    elif device == "cuda" and own:
        device = f"cuda:{own}"
    try:
        resolved = torch.device(device)
    except RuntimeError as error:
        raise ValueError(
            f"device: must be 'auto', 'cpu', 'cuda[:N]' or 'balanced', got {device!r}"
        ) from error
    count = torch.cuda.device_count()
    if resolved.type == "cuda" and (resolved.index or 0) >= count:
        raise ValueError(
            f"device: must be one of the {count} GPUs of this machine, got {device!r}; "
            "choose another, or 'cpu'; a launcher starts at most one process a GPU"
        )
    return resolved


def check_in_memory(model: Any, name: str, dtype: str, device: str) -> str:
    """Return the dtype of a model in memory; refuse a request for another dtype or device."""
    loaded = str(model.dtype).removeprefix("torch.")
    if dtype not in ("auto", loaded):
        raise ValueError(
            f"dtype: must be 'auto' or {loaded!r} for the model {name!r} in memory, got {dtype!r}; "
            "convert the model first"
        )
    if device != "auto":
        asked = resolve_device(device)
        if asked.type != model.device.type or asked.index not in (None, model.device.index):
            raise ValueError(
                f"device: must be 'auto' or {str(model.device)!r} for the model {name!r} in "
                f"memory, got {device!r}; move the model first"
            )
    return loaded
