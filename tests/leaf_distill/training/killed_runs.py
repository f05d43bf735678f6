"""As a script: `leaf distill` in a process that is killed at random moments, until it is finished.

`killed_runs.py SEED KILLS EVENTS OUTPUT ARGUMENT ...` forks itself, so that a run does not import
all anew, and kills the child with SIGKILL once it has made a random number, at most EVENTS, of new
files or directories in OUTPUT: every other time as soon as half a checkpoint is there, else after a
random delay. It prints as JSON how often it killed, and how often half a checkpoint was left.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import leaf_distill.training.distill
from leaf_distill import cli


def paths(directory: Path) -> set[str]:
    """All files below a directory, those that are being written or deleted too."""
    return {
        os.path.join(place, name)
        for place, folders, files in os.walk(directory)
        for name in (*folders, *files)
    }


def run_and_kill(argv: list[str], output: Path, events: int, delay: float | None) -> bool:
    """Run the command; kill it after so many new paths and a delay. Return whether it was.

    Without a delay it is killed while it writes the next checkpoint.
    """
    seen = paths(output)
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os._exit(cli.main(argv))
    while events > 0 or (delay is None and not halves(output)):
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            assert os.waitstatus_to_exitcode(status) == 0
            return False
        events -= len(paths(output) - seen)
        seen |= paths(output)
    time.sleep(delay or 0)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status) == -signal.SIGKILL


def halves(output: Path) -> set[str]:
    return {str(one) for one in output.glob("checkpoint-*") if not (one / "manifest.json").exists()}


def main(seed: str, kills: str, events: str, directory: str, *argv: str) -> None:
    draw, output = random.Random(int(seed)), Path(directory)
    killed = half = 0
    while killed < int(kills):
        delay = draw.random() * 0.02 if killed % 2 else None
        if not run_and_kill([*argv], output, draw.randint(1, int(events)), delay):
            break
        killed += 1
        half += bool(halves(output))
    while run_and_kill([*argv], output, 10**9, 0):
        pass
    print(json.dumps({"killed": killed, "half": half}))


if __name__ == "__main__":
    assert leaf_distill.training.distill
    main(*sys.argv[1:])
