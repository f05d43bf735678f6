"""The profiles of the study, and its directory: steps that are done once, and kept."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from leaf_distill.detection.config import Select
from leaf_distill.io import make_directory, read_json, write_json


@dataclass(frozen=True)
class Profile:
    """The size of a study.

    Attributes:
        name: of the profile.
        layers: lower layers of the base that each student has; the first student is for the choice
            of settings.
        teacher_layers: layers of the teacher; None: all of the base's.
        frozen: the lowest layers of all models, which do not train.
        teacher_steps, student_steps, rows_a_step: of the training of the pair.
        teacher_rate, student_rate: peak learning rates of it.
        teacher_gate: lowest accuracy of the teacher on adversarial problems of C-dev.
        student_gate: lowest accuracy of a student on the plain ones, highest on the adversarial.
        attempts: seeds that are tried for each model that is wanted.
        select: rows of B that are searched, as in `leaf detect`.
        max_batch_tokens: of detection and answers; None: by the free memory.
        rows: most problems of each split; None: all.
        domains: splits beside B on which the scores are measured.
        tests: the splits that distilled students answer.
        steps, distilled_rows: steps of a distillation, and rows in each.
        rates: learning rates that are tried on the development student.
        orders: batch orders of each student, which are averaged.
        workers: processes that share the work, and a CPU's cores.
        draws: of a bootstrap.
    """

    name: str
    layers: tuple[int, ...]
    teacher_layers: int | None = None
    frozen: int = 10
    teacher_steps: int = 120
    student_steps: int = 130
    rows_a_step: int = 16
    teacher_rate: float = 2e-4
    student_rate: float = 3e-4
    teacher_gate: float = 0.7
    student_gate: tuple[float, float] = (0.5, 0.3)
    attempts: int = 3
    select: Select = "student_wrong"
    max_batch_tokens: int | None = None
    rows: int | None = None
    domains: tuple[str, ...] = ("complex", "gsm8k")
    tests: tuple[str, ...] = ("C",)
    steps: int = 30
    distilled_rows: int = 16
    rates: tuple[float, ...] = (1e-4, 2e-4)
    orders: int = 1
    workers: int = 1
    draws: int = 1000


PROFILES = {
    "quick": Profile(
        "quick",
        layers=(2, 2),
        teacher_layers=4,
        frozen=1,
        teacher_steps=2,
        student_steps=2,
        rows_a_step=4,
        teacher_gate=0.0,
        student_gate=(0.0, 1.0),
        select="all",
        rows=6,
        domains=(),
        steps=2,
        distilled_rows=4,
        rates=(2e-4,),
        draws=100,
    ),
    "cpu": Profile("cpu", layers=(20,) * 4, steps=25, workers=2),
    "gpu": Profile(
        "gpu",
        layers=(20,) * 9,
        tests=("C", "complex", "gsm8k"),
        steps=100,
        max_batch_tokens=16384,
        workers=8,
    ),
}


class Study:
    """The directory of a study.

    DIR/study.json    the profile and the problems
    DIR/study.log     what the product's commands print
    DIR/steps/        the result of each step, as JSON, with its seconds
    DIR/pair/         the checkpoints of teacher and students
    DIR/student-N/    arms of `leaf detect` and distilled students

    Raises:
        ValueError: the directory is that of another study.
    """

    def __init__(self, root: Path, profile: Profile, inputs: dict[str, Any]) -> None:
        self.root, self.profile = root, profile
        for directory in (root / "steps", root / "pair"):
            make_directory(directory)
        record = {"command": "study", "profile": asdict(profile), "inputs": inputs}
        known = root / "study.json"
        if known.exists() and read_json(known) != _as_json(record):
            raise ValueError(
                f"output_dir: must be new or of the same study, got {root}, whose study.json has "
                "other settings; give another one"
            )
        write_json(known, record)

    def step(self, name: str, compute: Callable[[], Any]) -> Any:
        """Return the result of a step, which is computed only if it is not known.

        The result must be expressible in JSON. The output of `compute` goes to DIR/study.log.
        """
        path = self.root / "steps" / f"{name}.json"
        if not path.exists():
            print(f"{name} ...", flush=True)
            started = time.perf_counter()
            with (self.root / "study.log").open("a") as log, redirect_stdout(log):
                result = compute()
            seconds = round(time.perf_counter() - started, 1)
            write_json(path, {"step": name, "seconds": seconds, "result": result})
        return read_json(path)["result"]

    def done(self, name: str) -> Any:
        """Return the result of a step that is done, or None."""
        path = self.root / "steps" / f"{name}.json"
        return read_json(path)["result"] if path.exists() else None

    def seconds(self) -> dict[str, float]:
        """Return the seconds of each step that is done."""
        paths = sorted((self.root / "steps").glob("*.json"))
        return {path.stem: read_json(path)["seconds"] for path in paths}


def _as_json(value: Any) -> Any:
    """Return a value as it is read again from JSON."""
    if isinstance(value, dict):
        return {name: _as_json(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_as_json(one) for one in value]
    return value
