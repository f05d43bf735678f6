"""`leaf sweep`: the table and the plot of a sweep, and the threshold that it proposes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from leaf_distill.data.source import find_arm
from leaf_distill.detection.cells import Cell, Setting
from leaf_distill.detection.sweep import sweep_arm
from leaf_distill.detection.swept_arm import read_settings
from leaf_distill.evaluation.charts import curve_chart
from leaf_distill.evaluation.config import SweepConfig
from leaf_distill.evaluation.proposal import Proposal, propose_threshold, sentences
from leaf_distill.evaluation.pruning import HIT
from leaf_distill.evaluation.sheets import (
    Estimate,
    Sheet,
    Value,
    as_csv,
    as_json,
    estimate,
    printed,
    shown,
)
from leaf_distill.evaluation.tables import check_table
from leaf_distill.io import user_directory, write_bytes, write_json
from leaf_distill.terminal import plain_console, say
from leaf_distill.training.model_card import markdown_table

STEM = "sweep"

NOTE = (
    f"Percent. {HIT} Candidates: all, also those that are not usable. Known: usable candidates "
    "with answers in the cache. Tokens cut: of all tokens, those that some candidate cuts. "
    "Overlap: characters that this setting's and the arm's candidates both cut, of those that "
    "either cuts. Kept: known candidates that pass the validation. A cut repairs: the chance that "
    "the student is right on a random one of a row's cuts, 0 without a cut. These are effects on "
    "rows that the student fails: `leaf analyze` shows the harm to others."
)

LEGEND = (
    "*: the arm's own setting. +: of the candidates with answers in the cache alone.",
    "Empty: answers are missing, or no cut was made.",
)
"""These lines below the table say what its marks mean."""


@dataclass(frozen=True)
class SweepResult:
    """The findings of `leaf sweep`; its files are sweep.json, .md, .csv and .svg in the arm.

    Attributes:
        arm: its directory.
        cells: each point of the grid.
        proposals: the threshold for each level.
    """

    arm: Path
    cells: Sequence[Cell]
    proposals: Sequence[Proposal]


def sweep(config: SweepConfig) -> SweepResult:
    """Compute the cuts of every setting of a grid for the rows of an arm, without a model.

    Args:
        config: the settings.

    Returns:
        The cells and the proposed threshold of each level; they are printed too.

    Raises:
        ValueError: there is no such arm, the cache lacks its measurements, or other files are in
            the way; or no row of the arm has scores.
        StoreError: a file cannot be written.
    """
    arm = find_arm(user_directory(config.run_dir, "run_dir").absolute(), "run_dir")
    check_table(arm, STEM, "sweep", argument="run_dir")
    own = read_settings(arm, **config.moved)
    grid: dict[str, Sequence[str]] = {
        "strategy": config.strategies,
        "rule": config.rules or [own.rule],
        "score": config.scores or [own.score],
        "widen": config.widenings or [own.widen],
    }
    swept = sweep_arm(arm, own, config.thresholds, grid)
    if not swept.cells:
        raise ValueError(
            f"cache_dir: must hold what `leaf detect` measured for {arm}, got one without it: "
            f"{' '.join(swept.missing)}"
        )
    levels = dict.fromkeys(cell.setting.level for cell in swept.cells)
    marked = own.select != "all"
    proposals = [
        propose_threshold([one for one in swept.cells if one.setting.level == level], marked=marked)
        for level in levels
    ]
    result = SweepResult(arm, swept.cells, proposals)
    _write(result, swept.missing)
    return result


def _sheet(cells: Sequence[Cell]) -> Sheet:
    varied = [
        name
        for name in ("level", "score", "rule", "widen")
        if len({getattr(cell.setting, name) for cell in cells}) > 1
    ]
    lines = [_line(cell) for cell in cells]
    fixed = tuple(name for name in ("level", "score", "rule", "widen") if name not in varied)
    title = "Settings of detection, tried without a model"
    detail = (*fixed, "rows", "spans a row", "overlap", "usable", "known", *_no_room(varied))
    return Sheet(STEM, title, lines, NOTE, detail=detail)


def _no_room(varied: Sequence[str]) -> tuple[str, ...]:
    """Return the counts that the terminal has no room for beside the settings that vary."""
    more = len({*varied} - {"level"})  # each level has a table of its own
    return ((), ("candidates",), ("candidates", "hit", "kept"))[min(more, 2)] + (
        ("tokens cut",) if more > 2 else ()
    )


def _marked(sheet: Sheet) -> Sheet:
    """Return a sheet to be read: a number that counts the known candidates alone has a mark."""
    lines = [
        {**line, "kept": f"{line['kept']}+"} if line["known"] != line["usable"] else line
        for line in sheet.lines
    ]
    return replace(sheet, lines=lines)


def _line(cell: Cell) -> dict[str, Value]:
    setting = cell.setting
    repairs = estimate(cell.measured) if cell.tried else None
    return {
        "strategy": setting.strategy + " *" * cell.current,
        "threshold": f"{setting.threshold:g}",
        "level": setting.level,
        "score": setting.score,
        "rule": setting.rule,
        "widen": setting.widen,
        "rows": cell.rows,
        "hit": cell.hit,
        "spans a row": f"{cell.spans / cell.rows:.2f}" if cell.rows else None,
        "tokens cut": f"{100 * cell.tokens_cut / cell.tokens:.1f}" if cell.tokens else None,
        "overlap": f"{100 * cell.overlap:.0f}",
        "candidates": cell.candidates,
        "usable": cell.usable,
        "known": cell.known,
        "kept": cell.kept,
        "a cut repairs": repairs,
    }


def _chart(cells: Sequence[Cell]) -> str | None:
    """Return the plot of repaired shares over thresholds, None where too little is measured."""
    series: dict[str, list[tuple[float, Estimate]]] = {}
    for cell in cells:
        share = estimate(cell.measured) if cell.tried else None
        if share is not None:
            series.setdefault(_series(cell.setting), []).append((cell.setting.threshold, share))
    if not any(curve[1:] for curve in series.values()):
        return None
    title = "Rows that a random one of their cuts repairs"
    return curve_chart(title, series, "threshold", "% of failed rows")


def _size_chart(cells: Sequence[Cell]) -> str:
    series: dict[str, list[tuple[float, Estimate]]] = {}
    for cell in cells:
        share = cell.tokens_cut / cell.tokens if cell.tokens else 0.0
        point = cell.setting.threshold, Estimate(share, share, share)
        series.setdefault(_series(cell.setting), []).append(point)
    return curve_chart("Tokens that are cut", series, "threshold", "% of tokens")


def _series(setting: Setting) -> str:
    return ", ".join(
        (setting.strategy, setting.level, setting.score, setting.rule, f"{setting.widen}s")
    )


def _write(result: SweepResult, missing: Sequence[str]) -> None:
    sheet = _sheet(result.cells)
    marked = _marked(sheet)
    proposed = [text for one in result.proposals for text in sentences(one)]
    plots: dict[str, str | None] = {
        STEM: _chart(result.cells),
        f"{STEM}-size": _size_chart(result.cells),
    }
    images = []
    for name, text in plots.items():
        if text is not None:
            write_bytes(result.arm / f"{name}.svg", text.encode())
            images.append(f"![{name}]({name}.svg)")
    write_bytes(result.arm / f"{STEM}.csv", as_csv(sheet).encode())
    parts = ["# Settings of detection", *proposed, *missing, markdown_table(shown(marked))]
    parts += [" ".join(LEGEND).replace("*", "\\*"), NOTE]
    text = "\n\n".join([*parts, *images]) + "\n"
    write_bytes(result.arm / f"{STEM}.md", text.encode())
    write_json(result.arm / f"{STEM}.json", _json(result, sheet, missing))
    console = plain_console()
    for level in dict.fromkeys(line["level"] for line in marked.lines):
        lines = [line for line in marked.lines if line["level"] == level]
        detail = (*sheet.detail, "level")
        title = f"{sheet.title}: {level} level"
        one = replace(sheet, title=title, lines=lines, detail=detail)
        console.print(printed(one, width=console.width), "")
    for sentence in (*LEGEND, *proposed, *missing):
        say(sentence)
    say(f"{result.arm / STEM}.md says what the columns mean, and has the plots")


def _json(result: SweepResult, sheet: Sheet, missing: Sequence[str]) -> dict[str, Any]:
    return {
        "command": "sweep",
        **as_json(sheet),
        "missing": list(missing),
        "proposals": [
            {
                "level": one.level,
                "setting": asdict(one.cell.setting) if one.cell else None,
                "share": list(one.share) if one.share else None,
                "rows": len(one.cell.measured) if one.cell else 0,
                "doubts": list(one.doubts),
            }
            for one in result.proposals
        ],
    }
