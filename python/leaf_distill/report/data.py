"""Reads an arm and picks the rows that the page shows."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from leaf_distill.data.example import Range, Role
from leaf_distill.detection.output import SAMPLES
from leaf_distill.report.heat import Token
from leaf_distill.report.shape import Maybe, read_shaped

MODELS: tuple[Role, ...] = ("teacher", "student")
"""The order of the two on the page."""

Group = Literal["kept", "rejected", "none"]
GROUPS: tuple[Group, ...] = ("kept", "rejected", "none")
"""Rows with a kept counterfactual, with rejected ones only, and without any."""

RUN = {role: {"name": str} for role in MODELS}
FUNNEL = {
    "arm": str,
    "stages": [{"stage": str, "rows": int, "unit": str}],
    "left": [{"stage": str, "reason": str, "count": int, "unit": str}],
    "notes": {str: int},
    "nll": {str: {"mean": float, "max": float}},
    "settings": {
        **dict.fromkeys(("dataset", "dataset_split", "rule", "strategy", "validate"), str),
        **dict.fromkeys(("threshold", "cap"), float),
        "teacher_max": Maybe(float),
        "join_gap": int,
    },
    "models": {str: str},
    "templates": [str],
    "versions": {str: str},
    "seconds": {str: float},
}
"""What the page reads of run.json and of funnel.json."""


@dataclass(frozen=True)
class Reply:
    """A model's answer to one prompt; both are None where it was not asked."""

    text: str | None
    verdict: str | None

    @property
    def asked(self) -> bool:
        return self.text is not None or self.verdict is not None


@dataclass(frozen=True)
class Candidate:
    """One counterfactual prompt: what was cut, the models' answers, and whether it was kept."""

    cut: tuple[Range, ...]
    inside_word: bool  # a border of the cut lies within a word or a number
    replies: dict[Role, Reply]
    kept: bool
    reason: str | None


@dataclass(frozen=True)
class Sample:
    """One scored row of samples.parquet."""

    row_id: int
    context: tuple[tuple[str, str], ...]  # role and text of the messages before the user's
    text: str
    completion: str
    answer: str | None
    nll: dict[Role, float | None]  # nats a label token
    tokens: tuple[Token, ...]
    spans: tuple[Range, ...]
    replies: dict[Role, Reply]
    candidates: tuple[Candidate, ...]

    @property
    def group(self) -> Group:
        return _group(candidate.kept for candidate in self.candidates)

    @property
    def asked(self) -> tuple[Role, ...]:
        """The models that answered any of the row's prompts."""
        prompts = (self.replies, *(one.replies for one in self.candidates))
        return tuple(role for role in MODELS if any(replies[role].asked for replies in prompts))


@dataclass(frozen=True)
class Run:
    """An arm: its funnel, its models' names, the chosen rows, and how many there are."""

    funnel: dict[str, Any]
    models: dict[str, str]
    samples: tuple[Sample, ...]
    totals: dict[Group, int]


def read_run(arm: Path, *, samples: int, row_ids: Sequence[int] | None) -> Run:
    """Read an arm, and of its rows the first `samples` in the order of the page, or `row_ids`.

    Raises:
        ValueError: a file cannot be read or has another shape, or a row is not there.
    """
    funnel = read_shaped(arm / "funnel.json", FUNNEL)
    models = read_shaped(arm.parent.parent / "run.json", RUN)
    path = arm / "samples.parquet"
    table = _read_table(path)
    try:
        row_of = {row_id: at for at, row_id in enumerate(table["row_id"].to_pylist())}
        groups = [
            _group(candidate["kept"] for candidate in candidates)
            for candidates in table["candidates"].to_pylist()
        ]
    except (TypeError, ValueError) as error:
        raise _unlike(path, error) from error
    chosen = choose(groups, samples) if row_ids is None else _positions(row_of, row_ids, path)
    try:
        shown = [_sample(line) for line in table.take(pa.array(chosen, pa.int64())).to_pylist()]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise _unlike(path, error) from error
    return Run(
        funnel=funnel,
        models={role: models[role]["name"] for role in MODELS},
        samples=tuple(shown),
        totals={group: groups.count(group) for group in GROUPS},
    )


def _read_table(path: Path) -> pa.Table:
    try:
        table = pq.read_table(path, page_checksum_verification=True)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(
            f"{path}: must be a readable Parquet file, got an error ({_line(error)}); run "
            "`leaf detect` again"
        ) from error
    wrong = [field.name for field in SAMPLES if not _has(table.schema, field)]
    if wrong:
        raise ValueError(
            f"{path}: must have the columns that `leaf detect` writes, got none or another type "
            f"for {', '.join(wrong)}; run it again"
        )
    return table


def _has(schema: pa.Schema, field: pa.Field) -> bool:
    if field.name not in schema.names:
        return False
    kind = schema.field(field.name).type
    if field.name == "messages":  # with more than role and content it has a type of its own
        return bool(pa.types.is_list(kind) or pa.types.is_string(kind))
    return bool(kind == field.type)


def _unlike(path: Path, error: Exception) -> ValueError:
    return ValueError(
        f"{path}: must hold rows as `leaf detect` writes them, got others ({_line(error)}); run it "
        "again"
    )


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


def _positions(row_of: dict[int, int], row_ids: Sequence[int], path: Path) -> list[int]:
    for row_id in row_ids:
        if row_id not in row_of:
            raise ValueError(
                f"row_ids: must be of the {len(row_of)} scored rows in {path}, got {row_id}; give "
                "others"
            )
    return [row_of[row_id] for row_id in dict.fromkeys(row_ids)]


def choose(groups: Sequence[Group], count: int) -> list[int]:
    """Return positions of `count` rows: kept first, then rejected, then those without a candidate.

    A quarter of the places is held for rejected rows, so that a long run shows its failures too.
    """
    kept, rejected, none = ([i for i, one in enumerate(groups) if one == want] for want in GROUPS)
    held = min(len(rejected), count // 4)
    head = kept[: count - held]
    return (head + rejected[: count - len(head)] + none)[:count]


def _group(kept: Iterable[bool]) -> Group:
    flags = list(kept)
    return "none" if not flags else ("kept" if any(flags) else "rejected")


def _sample(line: dict[str, Any]) -> Sample:
    columns = ("teacher_saliency", "student_saliency", "score")
    numbers = zip(*(line[name] for name in columns), strict=True)
    text = _text(line["user_text"])
    return Sample(
        row_id=int(line["row_id"]),
        context=_context(line["messages"]),
        text=text,
        completion=_text(line["completion"]),
        answer=line["answer"],
        nll={role: line[f"{role}_nll"] for role in MODELS},
        tokens=tuple(
            Token(start, stop, _float(teacher), _float(student), _float(score), bool(confounder))
            for (start, stop), (teacher, student, score), confounder in zip(
                _ranges(line["offsets"]), numbers, line["confounder"], strict=True
            )
        ),
        spans=_ranges(line["spans"]),
        replies=_replies(line),
        candidates=tuple(_candidate(one, text) for one in line["candidates"]),
    )


def _candidate(line: dict[str, Any], text: str) -> Candidate:
    cut = _ranges(line["cut"])
    return Candidate(
        cut=cut,
        inside_word=any(_inside_word(text, at) for one in cut for at in one),
        replies=_replies(line),
        kept=bool(line["kept"]),
        reason=line["reason"],
    )


def _inside_word(text: str, at: int) -> bool:
    """Whether a border between two characters splits a word or a number."""
    return 0 < at < len(text) and text[at - 1].isalnum() and text[at].isalnum()


def _context(messages: Any) -> tuple[tuple[str, str], ...]:
    """Return role and text of all messages but the last; other keys follow the text as JSON."""
    turns = json.loads(messages) if isinstance(messages, str) else messages
    context = []
    for turn in turns[:-1]:
        text = turn["content"] or ""
        others = {
            name: value
            for name, value in turn.items()
            if name not in ("role", "content") and value is not None
        }
        if others:
            text = f"{text}\n{json.dumps(others, ensure_ascii=False)}".lstrip("\n")
        context.append((_text(turn["role"]), _text(text)))
    return tuple(context)


def _replies(line: dict[str, Any]) -> dict[Role, Reply]:
    return {role: Reply(line[f"{role}_answer"], line[f"{role}_verdict"]) for role in MODELS}


def _ranges(value: Iterable[Sequence[int]]) -> tuple[Range, ...]:
    return tuple((int(start), int(stop)) for start, stop in value)


def _float(value: float | None) -> float:
    return math.nan if value is None else value


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r:.40} where text should be")
    return value
