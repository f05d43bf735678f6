"""The steps of `gpu.py`: commands with a time limit and a log, and their outcomes."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from on_gpu import FINISHED, STARTED


class Outcome(NamedTuple):
    """The end of a step: passed, failed, out of time; or no fault: unfinished, not available."""

    step: str
    state: str
    seconds: float
    note: str

    def but(self, state: str, note: str) -> Outcome:
        return self._replace(state=state, note=note)


class Command:
    """A process with its children, whose output goes to a file."""

    def __init__(
        self, name: str, command: Sequence[str], log: Path, limit: float, known: Mapping[str, str]
    ) -> None:
        self.name, self.log, self.started = name, log, time.monotonic()
        self.deadline = self.started + limit
        with log.open("w") as output:
            print("$", *command, file=output, flush=True)
            # The folder must not contain a package leaf_ext, which Python would import.
            streams = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": subprocess.STDOUT}
            options = {"cwd": log.parent, "env": known, "start_new_session": True}
            self.process = subprocess.Popen(command, **streams, **options)

    def end(self) -> None:
        """Terminate the process so that it can end its children; kill it if it does not end."""
        for insistence in (signal.SIGTERM, signal.SIGKILL):
            if self.process.poll() is None:
                os.killpg(self.process.pid, insistence)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self.process.wait(5)

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def outcome(self) -> Outcome:
        """Wait until the end or the time limit, and judge by the exit status."""
        try:
            status = self.process.wait(max(0.0, self.deadline - time.monotonic()))
            state = "failed" if status else "passed"
        except subprocess.TimeoutExpired:
            self.end()
            state = "out of time"
        lines = [line.strip(" =") for line in self.text().splitlines() if line.strip(" =")]
        return Outcome(self.name, state, time.monotonic() - self.started, lines[-1][:200])


def judged_by_sanitizer(made: Outcome, text: str) -> Outcome:
    """Count reports about our kernels as a failure, and a sanitizer that cannot run as none."""
    # A report is a block of lines that begin with "=========" and name the kernel.
    heads = r"^========= (?:Invalid|Error: Race|Warning: Race|Uninitialized|Barrier|Misaligned)"
    blocks = re.split(r"^=========\s*$", text, flags=re.M)
    reports = [block for block in blocks if re.search(heads, block, re.M)]
    ours = [block for block in reports if "leaf" in block]
    calls, others = len(re.findall(r": ok$", text, re.M)), len(reports) - len(ours)
    known = f"no report in {calls} calls" + (f", {others} of others' kernels" if others else "")
    if STARTED not in text or "not supported" in text:
        return made.but("not available", f"it cannot run here: {made.note}")
    if ours:
        first = re.search(heads + ".*", ours[0], re.M)
        return made.but("failed", f"{len(ours)} reports, the first: {first and first[0][10:]}")
    if made.state == "out of time":
        return made.but("unfinished", f"{known}, then the time was up")
    if not re.search(f"^{FINISHED}$", text, re.M):
        return made.but("failed", made.note)
    return made.but("passed", known)


def summary(outcomes: Sequence[Outcome], options: str) -> str:
    rehearsal = " (a rehearsal on a CPU, with tiny inputs: no figure is of a GPU)"
    lines = ["# make gpu" + (rehearsal if "--tiny" in options else ""), ""]
    lines += [f"options: `{options}`", "", "| step | outcome | s | note |", "|---|---|---:|---|"]
    for step, state, seconds, note in outcomes:
        lines.append(f"| {step} | {state} | {seconds:.0f} | {note.replace('|', '/')} |")
    return "\n".join(lines) + "\n"
