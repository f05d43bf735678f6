"""The study from end to end: each step is done once, and a killed study goes on."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any

import cutting
import detection
import numpy as np
import torch
from distillation import (
    ARMS,
    KD,
    TEACHER,
    UNTRAINED,
    Source,
    answers,
    arms_of,
    distil,
    write_held_out,
)
from pair import find_base, make_model, measure, wanted
from problems import Problem, load_gsm8k, load_problems, of_split
from settings import PROFILES, Profile, Study

from leaf_distill.detection.config import DetectConfig

DEVELOPMENT = 0
"""The student for the choice of settings."""
SEARCHED = "B"
"""The split whose rows are cut and distilled on."""


@dataclass(frozen=True)
class Inputs:
    """The inputs of a study: a model, and places of rows; None: as shipped."""

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
        return load_problems(self.data) + load_gsm8k(self.gsm8k)


def run(inputs: Inputs) -> Study:
    """Run all steps; return the study."""
    study = inputs.study()
    profile, students = study.profile, range(1, len(study.profile.layers))
    searched = [(inputs, number, SEARCHED) for number in students]
    scored = [(inputs, number, name) for name in profile.domains for number in students]
    arms = [(inputs, number, name) for name in arms_of(profile) for number in students]
    untrained = [(inputs, number, UNTRAINED) for number in students]
    each(profile, make, [(inputs, name) for name in wanted(profile)])
    each(profile, examine, [(inputs, name) for name in wanted(profile)])
    each(profile, analyze, [*searched, *scored])
    each(profile, weigh, [(inputs,)])
    each(profile, gather, [(inputs, number) for number in (DEVELOPMENT, *students)])
    each(profile, develop, [(inputs, rate) for rate in profile.rates])
    each(profile, test, [(inputs, students[0], TEACHER), *untrained, *arms])
    return study


def each(profile: Profile, work: Callable[..., None], jobs: Sequence[tuple[Any, ...]]) -> None:
    """Do all jobs, in so many processes as the profile has; an error leaves the waiting ones."""
    if profile.workers == 1:
        for job in jobs:
            work(*job)
        return
    context = multiprocessing.get_context("spawn")  # a CUDA context does not survive a fork
    threads = max(1, (os.cpu_count() or 1) // profile.workers)
    with ProcessPoolExecutor(profile.workers, context, _begin, (threads,)) as pool:
        try:
            for done in as_completed([pool.submit(work, *job) for job in jobs]):
                done.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _begin(threads: int) -> None:
    """Set up a worker, which ends with its parent, however that ends."""
    torch.set_num_threads(threads)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    Thread(target=watch, daemon=True).start()


def make(inputs: Inputs, name: str) -> None:
    """Make a model of the pair."""
    make_model(inputs.study(), find_base(inputs.base), inputs.problems(), name)


def examine(inputs: Inputs, name: str) -> None:
    """Measure a model of the pair on all problems that it was not trained on."""
    study = inputs.study()
    study.step(f"accuracy-{name}", partial(measure, study, inputs.problems(), name))


def analyze(inputs: Inputs, number: int, domain: str) -> None:
    """Measure the scores on a domain's rows for a student; where it is searched, the cuts too.

    In other domains the scores are measured on all rows: too few pass both models' answers.
    """
    study = inputs.study()
    source = source_of(study, inputs.problems(), number, domain)
    rows = (source.config, source.problems)
    study.step(f"detection-{number}-{domain}", partial(detection.score_rows, *rows))
    if domain == SEARCHED:
        study.step(f"cutting-{number}", partial(cutting.cut_rows, *rows))


def weigh(inputs: Inputs) -> None:
    """Measure log_gap with other weights, on the development student and problems."""
    study = inputs.study()
    source = source_of(study, inputs.problems(), DEVELOPMENT, "B-dev", "C-dev")
    study.step("weights", partial(detection.weigh, source.config, source.problems))


def source_of(study: Study, problems: Sequence[Problem], number: int, *domains: str) -> Source:
    """Return the rows of some domains for a student."""
    domain = domains[0]
    rows = [row for one in domains for row in of_split(problems, one, study.profile.rows)]
    name = f"student-{number}"
    select = "all" if domain in study.profile.domains else study.profile.select
    config = detection.settings_of(study.root, name, rows, domain, select, study.profile)
    return Source(config, rows, study.root / name / f"{domain}-by-hand")


def gather(inputs: Inputs, number: int) -> None:
    """Write the dataset of each arm of a student; of the development student that of KD alone."""
    study = inputs.study()
    source = source_of(study, inputs.problems(), number, SEARCHED)
    arms = {KD: ARMS[KD]} if number == DEVELOPMENT else arms_of(study.profile)

    def compute() -> dict[str, str]:
        paths = {name: arm.dataset(source) for name, arm in arms.items()}
        return {name: str(path.relative_to(study.root)) for name, path in paths.items()}

    study.step(f"datasets-{number}", compute)


def develop(inputs: Inputs, rate: float) -> None:
    """Distil the development student with a learning rate; it answers development problems."""
    study, problems = inputs.study(), inputs.problems()
    held_out = study.root / "held-out-dev.jsonl"
    write_held_out(held_out, {"C-dev": of_split(problems, "C-dev", study.profile.rows)})
    output = study.root / f"student-{DEVELOPMENT}" / f"rate-{rate}"
    source = source_of(study, problems, DEVELOPMENT, SEARCHED)
    dataset = study.root / study.done(f"datasets-{DEVELOPMENT}")[KD]
    work = partial(distil, source.config, ARMS[KD], dataset, study.profile, output, held_out)
    study.step(f"rate-{rate}", partial(work, learning_rate=rate, seed=0))


def best_rate(study: Study) -> float:
    """Return the learning rate with which KD is best on the development student and problems.

    The measure is the mean accuracy on plain and adversarial problems of C-dev.
    """
    found = {rate: np.mean(study.done(f"rate-{rate}")["right"]) for rate in study.profile.rates}
    return max(found, key=lambda rate: (found[rate], -rate))


def test(inputs: Inputs, number: int, name: str) -> None:
    """Distil an arm from one student, in all batch orders; it answers the held-out problems."""
    study, problems = inputs.study(), inputs.problems()
    root = study.root / f"student-{number}"
    held_out = root / "held-out.jsonl"
    write_held_out(held_out, tests_of(study, problems))
    config = source_of(study, problems, number, SEARCHED).config
    if name in (TEACHER, UNTRAINED):
        model = config.teacher if name == TEACHER else config.student
        compute = partial(answered, model, held_out, config)
        study.step(f"distillation-{number}-{name}-0", compute)
        return
    arm, dataset = ARMS[name], study.root / study.done(f"datasets-{number}")[name]
    for order in range(study.profile.orders):
        output = root / "students" / f"{slug(name)}-{order}"
        work = partial(distil, config, arm, dataset, study.profile, output, held_out)
        step = f"distillation-{number}-{slug(name)}-{order}"
        seed = number + order * len(study.profile.layers)  # shared by the arms of a student alone
        study.step(step, partial(work, learning_rate=best_rate(study), seed=seed))


def answered(model: str, held_out: Path, config: DetectConfig) -> dict[str, list[bool]]:
    """Return the answers of a model that is not trained here."""
    return {"right": answers(model, held_out, config)}


def tests_of(study: Study, problems: Sequence[Problem]) -> dict[str, list[Problem]]:
    """Return the test sets that have rows."""
    profile = study.profile
    found = {name: of_split(problems, name, profile.rows) for name in profile.tests}
    return {name: rows for name, rows in found.items() if rows}


def slug(name: str) -> str:
    """Return a name as part of a file's name."""
    return "".join(char if char.isalnum() else "-" for char in name.replace(" %", "")).strip("-")
