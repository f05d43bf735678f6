"""Tables of numbers with intervals, as Markdown, CSV, JSON and on the screen."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from rich.console import Group
from rich.text import Text

from leaf_distill.statistics import bootstrap, paired_bootstrap, wilson_interval
from leaf_distill.terminal import light_table, titled

LONGEST = 12
"""Characters of a name that a table of the terminal has room for."""


class Estimate(NamedTuple):
    """A mean with the ends of its 95 % interval."""

    mean: float
    low: float
    high: float


Value = str | int | Estimate | None


@dataclass(frozen=True)
class Sheet:
    """A table: lines with the same keys, which are the heads of the columns.

    Attributes:
        name: of its CSV file.
        title: above it.
        lines: text, counts and estimates; None where there is nothing to say.
        note: below it: what the columns mean, and what they do not show.
        percent: whether estimates are shares, shown in percent.
        detail: columns that the terminal has no room for; of groups of rows it shows all together.
    """

    name: str
    title: str
    lines: Sequence[Mapping[str, Value]]
    note: str = ""
    percent: bool = True
    detail: tuple[str, ...] = ()


def estimated_difference(first: Sequence[float], second: Sequence[float]) -> Estimate | None:
    """Return the mean of second less first, paired by row, with its bootstrap interval."""
    if not first:
        return None
    return Estimate(*paired_bootstrap(np.asarray(first), np.asarray(second)))


def estimate(values: Sequence[float]) -> Estimate | None:
    """Return the mean of a value for each row, with its 95 % interval; None without rows.

    Wilson's interval where each value is 0 or 1, else that of a bootstrap over the rows.
    """
    if not values:
        return None
    if set(values) <= {0, 1}:
        right = int(sum(values))
        return Estimate(right / len(values), *wilson_interval(right, len(values)))
    return Estimate(*bootstrap([np.asarray(values, dtype=np.float64)]))


def shown(sheet: Sheet) -> list[tuple[str, ...]]:
    """Return the head and the lines of a sheet as text."""
    if not sheet.lines:
        return []
    heads = list(sheet.lines[0])
    rows = [tuple(_text(head, line[head], sheet) for head in heads) for line in sheet.lines]
    return [tuple(heads), *rows]


def _text(head: str, value: Value, sheet: Sheet, *, short: bool = False) -> str:
    if value is None:
        return ""
    if not isinstance(value, Estimate):
        return f"{value:,}" if isinstance(value, int) else value
    sign = "+" if "difference" in head else ""
    scale, digits = (100, 1) if sheet.percent else (1, 3)
    digits -= short
    mean, low, high = (f"{scale * number:{sign}.{digits}f}" for number in value)
    return f"{mean} ({low} to {high})"


def printed(sheet: Sheet, names: Mapping[str, str] | None = None, *, width: int = 80) -> Group:
    """Return a sheet as a table for the terminal: short numbers, without details and groups.

    Args:
        sheet: the table.
        names: short names for texts that a line has no room for.
        width: of the terminal; where words have room in it, no line ends inside one.
    """
    lines = [line for line in sheet.lines if line.get("group", "all") == "all"]
    told = [head for head in lines[0] if any(line[head] is not None for line in lines)]
    heads = [head for head in told if head not in sheet.detail]
    short = names or {}
    cells = [[_text(head, line[head], sheet, short=True) for line in lines] for head in heads]
    cells = [[short.get(text, text) for text in column] for column in cells]
    texts = [isinstance(lines[0][head], str) for head in heads]
    if sum(max(map(len, (head, *one))) + 2 for head, one in zip(heads, cells, strict=True)) > width:
        cells = [[text.replace(" (", "\n(") for text in column] for column in cells]
    # No line ends in a text by itself.
    titles = [
        head.replace(" ", "\n") if text else head for head, text in zip(heads, texts, strict=True)
    ]
    widths = _widths(
        [
            [line for text in (title, *column) for line in text.split("\n")]
            for title, column in zip(titles, cells, strict=True)
        ],
        texts,
        width,
    )
    table = light_table()
    for at, title in enumerate(titles):
        justify: Literal["left", "right"] = "right" if at and not texts[at] else "left"
        table.add_column(
            title, justify=justify, overflow="fold", no_wrap=texts[at], width=widths[at]
        )
    for row in zip(*cells, strict=True):
        table.add_row(*map(Text, row))
    return titled(sheet.title, table)


def _widths(
    columns: Sequence[Sequence[str]], whole: Sequence[bool], width: int
) -> Sequence[int | None]:
    """Return the widths at which columns keep their words whole; None where there is no room."""
    longest = [max(map(len, column)) for column in columns]
    widths = [
        most if fixed else max(len(word) for text in column for word in [*text.split(), ""])
        for column, most, fixed in zip(columns, longest, whole, strict=True)
    ]
    left = width - sum(widths) - 2 * (len(widths) - 1)  # two blanks between columns
    if left < 0:
        return [None] * len(widths)
    for at, most in enumerate(longest):
        more = min(most - widths[at], left)
        widths[at], left = widths[at] + more, left - more
    return widths


def short_names(names: Sequence[str]) -> dict[str, str]:
    """Return letters for names of which some is too long for a table, else nothing."""
    if max(map(len, names), default=0) <= LONGEST:
        return {}
    return {name: chr(ord("A") + at) for at, name in enumerate(names)} if len(names) <= 26 else {}


def as_csv(sheet: Sheet) -> str:
    """Return a sheet as CSV: an estimate has three columns, two of them its interval's ends."""
    text = io.StringIO()
    lines = [_flat(line) for line in sheet.lines]
    names = list(dict.fromkeys(name for line in lines for name in line))
    writer = csv.DictWriter(text, names, lineterminator="\n", restval="")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def as_json(sheet: Sheet) -> dict[str, Any]:
    """Return a sheet as JSON can hold it."""
    lines = [_flat(line) for line in sheet.lines]
    return {"title": sheet.title, "note": sheet.note, "lines": lines}


def _flat(line: Mapping[str, Value]) -> dict[str, str | int | float | None]:
    flat: dict[str, str | int | float | None] = {}
    for name, value in line.items():
        if isinstance(value, Estimate):
            flat |= {name: value.mean, f"{name} low": value.low, f"{name} high": value.high}
        else:
            flat[name] = value
    return flat
