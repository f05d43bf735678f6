"""The study from end to end: each step is done once, and a killed study goes on."""

from __future__ import annotations

import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import cutting
import detection
import distillation
import numpy as np
from distillation import KD, TEACHER, UNTRAINED, Source, answers, arms_of, distil, write_held_out
from pair import find_base, make_pair
from problems import Problem, load_gsm8k, load_problems, of_split
from settings import PROFILES, Study

TESTS = ("C", "complex", "gsm8k")
"""The rows that distilled students answer."""


@dataclass(frozen=True)
class Inputs:
    """The inputs of a study: a model, and places of rows; None: as shipped, or left out."""

    output_dir: Path
    profile: str
    base: str | None = None
    data: Path | None = None
    gsm8k: Path | None = None

    def study(self) -> Study:
        """Return the study in its directory."""
        named = {name: str(getattr(self, name)) for name in ("base", "data", "gsm8k")}
        return Study(self.output_dir, PROFILES[self.profile], named)

    def problems(self) -> list[Problem]:
        """Return all problems."""
        return load_problems(self.data) + (load_gsm8k(self.gsm8k) if self.gsm8k else [])


def run(inputs: Inputs) -> Study:
    """Run all steps; return the study."""
    study = inputs.study()
    make_pair(study, find_base(inputs.base), inputs.problems())
    choose_rate(inputs)
    students = range(1, len(study.profile.layers))
    if study.profile.workers == 1:
        for number in students:
            work(inputs, number)
    else:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(study.profile.workers, mp_context=context) as pool:
            for done in [pool.submit(work, inputs, number) for number in students]:
                done.result()
    return study


def choose_rate(inputs: Inputs) -> float:
    """Return the learning rate with which KD is best, on the development student and problems.

    The measure is the mean accuracy on plain and adversarial problems of C-dev.
    """
    study, problems = inputs.study(), inputs.problems()
    profile = study.profile
    tests = {"C-dev": of_split(problems, "C-dev", profile.rows)}
    held_out = study.root / "held-out-dev.jsonl"
    write_held_out(held_out, tests)
    source = source_of(study, problems, 0, "B")
    found = {}
    for rate in profile.rates:
        output = study.root / "student-0" / f"rate-{rate}"
        arguments = (source, distillation.ARMS[KD], profile, output, held_out)
        compute = partial(distil, *arguments, learning_rate=rate, order=0)
        found[rate] = float(np.mean(study.step(f"rate-{rate}", compute)["right"]))
    return max(found, key=lambda rate: (found[rate], -rate))


def source_of(study: Study, problems: Sequence[Problem], number: int, domain: str) -> Source:
    """Return the rows of a domain for a student."""
    rows = of_split(problems, domain, study.profile.rows)
    name = f"student-{number}"
    config = detection.settings_of(study.root, name, rows, domain, study.profile)
    return Source(config, rows, study.root / name / f"{domain}-by-hand")


def work(inputs: Inputs, number: int) -> None:
    """Do all steps of one student."""
    study, problems = inputs.study(), inputs.problems()
    for domain in study.profile.domains:
        if not of_split(problems, domain):
            continue
        source = source_of(study, problems, number, domain)
        rows = (source.config, source.problems)
        study.step(f"detection-{number}-{domain}", partial(detection.score_rows, *rows))
        study.step(f"cutting-{number}-{domain}", partial(cutting.cut_rows, *rows, source.place))
    distil_all(inputs, study, problems, number)


def distil_all(inputs: Inputs, study: Study, problems: Sequence[Problem], number: int) -> None:
    """Distil all arms from one student, in all batch orders."""
    held_out = study.root / f"student-{number}" / "held-out.jsonl"
    write_held_out(held_out, tests_of(study, problems))
    source = source_of(study, problems, number, "B")
    for name, model in ((UNTRAINED, source.config.student), (TEACHER, source.config.teacher)):
        compute = partial(answered, model, held_out, source.config.cache_dir)
        study.step(f"distillation-{number}-{name}-0", compute)
    rate = choose_rate(inputs)
    for name, arm in arms_of(study.profile).items():
        for order in range(study.profile.orders):
            step = f"distillation-{number}-{slug(name)}-{order}"
            output = study.root / f"student-{number}" / "students" / f"{slug(name)}-{order}"
            arguments = (source, arm, study.profile, output, held_out)
            study.step(step, partial(distil, *arguments, learning_rate=rate, order=order))


def answered(model: str, held_out: Path, cache_dir: str | None) -> dict[str, list[bool]]:
    """Return the answers of a model that is not trained here."""
    return {"right": answers(model, held_out, cache_dir)}


def tests_of(study: Study, problems: Sequence[Problem]) -> dict[str, list[Problem]]:
    """Return the test sets that have rows."""
    found = {name: of_split(problems, name, study.profile.rows) for name in TESTS}
    return {name: rows for name, rows in found.items() if rows}


def slug(name: str) -> str:
    """Return a name as part of a file's name."""
    return "".join(char if char.isalnum() else "-" for char in name.replace(" %", "")).strip("-")
