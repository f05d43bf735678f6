"""The files of an arm: the dataset for any trainer, and the samples for the report."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from leaf_distill.data.example import ROLES, Example, Message, Role
from leaf_distill.data.prompt import Renderer
from leaf_distill.data.ranges import in_messages
from leaf_distill.data.sequence import sequence
from leaf_distill.detection.spans import characters
from leaf_distill.io import write_bytes, write_table

MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
RANGES = pa.list_(pa.list_(pa.int64()))

SPANS = pa.list_(pa.struct([("message", pa.int64()), ("start", pa.int64()), ("stop", pa.int64())]))

DATASET = pa.schema(
    [
        ("row_id", pa.int64()),
        ("candidate_id", pa.int64()),
        ("parent_id", pa.int64()),
        ("branch", pa.string()),
        ("prompt", MESSAGES),
        ("completion", MESSAGES),
        ("teacher_prompt", MESSAGES),
        ("answer", pa.string()),
        ("spans", SPANS),
        ("inserted", pa.list_(pa.string())),
        ("context", pa.int64()),
        ("segment", pa.int64()),
        ("score", pa.float64()),
        ("accepted", pa.bool_()),
        ("reason", pa.string()),
        ("strategy", pa.string()),
        ("provenance", pa.string()),
        ("student_verdict", pa.string()),
    ]
)
ANSWERS = ("teacher_answer", "student_answer", "teacher_verdict")
CANDIDATES = pa.schema([*DATASET, *((name, pa.string()) for name in ANSWERS)])
CANDIDATE = pa.struct(
    [
        ("cut", RANGES),
        ("inserted", pa.list_(pa.string())),
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
        ("segment", pa.int64()),
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
PARTS = pa.list_(pa.struct([("kind", pa.string()), ("text", pa.string())]))
SEQUENCES = pa.schema([(f"{role}_sequence", PARTS) for role in ROLES])
"""Further columns of the samples, which those of older versions lack."""


def write_dataset(
    directory: Path, originals: Sequence[Example], provenance: str, *, cross: bool = False
) -> Path:
    """Write dataset and candidates, each as .parquet and .jsonl; return dataset.parquet.

    The dataset has each original, then its counterfactuals. The candidates are all changed prompts,
    those that were not accepted with the reason.

    Args:
        directory: where to.
        originals: the usable rows, with what was made of them.
        provenance: JSON text that says how the counterfactuals came about.
        cross: whether the student reads the whole prompt, and the teacher alone the changed one.
    """
    lines: list[dict[str, Any]] = []
    tried: list[dict[str, Any]] = []
    for original in originals:
        lines.append(_line(original))
        for view in original.views or (original,):
            for candidate in view.candidates:
                line = _line(candidate, view, provenance, cross=cross)
                lines += [line] if line["accepted"] else []
                tried.append(line | _answers(candidate))
    _write_lines(directory / "candidates", tried, CANDIDATES)
    return _write_lines(directory / "dataset", lines, DATASET)


def _write_lines(path: Path, lines: Sequence[dict[str, Any]], schema: pa.Schema) -> Path:
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    write_table(path.with_suffix(".parquet"), _table(lines, schema))
    write_bytes(path.with_suffix(".jsonl"), text.encode())
    return path.with_suffix(".parquet")


def _line(
    one: Example,
    parent: Example | None = None,
    provenance: str | None = None,
    *,
    cross: bool = False,
) -> dict[str, Any]:
    """Return a row of the dataset; a candidate's with the Example that it was made from."""
    reply = one.reply or {"role": "assistant", "content": one.prefix + one.completion}
    read = parent if parent is not None and cross else one
    branch = "original" if parent is None else "cross" if cross else "counterfactual"
    line: dict[str, Any] = {
        "row_id": one.row_id,
        "candidate_id": one.candidate_id,
        "parent_id": None if parent is None else parent.row_id,
        "branch": branch,
        "prompt": list(read.messages),
        "completion": [reply],
        "teacher_prompt": list(one.messages) if branch == "cross" else None,
        "answer": one.answer,
        "spans": [] if parent is None else in_messages(parent, one.cut),
        "inserted": list(one.inserted),
        "context": len(one.prefix),
        "segment": one.segment,
        "score": one.cut_score,
        "accepted": one.outcome is None or parent is None,
        "reason": one.outcome.reason if one.outcome and parent is not None else None,
        "strategy": one.strategy,
        "provenance": provenance,
        "student_verdict": _answers(one)["student_verdict"],
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
    if one.difficulty is not None:
        line["difficulty"] = one.difficulty
    return line


def _table(lines: Sequence[Mapping[str, Any]], schema: pa.Schema) -> pa.Table:
    """Return lines as a table of the schema, and of the further columns that some lines have."""
    columns = {}
    for name in dict.fromkeys([*schema.names, *(name for line in lines for name in line)]):
        kind = schema.field(name).type if name in schema.names else pa.string()
        values: list[Any] = [line.get(name) for line in lines]
        columns[name] = _messages(values) if kind == MESSAGES else pa.array(values, type=kind)
    return pa.table(columns)


def _messages(values: Sequence[Sequence[Message] | None]) -> pa.Array:
    """Return messages as structs; as JSON text if a value is no text, which structs would alter."""
    given = [turns for turns in values if turns is not None]
    names = dict.fromkeys(name for turns in given for message in turns for name in message)
    every = [value for turns in given for message in turns for value in message.values()]
    if not all(isinstance(value, str) for value in every):
        texts = [turns and json.dumps(turns, ensure_ascii=False) for turns in values]
        return pa.array(texts, pa.string())
    keys = dict.fromkeys(["role", "content", *names])
    return pa.array(values, type=pa.list_(pa.struct([(name, pa.string()) for name in keys])))


def write_samples(
    directory: Path, scored: Sequence[Example], renderers: Mapping[Role, Renderer]
) -> Path:
    """Write samples.parquet: a row for each scored row or view of one, with what was measured.

    The renderers give it what each model read.
    """
    path = directory / "samples.parquet"
    lines = [_sample(one) | _sequences(one, renderers) for one in scored]
    write_table(path, _table(lines, pa.schema([*SAMPLES, *SEQUENCES])))
    return path


def _sequences(example: Example, renderers: Mapping[Role, Renderer]) -> dict[str, Any]:
    return {
        f"{role}_sequence": [part._asdict() for part in sequence(renderer, example)]
        for role, renderer in renderers.items()
    }


def _sample(example: Example) -> dict[str, Any]:
    assert example.offsets is not None
    assert example.prunable is not None
    assert example.score is not None and example.confounder is not None
    return {
        "row_id": example.row_id,
        "segment": example.segment,
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
        "inserted": list(candidate.inserted),
        **_answers(candidate),
        "kept": candidate.outcome is None,
        "reason": candidate.outcome.reason if candidate.outcome else None,
    }


def _answers(example: Example) -> dict[str, str | None]:
    given = {role: example.answers.get(role) for role in ROLES}
    texts = {f"{role}_answer": one.text if one else None for role, one in given.items()}
    verdicts = {f"{role}_verdict": one.verdict if one else None for role, one in given.items()}
    return texts | verdicts
