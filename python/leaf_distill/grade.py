"""Is the answer right? By math-verify in killable processes, by its last number, or by its text.

math-verify can run for ever on a hostile expression, and its own time limit is a signal that works
in a main thread only. Here each pair is graded in a worker process that is killed when its time is
over. Workers are plain commands, not multiprocessing's, so that neither threads, a GPU nor a script
without ``if __name__ == "__main__"`` gets in their way.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from multiprocessing.connection import wait
from types import TracebackType
from typing import Literal, cast, get_args

Verdict = Literal["right", "wrong", "no_answer", "timeout"]
Rule = Literal["math", "number", "exact"]

START_LIMIT_S = 120.0  # for a worker to import math-verify; no pair's time
PAIRS_PER_WORKER = 16  # fewer pairs do not pay for starting one more worker
WORKER_MEMORY = 2 << 30  # bytes: 10^(10^10) is refused before it fills the machine
COMMAND = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from leaf_distill.grade import _work; _work(float(sys.argv[2]))"
)
# A minus after a word, a digit or a bracket is a subtraction, not a sign.
NUMBER = re.compile(
    r"(?:(?<![\w)\]])[-\u2212])?(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)"
    r"(?:\.[0-9]+)?(?:[eE][-+]?[0-9]{1,3}(?![0-9]))?"
)


class Grader:
    """Grades (gold, prediction) pairs by one rule; use it as a context manager.

    "math": math-verify, the gold answer first; a gold answer that it cannot read is compared as
    text. "number": the last number of each; a gold answer without one is compared as text.
    "exact": equal but for white space around. ``timeout_s`` is each pair's own time for "math".
    """

    def __init__(self, rule: Rule, *, timeout_s: float = 5.0, workers: int | None = None) -> None:
        if rule not in get_args(Rule):
            raise ValueError(f"grade must be one of {', '.join(get_args(Rule))}, not {rule!r}.")
        if timeout_s <= 0:
            raise ValueError(f"grade_timeout must be above 0 seconds, not {timeout_s}.")
        if workers is not None and workers < 1:
            raise ValueError(f"workers must be at least 1, not {workers}.")
        self.rule = rule
        self.timeout_s = timeout_s
        self.workers = workers or os.cpu_count() or 1
        self._idle: list[_Worker] = []

    def __enter__(self) -> Grader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the workers; grading again starts new ones."""
        while self._idle:
            self._idle.pop().kill()

    def grade(self, pairs: Sequence[tuple[str, str]]) -> list[Verdict]:
        """Return one verdict a pair, in order.

        "no_answer": nothing to compare in the prediction. "timeout": the pair's time ran out, or
        its worker died on it twice.
        """
        if self.rule == "exact":
            return [_exact(gold, prediction) for gold, prediction in pairs]
        if self.rule == "number":
            return [_number(gold, prediction) for gold, prediction in pairs]
        count = min(self.workers, -(-len(pairs) // PAIRS_PER_WORKER))
        with ThreadPoolExecutor(max(1, count)) as threads:
            return list(threads.map(self._math, pairs))

    def _math(self, pair: tuple[str, str]) -> Verdict:
        """Grade one pair in a worker; each thread holds at most one."""
        if not pair[1].strip():
            return "no_answer"
        for _ in range(2):
            worker = self._idle.pop() if self._idle else _Worker(self.timeout_s)
            try:
                verdict = worker.ask(pair, self.timeout_s)
            except _WorkerDied:
                worker.kill()
                continue
            except BaseException:
                worker.kill()
                raise
            if verdict is None:
                worker.kill()
                return "timeout"
            self._idle.append(worker)
            return verdict
        return "timeout"


class _WorkerDied(Exception):
    """A worker ended without an answer."""


class _Worker:
    """A process that grades one pair after another."""

    def __init__(self, timeout_s: float) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", COMMAND, json.dumps(sys.path), str(timeout_s)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
        )
        self.ready = False

    def ask(self, pair: tuple[str, str], timeout_s: float) -> Verdict | None:
        """Return the verdict, or None when the time is over; _WorkerDied if the process is gone."""
        if not self.ready:
            state = self._line(START_LIMIT_S)
            if state != "ready":
                self.kill()
                raise RuntimeError(f"math-verify cannot be loaded: {state or 'no sign of life'}")
            self.ready = True
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(pair).encode() + b"\n")
        except OSError as error:
            raise _WorkerDied from error
        return cast("Verdict | None", self._line(timeout_s))

    def _line(self, timeout_s: float) -> str | None:
        stream = self.process.stdout
        assert stream is not None
        if not wait([stream.fileno()], timeout_s):
            return None
        line = stream.readline()
        if not line:
            raise _WorkerDied
        return line.decode().strip()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                stream.close()


def _work(timeout_s: float) -> None:
    """Read pairs from the standard input and write verdicts, until it closes."""
    import logging
    import resource
    import signal

    replies = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # whatever a library prints must not pass for a verdict
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_AS, (WORKER_MEMORY, WORKER_MEMORY))
    try:
        import math_verify  # noqa: F401
    except Exception as error:
        replies.write(f"{type(error).__name__}: {error}".replace("\n", " ").encode() + b"\n")
        return
    logging.disable(logging.CRITICAL)
    replies.write(b"ready\n")
    for line in sys.stdin.buffer:
        gold, prediction = json.loads(line)
        # Should the parent be gone, nobody else would end an endless comparison.
        signal.setitimer(signal.ITIMER_REAL, timeout_s + 5.0)
        verdict = _judge(gold, prediction)
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        replies.write(verdict.encode() + b"\n")


def _judge(gold: str, prediction: str) -> Verdict:
    from math_verify import parse, verify

    if gold.strip() == prediction.strip():
        return "right"
    found = parse(prediction, parsing_timeout=None)
    if not found:
        return "no_answer"
    # Bare LaTeX is no expression to math-verify until it stands between dollars.
    wanted = parse(gold, parsing_timeout=None) or parse(f"${gold}$", parsing_timeout=None)
    return "right" if wanted and verify(wanted, found, timeout_seconds=None) else "wrong"


def _exact(gold: str, prediction: str) -> Verdict:
    if not prediction.strip():
        return "no_answer"
    return "right" if gold.strip() == prediction.strip() else "wrong"


def _number(gold: str, prediction: str) -> Verdict:
    wanted, found = _last_number(gold), _last_number(prediction)
    if wanted is None:
        return _exact(gold, prediction)
    if found is None:
        return "no_answer"
    return "right" if wanted == found else "wrong"


def _last_number(text: str) -> Decimal | None:
    numbers = NUMBER.findall(text)
    return Decimal(numbers[-1].replace(",", "").replace("\u2212", "-")) if numbers else None
