"""Reads an arm, and picks the rows that the page shows."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from leaf_distill.data.example import Role
from leaf_distill.detection.output import SAMPLES
from leaf_distill.io import read_json, reading
from leaf_distill.report.heat import Token

MODELS: tuple[Role, ...] = ("teacher", "student")
"""The order of the two on the page."""

Group = Literal["kept", "rejected", "none"]
GROUPS: tuple[Group, ...] = ("kept", "rejected", "none")
"""Rows with a kept counterfactual, with rejected ones only, and without any."""


@dataclass(frozen=True)
class Run:
    """An arm: its funnel, its models' names, the chosen rows, and how many there are.

    A row has the columns of samples.parquet, and what `_prepare` adds.
    """

    funnel: dict[str, Any]
    models: dict[str, str]
    rows: list[dict[str, Any]]
    totals: dict[Group, int]


def read_run(arm: Path, *, samples: int, row_ids: Sequence[int] | None) -> Run:
    """Read an arm, and of its rows the first `samples` in the order of the page, or `row_ids`.

    Raises:
        ValueError: a file cannot be read or has another shape, or a row is not there.
    """
    funnel, run = read_json(arm / "funnel.json"), read_json(arm.parent.parent / "run.json")
    with reading(arm.parent.parent / "run.json"):
        models = {str(role): str(run[role]["name"]) for role in MODELS}
    path = arm / "samples.parquet"
    with reading(path):
        table = pq.read_table(path, page_checksum_verification=True)
        wrong = [field.name for field in SAMPLES if not _has(table.schema, field)]
        if wrong:
            raise ValueError(f"no or another type for the columns {', '.join(wrong)}")
        row_of = {row_id: at for at, row_id in enumerate(table["row_id"].to_pylist())}
        groups = [_group(candidates) for candidates in table["candidates"].to_pylist()]
    for row_id in row_ids or ():
        if row_id not in row_of:
            raise ValueError(
                f"row_ids: must be of the {len(row_of)} scored rows in {path}, got {row_id}; give "
                "others"
            )
    if row_ids is None:
        chosen = choose(groups, samples)
    else:
        chosen = [row_of[row_id] for row_id in dict.fromkeys(row_ids)]
    with reading(path):
        rows = [_prepare(row) for row in table.take(pa.array(chosen, pa.int64())).to_pylist()]
    return Run(funnel, models, rows, {group: groups.count(group) for group in GROUPS})


def _has(schema: pa.Schema, field: pa.Field) -> bool:
    if field.name not in schema.names:
        return False
    kind = schema.field(field.name).type
    if field.name == "messages":  # with more than role and content it has a type of its own
        return bool(pa.types.is_list(kind) or pa.types.is_string(kind))
    return bool(kind == field.type)


def choose(groups: Sequence[Group], count: int) -> list[int]:
    """Return positions of `count` rows: kept first, then rejected, then those without a candidate.

    A quarter of the places is held for rejected rows, so that a long run shows its failures too.
    """
    kept, rejected, none = ([i for i, one in enumerate(groups) if one == want] for want in GROUPS)
    held = min(len(rejected), count // 4)
    head = kept[: count - held]
    return (head + rejected[: count - len(head)] + none)[:count]


def _group(candidates: Sequence[dict[str, Any]]) -> Group:
    if not candidates:
        return "none"
    return "kept" if any(one["kept"] for one in candidates) else "rejected"


def _prepare(row: dict[str, Any]) -> dict[str, Any]:
    """Add to a row its group, the models that were asked, tokens, and the earlier messages."""
    text = row["text"]
    if not isinstance(text, str) or not isinstance(row["completion"], str):
        raise TypeError(f"row {row['row_id']} has no text")
    for one in row["candidates"]:
        borders = (at for part in one["cut"] for at in part)
        one["inside_word"] = any(_inside_word(text, at) for at in borders)
    prompts = (row, *row["candidates"])
    columns = ("teacher_saliency", "student_saliency", "score")
    numbers = zip(*(map(_float, row[name]) for name in columns), strict=True)
    marked = zip(row["offsets"], numbers, row["confounder"], strict=True)
    return row | {
        "row_id": int(row["row_id"]),
        "group": _group(row["candidates"]),
        "asked": [
            role
            for role in MODELS
            if any(one[f"{role}_{of}"] is not None for one in prompts for of in _REPLY)
        ],
        "context": _context(row["messages"]),
        "tokens": [
            Token(start, stop, teacher, student, score, bool(marks))
            for (start, stop), (teacher, student, score), marks in marked
        ],
        "spans": [(start, stop) for start, stop in row["spans"]],
    }


_REPLY = ("answer", "verdict")


def _inside_word(text: str, at: int) -> bool:
    """Return whether a border between two characters splits a word or a number."""
    return 0 < at < len(text) and text[at - 1].isalnum() and text[at].isalnum()


def _context(messages: Any) -> list[tuple[str, str]]:
    """Return role and text of all messages but the last; other keys follow the text as JSON."""
    context = []
    for turn in (json.loads(messages) if isinstance(messages, str) else messages)[:-1]:
        others = {name: value for name, value in turn.items() if value is not None}
        role, text = others.pop("role"), others.pop("content", "")
        if others:
            text = f"{text}\n{json.dumps(others, ensure_ascii=False)}".lstrip("\n")
        context.append((role, text))
    return context


def _float(value: float | None) -> float:
    return math.nan if value is None else value
