"""Peak extra memory of a call, measured by Linux, or by torch on a GPU."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path

_PROCESS = Path("/proc/self")


def peak_extra_mib(run: Callable[..., object], *arguments: object) -> float | None:
    """Return by how many MiB the process's resident memory rises during `run`.

    Linux's peak counter is reset first, so that scratch memory of C++ code counts too. The result
    is None if the counter cannot be reset.
    """
    gc.collect()
    # New allocations would be hidden in freed blocks that the C library keeps.
    ctypes.CDLL(None).malloc_trim(0)
    try:
        (_PROCESS / "clear_refs").write_text("5")
    except OSError:
        return None
    before = _resident_mib("VmRSS")
    run(*arguments)
    return max(0.0, _resident_mib("VmHWM") - before)


def peak_extra_gpu_mib(run: Callable[[], object]) -> float:
    """Return by how many MiB the memory that torch allocates on the GPU rises during `run`."""
    import torch

    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return float(torch.cuda.max_memory_allocated() - before) / 2**20


def _resident_mib(counter: str) -> float:
    for line in (_PROCESS / "status").read_text().splitlines():
        if line.startswith(counter):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/self/status has no line {counter}")
