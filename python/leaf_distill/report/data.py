"""Reads a run directory and picks the rows that the page shows."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from leaf_distill.report.heat import Range, Token

Outcome = Literal["kept", "rejected", "none"]
OUTCOMES: tuple[Outcome, ...] = ("kept", "rejected", "none")
COLUMNS = (
    "row_id", "messages", "user_text", "completion", "answer", "candidates", "spans",
    "offsets", "teacher_saliency", "student_saliency", "score", "confounder",
    "teacher_answer", "teacher_verdict", "student_answer", "student_verdict",
)  # fmt: skip


@dataclass(frozen=True)
class Reply:
    """A model's answer to one prompt; both None where it was not asked or not graded."""

    text: str | None
    verdict: str | None


@dataclass(frozen=True)
class Candidate:
    """One counterfactual prompt: what was cut, what the models answered, and its fate."""

    cut: tuple[Range, ...]
    teacher: Reply
    student: Reply
    kept: bool
    reason: str | None


@dataclass(frozen=True)
class Sample:
    """One scored row of `samples.parquet`."""

    row_id: int
    context: tuple[tuple[str, str], ...]
    text: str
    completion: str
    answer: str | None
    tokens: tuple[Token, ...]
    spans: tuple[Range, ...]
    teacher: Reply
    student: Reply
    candidates: tuple[Candidate, ...]

    @property
    def outcome(self) -> Outcome:
        return _outcome(candidate.kept for candidate in self.candidates)


@dataclass(frozen=True)
class Run:
    """What a run directory says: its funnel, the chosen rows, and how many there were."""

    funnel: dict[str, Any]
    samples: tuple[Sample, ...]
    totals: dict[Outcome, int]


def _outcome(kept: Iterable[bool]) -> Outcome:
    flags = list(kept)
    return "none" if not flags else ("kept" if any(flags) else "rejected")


def _ranges(value: Sequence[Sequence[int]] | None) -> tuple[Range, ...]:
    return tuple((start, stop) for start, stop in value or ())


def _reply(record: dict[str, Any], model: str) -> Reply:
    return Reply(record[f"{model}_answer"], record[f"{model}_verdict"])


def _float(value: float | None) -> float:
    return math.nan if value is None else value


def _sample(record: dict[str, Any]) -> Sample:
    columns = zip(
        record["offsets"],
        record["teacher_saliency"],
        record["student_saliency"],
        record["score"],
        record["confounder"],
        strict=True,
    )
    tokens = tuple(
        Token(start, stop, _float(teacher), _float(student), _float(score), bool(confounder))
        for (start, stop), teacher, student, score, confounder in columns
    )
    messages = record["messages"] or ()
    return Sample(
        row_id=record["row_id"],
        context=tuple((message["role"], message["content"]) for message in messages[:-1]),
        text=record["user_text"],
        completion=record["completion"],
        answer=record["answer"],
        tokens=tokens,
        spans=_ranges(record["spans"]),
        teacher=_reply(record, "teacher"),
        student=_reply(record, "student"),
        candidates=tuple(
            Candidate(
                cut=_ranges(candidate["cut"]),
                teacher=_reply(candidate, "teacher"),
                student=_reply(candidate, "student"),
                kept=bool(candidate["kept"]),
                reason=candidate["reason"],
            )
            for candidate in record["candidates"] or ()
        ),
    )


def choose(outcomes: Sequence[Outcome], count: int) -> list[int]:
    """Positions of `count` rows: kept first, then rejected, then those without a candidate.

    A quarter of the places is held for rejected rows, so that a long run shows its failures too.
    """
    kept, rejected, none = ([i for i, o in enumerate(outcomes) if o == want] for want in OUTCOMES)
    held = min(len(rejected), count // 4)
    head = kept[: count - held]
    return (head + rejected[: count - len(head)] + none)[:count]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; ValueError names the file where it is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path} is not valid JSON ({error}); write it again by the command that made it"
        ) from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} should hold a JSON object, not a {type(value).__name__}")
    return value


def _read_table(path: Path) -> pa.Table:
    try:
        table = pq.read_table(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path} cannot be read ({error}); run `leaf detect` again") from error
    missing = [name for name in COLUMNS if name not in table.column_names]
    if missing:
        raise ValueError(
            f"{path} has no column {', '.join(missing)}: it was written by another version; "
            "run `leaf detect` again"
        )
    return table


def _positions(table: pa.Table, outcomes: Sequence[Outcome], count: int,
               row_ids: Sequence[int] | None, path: Path) -> list[int]:  # fmt: skip
    if row_ids is None:
        return choose(outcomes, count)
    where = {row_id: at for at, row_id in enumerate(table["row_id"].to_pylist())}
    missing = [row_id for row_id in row_ids if row_id not in where]
    if missing:
        raise ValueError(
            f"row_ids: row {missing[0]} is not in {path}, which holds the scored rows only "
            f"({len(where)} of them); choose among those"
        )
    return [where[row_id] for row_id in dict.fromkeys(row_ids)]


def read_run(directory: Path, *, samples: int, row_ids: Sequence[int] | None) -> Run:
    """The run in `directory`; FileNotFoundError or ValueError says what is not as it should be."""
    if samples < 0:
        raise ValueError(f"samples must be 0 or more, not {samples}")
    if not directory.is_dir():
        raise FileNotFoundError(
            f"{directory} is not a directory; give the output_dir of a `leaf detect`"
        )
    table_path, funnel_path = directory / "samples.parquet", directory / "funnel.json"
    for path in (funnel_path, table_path):
        if not path.is_file():
            raise FileNotFoundError(
                f"{directory} has no {path.name}: it is not the output_dir of a finished "
                "`leaf detect`; run that first (it goes on where it stopped)"
            )
    table = _read_table(table_path)
    outcomes = [
        _outcome(candidate["kept"] for candidate in candidates or ())
        for candidates in table["candidates"].to_pylist()
    ]
    chosen = pa.array(_positions(table, outcomes, samples, row_ids, table_path), pa.int64())
    return Run(
        funnel=read_json(funnel_path),
        samples=tuple(_sample(record) for record in table.take(chosen).to_pylist()),
        totals={outcome: outcomes.count(outcome) for outcome in OUTCOMES},
    )
