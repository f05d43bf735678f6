"""Grades pairs in processes that end when a pair has used up its time.

math-verify can run for ever on a hostile expression, and its own time limit is a signal that works
in a main thread only. Workers are plain commands, not multiprocessing's, so that neither threads, a
GPU nor a script without ``if __name__ == "__main__"`` gets in their way.

The limit counts the CPU time of the worker, so that a busy machine makes no right answer late. The
kernel ends the process at the limit, whatever code it is in.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import wait
from typing import cast

from leaf_distill.grading.text import Verdict
from leaf_distill.ranks import cores

START_LIMIT_S = 600.0  # wall time for a worker to import math-verify; no pair's time
PAIRS_PER_WORKER = 16  # fewer pairs do not pay for starting one more worker
WORKER_MEMORY = 2 << 30  # bytes: 10^(10^10) is refused before it fills the machine
COMMAND = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from leaf_distill.grading.pool import work; work(float(sys.argv[2]))"
)


class Pool:
    """Worker processes that `math.judge` runs in; they start when they are first needed.

    Args:
        timeout_s: CPU seconds that one pair may take.
        workers: processes at most; None takes one a core, which the processes of a run on
            one machine share.
    """

    def __init__(self, timeout_s: float, workers: int | None = None) -> None:
        self.timeout_s = timeout_s
        self.workers = workers or cores()
        self._idle: list[_Worker] = []

    def close(self) -> None:
        """End the workers; judging again starts new ones."""
        while self._idle:
            self._idle.pop().kill()

    def judge(self, pairs: Sequence[tuple[str, str]]) -> list[Verdict]:
        """Return one verdict a pair, in order.

        A pair whose worker ends without an answer is tried once more in a fresh worker.

        Raises:
            RuntimeError: math-verify cannot be loaded.
        """
        count = min(self.workers, -(-len(pairs) // PAIRS_PER_WORKER))
        with ThreadPoolExecutor(max(1, count)) as threads:
            return list(threads.map(self._judge_one, pairs))

    def _judge_one(self, pair: tuple[str, str]) -> Verdict:
        """Judge one pair in a worker; each thread holds at most one."""
        for attempt in range(2):
            worker = None
            if attempt == 0:
                with contextlib.suppress(IndexError):  # another thread may take the last one
                    worker = self._idle.pop()
            worker = worker or _Worker(self.timeout_s)
            try:
                verdict = worker.ask(pair)
            except BaseException:
                worker.kill()
                raise
            if verdict is not None:
                self._idle.append(worker)
                return verdict
            worker.kill()
        return "timeout"


class _Worker:
    """A process that judges one pair after another."""

    def __init__(self, timeout_s: float) -> None:
        # A worker that sleeps uses no CPU time; this much wall time is 20 processes for a core.
        self.wall_limit_s = 60.0 + 20.0 * timeout_s
        self.process = subprocess.Popen(
            [sys.executable, "-c", COMMAND, json.dumps(sys.path), str(timeout_s)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
        )
        self.ready = False

    def ask(self, pair: tuple[str, str]) -> Verdict | None:
        """Return the verdict, or None if the process has ended or its wall time is over."""
        if not self.ready:
            state = self._line(START_LIMIT_S)
            if state != "ready":
                raise RuntimeError(f"math-verify cannot be loaded: {state or 'no sign of life'}")
            self.ready = True
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(pair).encode() + b"\n")
        except OSError:
            return None
        return cast("Verdict | None", self._line(self.wall_limit_s))

    def _line(self, timeout_s: float) -> str | None:
        stream = self.process.stdout
        assert stream is not None
        if not wait([stream.fileno()], timeout_s):
            return None
        return stream.readline().decode().strip() or None

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                stream.close()


def work(timeout_s: float) -> None:
    """Read pairs from the standard input and write verdicts, until it closes."""
    import logging
    import resource

    replies = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # whatever a library prints must not pass for a verdict
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_AS, (WORKER_MEMORY, WORKER_MEMORY))
    try:
        from leaf_distill.grading.math import equal, judge

        logging.disable(logging.CRITICAL)
        equal(r"\frac{1}{2}", "0.5")  # what the first parse loads is no pair's time
    except Exception as error:
        replies.write(f"{type(error).__name__}: {error}".replace("\n", " ").encode() + b"\n")
        return
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # ends the process
    replies.write(b"ready\n")
    for line in sys.stdin.buffer:
        gold, prediction = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, timeout_s)
        verdict = judge(gold, prediction)
        signal.setitimer(signal.ITIMER_PROF, 0.0)
        replies.write(verdict.encode() + b"\n")
