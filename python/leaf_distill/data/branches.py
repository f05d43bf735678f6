"""Reads the columns by which the dataset of `leaf detect` tells a counterfactual's original."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Sequence
from numbers import Number
from typing import Any, get_args

from leaf_distill.data.example import Branch, Example, Range
from leaf_distill.data.source import Record


def plain(value: Any) -> Any:
    """Return a value as Python's own types, or None if it is a NaN."""
    if hasattr(value, "tolist"):  # of numpy, as pandas hands on a list
        value = value.tolist()
    missing = isinstance(value, Number) and value != value  # Decimal and numpy have a NaN too
    return None if missing else value


def read_branches(examples: Sequence[Example], records: Sequence[Record]) -> None:
    """Fill in which original each row belongs to, and the cut that made a counterfactual.

    A column `branch` with other values than those of `leaf detect` is left alone.
    """
    values = [record.get("branch") for record in records]
    if not any(values) or any(value not in (None, *get_args(Branch)) for value in values):
        return
    seen: Counter[int] = Counter()
    for position, (example, record) in enumerate(zip(examples, records, strict=True)):
        example.row_id = _integer(record, "row_id", position, position)
        if record.get("branch") != "counterfactual":
            continue
        given = _integer(record, "candidate_id", position, -1)
        example.candidate_id = given if given >= 0 else seen[example.row_id]
        seen[example.row_id] += 1
        example.strategy = _strategy(record.get("strategy"), position)
        example.cut = _cut(record.get("cut"), position)


def _integer(record: Record, name: str, position: int, missing: int) -> int:
    value = plain(record.get(name))
    if value is None:
        return missing
    with contextlib.suppress(TypeError, ValueError, OverflowError):
        if int(value) == value and abs(value) < 2**63:
            return int(value)
    raise ValueError(
        f"dataset: row {position}: {name}: must be a whole number of 64 bits, got {value!r:.60}; "
        "rename the column `branch` if it is not that of `leaf detect`"
    )


def _strategy(value: Any, position: int) -> str | None:
    if value is not None and not (isinstance(value, str) and value.isprintable()):
        raise ValueError(
            f"dataset: row {position}: strategy: must be the name of one, got {value!r:.60}"
        )
    return value


def _cut(value: Any, position: int) -> tuple[Range, ...]:
    try:
        cut = tuple((int(start), int(stop)) for start, stop in value or ())
        if not all(0 <= start < stop < 2**63 for start, stop in cut):
            raise ValueError("no range of characters")
        return cut
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(
            f"dataset: row {position}: cut: must be pairs of characters, start before stop, got "
            f"{value!r:.60}"
        ) from error
