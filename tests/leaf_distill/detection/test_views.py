"""The views of a row: what each is graded against, what it keeps, and how the row leaves."""

from __future__ import annotations

from dataclasses import fields

import pytest

from leaf_distill.data.example import ROW_FIELDS, Answer, Example
from leaf_distill.data.tests import Tests
from leaf_distill.detection.config import DetectConfig
from leaf_distill.detection.funnel import funnel
from leaf_distill.detection.levels import end_with_views, set_views

PROGRAM = {"grade": "code", "allow_code_execution": True}


def row(**fields: object) -> Example:
    return Example(
        3,
        ({"role": "user", "content": "How many?"},),
        "Tom has three. He gets four more. So he has 7.",
        **fields,  # type: ignore[arg-type]
    )


def viewed(example: Example, **settings: object) -> Example:
    set_views(example, DetectConfig(**{"level": "both", **settings}))  # type: ignore[arg-type]
    assert [view.segment for view in example.views] == [0, 1]
    return example


def test_a_beginning_is_graded_against_the_whole_completion_unless_programs_are_run() -> None:
    tests = Tests("asserts", code=("assert True",))
    for given in ({}, {"tests": tests}):
        example = viewed(row(**given))
        assert example.views[1].gold == example.completion
    assert viewed(row(tests=tests), **PROGRAM).views[1].answer is None
    assert viewed(row(answer="7", tests=tests)).views[1].gold == "7"


def test_the_view_of_the_prompt_keeps_the_answers_to_it() -> None:
    answers = {"student": Answer("8", 1, "wrong"), "teacher": Answer("7", 1, "right")}
    first, second = viewed(row(answers=answers)).views
    assert first.answers == answers and second.answers == {}


@pytest.mark.parametrize(
    ("stage", "reason", "left"),
    [
        ("render", "not_renderable", ("detect", "response_not_renderable")),
        ("mark", "student_right", ("detect", "response_student_right")),
        ("prune", "no_span", ("prune", "no_span")),
    ],
)
def test_a_row_stays_marked_whatever_becomes_of_its_views(
    stage: str, reason: str, left: tuple[str, str]
) -> None:
    example = row()
    set_views(example, DetectConfig(level="response", segments=3))
    for view, at in zip(example.views, (stage, "render"), strict=True):
        view.leave(at, reason)
    end_with_views(example)
    assert example.outcome is not None and example.outcome[:2] == left
    reached = {one["stage"]: one["rows"] for one in funnel([example], DetectConfig())["stages"]}
    assert reached["usable: originals of the dataset"] == 1
    assert reached["marked: student wrong, teacher right"] == 1


def test_a_counterfactual_has_every_field_of_its_row() -> None:
    names = [item.name for item in fields(Example)]
    read = set(names[: names.index("candidate_id")])
    # Answers to the whole prompt are none to a changed one, which the teacher reads too.
    assert set(ROW_FIELDS) == read - {"given", "verdict", "teacher_messages"}
