"""`leaf compare`: arms through detection, distillation at equal compute, and evaluation."""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from leaf_distill.config import AnswerOptions, json_object, need, package_versions
from leaf_distill.data.dataset import load_examples
from leaf_distill.data.example import Mask
from leaf_distill.detection.config import DetectConfig
from leaf_distill.detection.pipeline import detect
from leaf_distill.evaluation.config import CompareConfig, EvaluateConfig
from leaf_distill.evaluation.evaluate import evaluate
from leaf_distill.evaluation.measure import check_directory
from leaf_distill.evaluation.tables import check_table, printed_table
from leaf_distill.io import (
    locked,
    make_directory,
    user_directory,
    write_bytes,
    write_json,
    write_table,
)
from leaf_distill.models.source import named
from leaf_distill.statistics import paired_bootstrap, wilson_interval
from leaf_distill.training.config import DistillArguments, LeafConfig
from leaf_distill.training.distill import distill
from leaf_distill.training.identity import check_output
from leaf_distill.training.model_card import markdown_table

UNTRAINED = "untrained"


@dataclass(frozen=True)
class Training:
    """One distillation: its rows and its cost.

    tokens: all that the student read, without padding. kl_first, kl_last: the first and the last
    logged KL of the originals, nats a label token; they are means over different rows.
    """

    model: Path
    steps: int
    originals: int
    counterfactuals: int
    originals_a_step: int
    tokens: int
    kl_first: float
    kl_last: float


@dataclass(frozen=True)
class Arm:
    """One line of the comparison.

    interval: Wilson's 95 % interval of the accuracy. difference: the accuracy less that of the
    reference, on the same problems, with the 95 % interval of a paired bootstrap over problems.
    """

    name: str
    training: Training | None
    accuracy: float
    interval: tuple[float, float]
    difference: tuple[float, float, float] | None


@dataclass(frozen=True)
class CompareResult:
    """The arms, the reference of their differences, and the written table."""

    arms: tuple[Arm, ...]
    reference: str
    problems: int
    table: Path


def compare(config: CompareConfig, detection: DetectConfig, training: LeafConfig) -> CompareResult:
    """Run arms through both stages and evaluation, and write one table of them.

    Every arm starts from the same student and sees the same originals. It makes the same number of
    optimizer steps and reads `training.originals_per_step` rows in each, as nearly as whole
    originals allow: an arm with counterfactuals has fewer originals in a step. All students answer
    the same problems.

    Writes compare.json and compare.md in `detection.output_dir`, beside arms/, students/ and
    evaluation/. The same command goes on where a killed one stopped.

    Args:
        config: the arms, and the problems of the evaluation.
        detection: models, rows and settings of detection; its strategy is each arm's own.
        training: settings of the distillation; its output_dir is each arm's own.

    Returns:
        The arms in their order, after the student before any training.

    Raises:
        ValueError: settings or inputs cannot work.
        StoreError: a file cannot be written.
    """
    need(detection, "student", "teacher", "dataset")
    need(config, "eval_dataset")
    for name in ("eval_answers", "early_stopping_patience", "load_best_model_at_end"):
        if value := getattr(training, name):
            raise ValueError(
                f"{name}: must be left out, got {value}; all arms are evaluated after the training"
            )
    root = user_directory(detection.output_dir)
    check_table(root, "compare", "compare")
    for name in (UNTRAINED, *config.arms):
        check_directory(root / "evaluation" / name)
        check_output(root / "students" / name)
    # A wrong name is said before the training, not after it.
    with named("eval_dataset", "dataset"):
        load_examples(
            config.eval_dataset,
            split=config.eval_split,
            columns=json_object(detection.columns, "columns"),
            need_completion=False,
        )
    with locked(root / "students"):
        result = _compare(config, detection, training, root)
    Console().print(training_table(result), accuracy_table(result))
    print(f"The table is in {result.table}, its numbers are in {root / 'compare.json'}")
    return result


def _compare(
    config: CompareConfig, detection: DetectConfig, training: LeafConfig, root: Path
) -> CompareResult:
    datasets = _detect(config.arms, detection, root)
    models = {UNTRAINED: detection.student}
    trained: dict[str, Training] = {}
    for name in config.arms:
        _say(f"distillation: {name}")
        trained[name] = distill_equally(
            DistillArguments(
                student=detection.student,
                teacher=detection.teacher,
                dataset=str(datasets[name]),
                trust_remote_code=detection.trust_remote_code,
            ),
            training,
            root / "students" / name,
        )
        models[name] = str(trained[name].model)
    right = {}
    for name, model in models.items():
        _say(f"evaluation: {name}")
        right[name] = _evaluate(name, model, config, detection, root)
    reference = "kd" if "kd" in config.arms else config.arms[0]
    arms = [
        Arm(
            name=name,
            training=trained.get(name),
            accuracy=float(mine.mean()),
            interval=wilson_interval(int(mine.sum()), len(mine)),
            difference=None if name == reference else paired_bootstrap(right[reference], mine),
        )
        for name, mine in right.items()
    ]
    result = CompareResult(tuple(arms), reference, len(right[UNTRAINED]), root / "compare.md")
    write_json(
        root / "compare.json",
        {
            "command": "compare",
            "reference": reference,
            "problems": result.problems,
            "arms": [asdict(arm) for arm in arms],
            "settings": {
                "compare": asdict(config),
                "detect": asdict(detection),
                "training": training.to_dict(),  # type: ignore[no-untyped-call]
            },
            "versions": package_versions(),
        },
    )
    write_bytes(result.table, _markdown(result).encode())
    return result


def _say(step: str) -> None:
    print(f"{step} ...", file=sys.stderr, flush=True)


def _detect(arms: Sequence[str], detection: DetectConfig, root: Path) -> dict[str, Path]:
    """Return the dataset of each arm; that of `kd` has the originals of the others alone."""
    datasets: dict[str, Path] = {}
    for name in arms:
        if name != "kd":
            _say(f"detection: {name}")
            datasets[name] = detect(replace(detection, strategy=name)).dataset  # type: ignore[arg-type]
    if "kd" in arms:
        table = pq.read_table(next(iter(datasets.values())))
        make_directory(root / "arms" / "kd")
        datasets["kd"] = root / "arms" / "kd" / "dataset.parquet"
        write_table(datasets["kd"], table.filter(pc.equal(table["branch"], "original")))
    return datasets


def distill_equally(
    arguments: DistillArguments, training: LeafConfig, output_dir: Path
) -> Training:
    """Distil with a number of steps, and of rows in a step, that do not depend on counterfactuals.

    A step has a whole number of originals, so that its rows with their counterfactuals are as many
    as `training.originals_per_step` only to within half of what comes with one original.
    The steps are `training.max_steps`, or `num_train_epochs` passes over the originals at
    `originals_per_step` originals each, as plain distillation makes them.
    """
    branches = Counter(pq.read_table(arguments.dataset, columns=["branch"])["branch"].to_pylist())
    originals = branches["original"]
    rows = min(training.originals_per_step, originals)
    steps = training.max_steps
    if steps <= 0:
        steps = math.ceil(training.num_train_epochs * originals / rows)
    a_step = max(1, round(rows * originals / branches.total()))
    result = distill(
        arguments,
        training.with_changes(
            output_dir=str(output_dir),
            max_steps=steps,
            originals_per_step=a_step,
            per_device_train_batch_size=a_step,
            dataloader_drop_last=True,  # every step is a full one
            include_num_input_tokens_seen="non_padding",
        ),
    )
    log = [entry for entry in result.metrics["log"] if "loss" in entry]
    return Training(
        model=result.output_dir,
        steps=log[-1]["step"],
        originals=originals,
        counterfactuals=branches.total() - originals,
        originals_a_step=a_step,
        tokens=int(log[-1]["num_input_tokens_seen"]),
        kl_first=log[0]["kd_loss"],
        kl_last=log[-1]["kd_loss"],
    )


def _evaluate(
    name: str, model: str, config: CompareConfig, detection: DetectConfig, root: Path
) -> Mask:
    """Return which problems a model answers correctly."""
    shared = {item: getattr(detection, item) for item in AnswerOptions.__dataclass_fields__}
    if shared["dtype"] == "auto":  # trained students are saved in float32: one dtype for all
        shared["dtype"] = "float32"
    result = evaluate(
        EvaluateConfig(
            **shared,
            model=model,
            dataset=config.eval_dataset,
            dataset_split=config.eval_split,
            columns=detection.columns,
            output_dir=str(root / "evaluation" / name),
        )
    )
    verdicts = pq.read_table(result.answers, columns=["verdict"])["verdict"].to_pylist()
    return np.array([verdict == "right" for verdict in verdicts])


Lines = list[tuple[str, ...]]

COMPUTE = (
    "All arms make as many steps, and read as many rows in each as whole originals allow. "
    "Cut: counterfactuals; a step: originals in one; tokens: all that the student read, without "
    "padding. KL(teacher, student) of the originals, a token: the first and the last logged mean, "
    "over different rows."
)
CHANCE = (
    "Accuracy with Wilson's 95 % interval. Differences in points, with the 95 % interval of a "
    "paired bootstrap over the problems, which says little where fewer than ten changed. Chance in "
    "training is in no interval: there is one seed."
)


def _training_lines(result: CompareResult) -> Lines:
    lines: Lines = [("arm", "originals", "cut", "steps", "a step", "tokens", "KL")]
    for arm in result.arms:
        if (done := arm.training) is not None:
            counts = done.originals, done.counterfactuals, done.steps, done.originals_a_step
            kl = f"{done.kl_first:.3f} to {done.kl_last:.3f}"
            lines.append((arm.name, *map(str, counts), f"{done.tokens:,}", kl))
    return lines


def _accuracy_lines(result: CompareResult) -> Lines:
    lines: Lines = [("arm", "accuracy", "95 %", f"less {result.reference}", "95 %")]
    for arm in result.arms:
        low, high = (f"{100 * value:.1f}" for value in arm.interval)
        difference, between = "", ""
        if arm.difference is not None:
            difference, least, most = (f"{100 * value:+.1f}" for value in arm.difference)
            between = f"{least} to {most}"
        lines.append((arm.name, f"{arm.accuracy:.1%}", f"{low} to {high}", difference, between))
    return lines


def training_table(result: CompareResult) -> Table:
    """Return the printed table of the arms' distillations."""
    title = "Distillation at equal compute"
    return printed_table(title, _training_lines(result), caption=COMPUTE)


def accuracy_table(result: CompareResult) -> Table:
    """Return the printed table of the arms' accuracies."""
    title = f"Accuracy on {result.problems} problems"
    return printed_table(title, _accuracy_lines(result), caption=CHANCE)


def _markdown(result: CompareResult) -> str:
    accuracies, trainings = _accuracy_lines(result), _training_lines(result)
    parts = ("# Arms at equal compute", markdown_table(accuracies), f"{result.problems} problems.")
    return "\n\n".join([*parts, CHANCE, markdown_table(trainings), COMPUTE]) + "\n"
