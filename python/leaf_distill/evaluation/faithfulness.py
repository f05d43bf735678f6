"""Deletion and insertion curves of the scores on a run's rows: their table, plots and note."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from leaf_distill.detection.arm_curves import arm_curves
from leaf_distill.detection.swept_arm import read_settings
from leaf_distill.evaluation.arms import Arm
from leaf_distill.evaluation.charts import curve_chart
from leaf_distill.evaluation.config import AnalyzeConfig
from leaf_distill.evaluation.sheets import Estimate, Sheet, Value
from leaf_distill.io import StoreError, read_json, user_directory

NAME = "curves"
ENOUGH = 30
"""With fewer rows, intervals of a bootstrap are said to be too narrow."""
TITLE = "Deletion and insertion at equal size"
NOTE = (
    "Mean loss of the completion (nats a token) over curves in which the same shares of tokens are "
    "deleted by each score, the most suspect first (deletion: low is good), or put back into a "
    "text without them (insertion: high is good). 95 % intervals of a bootstrap over rows; the "
    "difference is from random ranks, paired by row. A loss is no answer: it ranks scores by what "
    "the label needs, and says nothing of a wrong answer that gets right."
)
MISSING = (
    "The scores have no deletion and insertion curves: {why}. `leaf analyze --curves` loads the "
    "models and measures them; `--scores` chooses fewer."
)


@dataclass(frozen=True)
class ScoreCurves:
    """The curves of scores on the rows of one arm.

    Attributes:
        arm: its name.
        lines: those of `summarize_curves`.
    """

    arm: str
    lines: Sequence[Mapping[str, Any]]

    @property
    def remark(self) -> str:
        """The rows that were read, and how many comparisons the intervals do not correct for."""
        compared = [one for one in self.lines if one["difference"] is not None]
        scores = {one["score"] for one in compared}
        rows = min((int(one["rows"]) for one in self.lines), default=0)
        few = f" With {rows} rows they are too narrow besides." if rows < ENOUGH else ""
        return (
            f"The rows are those of {self.arm}; the curves depend on the rows and on no strategy "
            f"or threshold. Scores compared with random ranks: {len(scores)}; comparisons, over "
            f"models and kinds of curves: {len(compared)}. The intervals are not corrected for "
            "their number: if no score were better or worse than random, about "
            f"{len(compared) / 20:.1f} would be told apart by chance.{few}"
        )


def score_curves(
    config: AnalyzeConfig, root: Path, arms: Sequence[Arm]
) -> tuple[ScoreCurves | None, list[str]]:
    """Return the curves on the rows of the first arm that has scored ones, and advice.

    Args:
        config: of `leaf analyze`; without `curves` no model is loaded, and nothing is raised.
        root: the run directory.
        arms: of the run.

    Raises:
        ValueError, StoreError: as `arm_curves`, where models may be loaded.
    """
    scored = (one for one in arms if any(row.scored for row in one.rows.values()))
    if (arm := next(scored, None)) is None:
        return None, []
    path, why = root / "arms" / arm.name, "their losses are not all in the cache"
    try:
        own = read_settings(path, **config.moved)
        lines = arm_curves(path, own, config.scores, load=config.curves)
        if lines is None and (measured := _measured(config, root, arm.name)):
            lines = arm_curves(path, own, measured, load=False)
    except (ValueError, StoreError) as error:
        if config.curves:
            raise
        lines, why = None, str(error)
    return (ScoreCurves(arm.name, lines), []) if lines else (None, [MISSING.format(why=why)])


def _measured(config: AnalyzeConfig, root: Path, arm: str) -> list[str]:
    """Return the scores of the curves that an earlier `leaf analyze` has written of an arm."""
    file = user_directory(config.output_dir or root / "analysis") / "analysis.json"
    if not file.is_file():
        return []
    found = read_json(file).get("curves") or {}
    names = dict.fromkeys(str(one["score"]) for one in found.get("lines", ()))
    return [*names] if found.get("arm") == arm else []


def curve_sheet(found: ScoreCurves | None) -> Sheet:
    """Return the table of the areas; it has no lines where there are no curves."""
    lines: list[dict[str, Value]] = [
        {
            "model": one["role"],
            "curve": one["kind"],
            "score": one["score"],
            "rows": one["rows"],
            "mean loss": Estimate(one["area"], *one["interval"]),
            "difference": None
            if one["difference"] is None
            else Estimate(one["difference"], *one["difference_interval"]),
            "than random": than_random(one),
        }
        for one in (found.lines if found else ())
    ]
    note = f"{found.remark} {NOTE}" if found else NOTE
    return Sheet(NAME, TITLE, lines, note, percent=False, detail=("rows", "mean loss"))


def than_random(line: Mapping[str, Any]) -> str | None:
    """Return what the interval of a difference from random says; None for random itself."""
    if line["difference"] is None:
        return None
    low, high = line["difference_interval"]
    if low <= 0 <= high:
        return "not told apart"
    return "better" if (high < 0) == (line["kind"] == "deletion") else "worse"


def curve_charts(found: ScoreCurves | None) -> Iterator[tuple[str, str]]:
    """Yield the name and the text of a plot for each model and kind."""
    lines = found.lines if found else ()
    for role, kind in dict.fromkeys((one["role"], one["kind"]) for one in lines):
        series = {
            str(one["score"]): [
                (share, Estimate(nll, nll, nll))
                for share, nll in zip(one["shares"], one["nll"], strict=True)
            ]
            for one in lines
            if (one["role"], one["kind"]) == (role, kind)
        }
        lowest = min(value.mean for curve in series.values() for _, value in curve)
        done = "deleted" if kind == "deletion" else "put back"
        yield (
            f"{NAME}-{kind}-{role}",
            curve_chart(
                f"{kind.capitalize()}, {role}",
                series,
                f"share of the tokens that are {done}",
                "loss (nats a token)",
                scale=1,
                floor=float(np.floor(10 * lowest)) / 10,
            ),
        )
