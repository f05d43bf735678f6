"""Loads the compiled module, whose import registers the CPU kernels of `torch.ops.leaf_ext`."""

from __future__ import annotations

import functools
import importlib
from pathlib import Path
from typing import TypedDict

import torch  # first: it loads the libraries that the compiled module is linked to


class BuildInfo(TypedDict):
    """Description of the build and of the instruction set that this machine uses."""

    version: str
    torch: str  # the version the extension was built with
    compiler: str
    backends: tuple[str, ...]
    architectures: tuple[str, ...]
    cuda_architectures: tuple[str, ...]
    instruction_set: str
    amx: bool  # whether bfloat16 matrices are multiplied with AMX on this machine


def _load() -> tuple[BuildInfo, None] | tuple[None, str]:
    """Return the build's description, or the reason why there is none."""
    try:
        module = importlib.import_module("leaf_ext._C")
    except ModuleNotFoundError as error:
        if error.name != "leaf_ext._C":
            raise
        return None, (
            f"there is no compiled module in {Path(__file__).parent}; `pip install "
            "--no-build-isolation .` builds it (with `-e` also for a Python that is started in the "
            "sources)"
        )
    except ImportError as error:
        return None, f"the compiled module could not be loaded: {error}"
    info: BuildInfo = module.build_info()
    return info, None


def prefer_huge_pages(tensor: torch.Tensor) -> torch.Tensor:
    """Ask for huge pages for a tensor on a CPU that has not been written yet, and return it.

    Pages of 4 KiB are mapped one by one at their first write, which takes longer than most kernels.
    """
    if _INFO is not None and tensor.device.type == "cpu":
        module = importlib.import_module("leaf_ext._C")
        module.prefer_huge_pages(tensor.data_ptr(), tensor.nbytes)
    return tensor


def has_amx() -> bool:
    """Return whether `torch.ops.leaf_ext.bfloat16_matmul` runs here."""
    return _INFO is not None and _INFO["amx"]


# ERROR says why the compiled kernels are not available; it is None if they are.
_INFO, ERROR = _load()


def missing(backend: str, device: torch.device) -> str | None:
    """Return why the compiled kernels of a backend cannot run on a device, or None if they can."""
    if _INFO is None:
        return ERROR
    if backend == "cuda" and "cuda" not in _INFO["backends"]:
        return (
            "this build has no CUDA kernels; `LEAF_BUILD_CUDA=1 pip install --no-build-isolation "
            ".` builds them (it needs nvcc, and a CUDA build of torch)"
        )
    if device.type != backend:
        return f"it runs on {backend.upper()} tensors, got {device}"
    if backend == "cuda":
        return _missing_on_gpu(device.index if device.index is not None else -1)
    return None


@functools.cache
def _missing_on_gpu(index: int) -> str | None:
    assert _INFO is not None
    if torch.version.hip is not None:
        return "it runs on GPUs by NVIDIA"
    if not torch.cuda.is_available():
        return "torch sees no GPU"
    major, minor = torch.cuda.get_device_capability(None if index < 0 else index)
    return lacks_architecture(_INFO["cuda_architectures"], 10 * major + minor)


def lacks_architecture(built: tuple[str, ...], capability: int) -> str | None:
    """Return why a GPU of this compute capability (90 for 9.0) cannot run the build, or None.

    Machine code runs on its own major version, from its minor version on. The newest architecture
    is also included as PTX, which runs on all later GPUs.
    """
    numbers = [int(architecture) for architecture in built]
    native = any(n // 10 == capability // 10 and n <= capability for n in numbers)
    if native or capability >= max(numbers):
        return None
    return (
        f"it was built for compute capabilities {', '.join(built)}, and this GPU has {capability} "
        f"(LEAF_CUDA_ARCHS={capability} builds for it; 80 is the least)"
    )


def build_info() -> BuildInfo:
    """Describe the build that is installed.

    Returns:
        A dict of version, torch version and compiler, backends, compiled CPU and CUDA
        architectures, and the instruction set that the CPU kernels use on this machine.

    Raises:
        RuntimeError: there is no compiled module; the message says why.
    """
    if _INFO is None:
        raise RuntimeError(f"leaf_ext.build_info: {ERROR}")
    return _INFO
