"""The steps of `gpu.py`: a command with a time limit and a log, and what to make of its end."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from on_gpu import FINISHED, STARTED


@dataclass(frozen=True)
class Outcome:
    """`state` is passed, failed, out of time, unfinished or not available."""

    step: str
    state: str
    seconds: float
    note: str

    @property
    def is_bad(self) -> bool:
        """What a machine cannot run, or a tool has not finished, is no fault of ours."""
        return self.state in ("failed", "out of time")

    def but(self, state: str, note: str) -> Outcome:
        return replace(self, state=state, note=note)


def exit_when_told() -> None:
    """A SIGTERM runs the `finally` clauses, as a SIGINT does."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


class Command:
    """A process with its children, its output in a file."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        log: Path,
        limit: float,
        environment: Mapping[str, str],
        folder: Path,
    ) -> None:
        self.name, self.log = name, log
        self.started = time.monotonic()
        self.deadline = self.started + limit
        with log.open("w") as output:
            print("$", *command, file=output, flush=True)
            self.process = subprocess.Popen(
                command,
                cwd=folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait(self) -> int | None:
        """The exit status, or None if the time was up and the process had to be ended."""
        try:
            return self.process.wait(max(0.0, self.deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            self.end()
            return None

    def end(self) -> None:
        """Asks it to end, so that it ends what it has started; then insists."""
        for insistence in (signal.SIGTERM, signal.SIGKILL):
            if self.process.poll() is None:
                os.killpg(self.process.pid, insistence)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self.process.wait(5)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def last_line(self) -> str:
        lines = [line for line in self.text().splitlines() if line.strip(" =")]
        return lines[-1].strip(" =")[:200] if lines else ""


def judged_by_status(command: Command) -> Outcome:
    status = command.wait()
    state = {0: "passed", None: "out of time"}.get(status, "failed")
    return Outcome(command.name, state, command.seconds, command.last_line())


def judged_by_sanitizer(command: Command) -> Outcome:
    """What it reports of our kernels is a failure; that it cannot run on a machine is none."""
    status, text = command.wait(), command.text()
    made = Outcome(command.name, "passed", command.seconds, "")
    # A report is a block of lines behind "=========", and names its kernel.
    heads = r"^========= (?:Invalid|Error: Race|Warning: Race|Uninitialized|Barrier|Misaligned)"
    blocks = re.split(r"^=========\s*$", text, flags=re.M)
    reports = [block for block in blocks if re.search(heads, block, re.M)]
    ours = [block for block in reports if "leaf" in block]
    calls, others = text.count("call_"), len(reports) - len(ours)
    known = f"no report in {calls} calls" + (f", {others} of others' kernels" if others else "")
    if STARTED not in text or "not supported" in text:
        return made.but("not available", f"it cannot run here: {command.last_line()}")
    if ours:
        first = re.search(heads + ".*", ours[0], re.M)
        return made.but("failed", f"{len(ours)} reports, the first: {first and first[0][10:]}")
    if status is None:
        return made.but("unfinished", f"{known}, then the time was up")
    if FINISHED not in text:
        return made.but("failed", f"exit status {status}: {command.last_line()}")
    return made.but("passed", known)


def summary(outcomes: Sequence[Outcome], options: str) -> str:
    rehearsal = " (a rehearsal on a CPU, with tiny inputs: no figure is of a GPU)"
    title = "# make gpu" + (rehearsal if "--tiny" in options else "")
    lines = [title, "", f"options: `{options}`", "", "| step | outcome | s | note |"]
    lines += ["|---|---|---:|---|"]
    for outcome in outcomes:
        note = outcome.note.replace("|", "/")
        lines.append(f"| {outcome.step} | {outcome.state} | {outcome.seconds:.0f} | {note} |")
    return "\n".join(lines) + "\n"
