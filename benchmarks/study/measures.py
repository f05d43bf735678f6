"""Measures of scores on known distractors, with errors over templates and students."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from problems import NUMBER, value

Mask = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float64]
Estimate = tuple[float, float]
"""An estimate, and its standard error."""


@dataclass(frozen=True)
class Row:
    """The prunable tokens of a problem that one student was scored on.

    Attributes:
        student: whose scores they are.
        problem: its name; the same problem may be a row of several students.
        template: the problem's template.
        planted, number: bool [n]: the token is in a distractor; it has a digit.
        phrase: int [n], the phrase that each token is in.
        planted_phrase: bool [p]: at least half of the phrase's tokens are in a distractor.
        suspicion: float64 [n] by score, high for a distractor.
    """

    student: int
    problem: str
    template: str
    planted: Mask
    number: Mask
    phrase: npt.NDArray[np.int64]
    planted_phrase: Mask
    suspicion: dict[str, Floats]


def as_json(row: Row) -> dict[str, Any]:
    """Return a row as JSON has it."""
    return {
        "problem": row.problem,
        "template": row.template,
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
        row["template"],
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


def aucs(rows: Sequence[Row], name: str, *, numbers: bool = False) -> Floats:
    """Return the chance that a token of a distractor is more suspicious than another one of a row.

    Ties count half. NaN in a row without both kinds of tokens.
    """
    return np.array([_auc(row, name, row.number | (not numbers)) for row in rows])


def _auc(row: Row, name: str, keep: Mask) -> float:
    values, truth = row.suspicion[name][keep], row.planted[keep]
    if truth.all() or not truth.any():
        return np.nan
    above = values[truth][:, None] - values[~truth][None]
    return float((above > 0).mean() + (above == 0).mean() / 2)


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


def mean(values: Floats, rows: Sequence[Any], *, draws: int = 1000) -> Estimate | None:
    """Return the mean of a value of each row, without those that are NaN; None if all are.

    Its error counts that other students and other templates would give other values: the variance
    is V_student n / (n - 1) + V_template - V_row of bootstraps that draw n students, templates or
    rows with replacement, and is at least the largest of the last two. With one student it counts
    templates alone.

    Args:
        values: [n].
        rows: each with `student` and `template`.
        draws: of each bootstrap.
    """
    known = np.isfinite(values)
    if not known.any():
        return None
    kept, values = [row for row, one in zip(rows, known, strict=True) if one], values[known]
    places = [
        np.unique([row.student for row in kept], return_inverse=True)[1],
        np.unique([row.template for row in kept], return_inverse=True)[1],
        np.arange(len(kept)),
    ]
    student, template, row = (_variance(values, place, draws) for place in places)
    students = int(places[0].max()) + 1
    whole = template if students == 1 else student * students / (students - 1) + template - row
    return float(values.mean()), float(np.sqrt(max(whole, template, row)))


def _variance(values: Floats, place: npt.NDArray[np.int64], draws: int) -> float:
    """Return the variance of the mean where groups of rows are drawn with replacement."""
    count = int(place.max()) + 1
    sums, sizes = np.bincount(place, values), np.bincount(place)
    weights = np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), size=draws)
    return float(np.var((weights @ sums) / (weights @ sizes)))
