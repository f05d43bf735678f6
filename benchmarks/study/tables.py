"""Tables in Markdown, and the numbers in them."""

from __future__ import annotations

from collections.abc import Sequence

from measures import Interval

from leaf_distill.evaluation.sheets import Estimate


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Return a table; all columns but the first are numbers."""
    marks = "|".join(["---", *["---:"] * (len(head) - 1)])
    rows = [f"| {' | '.join(line)} |" for line in (head, *lines)]
    return "\n".join([rows[0], f"|{marks}|", *rows[1:]])


def short(number: float) -> str:
    """Return a share without its leading zero."""
    return f"{number:.2f}".replace("0.", ".", 1)


def shown(value: Interval | None) -> str:
    """Return a share with its interval, nothing where there is none."""
    if value is None:
        return ""
    mean, low, high = map(short, value)
    return f"{mean} ({low} to {high})"


def signed(value: Interval | None) -> str:
    """Return a difference with its interval."""
    return "" if value is None else "{:+.2f} ({:+.2f} to {:+.2f})".format(*value)


def percent(value: Interval | None, *, sign: bool = False) -> str:
    """Return a share in percent with its standard error."""
    if value is None:
        return ""
    return f"{100 * value[0]:{'+' if sign else ''}.1f} ± {100 * standard_error(value):.1f}"


def standard_error(value: Interval) -> float:
    """Return the standard error of which the width of an interval is 3.92."""
    return (value[2] - value[1]) / 3.92


def is_above(value: Interval | None, *, errors: float) -> bool:
    """Return whether a difference is so many standard errors above 0."""
    return value is not None and value[0] > 0 and value[0] >= errors * standard_error(value)


def estimates(values: Sequence[Interval | None]) -> list[Estimate | None]:
    """Return intervals as a chart takes them."""
    return [None if one is None else Estimate(*one) for one in values]
