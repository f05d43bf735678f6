"""Times the jobs of the table that have no line yet, and appends a line of JSON for each.

    python -m on_gpu.worker RESULTS [--seconds 200] [--late] [--tiny]

One line is written when a job begins and another when it ends, so that after a crash another worker
continues with the next job. A job that hangs ends the process, which prints its stack.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import platform
import re
import shutil
import subprocess
import time
import traceback
from functools import partial
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from checked import WrongResult

import leaf_ext

from . import peers, table
from .clock import Clock
from .subjects import Subject
from .topk import SUBJECTS

# Seconds after which a job counts as hung. The longest legitimate wait is a torch compilation.
PATIENCE = 75.0
# The result of a job that has begun and not ended.
BEGUN = "the process ended in it"


def facts() -> dict[str, str]:
    """Return the page's description of the machine and the software."""
    found = {"GPU": "none (a rehearsal)", "torch": f"{torch.__version__}"}
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found["GPU"] = f"{properties.name}, {properties.multi_processor_count} multiprocessors"
        found["memory"] = f"{properties.total_memory / 1e9:.0f} GB"
        found["torch"] += f", CUDA {torch.version.cuda}"
    for tool, arguments, pattern in (
        ("nvidia-smi", ("--query-gpu=driver_version", "--format=csv,noheader"), r"([\d.]+)"),
        ("nvcc", ("--version",), r"release ([\d.]+)"),
    ):
        if shutil.which(tool):
            text = subprocess.run([tool, *arguments], capture_output=True, text=True).stdout
            found[tool] = (re.search(pattern, text) or ["", "unknown"])[1]
    found["Python"] = f"{platform.python_version()}, {platform.system()} {platform.release()}"
    for package in ("triton", "numpy", *peers.PACKAGES):
        found[package] = peers.version(package)
    try:
        found["leaf_ext"] = ", ".join(f"{k} {v}" for k, v in leaf_ext.build_info().items())
    except RuntimeError as error:
        found["leaf_ext"] = str(error)
    return found


def measure(subject: Subject, variant: str, clock: Clock) -> dict[str, Any]:
    """Compare the result with the truth first, and time it only if it is right."""
    step = subject.step(variant)
    found, prepare = subject.check(variant, step), partial(subject.arguments, variant)
    clock.release()
    extra, times = clock.peak_extra(step, prepare), clock.seconds(step, prepare)
    spread = quantiles(times, n=10)
    found |= {"status": "timed", "seconds": median(times), "extra": extra}
    return found | {"spread": [spread[0], spread[-1]], "repetitions": len(times)}


def outcome(error: BaseException) -> dict[str, str]:
    note = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:300]}"
    if isinstance(error, (torch.OutOfMemoryError, ImportError)):
        return {"status": "not available", "note": note}
    return {"status": "refused" if isinstance(error, WrongResult) else "failed", "note": note}


class Worker:
    """Appends to the file of results; keeps the inputs that the jobs of a group share."""

    def __init__(self, path: Path, clock: Clock) -> None:
        self.path, self.clock = path, clock
        self.done = {tuple(row["job"]) for row in rows_of(path)}
        self.group: table.Group | None = None
        self.subject: Subject | None = None

    def write(self, job: table.Job, **values: Any) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps({"job": job, **values}) + "\n")

    def measured(self, job: table.Job, group: table.Group) -> dict[str, Any]:
        if self.group != group:
            self.group = self.subject = None  # free the old inputs before the new ones are made
            self.clock.release()
            self.subject = SUBJECTS[group.op](group.case, self.clock)
            self.group = group
        assert self.subject is not None
        return measure(self.subject, job.variant, self.clock)

    def run(self, job: table.Job, group: table.Group) -> None:
        print(*job, flush=True)
        self.write(job, status="failed", note=BEGUN)
        # The watchdog does not need the interpreter, so it can end a hanging call.
        faulthandler.dump_traceback_later(PATIENCE, exit=True)
        try:
            found = self.measured(job, group)
        except Exception as error:
            traceback.print_exc()
            found = outcome(error)
        self.write(job, **found)
        self.clock.release()  # raises after a fault, when no later call would reach the device
        faulthandler.cancel_dump_traceback_later()


def rows_of(path: Path) -> list[dict[str, Any]]:
    """Return the last line of each job. The first line of the file describes the machine."""
    lines = path.read_text().splitlines()[1:] if path.exists() else []
    rows = (json.loads(line) for line in lines)
    return list({tuple(row["job"]): row for row in rows}.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path)
    parser.add_argument("--seconds", type=float, default=200.0)
    parser.add_argument("--late", action="store_true", help="the other sizes too")
    parser.add_argument("--tiny", action="store_true")
    arguments = parser.parse_args()
    deadline = time.monotonic() + arguments.seconds
    if not arguments.results.exists():
        arguments.results.write_text(json.dumps(facts()) + "\n")
    if arguments.tiny:  # the Triton kernels are interpreted
        from quick_interpreter import quicken_the_interpreter

        quicken_the_interpreter()
    clock = Clock(torch.device("cpu" if arguments.tiny else "cuda:0"))
    worker = Worker(arguments.results, clock)
    for group in table.groups(arguments.tiny):
        for job in table.jobs(group) if arguments.late or not group.late else ():
            if time.monotonic() > deadline:
                return print("the time was spent")
            if job not in worker.done:
                worker.run(job, group)
    print("all jobs were run")


if __name__ == "__main__":
    main()
