"""The results of stage 1 on disk: the dataset for any trainer, and the samples for the report."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from leaf_distill.data.dataset import Row
from leaf_distill.detection.counterfactual import cut
from leaf_distill.detection.search import RANGES, cut_messages
from leaf_distill.detection.steps import Answered
from leaf_distill.io import write_bytes, write_table

MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))

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
        ("user_text", pa.string()),
        ("completion", pa.string()),
        ("answer", pa.string()),
        ("offsets", RANGES),
        ("prunable", pa.list_(pa.bool_())),
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

Answers = Mapping[str, Mapping[int, Answered]]
"""For each role its answers, by row or by candidate number."""


@dataclass(frozen=True)
class CandidateFate:
    """One proposed cut, what the models made of it, and why it was dropped (None: kept)."""

    row_id: int
    candidate_id: int
    cut: Sequence[Sequence[int]]
    teacher: Answered | None
    student: Answered | None
    reason: str | None


def write_dataset(
    directory: Path,
    rows: Sequence[Row],
    completions: Mapping[int, str],
    fates: Mapping[int, Sequence[CandidateFate]],
    strategy: str,
) -> Path:
    """Write dataset.parquet and dataset.jsonl: each original, followed by its counterfactuals."""
    lines = [line for row in rows for line in _lines(row, completions, fates, strategy)]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    path = directory / "dataset.parquet"
    write_table(path, pa.Table.from_pylist(lines, schema=DATASET))
    write_bytes(directory / "dataset.jsonl", text.encode())
    return path


def _lines(
    row: Row,
    completions: Mapping[int, str],
    fates: Mapping[int, Sequence[CandidateFate]],
    strategy: str,
) -> Iterator[dict[str, object]]:
    line: dict[str, object] = {
        "row_id": row.row_id,
        "candidate_id": -1,
        "branch": "original",
        "prompt": list(row.messages),
        "completion": [{"role": "assistant", "content": completions[row.row_id]}],
        "answer": row.answer,
        "cut": [],
        "strategy": None,
    }
    yield line
    for fate in fates.get(row.row_id, ()):
        if fate.reason is None:
            text = cut(row.messages[-1]["content"], [(start, stop) for start, stop in fate.cut])
            yield line | {
                "candidate_id": fate.candidate_id,
                "branch": "counterfactual",
                "prompt": list(cut_messages(row, text)),
                "cut": [list(part) for part in fate.cut],
                "strategy": strategy,
            }


def write_samples(
    directory: Path,
    rows: Mapping[int, Row],
    completions: Mapping[int, str],
    detections: pa.Table,
    answers: Answers,
    fates: Mapping[int, Sequence[CandidateFate]],
) -> Path:
    """Write samples.parquet: one row for each scored row, with all that was seen in it."""
    ids: list[int] = detections["row_id"].to_pylist()
    columns: dict[str, Any] = {
        "messages": [list(rows[row_id].messages) for row_id in ids],
        "user_text": [rows[row_id].messages[-1]["content"] for row_id in ids],
        "completion": [completions[row_id] for row_id in ids],
        "answer": [rows[row_id].answer for row_id in ids],
        "candidates": [[_candidate(fate) for fate in fates.get(row_id, ())] for row_id in ids],
    }
    for role in ("teacher", "student"):
        given = [answers[role].get(row_id) for row_id in ids]
        columns[f"{role}_answer"] = [item.text if item else None for item in given]
        columns[f"{role}_verdict"] = [item.verdict if item else None for item in given]
    arrays = [
        pa.array(columns[field.name], type=field.type)
        if field.name in columns
        else detections[field.name]
        for field in SAMPLES
    ]
    path = directory / "samples.parquet"
    write_table(path, pa.table(arrays, schema=SAMPLES))
    return path


def _candidate(fate: CandidateFate) -> dict[str, object]:
    return {
        "cut": fate.cut,
        "teacher_answer": fate.teacher.text if fate.teacher else None,
        "student_answer": fate.student.text if fate.student else None,
        "teacher_verdict": fate.teacher.verdict if fate.teacher else None,
        "student_verdict": fate.student.verdict if fate.student else None,
        "kept": fate.reason is None,
        "reason": fate.reason,
    }
