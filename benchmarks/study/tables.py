"""Tables in Markdown, and the numbers in them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from measures import Estimate

from leaf_distill.evaluation import sheets

TITLES = {
    "B": "PROBLEMATHIC, simple problems",
    "C": "simple",
    "complex": "PROBLEMATHIC, complex problems",
    "gsm8k": "GSM8K with an inserted sentence",
}


@dataclass(frozen=True)
class Line:
    """The values of an arm on one problem of one student."""

    student: int
    template: str
    values: Mapping[str, Any]


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Return a table; all columns but the first are numbers."""
    marks = "|".join(["---", *["---:"] * (len(head) - 1)])
    rows = [f"| {' | '.join(line)} |" for line in (head, *lines)]
    return "\n".join([rows[0], f"|{marks}|", *rows[1:]])


def shown(value: Estimate | None, *, sign: bool = False) -> str:
    """Return a share in percent with its standard error, nothing where there is none."""
    if value is None:
        return ""
    return f"{100 * value[0]:{'+' if sign else ''}.1f} ± {100 * value[1]:.1f}"


def is_above(value: Estimate | None, *, errors: float) -> bool:
    """Return whether a difference is so many standard errors above 0."""
    return value is not None and value[0] > 0 and value[0] >= errors * value[1]


def bars(values: Sequence[Estimate | None]) -> list[sheets.Estimate | None]:
    """Return values with two errors on each side, as a chart takes them."""
    return [
        None
        if one is None
        else sheets.Estimate(one[0], max(one[0] - 2 * one[1], 0), min(one[0] + 2 * one[1], 1))
        for one in values
    ]
