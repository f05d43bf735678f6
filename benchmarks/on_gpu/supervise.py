"""Runs the worker within a budget of time, and replaces it when it crashes or hangs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from . import jobs
from .worker import Row, key, read_rows, write_row

# Seconds without a finished line after which the worker counts as hung. The longest that is right
# is a compilation by torch, or the float64 truth of the largest case.
PATIENCE = 75.0
MOST_CRASHES = 8


def run(rows: Path, budget: float, tiny: bool) -> list[Row]:
    """All lines that could be had; jobs that the budget left out have one that says so."""
    deadline, crashes = time.monotonic() + budget, 0
    rows.unlink(missing_ok=True)
    while time.monotonic() < deadline and crashes < MOST_CRASHES and _left(rows, tiny):
        why = _one_worker(rows, deadline, tiny)
        if why and (left := _left(rows, tiny)):
            write_row(rows, left[0], status="failed", note=why)
        crashes += bool(why)
    why = "the time was spent" if crashes < MOST_CRASHES else f"{crashes} workers had crashed"
    for job in _left(rows, tiny):
        write_row(rows, job, status="left out", note=why)
    return read_rows(rows)


def _left(rows: Path, tiny: bool) -> list[jobs.Job]:
    done = {key(row) for row in read_rows(rows)}
    return [job for job in jobs.plan(tiny) if job not in done]


def _one_worker(rows: Path, deadline: float, tiny: bool) -> str | None:
    """Why it ended before its time, or None. A lost device has its line already: no reason."""
    command = [sys.executable, "-m", "on_gpu.worker", str(rows), *(["--tiny"] if tiny else [])]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    seen, last = -1, time.monotonic()
    try:
        while (code := process.poll()) is None:
            time.sleep(0.2)
            now, size = time.monotonic(), rows.stat().st_size if rows.exists() else 0
            if size != seen:
                seen, last = size, now
            if now > deadline:
                return None
            if now - last > PATIENCE:
                return f"no result within {PATIENCE:.0f} s"
    finally:
        _end(process)
    return None if code in (0, 3) else f"the process ended with {code}"


def _end(process: subprocess.Popen[bytes]) -> None:
    """With the compilers that it has started."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
