"""The studies of the paper on a run of `leaf detect`, and curves of the scores: tables, plots."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from leaf_distill.evaluation.arms import Arm, read_arms
from leaf_distill.evaluation.charts import curve_chart, histogram_chart, interval_chart
from leaf_distill.evaluation.config import AnalyzeConfig
from leaf_distill.evaluation.faithfulness import (
    ScoreCurves,
    curve_charts,
    curve_sheet,
    score_curves,
    than_random,
)
from leaf_distill.evaluation.pruning import (
    FLATTERY,
    NO_OP,
    against_random,
    gains,
    harm,
    level,
    missing_controls,
    overview,
    threshold_of,
    unsearched,
    without_cuts,
)
from leaf_distill.evaluation.sheets import (
    Estimate,
    Sheet,
    as_csv,
    as_json,
    printed,
    short_names,
    shown,
)
from leaf_distill.evaluation.similarity import Shift, shifts, similarity
from leaf_distill.evaluation.tables import check_table
from leaf_distill.io import make_directory, user_directory, write_bytes, write_json
from leaf_distill.terminal import plain_console, say
from leaf_distill.training.model_card import markdown_table

STEM = "analysis"
REPAIRED = "a cut repairs"
SHARE = "% of failed rows that a cut repairs"


@dataclass(frozen=True)
class AnalyzeResult:
    """The findings of `leaf analyze`.

    Attributes:
        directory: of all files: analysis.md, analysis.json, a CSV file a table, and the plots.
        sheets: the tables by name: gain, random, harm, arms, similarity, curves.
        advice: the arms without a row or a cut, and what to run for what is missing.
        curves: deletion and insertion curves of the scores; None where they were not measured.
    """

    directory: Path
    sheets: Mapping[str, Sheet]
    advice: Sequence[str]
    curves: ScoreCurves | None = None


def analyze(config: AnalyzeConfig) -> AnalyzeResult:
    """Write the studies of the paper on the arms of a run; only `curves` loads the models.

    How many failed rows cutting repairs by source and difficulty (Figure 1), beside random cuts,
    and the harm to solved rows; strategies, thresholds and levels side by side (Figures 7, 9, 10);
    the similarity of answers to references before and after a cut (Figure 13); the loss while the
    tokens that a score suspects are deleted or put back.

    Args:
        config: the settings.

    Returns:
        The tables; they are printed too.

    Raises:
        ValueError: there is no such arm, a file cannot be read, or other files are in the way; or a
            model that `curves` needs cannot be loaded, or is another one than that of the run.
        StoreError: a file cannot be written.
    """
    root, arms = read_arms(user_directory(config.run_dir, "run_dir"), config.arms)
    directory = user_directory(config.output_dir or root / STEM)
    check_table(directory, STEM, "analyze")
    moved = shifts(arms)
    curves, lacking = score_curves(config, root, arms)
    sheets = [gains(arms), against_random(arms), harm(arms), overview(arms), similarity(moved)]
    charts = dict((*_charts(arms, sheets, moved), *curve_charts(curves)))
    sheets.append(curve_sheet(curves))
    advice = [*unsearched(arms), *without_cuts(arms), *missing_controls(arms), *lacking]
    result = AnalyzeResult(directory, {one.name: one for one in sheets}, advice, curves)
    _write(result, charts, [arm.name for arm in arms])
    _print(result)
    return result


def _charts(
    arms: Sequence[Arm], sheets: Sequence[Sheet], moved: Sequence[Shift]
) -> Iterator[tuple[str, str]]:
    """Yield the name and the text of each plot that the arms have something for."""
    gain = sheets[0]
    if gain.lines:
        groups = list(dict.fromkeys(str(line["group"]) for line in gain.lines))
        names = list(dict.fromkeys(str(line["arm"]) for line in gain.lines))
        by_arm = {name: [_find(gain, group=group, arm=name) for group in groups] for name in names}
        if any(value is not None for values in by_arm.values() for value in values):
            yield (
                "gain",
                interval_chart("Repaired by cutting, without training", groups, by_arm, SHARE),
            )
    repaired = {arm.name: _find(sheets[3], arm=arm.name) for arm in arms}
    if sum(value is not None for value in repaired.values()) > 1:
        title = "Strategies side by side"
        yield "arms", interval_chart(title, list(repaired), {"": list(repaired.values())}, SHARE)
    curves = _curves(arms, repaired)
    if curves:
        yield "thresholds", curve_chart("Thresholds", curves, "threshold", SHARE)
    for one in moved:
        of = "label" if one.reference == "the label" else "teacher"
        series = {"before": one.before, "after a cut": one.after}
        axis = f"Jaccard similarity to {one.reference}"
        yield f"similarity-{of}-{one.arm}", histogram_chart(one.arm, series, axis)


def _find(sheet: Sheet, **keys: str) -> Estimate | None:
    for line in sheet.lines:
        if all(line[name] == value for name, value in keys.items()):
            found = line[REPAIRED]
            return found if isinstance(found, Estimate) else None
    return None


def _curves(
    arms: Sequence[Arm], repaired: Mapping[str, Estimate | None]
) -> dict[str, list[tuple[float, Estimate]]]:
    """Return the arms that differ in their threshold alone as curves, where there are two."""
    groups: list[tuple[Arm, list[tuple[float, Estimate]]]] = []
    for arm in arms:
        if (value := repaired[arm.name]) is not None:
            name = threshold_of(arm)
            alike = (curve for head, curve in groups if head.differs_in(arm) <= {name})
            curve = next(alike, None)
            if curve is None:
                curve = []
                groups.append((arm, curve))
            curve.append((float(arm.settings[name]), value))
    curves: dict[str, list[tuple[float, Estimate]]] = {}
    for head, curve in groups:
        if curve[1:]:
            name = _curve_name(head)
            # Settings that are in no name, such as max_rows, may make two curves of one.
            curves[f"{head.name}, {level(head)}" if name in curves else name] = curve
    return curves


def _curve_name(arm: Arm) -> str:
    """Return the name of an arm without its threshold, where the name has it."""
    name = threshold_of(arm)
    value = str(arm.settings[name]).removesuffix(".0")
    return f"{arm.name.replace(f'-{name}-{value}', '')}, {level(arm)}"


def _write(result: AnalyzeResult, charts: Mapping[str, str], arms: Sequence[str]) -> None:
    make_directory(result.directory)
    if result.curves is None:  # those of an earlier run are not of these rows
        for pattern in ("curves.csv", "curves-deletion-*.svg", "curves-insertion-*.svg"):
            for path in result.directory.glob(pattern):
                path.unlink()
    for name, text in charts.items():
        write_bytes(result.directory / f"{name}.svg", text.encode())
    for name, sheet in result.sheets.items():
        if sheet.lines:
            write_bytes(result.directory / f"{name}.csv", as_csv(sheet).encode())
    content = {
        "command": "analyze",
        "arms": list(arms),
        "advice": list(result.advice),
        "tables": {name: as_json(sheet) for name, sheet in result.sheets.items()},
        "curves": _json(result.curves) if result.curves else None,
    }
    write_bytes(result.directory / f"{STEM}.md", _page(result, list(charts)).encode())
    write_json(result.directory / f"{STEM}.json", content)


def _json(curves: ScoreCurves) -> dict[str, Any]:
    lines = [{**line, "than_random": than_random(line)} for line in curves.lines]
    return {"arm": curves.arm, "remark": curves.remark, "lines": lines}


def _page(result: AnalyzeResult, charts: Sequence[str]) -> str:
    parts = ["# Cutting alone, without training", FLATTERY, NO_OP, *result.advice]
    for name, sheet in result.sheets.items():
        if sheet.lines:
            parts += [f"## {sheet.title}", markdown_table(shown(sheet)), sheet.note]
        own = [chart for chart in charts if chart.split("-")[0] == name]
        own += [chart for chart in charts if chart == "thresholds" and name == "arms"]
        parts += [f"![{chart}]({chart}.svg)" for chart in own]
    return "\n\n".join(parts) + "\n"


SHORT = {"the teacher's answer": "teacher", "the label": "label"}
"""Of references, in the terminal."""


def _print(result: AnalyzeResult) -> None:
    console = plain_console()
    lines = (line for sheet in result.sheets.values() for line in sheet.lines if "arm" in line)
    short = short_names(list(dict.fromkeys(str(line["arm"]) for line in lines)))
    for name, letter in short.items():
        say(f"{letter}  {name}")
    for sheet in result.sheets.values():
        if sheet.lines:
            console.print(printed(sheet, SHORT | short, width=console.width), "")
    say(FLATTERY)
    if result.curves:
        say(result.curves.remark)
    for text in result.advice:
        say(f"note: {text}", style="yellow")
    say(f"{result.directory / STEM}.md says more, also by source and difficulty")
