"""Reads an arm, and picks the rows that the page shows."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from leaf_distill.data.example import Example, Role
from leaf_distill.detection.config import TURNS
from leaf_distill.detection.levels import analyzed_turns
from leaf_distill.detection.output import SAMPLES, SEQUENCES
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

    A row has its `row_id`, its `group`, its right `answer`, and its `views`: the levels at which it
    was analyzed, each with the columns of samples.parquet and what `_prepare` adds.
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
    with reading(arm / "funnel.json"):
        turns = funnel["settings"]["turns"]
        if not TURNS.fullmatch(turns):
            raise ValueError(f"the turns {turns!r} have no meaning")
    path = arm / "samples.parquet"
    with reading(path):
        table = pq.read_table(path, page_checksum_verification=True)
        newer = [field for field in SEQUENCES if field.name in table.schema.names]
        wrong = [one.name for one in (*SAMPLES, *newer) if not _has(table.schema, one)]
        if wrong:
            raise ValueError(f"no or another type for the columns {', '.join(wrong)}")
        places: dict[int, list[int]] = {}
        for at, row_id in enumerate(table["row_id"].to_pylist()):
            places.setdefault(row_id, []).append(at)
        candidates = table["candidates"].to_pylist()
        groups = [_group([one for at in own for one in candidates[at]]) for own in places.values()]
    known = list(places)
    for row_id in row_ids or ():
        if row_id not in places:
            raise ValueError(
                f"row_ids (--row): must be of the {len(known)} scored rows in {path}, got {row_id};"
                " give others"
            )
    if row_ids is None:
        chosen = [known[index] for index in choose(groups, samples)]
    else:
        chosen = list(dict.fromkeys(row_ids))
    with reading(path):
        rows = [_row(table, places[row_id], turns) for row_id in chosen]
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


def _row(table: pa.Table, places: Sequence[int], turns: str) -> dict[str, Any]:
    """Return a row with the views that stand at some places of the table."""
    views = [_prepare(view, turns) for view in table.take(pa.array(places, pa.int64())).to_pylist()]
    first, candidates = views[0], [one for view in views for one in view["candidates"]]
    # A row without an answer is graded against its whole completion, which the page shows anyway.
    whole = first["text"] + first["completion"] if first["segment"] else first["completion"]
    return {
        "row_id": int(first["row_id"]),
        "group": _group(candidates),
        "answer": None if first["segment"] and first["answer"] == whole else first["answer"],
        "views": views,
        "candidates": candidates,
    }


def _prepare(view: dict[str, Any], turns: str) -> dict[str, Any]:
    """Add to a view its name, the models that were asked, tokens, and the other messages."""
    text = view["text"]
    if not isinstance(text, str) or not isinstance(view["completion"], str):
        raise TypeError(f"row {view['row_id']} has no text")
    for one in view["candidates"]:
        borders = (at for part in one["cut"] for at in part)
        one["inside_word"] = any(_inside_word(text, at) for at in borders)
    asked = _asked(view, *view["candidates"])
    columns = ("teacher_saliency", "student_saliency", "score")
    numbers = zip(*(map(_float, view[name]) for name in columns), strict=True)
    marked = zip(view["offsets"], numbers, view["confounder"], strict=True)
    analyzed, names = _messages(view, turns)
    return view | {
        "name": _name(int(view["segment"])),
        "asked": asked,
        "answered": bool(_asked(view)),
        "context": _context(_turns(view), analyzed),
        "names": names,
        "sequences": _sequences(view),
        "tokens": [
            Token(start, stop, teacher, student, score, bool(marks))
            for (start, stop), (teacher, student, score), marks in marked
        ],
        "spans": [(start, stop) for start, stop in view["spans"]],
    }


def _sequences(view: Mapping[str, Any]) -> list[tuple[str, list[dict[str, str]]]]:
    """Return who reads what, once where both read the same; runs of older versions lack it."""
    read = [(role, view.get(f"{role}_sequence") or []) for role in MODELS]
    (_, first), (_, second) = read
    return [one for one in (read[:1] if first == second else read) if one[1]]


def _name(segment: int) -> str:
    """Return the name of a level, which is the text that was analyzed."""
    if segment < 2:
        return "Response, segment 1" if segment else "Prompt"
    return f"Response, segments 1 to {segment}"


def _turns(view: Mapping[str, Any]) -> list[dict[str, Any]]:
    messages = view["messages"]
    return list(json.loads(messages) if isinstance(messages, str) else messages)


def _messages(view: Mapping[str, Any], turns: str) -> tuple[set[int], dict[int, str]]:
    """Return the indices of the analyzed messages, and their names by their first character.

    There are no names where the conversation has one user turn, or the response is analyzed.
    """
    if view["segment"]:
        return set(), {}
    messages = _turns(view)
    row = Example(int(view["row_id"]), tuple(messages), view["completion"])
    row.turns = analyzed_turns(row, turns)
    if row.text != view["text"]:
        raise ValueError(f"row {row.row_id} has a text that is not of its messages")
    users = [at for at, turn in enumerate(messages) if turn["role"] == "user"]
    if len(users) < 2:
        return set(row.places), {}
    starts = (start for start, _ in row.parts)
    names = (f"user turn {users.index(place) + 1}" for place in row.places)
    return set(row.places), dict(zip(starts, names, strict=True))


def _asked(*prompts: Mapping[str, Any]) -> list[Role]:
    """Return the models that answered any of some prompts."""
    of = ("answer", "verdict")
    return [
        role
        for role in MODELS
        if any(one[f"{role}_{name}"] is not None for one in prompts for name in of)
    ]


def _inside_word(text: str, at: int) -> bool:
    """Return whether a border between two characters splits a word or a number."""
    return 0 < at < len(text) and text[at - 1].isalnum() and text[at].isalnum()


def _context(messages: Sequence[dict[str, Any]], analyzed: set[int]) -> list[tuple[str, str]]:
    """Return role and text of the messages that are not analyzed; other keys follow as JSON."""
    context = []
    for at, turn in enumerate(messages):
        if at in analyzed:
            continue
        others = {name: value for name, value in turn.items() if value is not None}
        role, text = others.pop("role"), others.pop("content", "")
        if others:
            text = f"{text}\n{json.dumps(others, ensure_ascii=False)}".lstrip("\n")
        context.append((role, text))
    return context


def _float(value: float | None) -> float:
    return math.nan if value is None else value
