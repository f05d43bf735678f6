"""Verdicts on answers; what they cost is kept in the row cache."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.metadata import version

from leaf_distill.config import AnswerOptions
from leaf_distill.data.example import Example
from leaf_distill.detection.cache import RowCache, compute_missing
from leaf_distill.grading import Grader
from leaf_distill.grading.code import CodeGrader, identity
from leaf_distill.grading.sandbox.end import depends_on_load
from leaf_distill.io import digest

ROWS_A_GRADING = 256
PROGRAMS_A_GRADING = 32
ANSWER_SHOWN = 120
"""Characters at the end of an answer that are quoted."""


def grade_answers(
    answers: Sequence[tuple[Example, str]], config: AnswerOptions, cache: RowCache
) -> list[tuple[str, str]]:
    """Return a verdict and a detail for each answer's text."""
    if config.grade == "code":
        return _grade_programs(answers, config, cache)
    pairs = [(example.gold, text) for example, text in answers]
    if config.grade != "math":  # cheaper than a look into the cache
        with Grader(config.grade, timeout_s=config.grade_timeout) as grader:
            return [(verdict, "") for verdict in grader.grade(pairs)]
    settings = ["grade", config.grade, version("math-verify"), *identity()]
    keys = [digest([*settings, *pair]) for pair in pairs]
    with Grader(config.grade, timeout_s=config.grade_timeout) as grader:

        def compute(batch: list[int]) -> list[bytes]:
            return [verdict.encode() for verdict in grader.grade([pairs[at] for at in batch])]

        values = compute_missing(
            cache,
            keys,
            batches(len(pairs), ROWS_A_GRADING),
            compute,
            description="grading",
            keep=lambda value: value != b"timeout",
        )
    return [(value.decode(), "") for value in values]


def _grade_programs(
    answers: Sequence[tuple[Example, str]], config: AnswerOptions, cache: RowCache
) -> list[tuple[str, str]]:
    pairs = [(example.tests, text) for example, text in answers if example.tests]
    settings = ["grade", config.grade, config.grade_timeout, *identity()]
    keys = [digest([*settings, tests.to_json(), text]) for tests, text in pairs]
    with CodeGrader(timeout_s=config.grade_timeout, store=cache) as grader:

        def compute(batch: list[int]) -> list[bytes]:
            judged = grader.grade([pairs[at] for at in batch])
            return [json.dumps(one).encode() for one in judged]

        plan = batches(len(pairs), PROGRAMS_A_GRADING)
        values = compute_missing(
            cache,
            keys,
            plan,
            compute,
            description="running programs",
            keep=lambda value: not depends_on_load(json.loads(value)[1]),
        )
    return [(verdict, detail) for verdict, detail in map(json.loads, values)]


def quote(text: str, gold: str) -> str:
    """Return how an answer and its gold end: "ends '5', and its gold ends '6'"."""
    return f"ends {text[-ANSWER_SHOWN:]!r}, and its gold ends {gold[-ANSWER_SHOWN:]!r}"


def batches(count: int, size: int) -> list[range]:
    return [range(at, min(at + size, count)) for at in range(0, count, size)]
