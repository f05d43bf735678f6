"""`leaf compare`: arms through detection, distillation at equal compute, and evaluation."""

from __future__ import annotations

import contextlib
import io
import math
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from leaf_distill.config import AnswerOptions, json_object, need, package_versions
from leaf_distill.data.dataset import load_examples
from leaf_distill.data.example import Mask
from leaf_distill.detection.config import DetectConfig
from leaf_distill.evaluation.arm_datasets import dataset_of, make_datasets, plan_detections
from leaf_distill.evaluation.arm_record import ArmRecord
from leaf_distill.evaluation.compare_table import (
    Arm,
    CompareResult,
    Training,
    accuracy_table,
    markdown,
    training_table,
)
from leaf_distill.evaluation.compared import ARMS
from leaf_distill.evaluation.config import CompareConfig, EvaluateConfig
from leaf_distill.evaluation.evaluate import evaluate
from leaf_distill.evaluation.measure import check_directory
from leaf_distill.evaluation.tables import check_table
from leaf_distill.io import (
    is_of,
    locked,
    read_json,
    user_directory,
    write_bytes,
    write_json,
)
from leaf_distill.models.source import named
from leaf_distill.statistics import paired_bootstrap, wilson_interval
from leaf_distill.terminal import plain_console, say
from leaf_distill.training.checks import of_evaluation
from leaf_distill.training.config import DistillArguments, LeafConfig
from leaf_distill.training.distill import distill
from leaf_distill.training.identity import (
    check_identity,
    check_output,
    digest_of,
    settings_of,
)
from leaf_distill.training.log_lines import plain_on_purpose

UNTRAINED = "untrained"


def compare(config: CompareConfig, detection: DetectConfig, training: LeafConfig) -> CompareResult:
    """Run arms through both stages and evaluation, and write one table of them.

    `ARMS` says what each arm is; its settings win over the given ones. Every arm starts from the
    same student and sees the same originals. It makes the same number of optimizer steps and reads
    `training.originals_per_step` rows in each, as nearly as whole originals allow: an arm with
    counterfactuals has fewer originals in a step. All students answer the same problems.

    Writes compare.json and compare.md in `detection.output_dir`, beside arms/, students/ and
    evaluation/. The same command goes on where a killed one stopped.

    Args:
        config: the arms, and the problems of the evaluation.
        detection: models, rows and settings of detection, which runs for the arms that need it.
        training: settings of the distillation; its output_dir is each arm's own, and `failed_share`
            holds for kd_failed alone.

    Returns:
        The arms in their order, after the student before any training.

    Raises:
        ValueError: settings or inputs cannot work.
        StoreError: a file cannot be written.
    """
    need(detection, "student", "teacher", "dataset")
    need(config, "eval_dataset")
    for name, value in of_evaluation(training).items():
        raise ValueError(
            f"{name}: must be left out, got {value}; all arms are evaluated after the training"
        )
    if training.failed_share is not None and not any(
        "failed_share" in ARMS[name].training for name in config.arms
    ):
        raise ValueError(
            f"failed_share: must come with the arm kd_failed, got {training.failed_share} and arms "
            f"{', '.join(config.arms)}; add the arm, or leave it out"
        )
    root = user_directory(detection.output_dir)
    # Settings that do not go together are said before anything runs.
    trainings = {name: ARMS[name].trains(training) for name in config.arms}
    plan = plan_detections(config.arms, detection)
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
    record = ArmRecord(root / "students", config.arms, detection)
    with locked(root / "students"):
        record.check()
        for name in filter(record.trained, config.arms):
            _check_training(trainings[name], dataset_of(name, plan, root), root / "students" / name)
        record.write()
        trained = _train(detection, make_datasets(plan, root), trainings, root)
        settings = {name: ARMS[name].settings(one) for name, one in trainings.items()}
        result = _compare(config, detection, trained, settings, root)
        _write(result, config, detection, training)
    tables = training_table(result), accuracy_table(result)
    plain_console().print("", tables[0], "", tables[1], *result.notes, "", sep="\n")
    say(f"The table is in {result.table}, its numbers are in {root / 'compare.json'}")
    return result


def _train(
    detection: DetectConfig,
    datasets: Mapping[str, Path],
    trainings: Mapping[str, LeafConfig],
    root: Path,
) -> dict[str, Training]:
    """Return the distillation of each arm."""
    trained: dict[str, Training] = {}
    for name, training in trainings.items():
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
    return trained


def _compare(
    config: CompareConfig,
    detection: DetectConfig,
    trained: Mapping[str, Training],
    settings: Mapping[str, dict[str, Any]],
    root: Path,
) -> CompareResult:
    """Evaluate the student before any training and after each."""
    models = {UNTRAINED: detection.student} | {name: str(trained[name].model) for name in trained}
    right = {}
    for name, model in models.items():
        _say(f"evaluation: {name}")
        right[name] = _evaluate(name, model, config, detection, root)
    reference = "kd" if "kd" in config.arms else config.arms[0]
    arms = [
        Arm(
            name=name,
            says=ARMS[name].says if name in trained else "the student before any training",
            settings=settings.get(name, {}),
            training=trained.get(name),
            accuracy=float(mine.mean()),
            interval=wilson_interval(int(mine.sum()), len(mine)),
            difference=None if name == reference else paired_bootstrap(right[reference], mine),
        )
        for name, mine in right.items()
    ]
    unreadable = read_json(root / "evaluation" / UNTRAINED / "metrics.json")["unreadable_rows"]
    problems = len(right[UNTRAINED])
    return CompareResult(tuple(arms), reference, problems, root / "compare.md", unreadable)


def _write(
    result: CompareResult, config: CompareConfig, detection: DetectConfig, training: LeafConfig
) -> None:
    write_json(
        result.table.with_name("compare.json"),
        {
            "command": "compare",
            "reference": result.reference,
            "problems": result.problems,
            "unreadable_rows": result.unreadable,
            "arms": [asdict(arm) for arm in result.arms],
            "settings": {
                "compare": asdict(config),
                "detect": asdict(detection),
                "training": training.to_dict(),  # type: ignore[no-untyped-call]
            },
            "versions": package_versions(),
        },
    )
    write_bytes(result.table, markdown(result).encode())


def _say(step: str) -> None:
    print(f"{step} ...", file=sys.stderr, flush=True)


def distill_equally(
    arguments: DistillArguments, training: LeafConfig, output_dir: Path
) -> Training:
    """Distil with a number of steps, and of rows in a step, that do not depend on counterfactuals.

    Tokens and passes may differ: a token that is not trained on is read all the same.

    A step has a whole number of originals, so that its rows with their counterfactuals are as many
    as `training.originals_per_step` only to within half of what comes with one original.
    The steps are `training.max_steps`, or `num_train_epochs` passes over the originals at
    `originals_per_step` originals each, as plain distillation makes them.
    """
    branches = _count_branches(Path(arguments.dataset))
    equal = _equalized(training, branches, output_dir)
    with plain_on_purpose():  # or else the detections have said that they found nothing
        result = distill(arguments, equal)
    log = [entry for entry in result.metrics["log"] if "loss" in entry]
    return Training(
        model=result.output_dir,
        steps=log[-1]["step"],
        originals=branches["original"],
        counterfactuals=branches.total() - branches["original"],
        originals_a_step=equal.originals_per_step,
        tokens=int(log[-1]["num_input_tokens_seen"]),
        kl_first=log[0].get("kd_loss"),
        kl_last=log[-1].get("kd_loss"),
    )


def _count_branches(dataset: Path) -> Counter[str]:
    return Counter(pq.read_table(dataset, columns=["branch"])["branch"].to_pylist())


def _equalized(training: LeafConfig, branches: Counter[str], output_dir: Path) -> LeafConfig:
    """Return the settings of an arm's training, whose dataset has so many rows of each branch."""
    originals = branches["original"]
    rows = min(training.originals_per_step, originals)
    steps = training.max_steps
    if steps <= 0:
        steps = math.ceil(training.num_train_epochs * originals / rows)
    a_step = max(1, round(rows * originals / branches.total()))
    run = output_dir / "run.json"
    trained = read_json(run).get("max_steps") if is_of(run, "distill") else steps
    if trained != steps:  # `distill` would go on, with a schedule that is not the other arms'
        raise ValueError(
            f"max_steps: must stay {trained} in a directory whose arms have so many, got {steps}; "
            "give another output_dir"
        )
    return training.with_changes(
        output_dir=str(output_dir),
        max_steps=steps,
        originals_per_step=a_step,
        per_device_train_batch_size=a_step,
        dataloader_drop_last=True,  # every step is a full one
        include_num_input_tokens_seen="non_padding",
    )


def _check_training(training: LeafConfig, dataset: Path, student: Path) -> None:
    """Raise ValueError where a student's training has other settings than it had so far.

    `distill` takes another learning rate in a run that has not finished; arms are trained alike. A
    student whose dataset is gone is left to `distill`.
    """
    known = read_json(student / "run.json")["dataset"]["digest"]
    if dataset.is_file() and digest_of(load_examples(str(dataset))) == known:
        settings = settings_of(_equalized(training, _count_branches(dataset), student))
        check_identity(student, settings, finished=True)


def _evaluate(
    name: str, model: str, config: CompareConfig, detection: DetectConfig, root: Path
) -> Mask:
    """Return which problems a model answers correctly."""
    shared = {item: getattr(detection, item) for item in AnswerOptions.__dataclass_fields__}
    if shared["dtype"] == "auto":  # trained students are saved in float32: one dtype for all
        shared["dtype"] = "float32"
    settings = EvaluateConfig(
        **shared,
        model=model,
        dataset=config.eval_dataset,
        dataset_split=config.eval_split,
        columns=detection.columns,
        output_dir=str(root / "evaluation" / name),
    )
    with contextlib.redirect_stdout(io.StringIO()):  # the table of all arms follows
        result = evaluate(settings)
    low, high = result.interval
    say(f"{name}: {result.accuracy:.1%} right ({low:.1%} to {high:.1%})")
    verdicts = pq.read_table(result.answers, columns=["verdict"])["verdict"].to_pylist()
    return np.array([verdict == "right" for verdict in verdicts])
