"""Grades programs: each runs in a sandbox, and its tests in another one."""

from __future__ import annotations

import hashlib
import json
import math
import platform
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

from leaf_distill.data.tests import Tests
from leaf_distill.grading.program import find_program
from leaf_distill.grading.sandbox.end import End, depends_on_load
from leaf_distill.grading.sandbox.process import (
    MEMORY,
    PACKAGES,
    SandboxError,
    run_judged,
    run_script,
    unavailable,
)
from leaf_distill.ranks import cores

CodeVerdict = Literal["right", "wrong", "error", "timeout", "memory", "no_program", "refused"]
FAILED: tuple[CodeVerdict, ...] = ("wrong", "error", "timeout", "memory", "no_program")
"""The verdicts that say that an answer is not right. "refused" says that it cannot be judged."""

REFERENCE_LIMIT_S = 120
REFERENCE_MEMORY = 4 << 30  # bytes
TIMES_REFERENCE = 4.0
TIMES_MEMORY = 2
LONGER = 1 << 20  # characters that an output may have more than the wanted one, to be looked at
SHOWN = 200  # characters of a text in a sentence


class Judged(NamedTuple):
    """A verdict, and the first test that failed and how (empty if right)."""

    verdict: CodeVerdict
    detail: str


@dataclass(frozen=True)
class Reference:
    """The result of running the reference.

    Attributes:
        problem: why the tests cannot be used; empty where they can.
        cpu_s: processor time of the reference, 0 without one.
        memory: the most bytes that it had in memory.
        values: of "calls" without outputs, the reference's value for each input, encoded.
    """

    problem: str = ""
    cpu_s: float = 0.0
    memory: int = 0
    values: tuple[str, ...] = ()

    def to_json(self) -> str:
        return json.dumps([self.problem, self.cpu_s, self.memory, self.values])

    @classmethod
    def from_json(cls, text: bytes) -> Reference:
        problem, cpu_s, memory, values = json.loads(text)
        return cls(problem, cpu_s, memory, tuple(values))


@cache
def identity() -> tuple[str, ...]:
    """Return what decides a verdict beside the tests and the program, for keys: code, versions."""
    here = Path(__file__).parent
    sources = (path.read_bytes() for path in sorted(here.rglob("*.py")))
    code = hashlib.sha256(b"".join(sources)).hexdigest()
    return (code, platform.python_version(), *map(version, PACKAGES))


class Store(Protocol):
    """Keeps bytes by key, as the row cache does."""

    def get(self, keys: Sequence[str]) -> Mapping[str, bytes]: ...

    def put(self, values: Mapping[str, bytes]) -> object: ...


class CodeGrader:
    """Grades answers that are programs; use it as a context manager.

    A program runs as a confined process: see `sandbox.confine`. Its tests run in another one, which
    calls the program and compares what comes back, so that a verdict cannot be forged. The
    reference of the tests, where there is one, runs first: it shows that the tests work, gives the
    wanted values where the tests have only inputs, and the time that a program may take,
    `timeout_s` and four times its own.

    Args:
        timeout_s: processor seconds that a program may take, beside the reference's.
        workers: programs at once; None takes one a core.
        store: keeps what references gave, beyond this object's life.

    Raises:
        ValueError: an argument is out of its range.
        SandboxError: programs cannot be confined on this machine; says what is missing.
    """

    def __init__(
        self, *, timeout_s: float = 5.0, workers: int | None = None, store: Store | None = None
    ) -> None:
        if not 0 < timeout_s < math.inf:
            raise ValueError(f"grade_timeout: must be seconds above 0, got {timeout_s}")
        if workers is not None and workers < 1:
            raise ValueError(f"workers: must be at least 1, got {workers}; None takes one a core")
        if why := unavailable():
            raise SandboxError(f"--grade code: {why}")
        self.timeout_s = timeout_s
        self._store = store
        self._known: dict[str, Reference] = {}
        self._threads = ThreadPoolExecutor(workers or cores())
        self._stop = threading.Event()

    def __enter__(self) -> CodeGrader:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """End the threads, and what still runs in them."""
        self._stop.set()
        self._threads.shutdown(cancel_futures=True)

    def check(self, tests: Sequence[Tests]) -> list[str]:
        """Return for each of the tests why it cannot be used: it, or its reference, fails."""
        return [reference.problem for reference in self._references(tests)]

    def grade(self, answers: Sequence[tuple[Tests, str]]) -> list[Judged]:
        """Return one verdict for each answer, in order.

        Args:
            answers: tests, each with an answer that holds a program.

        Returns:
            "right"; "wrong", where a test fails; "error", where the program, or a test with what it
            returned, raises; "timeout"; "memory"; "no_program", where the answer has none that the
            tests could call; "refused", where it does what is not allowed, or returns what cannot
            be compared outside of its process.

        Raises:
            SandboxError: a process cannot be confined.
            ValueError: the tests of an answer cannot be used, which `check` tells.
        """
        references = self._references([tests for tests, _ in answers])
        for reference in references:
            if reference.problem:
                raise ValueError(f"tests: must work, got tests that do not ({reference.problem})")
        jobs = [(*pair, one) for pair, one in zip(answers, references, strict=True)]
        return list(self._threads.map(lambda job: self._grade(*job), jobs))

    def _grade(self, tests: Tests, answer: str, reference: Reference) -> Judged:
        program = find_program(answer, tests)
        if program is None:
            name = tests.entry_point or "what the tests call"
            reads = tests.kind == "stdin"
            return Judged("no_program", "no code" if reads else f"no code defines {name}")
        limit = math.ceil(self.timeout_s + TIMES_REFERENCE * reference.cpu_s)
        memory = min(max(MEMORY, TIMES_MEMORY * reference.memory), REFERENCE_MEMORY)
        judged, _ = _run(tests, program, limit, memory, self._stop, reference.values)
        unjudged = judged["verdict"] == "bad_tests"  # which worked with the reference
        return Judged("refused" if unjudged else judged["verdict"], judged["detail"])

    def _references(self, tests: Sequence[Tests]) -> list[Reference]:
        """Return the reference of each of the tests; those that are new run here, and are kept."""
        # The machine is part of the key, since the time is its own.
        texts = [json.dumps([platform.node(), *identity(), one.to_json()]) for one in tests]
        keys = [f"reference {hashlib.sha256(text.encode()).hexdigest()}" for text in texts]
        new = {key: one for key, one in zip(keys, tests, strict=True) if key not in self._known}
        if self._store is not None:
            for key, value in self._store.get(list(new)).items():
                self._known[key] = Reference.from_json(value)
                del new[key]
        # A store belongs to the thread that opened it: this one.
        found = self._threads.map(lambda one: _run_reference(one, self._stop), new.values())
        for key, one in zip(new, found, strict=True):
            self._known[key] = one
            if self._store is not None and not depends_on_load(one.problem):
                self._store.put({key: one.to_json().encode()})
        return [self._known[key] for key in keys]


def _run_reference(tests: Tests, stop: threading.Event) -> Reference:
    """Run the reference against its own tests; without one, see that the tests compile."""
    record = tests.kind == "calls" and not tests.outputs
    if not tests.reference:
        if record:
            return Reference("there are neither outputs nor a reference that would give them")
        if tests.kind == "stdin":
            return Reference()
        judged, _ = _run(tests, "", 10, MEMORY, stop, dry=True)
        return Reference(judged["detail"])
    limits = REFERENCE_LIMIT_S, REFERENCE_MEMORY
    judged, end = _run(tests, tests.reference, *limits, stop, record=record)
    if judged["verdict"] != "right":
        detail = judged["detail"]
        return Reference(f"the reference is not right: {judged['verdict']}, {detail}")
    values = tuple(judged.get("values", ()))
    return Reference("", end.cpu_s, end.memory, values)


def _run(
    tests: Tests,
    program: str,
    cpu_s: int,
    memory: int,
    stop: threading.Event,
    values: Sequence[str] = (),
    **flags: bool,
) -> tuple[dict[str, Any], End]:
    """Run a program against tests; return the judge's result, and how the program ended."""
    if tests.kind == "stdin":
        return _run_scripts(tests, program, cpu_s, memory, stop)
    job = {
        **{name: getattr(tests, name) for name in _SENT},
        "values": values,
        **{"dry": False, "record": False, **flags},
    }
    return run_judged(job, program, cpu_s=cpu_s, memory=memory, stop=stop)


_SENT = ("kind", "entry_point", "setup", "code", "inputs", "outputs", "atol", "matches")


def _run_scripts(
    tests: Tests, program: str, cpu_s: int, memory: int, stop: threading.Event
) -> tuple[dict[str, Any], End]:
    """Run a script once for each input; the limits hold for each."""
    most = End()
    for number, (given, wanted) in enumerate(zip(tests.inputs, tests.outputs, strict=True)):
        printed, error, end = run_script(
            program, given, cpu_s=cpu_s, memory=memory, setup=tests.setup, stop=stop
        )
        most.cpu_s, most.memory = max(most.cpu_s, end.cpu_s), max(most.memory, end.memory)
        test = f"input {number + 1} ({given[:SHOWN]!r})"
        if end.status or end.reason:
            verdict, how = end.verdict(cpu_s)
            verdict = _named_by(error, verdict)
            return {"verdict": verdict, "detail": f"{test}: {error or how}"}, most
        text = printed.decode(errors="replace")
        if not same_output(text, wanted):
            detail = f"{test}: it must print {wanted[:SHOWN]!r}, got {text[:SHOWN]!r}"
            return {"verdict": "wrong", "detail": detail}, most
    return {"verdict": "right", "detail": ""}, most


def _named_by(error: str, verdict: str) -> str:
    """Return the verdict that the exception of a script stands for."""
    if verdict != "error":
        return verdict
    if error.startswith("MemoryError"):
        return "memory"
    return "refused" if error.startswith("PermissionError") else verdict


def same_output(printed: str, wanted: str) -> bool:
    """Return whether two outputs are the same: line by line, numbers by their value.

    White space at the ends of lines and of the text does not count.
    """
    if len(printed) > 4 * len(wanted) + LONGER:
        return False
    mine, other = (text.strip().split("\n") for text in (printed, wanted))
    return len(mine) == len(other) and all(map(_same_line, mine, other))


def _same_line(printed: str, wanted: str) -> bool:
    mine, other = printed.split(), wanted.split()
    if mine == other:
        return True
    if len(mine) != len(other):
        return False
    pairs = [(a, b) for a, b in zip(mine, other, strict=True) if a != b]
    if any("_" in text for pair in pairs for text in pair):  # which Decimal takes
        return False
    try:
        return all(Decimal(a) == Decimal(b) for a, b in pairs)
    except InvalidOperation:
        return False
