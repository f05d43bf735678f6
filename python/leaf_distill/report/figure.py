"""The heat map of one row as a figure for a paper."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from leaf_distill.data.source import find_arm
from leaf_distill.io import make_directory, reading, user_directory, write_bytes
from leaf_distill.models.svg import BLUE, GENERATOR, ORANGE, Cell, Note, Row, Scale, heat_map
from leaf_distill.report.data import read_run
from leaf_distill.report.heat import LEVELS, heat, score_level
from leaf_distill.report.place import check_output, output_path

ROWS = (Row("teacher", BLUE), Row("student", BLUE), Row("score", ORANGE, marked=True))
SCALES = (
    Scale("saliency", ("0", "1"), BLUE, tuple(step / LEVELS for step in range(LEVELS + 1))),
    Scale(
        "score",
        ("0 (suspect)", "1"),
        ORANGE,
        tuple((score_level(step / 40) or 0) / LEVELS for step in range(41)),
    ),
)
WORDS = {"right": "right", "wrong": "wrong", "no_answer": "no answer", "cut_off": "cut off"}


def write_figure(
    run_directory: str | Path,
    output: str | Path,
    *,
    row_id: int | None = None,
    columns: int = 2,
) -> Path:
    """Write the heat map of a scored row of an arm as SVG, and return its path.

    It shows the text with the saliency of teacher and student and the score, each token below
    itself, the detected spans and the kept cut (of several, the first; without any, the first that
    was left out), and the student's answers with and without the cut. Where a row was analyzed at
    several levels, it is the first with a kept cut.

    Args:
        run_directory: the output directory of `leaf detect`, or one of its arms.
        output: the file, which ends in .svg.
        row_id: the row; default: the first that the page shows.
        columns: the width, in columns of a paper with two: 1 (240 points) or 2 (504).

    Raises:
        ValueError: there is no arm or there are several, a file in it cannot be read, the row is
            not there, or `output` is a file of something else.
        StoreError: the figure cannot be written.
    """
    path = output_path(output, "figure")
    if path.suffix.lower() != ".svg":
        raise ValueError(
            f"figure: must end in .svg, got {str(output)!r}; rsvg-convert makes PDF and PNG of it"
        )
    check_output(path, "figure", GENERATOR, "figure")
    arm = find_arm(user_directory(run_directory, "run_dir").absolute(), "run_dir")
    run = read_run(arm, samples=1, row_ids=None if row_id is None else [row_id])
    if not run.rows:
        raise ValueError(
            f"run_dir: must have a scored row to draw, got {arm}, which has none; its funnel.json "
            "says where its rows left"
        )
    row = run.rows[0]
    with reading(arm / "samples.parquet"):
        content = draw_row(row, columns)
    make_directory(path.parent)
    # Half of a surrogate pair, which Python text may hold, has no bytes in UTF-8.
    write_bytes(path, content.encode(errors="replace"))
    return path


def draw_example(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the figure of the first row that has a kept cut; nothing where none has."""
    for row in rows:
        if any(one["kept"] for view in row["views"] for one in view["candidates"]):
            return draw_row(row, columns=2)
    return ""


def draw_row(row: Mapping[str, Any], columns: int) -> str:
    """Return the figure of a row, as `read_run` has it."""
    views: Sequence[Mapping[str, Any]] = row["views"]
    view = next((one for one in views if any(c["kept"] for c in one["candidates"])), views[0])
    shown = sorted(view["candidates"], key=lambda one: not one["kept"])[:1]
    cuts = [tuple(part) for one in shown for part in one["cut"]]
    cells = [
        Cell(cell.text, _tints(cell), part.span, part.cut)
        for part in heat(view["text"], view["tokens"], view["spans"], cuts)
        for cell in part.cells
    ]
    return heat_map(
        ROWS,
        cells,
        SCALES,
        title=f"Row {row['row_id']}: saliency of teacher and student, and score, of each token",
        notes=[*_answer(view, "whole"), *(line for one in shown for line in _answer(one, "cut"))],
        columns=columns,
    )


def _tints(cell: Any) -> tuple[float, ...]:
    return tuple((getattr(cell, name) or 0) / LEVELS for name in ("teacher", "student", "score"))


def _answer(prompt: Mapping[str, Any], name: str) -> list[Note]:
    """Return the line about the student's answer, if it was asked."""
    text, verdict = prompt["student_answer"], prompt["student_verdict"]
    if text is None:
        return []
    sign = {"right": "\u2713 ", "wrong": "\u2717 "}.get(verdict, "")
    word = "" if verdict is None else f"  {sign}{WORDS.get(verdict, verdict.replace('_', ' '))}"
    return [Note(" ".join(text.split()), f"student, {name + ' text:':<12} ", word)]
