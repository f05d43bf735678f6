"""Peak extra memory of a call, measured by Linux."""

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


def _resident_mib(counter: str) -> float:
    for line in (_PROCESS / "status").read_text().splitlines():
        if line.startswith(counter):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/self/status has no line {counter}")
