"""Loads the compiled module, whose import registers the CPU kernels of `torch.ops.leaf_ext`."""

from __future__ import annotations

import importlib
from typing import TypedDict

import torch  # first: it loads the libraries that the compiled module is linked to


class BuildInfo(TypedDict):
    """What was compiled, and what of it this machine uses."""

    version: str
    torch: str  # that the extension was built with
    compiler: str
    backends: tuple[str, ...]
    architectures: tuple[str, ...]
    instruction_set: str


def _load() -> tuple[BuildInfo, None] | tuple[None, str]:
    """The build's own description, or why there is none."""
    try:
        module = importlib.import_module("leaf_ext._C")
    except ModuleNotFoundError as error:
        if error.name != "leaf_ext._C":
            raise
        return None, (
            "the compiled module was not built; `pip install --no-build-isolation .` builds it"
        )
    except ImportError as error:
        return None, f"the compiled module could not be loaded: {error}"
    info: BuildInfo = module.build_info()
    return info, None


def prefer_huge_pages(tensor: torch.Tensor) -> torch.Tensor:
    """The same tensor, fresh memory on a CPU that is about to be written, in huge pages if it can.

    Pages of 4 KiB are mapped one by one at their first write, which takes longer than most kernels.
    """
    if _INFO is not None and tensor.device.type == "cpu":
        module = importlib.import_module("leaf_ext._C")
        module.prefer_huge_pages(tensor.data_ptr(), tensor.nbytes)
    return tensor


# ERROR: why the compiled kernels are not available; None where they are.
_INFO, ERROR = _load()


def build_info() -> BuildInfo:
    """Version, backends, compiled architectures and the instruction set that the CPU kernels use.

    Raises:
        RuntimeError: there is no compiled module; the message says why.
    """
    if _INFO is None:
        raise RuntimeError(f"leaf_ext.build_info: {ERROR}")
    return _INFO
