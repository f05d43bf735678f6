"""From rows to padded batches: each row rendered once for the student and once for the teacher."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from leaf_distill.data.dataset import Message, Rejection, UnusableRow, check_text, read_layout
from leaf_distill.data.prompt import Renderer, Rendering

logger = logging.getLogger(__name__)

BRANCHES = ("original", "counterfactual")

FILLER = -1
"""Index of a row without labels, for a rank that has nothing left in the last step of an epoch."""

Ids = NDArray[np.int32]
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Example:
    """One row as both models read it.

    `predicts` is True where the NEXT token is a label: the position whose hidden state predicts it.
    """

    row_id: int
    counterfactual: bool
    student_ids: Ids
    student_predicts: Mask
    teacher_ids: Ids
    teacher_predicts: Mask

    @property
    def n_labels(self) -> int:
        return int(self.student_predicts.sum())


class Rows(Protocol):
    """Rows by position: a `datasets.Dataset`, a list of dicts."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Any: ...


def prepare_examples(
    rows: Iterable[Mapping[str, Any]], student: Renderer, teacher: Renderer, *, max_length: int
) -> tuple[list[Example], list[Rejection]]:
    """Render rows in the layout of `dataset.parquet`, or plain prompt/completion rows.

    `prompt` and `completion` are a string or messages, the completion one assistant message;
    `branch` says "original" or "counterfactual" and may be missing (all originals); so may
    `row_id` (the row's position). A row that is longer than `max_length` tokens for either model,
    is refused by a template, or has an empty prompt or completion, is left out whole and returned
    as a Rejection: nothing is ever cut.

    Raises:
        ValueError: a column is missing or malformed, or the two models' templates give the row
            different label tokens; names the row.
    """
    examples: list[Example] = []
    rejections: list[Rejection] = []
    if teacher.fingerprint == student.fingerprint:
        teacher = student  # the usual case: one rendering serves both
    for position, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise ValueError(f"row {position}: needs columns by name, came {row!r:.60}")
        row_id = _integer(row, "row_id", position, position)
        candidate_id = _integer(row, "candidate_id", position, -1)
        counterfactual = _is_counterfactual(row, position)
        try:
            messages, completion = _conversation(row, position)
            renderings = _render(messages, completion, student, teacher)
            _check_length(renderings, max_length)
        except UnusableRow as problem:
            left = Rejection(row_id, candidate_id, "distill", problem.reason, problem.detail)
            rejections.append(left)
            continue
        example = _example(row_id, counterfactual, *renderings)
        _check_labels(example, position)
        examples.append(example)
    return examples, rejections


def _integer(row: Mapping[str, Any], name: str, position: int, missing: int) -> int:
    value = missing if row.get(name) is None else row[name]
    if not isinstance(value, int | np.integer):
        raise ValueError(f"row {position}: {name}: needs an integer, came {value!r}")
    return int(value)


def _is_counterfactual(row: Mapping[str, Any], position: int) -> bool:
    branch = row.get("branch") or "original"
    if branch not in BRANCHES:
        raise ValueError(
            f"row {position}: branch: needs one of {', '.join(BRANCHES)}, came {branch!r}"
        )
    return bool(branch == "counterfactual")


def _conversation(row: Mapping[str, Any], position: int) -> tuple[tuple[Message, ...], str]:
    """The prompt's messages and the completion's text."""
    for column in ("prompt", "completion"):
        if row.get(column) is None:
            raise ValueError(
                f"row {position}: needs the column {column!r}, came {sorted(row)}; other layouts "
                "are read by leaf_distill.data.dataset.load_rows"
            )
    try:
        messages, completion = read_layout(("prompt", "completion"), row)
        check_text([*(turn["content"] for turn in messages), completion])
    except UnusableRow as problem:
        if problem.reason in ("empty_prompt", "no_user_turn"):
            raise
        raise ValueError(f"row {position}: {problem.detail}") from problem
    if not completion.strip():
        raise UnusableRow("empty_completion", "the completion is empty.")
    return messages, completion


def _render(
    messages: Sequence[Message], completion: str, student: Renderer, teacher: Renderer
) -> tuple[Rendering, Rendering]:
    try:
        ours = student.render(messages, completion)
        return ours, ours if teacher is student else teacher.render(messages, completion)
    except ValueError as error:  # the template refuses the row's roles, or changes its text
        raise UnusableRow("not_renderable", str(error)) from error


def _check_length(renderings: Iterable[Rendering], max_length: int) -> None:
    longest = max(len(rendering.input_ids) for rendering in renderings)
    if longest > max_length:
        raise UnusableRow("too_long", f"{longest} tokens, max_length {max_length}")


def _example(row_id: int, counterfactual: bool, ours: Rendering, theirs: Rendering) -> Example:
    student = _arrays(ours)
    # Usually both models share tokenizer and template; then they share the arrays too.
    same = ours.input_ids == theirs.input_ids and ours.label_mask == theirs.label_mask
    teacher = student if same else _arrays(theirs)
    return Example(row_id, counterfactual, *student, *teacher)


def _arrays(rendering: Rendering) -> tuple[Ids, Mask]:
    ids = np.asarray(rendering.input_ids, dtype=np.int32)
    predicts = np.zeros(len(ids), dtype=np.bool_)
    predicts[:-1] = rendering.label_mask[1:]
    return ids, predicts


def _labels(ids: Ids, predicts: Mask) -> list[int]:
    return [int(token) for token in ids[1:][predicts[:-1]]]


def _check_labels(example: Example, position: int) -> None:
    """The KL compares distributions token by token, so both models need the very same labels."""
    student = _labels(example.student_ids, example.student_predicts)
    teacher = _labels(example.teacher_ids, example.teacher_predicts)
    if student == teacher:
        return
    first = next(
        (
            i
            for i, (ours, theirs) in enumerate(zip(student, teacher, strict=False))
            if ours != theirs
        ),
        min(len(student), len(teacher)),
    )
    raise ValueError(
        f"row {position} (row_id {example.row_id}): the templates of teacher and student give "
        f"different label tokens: {len(teacher)} and {len(student)} of them, first differing at "
        f"label {first} (teacher {teacher[first : first + 3]}, student "
        f"{student[first : first + 3]}); give both models one chat template, or chat_template none"
    )


def summarize(rejections: Sequence[Rejection]) -> dict[str, int]:
    """How many rows were left out for each reason."""
    return dict(Counter(rejection.reason for rejection in rejections))


class ExampleDataset(Dataset[Example]):
    """Examples by index; `FILLER` is the shortest one with its labels taken away."""

    def __init__(self, examples: Sequence[Example]) -> None:
        self.examples = list(examples)
        self.shortest = shortest = min(self.examples, key=lambda example: len(example.student_ids))
        self._filler = replace(
            shortest,
            counterfactual=False,
            student_predicts=np.zeros_like(shortest.student_predicts),
            teacher_predicts=np.zeros_like(shortest.teacher_predicts),
        )

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Example:
        return self._filler if index == FILLER else self.examples[index]

    def branch_indices(self, *, counterfactual: bool) -> list[int]:
        """Positions of the rows of one branch."""
        return [i for i, row in enumerate(self.examples) if row.counterfactual is counterfactual]


@dataclass(frozen=True)
class Collator:
    """Pads examples on the right.

    Returns `input_ids`, `attention_mask` int64 [B, T] and `predicts` bool [B, T] for the student,
    the same with the prefix `teacher_` for the teacher (its own T), `counterfactual` bool [B] and
    `row_id` int64 [B]. Row by row, `predicts` and `teacher_predicts` mark the same labels in order.
    """

    student_pad: int
    teacher_pad: int

    def __call__(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        student = [(row.student_ids, row.student_predicts) for row in examples]
        teacher = [(row.teacher_ids, row.teacher_predicts) for row in examples]
        return {
            **_pad(student, self.student_pad, ""),
            **_pad(teacher, self.teacher_pad, "teacher_"),
            "counterfactual": torch.tensor([row.counterfactual for row in examples]),
            "row_id": torch.tensor([row.row_id for row in examples]),
        }


def _pad(rows: Sequence[tuple[Ids, Mask]], pad: int, prefix: str) -> dict[str, Tensor]:
    shape = (len(rows), max(len(ids) for ids, _ in rows))
    input_ids = torch.full(shape, pad)
    attention_mask = torch.zeros(shape, dtype=torch.int64)
    predicts = torch.zeros(shape, dtype=torch.bool)
    for i, (ids, mask) in enumerate(rows):
        input_ids[i, : len(ids)] = torch.from_numpy(ids)
        attention_mask[i, : len(ids)] = 1
        predicts[i, : len(ids)] = torch.from_numpy(mask)
    return {
        f"{prefix}input_ids": input_ids,
        f"{prefix}attention_mask": attention_mask,
        f"{prefix}predicts": predicts,
    }


def prepare_dataset(
    rows: Rows, student: Renderer, teacher: Renderer, *, max_length: int, name: str
) -> tuple[ExampleDataset, list[Rejection]]:
    """`prepare_examples` of a dataset; ValueError naming it when no row is left."""
    examples, rejections = prepare_examples(rows, student, teacher, max_length=max_length)
    reasons = summarize(rejections)
    if not examples:
        why = f"{reasons}; the first: {rejections[0].detail}" if rejections else "it is empty"
        raise ValueError(f"{name}: no row is left to train on ({why})")
    if rejections:
        total = len(examples) + len(rejections)
        logger.warning("%s: %d of %d rows left out: %s", name, len(rejections), total, reasons)
    return ExampleDataset(examples), rejections
