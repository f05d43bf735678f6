"""Peak extra memory of a call, as Linux counts it."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path

_PROCESS = Path("/proc/self")


def peak_extra_mib(run: Callable[..., object], *arguments: object) -> float | None:
    """How far the process's resident memory rises above its level before `run`, in MiB.

    Linux's own peak counter is reset first, so that scratch memory of C++ code counts as well. None
    where the counter cannot be reset.
    """
    gc.collect()
    # Freed blocks that the C library keeps would hide what is allocated in them.
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
