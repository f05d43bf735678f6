"""Tables in Markdown, and the numbers in them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
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


def with_error(values: Sequence[float], *, sign: bool = False) -> str:
    """Return the mean of values of students in percent, with its standard error."""
    if not values:
        return ""
    mean, error = f"{100 * np.mean(values):{'+' if sign else ''}.1f}", standard_error(values)
    return mean if error is None else f"{mean} ± {100 * error:.1f}"


def standard_error(values: Sequence[float]) -> float | None:
    """Return the standard error of the mean of at least two values."""
    return float(np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else None


def estimate(found: Mapping[int, float]) -> Estimate:
    """Return the mean of a share by student, with two standard errors on each side."""
    values = [*found.values()]
    mean, error = float(np.mean(values)), standard_error(values) or 0.0
    return Estimate(mean, max(mean - 2 * error, 0.0), min(mean + 2 * error, 1.0))


def estimates(values: Sequence[Interval | None]) -> list[Estimate | None]:
    """Return intervals as a chart takes them."""
    return [None if one is None else Estimate(*one) for one in values]
