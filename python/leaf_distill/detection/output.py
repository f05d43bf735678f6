"""The files of an arm: the dataset for any trainer, and the samples for the report."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from leaf_distill.data.example import ROLES, Example, Message
from leaf_distill.detection.spans import characters
from leaf_distill.io import write_bytes, write_table

MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
RANGES = pa.list_(pa.list_(pa.int64()))

DATASET = pa.schema(
    [
        ("row_id", pa.int64()),
        ("candidate_id", pa.int64()),
        ("branch", pa.string()),
        ("prompt", MESSAGES),
        ("completion", MESSAGES),
        ("answer", pa.string()),
        ("cut", RANGES),
        ("strategy", pa.string()),
    ]
)
CANDIDATE = pa.struct(
    [
        ("cut", RANGES),
        ("teacher_answer", pa.string()),
        ("student_answer", pa.string()),
        ("teacher_verdict", pa.string()),
        ("student_verdict", pa.string()),
        ("kept", pa.bool_()),
        ("reason", pa.string()),
    ]
)
SAMPLES = pa.schema(
    [
        ("row_id", pa.int64()),
        ("messages", MESSAGES),
        ("text", pa.string()),
        ("completion", pa.string()),
        ("answer", pa.string()),
        ("offsets", RANGES),
        ("prunable", pa.list_(pa.bool_())),
        ("teacher_nll", pa.float32()),
        ("student_nll", pa.float32()),
        ("teacher_saliency", pa.list_(pa.float32())),
        ("student_saliency", pa.list_(pa.float32())),
        ("score", pa.list_(pa.float32())),
        ("confounder", pa.list_(pa.bool_())),
        ("spans", RANGES),
        ("teacher_answer", pa.string()),
        ("student_answer", pa.string()),
        ("teacher_verdict", pa.string()),
        ("student_verdict", pa.string()),
        ("candidates", pa.list_(CANDIDATE)),
    ]
)


def write_dataset(directory: Path, originals: Sequence[Example]) -> Path:
    """Write dataset.parquet and dataset.jsonl: each original, then its counterfactuals."""
    lines = [line for example in originals for line in _lines(example)]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    path = directory / "dataset.parquet"
    write_table(path, _table(lines, DATASET))
    write_bytes(directory / "dataset.jsonl", text.encode())
    return path


def _lines(example: Example) -> Iterator[dict[str, Any]]:
    for one in (example, *(part for part in example.candidates if part.outcome is None)):
        line: dict[str, Any] = {
            "row_id": one.row_id,
            "candidate_id": one.candidate_id,
            "branch": one.branch,
            "prompt": list(one.messages),
            "completion": [one.reply or {"role": "assistant", "content": one.completion}],
            "answer": one.answer,
            "cut": [list(part) for part in one.cut],
            "strategy": one.strategy,
        }
        kwargs = dict(one.template_kwargs)
        if tools := kwargs.pop("tools", None):
            line["tools"] = json.dumps(tools, ensure_ascii=False)
        if kwargs:
            line["chat_template_kwargs"] = json.dumps(kwargs, ensure_ascii=False)
        if one.tests is not None:
            line["tests"] = one.tests.to_json()
        if one.source is not None:
            line["source"] = one.source
        yield line


def _table(lines: Sequence[dict[str, Any]], schema: pa.Schema) -> pa.Table:
    """Return lines as a table of the schema, and of the further columns that some lines have."""
    columns = {}
    for name in dict.fromkeys([*schema.names, *(name for line in lines for name in line)]):
        kind = schema.field(name).type if name in schema.names else pa.string()
        values: list[Any] = [line.get(name) for line in lines]
        columns[name] = _messages(values) if kind == MESSAGES else pa.array(values, type=kind)
    return pa.table(columns)


def _messages(values: Sequence[Sequence[Message]]) -> pa.Array:
    """Return messages as structs; as JSON text if a value is no text, which structs would alter."""
    names = dict.fromkeys(name for turns in values for message in turns for name in message)
    every = [value for turns in values for message in turns for value in message.values()]
    if not all(isinstance(value, str) for value in every):
        return pa.array([json.dumps(turns, ensure_ascii=False) for turns in values], pa.string())
    keys = dict.fromkeys(["role", "content", *names])
    return pa.array(values, type=pa.list_(pa.struct([(name, pa.string()) for name in keys])))


def write_samples(directory: Path, scored: Sequence[Example]) -> Path:
    """Write samples.parquet: one row for each scored row, with everything that was measured."""
    path = directory / "samples.parquet"
    write_table(path, _table([_sample(example) for example in scored], SAMPLES))
    return path


def _sample(example: Example) -> dict[str, Any]:
    assert example.offsets is not None
    assert example.prunable is not None
    assert example.score is not None and example.confounder is not None
    return {
        "row_id": example.row_id,
        "messages": list(example.messages),
        "text": example.text,
        "completion": example.completion,
        "answer": example.answer,
        "offsets": example.offsets.tolist(),
        "prunable": example.prunable.tolist(),
        **{f"{role}_nll": np.float32(example.nll[role]) for role in ROLES},
        **{f"{role}_saliency": example.saliency[role] for role in ROLES},
        "score": example.score,
        "confounder": example.confounder.tolist(),
        "spans": [list(characters(example, span)) for span in example.spans],
        **_answers(example),
        "candidates": [_candidate(one) for one in example.candidates],
    }


def _candidate(candidate: Example) -> dict[str, Any]:
    return {
        "cut": [list(part) for part in candidate.cut],
        **_answers(candidate),
        "kept": candidate.outcome is None,
        "reason": candidate.outcome.reason if candidate.outcome else None,
    }


def _answers(example: Example) -> dict[str, str | None]:
    given = {role: example.answers.get(role) for role in ROLES}
    texts = {f"{role}_answer": one.text if one else None for role, one in given.items()}
    verdicts = {f"{role}_verdict": one.verdict if one else None for role, one in given.items()}
    return texts | verdicts
