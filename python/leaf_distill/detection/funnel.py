"""Counts of a run: how many rows and candidates reached each stage, and why the others left."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa

from leaf_distill.data.example import ROLES, Example, candidates_of, views_of
from leaf_distill.detection.config import DetectConfig
from leaf_distill.detection.gain import pruning_gain
from leaf_distill.terminal import light_table, plain_console, say, titled
from leaf_distill.wording import TIED

ROW_STAGES = {
    "rows": None,
    "render": "usable: originals of the dataset",
    "predict": "answered",
    "mark": "marked: student wrong, teacher right",
    "detect": "scored",
    "prune": "with candidates",
    "validate": "with counterfactuals",
}
"""The name of the rows that did not leave at a stage, in the order of the stages."""

UNUSED = ("rows", "render")
"""The stages at which rows leave that are not in the dataset."""

KEPT = "kept counterfactuals"

"""A blank at which no line ends; it is printed as a plain one."""

REASONS_SHOWN = 3
"""For how many reasons a row is named that left for it."""

NO_CUT = "no cut was made"
"""This stands in place of the share of rows that a cut repairs."""

VIEWS = {"prompts": "prompts", "beginnings": "beginnings of responses"}
"""The levels of a row, in words. One may leave while another keeps the row in."""

OUTCOMES = pa.schema(
    [
        ("row_id", pa.int64()),
        ("segment", pa.int64()),
        ("candidate_id", pa.int64()),
        ("stage", pa.string()),
        ("reason", pa.string()),
        ("detail", pa.string()),
    ]
)


def funnel(examples: Sequence[Example], config: DetectConfig) -> dict[str, Any]:
    """Return what funnel.json holds of a finished run: `stages`, `left`, `notes`, `nll`, `sources`.

    stages: stage, rows and unit, from the rows that came in to the candidates that are kept. left:
    stage, reason, count and unit, in the order of the stages, most frequent first; the units
    "prompts" and "beginnings" are the levels of rows that are analyzed at several (`VIEWS`).
    notes: how often each alteration was made. nll: each model's mean and highest loss (nats a label
    token). sources: the accuracy gained by cutting, as `pruning_gain` returns it.
    """
    candidates = list(candidates_of(examples))
    views = [view for example in examples for view in example.views]
    gone = Counter(one.outcome.stage for one in examples if one.outcome)
    stages: list[dict[str, object]] = [{"stage": "rows in", "rows": len(examples), "unit": "rows"}]
    remaining = len(examples)
    for stage, name in ROW_STAGES.items():
        remaining -= gone[stage]
        if name is not None and stage not in _skipped(config):
            stages.append({"stage": name, "rows": remaining, "unit": "rows"})
    kept = sum(one.outcome is None for one in candidates)
    for name, number in (("candidates", len(candidates)), (KEPT, kept)):
        stages.append({"stage": name, "rows": number, "unit": "candidates"})
    notes = Counter(note for one in (*examples, *views, *candidates) for note in one.notes)
    return {
        "stages": stages,
        "left": [
            *_reasons(examples, "rows"),
            *_reasons([view for view in views if not view.segment], "prompts"),
            *_reasons([view for view in views if view.segment], "beginnings"),
            *_reasons(candidates, "candidates"),
        ],
        "notes": dict(sorted(notes.items())),
        "nll": _nll(list(views_of(examples))),
        "sources": pruning_gain(examples, config),
    }


def _skipped(config: DetectConfig) -> set[str]:
    """Return the stages that a configuration does not have."""
    skipped = {"predict", "mark"} if config.select == "all" else set()
    return skipped | ({"validate"} if config.validate == "none" else set())


def _reasons(examples: Sequence[Example], unit: str) -> Iterator[dict[str, object]]:
    order = list(ROW_STAGES)
    tally = Counter((one.outcome.stage, one.outcome.reason) for one in examples if one.outcome)
    for (stage, reason), count in sorted(
        tally.items(), key=lambda entry: (order.index(entry[0][0]), -entry[1])
    ):
        yield {"stage": stage, "reason": reason, "count": count, "unit": unit}


def _nll(examples: Sequence[Example]) -> dict[str, dict[str, float]]:
    measured: dict[str, dict[str, float]] = {}
    for role in ROLES:
        values = [one.nll[role] for one in examples if math.isfinite(one.nll.get(role, math.nan))]
        if values:
            mean = sum(values) / len(values)
            measured[role] = {"mean": round(mean, 4), "max": round(max(values), 4)}
    return measured


def outcomes_table(examples: Sequence[Example]) -> pa.Table:
    """Return one line for each row, view and candidate: where it left and why, or `kept`.

    A row with views has lines for them behind its own, which says what became of all of them and
    has no segment.
    """
    lines = []
    for one in (part for example in examples for part in _with_parts(example)):
        stage, reason, detail = one.outcome or ("dataset", "kept", None)
        segment = None if one.views else one.segment
        values = (one.row_id, segment, one.candidate_id, stage, reason, detail)
        lines.append(dict(zip(OUTCOMES.names, values, strict=True)))
    return pa.Table.from_pylist(lines, schema=OUTCOMES)


def _with_parts(example: Example) -> Iterator[Example]:
    yield example
    for view in example.views or (example,):
        if view is not example:
            yield view
        yield from view.candidates


def show_funnel(summary: Mapping[str, Any], warnings: Sequence[str]) -> None:
    """Print the funnel as a table, and what the reader should know before using the result."""
    table = light_table()
    table.add_column("stage")
    table.add_column("number", justify="right")
    table.add_column("left, and why")
    lines: dict[str, list[str]] = {}
    for reason in summary["left"]:
        if reason["unit"] in VIEWS:
            continue
        line = f"{reason['count']} {reason['reason'].replace('_', ' ')}"
        lines.setdefault(_shown_at(reason), []).append(line)
    for entry in summary["stages"]:
        name = entry["stage"]
        table.add_row(name, str(entry["rows"]), "\n".join(lines.get(name, [])))
    plain_console().print(titled("LeaF, stage 1", table))
    show_sources(summary["sources"])
    for name, reasons in views_that_left(summary["left"]):
        say(f"{name} that left: {', '.join(reasons)}")
    for note, count in summary["notes"].items():
        say(f"note: {note.replace('_', ' ')}: {count}")
    show_notes(warnings)
    times = ", ".join(f"{name}{TIED}{value:.1f}" for name, value in summary["seconds"].items())
    say(f"seconds: {times}")


def show_notes(warnings: Iterable[str]) -> None:
    """Print what the reader should know before using a result, or before starting a run."""
    for warning in warnings:
        say(f"note: {warning}", style="yellow")


def show_left(examples: Sequence[Example]) -> None:
    """Print why rows left that no model was asked yet, most frequent first, with examples."""
    for name, stages in (("left", UNUSED), ("left at this level, if marked", ("detect",))):
        gone = [one for one in examples if one.outcome and one.outcome.stage in stages]
        if not gone:
            continue
        counts = Counter(one.outcome.reason for one in gone if one.outcome)
        listed = ", ".join(
            f"{count} {reason.replace('_', ' ')}" for reason, count in counts.most_common()
        )
        say(f"{name}: {listed}; {first_of_each(gone)}")


def first_of_each(gone: Sequence[Example]) -> str:
    """Name the first row that left for each reason, the most frequent ones first, and its detail.

    A few are named: the rest are in outcomes.parquet, and a reader sees what to look for.
    """
    counts = Counter(one.outcome.reason for one in gone if one.outcome)
    found = []
    for reason, _ in counts.most_common(REASONS_SHOWN):
        first = next(one for one in gone if one.outcome and one.outcome.reason == reason)
        found.append(f"row {first.row_id}: {first.outcome.detail if first.outcome else ''}")
    return "; ".join(found) + " (rows are counted from 0, without blank lines)"


def views_that_left(left: Iterable[Mapping[str, Any]]) -> Iterator[tuple[str, list[str]]]:
    """Yield the name of each level of rows, and how many of it left by themselves, and why."""
    counts = {name: Counter[str]() for name in VIEWS}
    for entry in left:
        if entry["unit"] in VIEWS:
            counts[entry["unit"]][entry["reason"].replace("_", " ")] += entry["count"]
    for name, reasons in counts.items():
        if reasons:
            yield VIEWS[name], [f"{count} {reason}" for reason, count in reasons.items()]


def show_sources(sources: Sequence[Mapping[str, Any]]) -> None:
    """Print how many marked rows a cut repairs: one line, or a table where rows have sources."""
    if not sources or not sources[0]["marked"]:
        return
    if not sources[0]["cuts"]:
        say(f"{NO_CUT} in any of {sources[0]['marked']} marked rows")
        return
    if len(sources) == 1:
        one = sources[0]
        text = f"cutting repairs {one['repaired']} of {one['marked']} marked rows, {_share(one)}"
        say(text)
        return
    table = light_table()
    table.add_column("source")
    for name in ("marked", "repaired", "share and 95 % interval", "accuracy before", "best cut"):
        table.add_column(name, justify="right")
    for one in sources:
        cells = ["", NO_CUT if one["marked"] else "", f"{one['before']:.1%}", ""]
        if one["cuts"]:
            accuracy = [f"{one[name]:.1%}" for name in ("before", "best_cut")]
            cells = [str(one["repaired"]), _share(one), *accuracy]
        table.add_row(one["source"], str(one["marked"]), *cells)
    plain_console().print(titled("Marked rows that a cut repairs", table))


def _share(line: Mapping[str, Any]) -> str:
    low, high = line["interval"]
    return f"{line['repaired_share']:.1%} ({low:.1%} to {high:.1%})"


def _shown_at(reason: Mapping[str, Any]) -> str:
    """Return the line of the table that is lower for this reason."""
    if reason["unit"] == "candidates":
        return KEPT
    return ROW_STAGES[reason["stage"]] or str(ROW_STAGES["render"])
