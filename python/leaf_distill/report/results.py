"""Reads the results of `leaf distill`, `evaluate`, `compare` and `analyze` in a run directory."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from leaf_distill.evaluation.faithfulness import ScoreCurves, curve_charts, than_random
from leaf_distill.io import read_json, reading
from leaf_distill.report.token_kl import read_token_kl

PLACES = ("*", "*/*", "*/*/*")
"""The directories, from the run directory, in which a metrics.json is looked for: also that of an
arm in students/ or evaluation/, and BENCHMARK/MODEL/ in the output directory of an evaluation."""

ANALYSIS = "analysis"
"""The directory and the stem of the files of `leaf analyze`, in the run directory."""

BRANCHES = {"kd_loss": "originals", "cd_loss": "counterfactuals"}


def read_results(directory: Path) -> dict[str, Any]:
    """Read the results in a run directory; often there are none.

    Returns:
        `trainings` and `evaluations` as the page shows them, and `reference`, the arm that the
        differences of accuracies are taken from, or None without a comparison; `curves`, the
        deletion and insertion curves of scores, or None where `leaf analyze` has none.

    Raises:
        ValueError: a file cannot be read or has another shape.
    """
    trainings: list[dict[str, Any]] = []
    evaluations: list[dict[str, Any]] = []
    for path in (path for place in PLACES for path in _sorted(directory, place)):
        metrics = read_json(path)
        with reading(path):
            if "log" in metrics:
                layer = read_token_kl(path.parent)
                trainings += (
                    one | {"token_kl": layer} for one in _training(path.parent.name, metrics)
                )
            elif metrics.get("command") == "evaluate":
                counts = {name: int(count) for name, count in metrics["counts"].items()}
                counts.pop("right", None)
                name = _name(path.parent, metrics)
                evaluations.append(_evaluation(name, metrics["rows"], metrics, counts))
    reference = None
    path = directory / "compare.json"
    if path.is_file():
        comparison = read_json(path)
        with reading(path):
            reference = str(comparison["reference"])
            evaluations = _with_arms(evaluations, comparison)
    return {
        "trainings": trainings,
        "evaluations": evaluations,
        "reference": reference,
        "curves": _curves(directory / ANALYSIS / f"{ANALYSIS}.json"),
    }


def _curves(path: Path) -> dict[str, Any] | None:
    """Return the remark on the curves, and for each model the plots and the lines of its scores.

    A line has for each kind of curve, under its name, what was measured.
    """
    if not path.is_file():
        return None
    content = read_json(path)
    with reading(path):
        found = content.get("curves") if content.get("command") == "analyze" else None
        if found is None:
            return None
        curves = ScoreCurves(str(found["arm"]), found["lines"])
        charts = dict(curve_charts(curves))
        models = []
        for role in dict.fromkeys(str(one["role"]) for one in curves.lines):
            scores: dict[str, dict[str, Any]] = {}
            rows: dict[str, int] = {}
            for one in (one for one in curves.lines if one["role"] == role):
                rows[str(one["kind"])] = int(one["rows"])
                scores.setdefault(str(one["score"]), {})[str(one["kind"])] = {
                    "area": _bounds(one["area"], one["interval"]),
                    "difference": None
                    if one["difference"] is None
                    else _bounds(one["difference"], one["difference_interval"]),
                    "than_random": than_random(one),
                }
            plots = [Markup(svg) for name, svg in charts.items() if name.endswith(f"-{role}")]
            models.append({"role": role, "charts": plots, "rows": rows, "scores": scores})
        return {"remark": curves.remark, "models": models}


def _bounds(value: float, interval: Sequence[float]) -> tuple[float, float, float]:
    low, high = interval
    return float(value), float(low), float(high)


def _sorted(directory: Path, place: str) -> list[Path]:
    return sorted(directory.glob(f"{place}/metrics.json"))


def _name(place: Path, metrics: Mapping[str, Any]) -> str:
    """Return the name of an evaluation's directory, and what was measured if a name tells it."""
    if not metrics.get("benchmark"):
        return place.name
    return f"{place.name}, {place.parent.name} {metrics['metric']}"


def _training(name: str, metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return one distillation with the KL of each branch, or nothing where none was logged.

    The points of a curve are percent of the chart, y downwards; `top` is the KL at its upper edge.
    """
    logged: dict[str, list[tuple[int, float]]] = {}
    for entry in metrics["log"]:
        for branch in BRANCHES.keys() & entry.keys():
            if math.isfinite(entry[branch]):
                logged.setdefault(branch, []).append((int(entry["step"]), float(entry[branch])))
    rows = {branch: int(metrics["rows"][branch]) for branch in BRANCHES.values()}
    if not logged:
        return []
    steps = [step for points in logged.values() for step, _ in points]
    first, last = min(steps), max(steps)
    top = max(value for points in logged.values() for _, value in points) or 1.0
    curves = []
    for key, branch in BRANCHES.items():
        if points := logged.get(key):
            # A line needs two points, also where one step was logged.
            text = " ".join(
                f"{100 * (step - first) / max(last - first, 1):.2f},{100 - 100 * value / top:.2f}"
                for step, value in points * (1 if points[1:] else 2)
            )
            ends = {"first": points[0][1], "last": points[-1][1]}
            curves.append({"branch": branch, "points": text, **ends})
    ends = {"first_step": first, "last_step": last}
    return [{"name": name, **rows, **ends, "top": top, "curves": curves}]


def _evaluation(
    name: str, rows: int, measured: Mapping[str, Any], others: Mapping[str, int]
) -> dict[str, Any]:
    """Return one accuracy with its 95 % interval, and the counts of all verdicts but `right`."""
    low, high = measured["interval"]
    return {
        "name": name,
        "rows": int(rows),
        "accuracy": float(measured["accuracy"]),
        "interval": (float(low), float(high)),
        "others": others,
        "training": None,
        "difference": None,
    }


def _with_arms(
    evaluations: list[dict[str, Any]], comparison: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Return the arms of a comparison, each with the verdicts of its evaluation, then the rest."""
    rest, arms = list(evaluations), []
    for arm in comparison["arms"]:
        one = _evaluation(arm["name"], comparison["problems"], arm, {})
        found = [other for other in rest if {**other, "others": {}} == one]
        for other in found[:1]:
            rest.remove(other)
            one["others"] = other["others"]
        if arm["training"] is not None:
            counted = ("counterfactuals", "steps", "tokens")
            one["training"] = {name: int(arm["training"][name]) for name in counted}
        if arm["difference"] is not None:
            change, low, high = map(float, arm["difference"])
            one["difference"] = (change, low, high)
        arms.append(one)
    return arms + rest
