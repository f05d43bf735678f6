"""Measures of scores on known distractors, with intervals over problems and students."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from problems import NUMBER, value

Mask = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float64]
Interval = tuple[float, float, float]
"""An estimate, and its 95 % interval of a bootstrap."""


@dataclass(frozen=True)
class Row:
    """The prunable tokens of a problem that one student was scored on.

    Attributes:
        student: whose scores they are.
        problem: its name; the same problem may be a row of several students.
        planted, number: bool [n]: the token is in a distractor; it has a digit.
        phrase: int [n], the phrase that each token is in.
        planted_phrase: bool [p]: at least half of the phrase's tokens are in a distractor.
        suspicion: float64 [n] by score, high for a distractor.
    """

    student: int
    problem: str
    planted: Mask
    number: Mask
    phrase: npt.NDArray[np.int64]
    planted_phrase: Mask
    suspicion: dict[str, Floats]


def as_json(row: Row) -> dict[str, Any]:
    """Return a row as JSON has it."""
    return {
        "problem": row.problem,
        "planted": row.planted.tolist(),
        "number": row.number.tolist(),
        "phrase": row.phrase.tolist(),
        "planted_phrase": row.planted_phrase.tolist(),
        "suspicion": {name: values.tolist() for name, values in row.suspicion.items()},
    }


def from_json(student: int, row: dict[str, Any]) -> Row:
    """Return what `as_json` was given."""
    return Row(
        student,
        row["problem"],
        np.array(row["planted"], dtype=np.bool_),
        np.array(row["number"], dtype=np.bool_),
        np.array(row["phrase"], dtype=np.int64),
        np.array(row["planted_phrase"], dtype=np.bool_),
        {name: np.array(values, dtype=np.float64) for name, values in row["suspicion"].items()},
    )


def unmentioned(
    text: str, offsets: npt.NDArray[np.int64] | Sequence[Sequence[int]], label: str
) -> Floats:
    """Return 1 on the tokens of numbers that the label lacks, -1 on those that it has, else 0."""
    known = {value(number) for number in NUMBER.findall(label)}
    spans = np.asarray(offsets)
    values = np.zeros(len(spans))
    for match in NUMBER.finditer(text):
        inside = (spans[:, 0] < match.end()) & (match.start() < spans[:, 1])
        values[inside] = -1.0 if value(match.group()) in known else 1.0
    return values


def auc(
    rows: Sequence[Row], name: str, *, numbers: bool = False, draws: int = 1000
) -> Interval | None:
    """Return the chance that a token of a distractor is more suspicious than another one.

    Tokens of all rows together; ties count half. None where there are not both kinds of tokens.
    """
    keep = [row.number if numbers else np.ones_like(row.number) for row in rows]
    if not any(one.any() for one in keep):
        return None
    owner = np.repeat(np.arange(len(rows)), [int(one.sum()) for one in keep])
    values = np.concatenate([row.suspicion[name][one] for row, one in zip(rows, keep, strict=True)])
    truth = np.concatenate([row.planted[one] for row, one in zip(rows, keep, strict=True)])
    if truth.all() or not truth.any():
        return None
    _, place = np.unique(values, return_inverse=True)
    size = int(place.max()) + 1

    def once(weights: Floats) -> float:
        weight = weights[owner]
        true = np.bincount(place, weight * truth, minlength=size)
        false = np.bincount(place, weight * ~truth, minlength=size)
        pairs = true.sum() * false.sum()
        return float(true @ (np.cumsum(false) - false / 2) / pairs) if pairs else np.nan

    return interval(once, rows, draws=draws)


def first_phrases(rows: Sequence[Row], name: str) -> Floats:
    """Return whether the phrase with the highest mean score is a distractor, of each row.

    Phrases that tie share the first place. NaN in a row without a distractor's phrase, or with no
    other one.
    """
    return np.array([_first_phrase(row, name) for row in rows])


def _first_phrase(row: Row, name: str) -> float:
    if row.planted_phrase.all() or not row.planted_phrase.any():
        return np.nan
    count = len(row.planted_phrase)
    sizes = np.bincount(row.phrase, minlength=count)
    sums = np.bincount(row.phrase, row.suspicion[name], minlength=count)
    means = np.where(sizes > 0, sums / np.maximum(sizes, 1), -np.inf)
    first = means >= means.max() - 1e-12
    return float(row.planted_phrase[first].mean())


def share(values: Floats, rows: Sequence[Any], *, draws: int = 1000) -> Interval | None:
    """Return the mean of a value of each row, without those that are NaN; None if all are."""
    kept = np.isfinite(values)
    if not kept.any():
        return None
    filled = np.where(kept, values, 0.0)

    def once(weights: Floats) -> float:
        total = weights @ kept
        return float(weights @ filled / total) if total else np.nan

    return interval(once, rows, draws=draws)


def interval(
    once: Callable[[Floats], float], rows: Sequence[Any], *, draws: int = 1000, seed: int = 0
) -> Interval:
    """Return a statistic of weighted rows, with its interval.

    Problems and students are drawn with replacement, independently; a row's weight is the product
    of how often its two were drawn. With one student the interval is over problems alone.

    Args:
        once: the statistic, for a weight of each row.
        rows: each with `student` and `problem`.
        draws, seed: of the bootstrap.
    """
    random = np.random.default_rng(seed)
    places = [np.unique([getattr(row, of) for row in rows], return_inverse=True)[1].ravel()
              for of in ("student", "problem")]  # fmt: skip
    found = []
    for _ in range(draws):
        weights = np.ones(len(rows))
        for place in places:
            count = int(place.max()) + 1
            weights *= random.multinomial(count, np.full(count, 1 / count))[place]
        found.append(once(weights) if weights.any() else np.nan)
    low, high = np.nanquantile(found, (0.025, 0.975))
    return once(np.ones(len(rows))), float(low), float(high)
