"""Greedy answers of the student to held-out prompts while it trains, graded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from leaf_distill.data.collator import plan_batches
from leaf_distill.data.example import Answer, Example
from leaf_distill.data.prompt import Renderer
from leaf_distill.grading import Grader
from leaf_distill.grading.code import CodeGrader
from leaf_distill.models.generation import generate
from leaf_distill.training.config import LeafConfig


def gradable(examples: Sequence[Example], config: LeafConfig) -> list[Example]:
    """Return the first `eval_answers` originals that an answer can be graded against."""
    by_tests = config.grade == "code"
    found = [
        one
        for one in examples
        if one.branch == "original" and (one.tests is not None if by_tests else one.gold.strip())
    ]
    return found[: config.eval_answers]


def count_right(
    model: Any, renderer: Renderer, rows: Sequence[Example], config: LeafConfig
) -> tuple[int, int]:
    """Let a model answer rows greedily, and grade.

    An answer that is right before it is cut off is right. The model is in the mode that it was in
    afterwards.

    Args:
        model: the student.
        renderer: of its prompts.
        rows: of `gradable`.
        config: `max_new_tokens`, `max_batch_tokens`, `grade` and `grade_timeout`.

    Returns:
        How many answers are right, and how many were graded: rows whose tests do not work are not.
    """
    prompts = [renderer.prompt(row).input_ids.tolist() for row in rows]
    lengths = [len(prompt) + config.max_new_tokens for prompt in prompts]
    answers: dict[int, Answer] = {}
    for batch in plan_batches(lengths, max_tokens=config.max_batch_tokens):
        found = generate(
            model,
            renderer.tokenizer,
            [prompts[at] for at in batch],
            end_ids=renderer.end_ids,
            max_new_tokens=config.max_new_tokens,
        )
        answers.update(zip(batch, found, strict=True))
    texts = {
        at: rows[at].prefix + one.text
        for at, one in answers.items()
        if one.verdict in (None, "cut_off")
    }
    if config.grade == "code":
        return _count_programs(rows, texts, config)
    with Grader(config.grade, timeout_s=config.grade_timeout) as grader:
        verdicts = grader.grade([(rows[at].gold, text) for at, text in texts.items()])
    return verdicts.count("right"), len(rows)


def _count_programs(
    rows: Sequence[Example], texts: dict[int, str], config: LeafConfig
) -> tuple[int, int]:
    tests = {at: row.tests for at, row in enumerate(rows) if row.tests is not None}
    with CodeGrader(timeout_s=config.grade_timeout) as grader:
        problems = dict(zip(tests, grader.check(list(tests.values())), strict=True))
        usable = [at for at, problem in problems.items() if not problem]
        judged = grader.grade([(tests[at], texts[at]) for at in usable if at in texts])
    return sum(verdict == "right" for verdict, _ in judged), len(usable)
