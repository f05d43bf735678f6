"""Which distillation makes a student robust: arms at equal compute, from one student each.

Every arm has the same steps and rows a step, the counterfactuals within them. The students answer
held-out problems in their plain and their adversarial form.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from cutting import ARMS as CUTS
from cutting import TOP, write_by_hand
from detection import CONTROL, MAX_NEW_TOKENS, ORACLE, SCORING, write_rows
from problems import Problem, as_rows
from settings import Profile

from leaf_distill.data.dataset import load_examples
from leaf_distill.detection.config import DetectConfig
from leaf_distill.detection.output import write_dataset
from leaf_distill.detection.pipeline import detect
from leaf_distill.evaluation.compare import distill_equally
from leaf_distill.evaluation.compared import ARMS as COMPARED
from leaf_distill.evaluation.config import EvaluateConfig
from leaf_distill.evaluation.evaluate import evaluate
from leaf_distill.io import make_directory, write_table
from leaf_distill.training.config import DistillArguments, LeafConfig

UNTRAINED, TEACHER, KD = "untrained", "teacher", "kd"
AS_MANY = "as many random phrases as search"
FEW = 10
"""Percent of the problems that have distractors, where few have."""
HALF: Mapping[str, Any] = {"kd_weight": 0.5}
"""The paper's loss; without it all label tokens count the same."""
FLOATS = ("float32", "bfloat16")


@dataclass(frozen=True)
class Source:
    """The source of an arm's rows: the settings of detection, its rows, and its directory."""

    config: DetectConfig
    problems: Sequence[Problem]
    place: Path


@dataclass(frozen=True)
class Arm:
    """An arm: a sentence about it, its rows, and its settings of training."""

    says: str
    dataset: Callable[[Source], Path]
    training: Mapping[str, Any] = field(default_factory=dict)


def originals(source: Source) -> Path:
    """Return the adversarial problems alone, with the verdict on the student's answers."""
    table = pq.read_table(detect(replace(source.config, **SCORING)).dataset)
    path = source.place / "kd" / "dataset.parquet"
    make_directory(path.parent)
    write_table(path, table.filter(pc.equal(table["branch"], "original")))
    return path


def with_share(share: int) -> Callable[[Source], Path]:
    """Return the maker of a dataset of which so many percent of the rows have distractors."""

    def make(source: Source) -> Path:
        mixed = _mixed(source, share)
        return write_dataset(mixed.place, load_examples(mixed.config.dataset), "{}")

    return make


def of_few(make: Callable[[Source], Path]) -> Callable[[Source], Path]:
    """Return the maker of the same arm's dataset from rows of which few have distractors."""
    return lambda source: make(_mixed(source, FEW))


def _mixed(source: Source, share: int) -> Source:
    """Return the same problems, of which so many percent have distractors, the others none."""
    order = list(range(len(source.problems)))
    random.Random(0).shuffle(order)
    whole = set(order[: round(len(order) * share / 100)])
    problems = [
        one if at in whole else replace(one, adversarial=one.plain, ranges=())
        for at, one in enumerate(source.problems)
    ]
    place = source.place / f"{share}-percent"
    dataset = write_rows(place / "rows.jsonl", as_rows(problems, "adversarial"))
    config = replace(source.config, dataset=str(dataset), output_dir=str(place / "run"))
    return Source(config, problems, place)


def detected(**changes: Any) -> Callable[[Source], Path]:
    """Return the maker of the dataset of an arm of `leaf detect`."""
    return lambda source: detect(replace(source.config, **changes)).dataset


def as_many_at_random(source: Source) -> Path:
    """Return random phrases that the teacher can do without, as many as the search has cuts."""
    changes = {**CUTS[f"{TOP}random"], "validate": "teacher"}
    table = pq.read_table(detect(replace(source.config, **changes)).dataset)
    searched = detected(validate="both", **CUTS["search"])(source)
    wanted = sum(branch != "original" for branch in _branches(pq.read_table(searched)))
    branches = _branches(table)
    drawn = [at for at, branch in enumerate(branches) if branch != "original"]
    random.Random(0).shuffle(drawn)
    kept = {*drawn[:wanted], *(at for at, one in enumerate(branches) if one == "original")}
    path = source.place / "random-as-many" / "dataset.parquet"
    make_directory(path.parent)
    write_table(path, table.take(sorted(kept)))
    return path


def _branches(table: pa.Table) -> list[str]:
    branches: list[str] = table["branch"].to_pylist()
    return branches


def by_hand(name: str, *, cross: bool = False) -> Callable[[Source], Path]:
    """Return the maker of a dataset with cuts by hand."""

    def make(source: Source) -> Path:
        directory = source.place / (name.split(":")[0].replace(" ", "-") + "-cross" * cross)
        return write_by_hand(source.config, source.problems, directory, name, cross=cross)

    return make


def _cut(says: str, name: str) -> Arm:
    changes = {"validate": "both", **CUTS[name]}
    return Arm(says, detected(**changes))


ALL_HAVE: Mapping[str, Arm] = {
    KD: Arm("plain distillation on problems with distractors", originals),
    **{
        f"{KD}, {share} % with distractors": Arm(
            f"plain distillation; {share} % of the problems have distractors", with_share(share)
        )
        for share in (0, 10, 50)
    },
    "kd_failed": Arm(COMPARED["kd_failed"].says, originals, COMPARED["kd_failed"].training),
    "kd_entropy": Arm(COMPARED["kd_entropy"].says, originals, COMPARED["kd_entropy"].training),
    "sft": Arm(COMPARED["sft"].says, originals, COMPARED["sft"].training),
    "augmented": Arm(
        COMPARED["augmented"].says, detected(**(COMPARED["augmented"].detection or {}))
    ),
    "LeaF spans": _cut("the paper's token spans", "token spans, one at a time (the paper)"),
    "log_gap phrases": _cut("the top 1, 2, 3 phrases by log_gap", f"{TOP}log_gap"),
    "search": _cut("the cuts of the search", "search"),
    "LeaF spans, lambda 0.5": replace(
        _cut(
            "LeaF spans, with lambda 0.5: half of the loss is that of the counterfactuals",
            "token spans, one at a time (the paper)",
        ),
        training=HALF,
    ),
    "search, lambda 0.5": replace(_cut("search, with lambda 0.5", "search"), training=HALF),
    "search, failed": replace(
        _cut("search, with half of each step from rows that the student fails", "search"),
        training=COMPARED["kd_failed"].training,
    ),
    "cross, search": Arm(
        "the teacher reads the problem without the cuts of the search, the student the whole one",
        detected(validate="both", cross_branch=True, **CUTS["search"]),
    ),
    "random phrases": _cut("a control: 1, 2, 3 phrases at random", f"{TOP}random"),
    AS_MANY: Arm(
        "a control: so many cuts of 1, 2, 3 phrases at random, after which the teacher is right",
        as_many_at_random,
    ),
    "no model": Arm("phrases whose numbers the label lacks", by_hand(CONTROL)),
    "truth": Arm("the true distractors", by_hand(ORACLE)),
    "cross, truth": Arm(
        "the teacher reads the problem without the true distractors, the student the whole one",
        by_hand(ORACLE, cross=True),
    ),
}
"""Arms from problems with distractors, and plain distillation from fewer of them.

Those with cuts keep what both models answer, but for those with as many cuts at random: too few of
these are answered by both.
"""

FEW_HAVE: Mapping[str, Arm] = {
    f"{name}, {FEW} %": replace(
        ALL_HAVE[name],
        says=f"{name}, where {FEW} % of the problems have distractors",
        dataset=of_few(ALL_HAVE[name].dataset),
    )
    for name in (
        *("kd_failed", "sft", "augmented", "log_gap phrases", "search", "search, lambda 0.5"),
        *(AS_MANY, "no model", "truth"),
    )
}
"""Arms that start from problems of which few have distractors."""

ARMS = {**ALL_HAVE, **FEW_HAVE}

KD_OF_FEW = f"{KD}, {FEW} % with distractors"
WITHOUT_CUTS = [name for name in ARMS if name.startswith((KD, "sft"))]
"""The arms that train on problems as they are."""


def arms_of(profile: Profile) -> dict[str, Arm]:
    """Return the arms that can run; kd_failed needs the verdicts on the student's answers."""
    answered = profile.select != "all"
    return {
        name: arm for name, arm in ARMS.items() if answered or "failed_share" not in arm.training
    }


def distil(
    config: DetectConfig,
    arm: Arm,
    dataset: Path,
    profile: Profile,
    output: Path,
    held_out: Path,
    *,
    learning_rate: float,
    seed: int,
) -> dict[str, Any]:
    """Distil a student, and return its counts and answers; the weights are deleted.

    Args:
        config: the pair.
        arm: the settings of training.
        dataset: the arm's rows.
        profile: the steps and rows a step.
        output: the directory of the student.
        held_out: the problems that it answers.
        learning_rate: the peak.
        seed: of the batches' order.
    """
    training = LeafConfig(
        output_dir=str(output),
        max_steps=profile.steps,
        originals_per_step=profile.distilled_rows,
        per_device_train_batch_size=profile.distilled_rows,
        learning_rate=learning_rate,
        warmup_steps=max(1, profile.steps // 10),
        seed=seed,
        logging_steps=profile.steps,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        bf16=has_fast_bfloat16(),
        **arm.training,
    )
    arguments = DistillArguments(
        student=config.student,
        teacher=config.teacher,
        dataset=str(dataset),
        teacher_dtype=FLOATS[has_fast_bfloat16()],
    )
    trained = distill_equally(arguments, training, output)
    right = answers(str(trained.model), held_out, config)
    shutil.rmtree(output)
    return {
        "originals": trained.originals,
        "counterfactuals": trained.counterfactuals,
        "originals_a_step": trained.originals_a_step,
        "tokens": trained.tokens,
        "right": right,
    }


def has_fast_bfloat16() -> bool:
    """Return whether students train and answer in bfloat16 here: on GPUs, and CPUs with AMX."""
    return torch.cuda.is_available() or bool(torch.cpu.get_capabilities().get("amx_bf16"))


def write_held_out(path: Path, sets: Mapping[str, Sequence[Problem]]) -> None:
    """Write the problems of all test sets, each plain and then adversarial."""
    rows = [
        row
        for problems in sets.values()
        for form in ("plain", "adversarial")
        for row in as_rows(problems, form)
    ]
    write_rows(path, rows)


def answers(model: str, held_out: Path, config: DetectConfig) -> list[bool]:
    """Return which held-out problems a model answers with the label, greedily."""
    output = held_out.parent / "evaluation" / Path(model).parent.name / Path(model).name
    result = evaluate(
        EvaluateConfig(
            model=model,
            dataset=str(held_out),
            output_dir=str(output),
            cache_dir=config.cache_dir,
            dtype=FLOATS[has_fast_bfloat16()],
            max_batch_tokens=config.max_batch_tokens,
            grade="exact",
            max_new_tokens=MAX_NEW_TOKENS,
        )
    )
    verdicts = pq.read_table(result.answers, columns=["verdict"])["verdict"].to_pylist()
    return [verdict == "right" for verdict in verdicts]
