"""The results of `leaf distill`, `leaf evaluate` and `leaf compare` in a run directory."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from leaf_distill.io import read_json
from leaf_distill.report.shape import Maybe, check_shape, read_shaped

PLACES = ("*", "students/*", "evaluation/*")
"""The directories, from the run directory, in which a metrics.json is looked for."""

TRAINING = {"rows": {"originals": int, "counterfactuals": int}, "log": [{}]}
EVALUATION = {
    "rows": int,
    "accuracy": float,
    "interval": (float, float),
    "counts": {str: int},
}
COMPARISON = {
    "reference": str,
    "problems": int,
    "arms": [
        {
            "name": str,
            "training": Maybe(dict.fromkeys(("counterfactuals", "steps", "tokens"), int)),
            "accuracy": float,
            "interval": (float, float),
            "difference": Maybe((float, float, float)),
        }
    ],
}
BRANCHES = {"kd_loss": "originals", "cd_loss": "counterfactuals"}


@dataclass(frozen=True)
class Curve:
    """KL per token of one branch over the steps; points are percent of the chart, y downwards."""

    branch: str
    first: float
    last: float
    points: str


@dataclass(frozen=True)
class Training:
    """One distillation: what it read, its KL, and the KL at the top of its chart."""

    name: str
    originals: int
    counterfactuals: int
    first_step: int
    last_step: int
    top: float
    curves: tuple[Curve, ...]


@dataclass(frozen=True)
class Evaluation:
    """Accuracy of one model on one set, with its 95 % interval, and the verdicts but `right`.

    training: counterfactuals, steps and tokens of an arm of `leaf compare`. difference: of its
    accuracy to the reference's, with the 95 % interval. Both are None elsewhere.
    """

    name: str
    rows: int
    accuracy: float
    interval: tuple[float, float]
    others: tuple[tuple[str, int], ...] = ()
    training: Mapping[str, int] | None = None
    difference: tuple[float, float, float] | None = None


@dataclass(frozen=True)
class Results:
    """What was found; reference is that of the differences, None without a comparison."""

    trainings: tuple[Training, ...]
    evaluations: tuple[Evaluation, ...]
    reference: str | None


def read_results(directory: Path) -> Results:
    """Read the results in a run directory; often there are none.

    Raises:
        ValueError: a file cannot be read or has another shape.
    """
    trainings: list[Training] = []
    evaluations: list[Evaluation] = []
    found = [sorted(directory.glob(f"{place}/metrics.json")) for place in PLACES]
    for path in (path for paths in found for path in paths):
        metrics = read_json(path)
        if "log" in metrics:
            check_shape(metrics, TRAINING, f"{path}: ")
            trainings += _training(path, metrics)
        elif metrics.get("command") == "evaluate":
            check_shape(metrics, EVALUATION, f"{path}: ")
            evaluations.append(_evaluation(path.parent.name, metrics))
    reference = None
    path = directory / "compare.json"
    if path.is_file():
        comparison = read_shaped(path, COMPARISON)
        reference = comparison["reference"]
        evaluations = _with_arms(evaluations, comparison)
    return Results(tuple(trainings), tuple(evaluations), reference)


def _training(path: Path, metrics: Mapping[str, Any]) -> list[Training]:
    """Return the training, or nothing where no loss was logged."""
    logged: dict[str, list[tuple[int, float]]] = {}
    for branch in BRANCHES:
        for index, entry in enumerate(metrics["log"]):
            if branch in entry:
                check_shape(entry, {"step": int, branch: float}, f"{path}: log.{index}.")
                if math.isfinite(entry[branch]):
                    logged.setdefault(branch, []).append((entry["step"], entry[branch]))
    if not logged:
        return []
    steps = [step for points in logged.values() for step, _ in points]
    first, last = min(steps), max(steps)
    top = max(value for points in logged.values() for _, value in points) or 1.0
    curves = []
    for branch, points in logged.items():
        # A line needs two points, also where one step was logged.
        text = " ".join(
            f"{100 * (step - first) / max(last - first, 1):.2f},{100 - 100 * value / top:.2f}"
            for step, value in points * (1 if points[1:] else 2)
        )
        curves.append(Curve(BRANCHES[branch], points[0][1], points[-1][1], text))
    rows = metrics["rows"]
    counts = rows["originals"], rows["counterfactuals"]
    return [Training(path.parent.name, *counts, first, last, top, tuple(curves))]


def _evaluation(name: str, metrics: Mapping[str, Any]) -> Evaluation:
    low, high = metrics["interval"]
    others = tuple((verdict, n) for verdict, n in metrics["counts"].items() if verdict != "right")
    return Evaluation(name, metrics["rows"], metrics["accuracy"], (low, high), others)


def _with_arms(
    evaluations: Sequence[Evaluation], comparison: Mapping[str, Any]
) -> list[Evaluation]:
    """Return the arms of a comparison, each with the verdicts of its evaluation, then the rest."""
    rest = list(evaluations)
    arms = []
    for arm in comparison["arms"]:
        low, high = arm["interval"]
        one = Evaluation(arm["name"], comparison["problems"], arm["accuracy"], (low, high))
        for found in rest:
            if replace(found, others=()) == one:
                rest.remove(found)
                one = found
                break
        arms.append(replace(one, training=arm["training"], difference=arm["difference"]))
    return arms + rest
