"""What `leaf distill` and `leaf evaluate` measured, where they wrote beside or into the run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from leaf_distill.report.data import read_json

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
    """One distillation: what it read, how its divergence fell, and the height of its chart."""

    name: str
    originals: int
    counterfactuals: int
    first_step: int
    last_step: int
    top: float
    curves: tuple[Curve, ...]


@dataclass(frozen=True)
class Evaluation:
    """Accuracy of one model on one set, with its 95 % interval and the verdicts of the rest."""

    name: str
    rows: int
    accuracy: float
    low: float
    high: float
    others: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Results:
    """All that was found, in the order of the directories' names."""

    trainings: tuple[Training, ...]
    evaluations: tuple[Evaluation, ...]


def _training(name: str, metrics: Mapping[str, Any]) -> Training | None:
    steps = [entry for entry in metrics["log"] if any(branch in entry for branch in BRANCHES)]
    if not steps:
        return None
    first, last = steps[0]["step"], steps[-1]["step"]
    top = max(entry[branch] for entry in steps for branch in BRANCHES if branch in entry) or 1.0
    curves = []
    for branch, title in BRANCHES.items():
        logged = [(entry["step"], entry[branch]) for entry in steps if branch in entry]
        if logged:
            points = " ".join(
                f"{100 * (step - first) / max(last - first, 1):.2f},{100 - 100 * value / top:.2f}"
                for step, value in logged
            )
            curves.append(Curve(title, logged[0][1], logged[-1][1], points))
    rows = metrics["rows"]
    counts = rows["originals"], rows["counterfactuals"]
    return Training(name, *counts, first, last, top, tuple(curves))


def _evaluation(name: str, metrics: Mapping[str, Any]) -> Evaluation:
    low, high = metrics["interval"]
    others = tuple((verdict, n) for verdict, n in metrics["counts"].items() if verdict != "right")
    return Evaluation(name, metrics["rows"], metrics["accuracy"], low, high, others)


def read_results(directory: Path) -> Results:
    """Results in `directory` itself and in the directories right below it; often there are none."""
    paths: Sequence[Path] = sorted(
        [*directory.glob("metrics.json"), *directory.glob("*/metrics.json")]
    )
    trainings, evaluations = [], []
    for path in paths:
        metrics = read_json(path)
        name = path.parent.name
        if {"log", "rows"} <= metrics.keys():
            trainings.append(_training(name, metrics))
        elif {"accuracy", "interval", "counts", "rows"} <= metrics.keys():
            evaluations.append(_evaluation(name, metrics))
    return Results(tuple(item for item in trainings if item), tuple(evaluations))
