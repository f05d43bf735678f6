"""Times jobs, one line of JSON each, until all are done or the device gives up.

    python -m on_gpu.worker ROWS [--tiny]

Jobs of which ROWS already has a line are skipped: after a crash another worker goes on from there.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import traceback
from dataclasses import asdict
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from checked import WrongResult

from . import jobs
from .clock import clock_of
from .subject import NotAvailable, Setting, Subject, Timed

Row = dict[str, Any]


def read_rows(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def write_row(path: Path, job: jobs.Job, **values: Any) -> None:
    with path.open("a") as file:
        file.write(json.dumps(asdict(job) | values) + "\n")


def key(row: Row) -> jobs.Job:
    return jobs.Job(row["op"], row["case"], row["variant"])


def measure(timed: Timed, setting: Setting) -> Row:
    """The comparison with the truth comes first, and its failure is the end of it."""
    found: Row = timed.check()
    clock = setting.clock
    clock.release()
    if timed.has_memory:
        found["extra_bytes"] = clock.peak_extra(timed.step, timed.prepare)
    times = clock.seconds(timed.step, timed.prepare)
    spread = quantiles(times, n=10)
    return found | {
        "status": "timed",
        "seconds": median(times),
        "spread": [spread[0], spread[-1]],
        "repetitions": len(times),
        "bytes": timed.bytes,
    }


def outcome(error: BaseException) -> Row:
    first = (str(error).strip().splitlines() or [""])[0][:300]
    if isinstance(error, torch.OutOfMemoryError):
        return {"status": "not available", "note": f"out of memory: {first}"}
    if isinstance(error, (NotAvailable, ImportError)):
        return {"status": "not available", "note": first}
    if isinstance(error, WrongResult):
        return {"status": "refused", "note": first}
    return {"status": "failed", "note": f"{type(error).__name__}: {first}"}


class Worker:
    """Keeps the inputs of one case, which its variants share."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.case: tuple[str, str] | None = None
        self.subject: Subject | None = None

    def run(self, job: jobs.Job) -> Row:
        clock = self.setting.clock
        if job.op == jobs.COPY:
            step, prepare, moved = clock.copy()
            return measure(Timed(step, prepare, dict, moved, has_memory=False), self.setting)
        if self.case != (job.op, job.case):
            self.subject, self.case = None, None  # the old inputs go before the new ones come
            clock.release()
            self.subject = jobs.subject(job, self.setting)
            self.case = (job.op, job.case)
        assert self.subject is not None
        return measure(self.subject.timed(job.variant), self.setting)


def device_is_lost(setting: Setting) -> bool:
    """After a fault in a kernel no call of this process reaches the device any more."""
    try:
        setting.clock.synchronize()
    except RuntimeError:
        return True
    return False


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", type=Path)
    parser.add_argument("--tiny", action="store_true")
    arguments = parser.parse_args()
    device = torch.device("cpu" if arguments.tiny else "cuda:0")
    setting = Setting(clock_of(device), arguments.tiny)
    worker = Worker(setting)
    done = {key(row) for row in read_rows(arguments.rows)}
    for job in jobs.plan(arguments.tiny):
        if job in done:
            continue
        print(job, flush=True)
        try:
            row = worker.run(job)
        except Exception as error:
            traceback.print_exc()
            row = outcome(error)
        write_row(arguments.rows, job, **row)
        setting.clock.release() if not device_is_lost(setting) else os._exit(3)
    return 0


if __name__ == "__main__":
    sys.exit(main())
