"""Grades answers by mathematics, by the last number, or by the text."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import get_args

from leaf_distill.config import GradeRule
from leaf_distill.grading.math import judge_quickly
from leaf_distill.grading.pool import Pool
from leaf_distill.grading.text import (
    Kind,
    Verdict,
    gold_kind,
    grade_exact,
    grade_number,
    grade_words,
)


class Grader:
    """Grades (gold, prediction) pairs by one rule; use it as a context manager.

    The final answer of each text is compared: the content of the last `\\boxed{}`, or else the
    line after the last `####`, or else ("math" only) the text after "the answer is", or else all.

    - "math": equal as mathematics, by LaTeX and math-verify; a gold answer that is a letter, a word
      or a text (`gold_kind`) is compared as such.
    - "number": the last numbers are equal; a gold answer without one is compared as for "math".
    - "exact": the same text but for white space around it.

    Args:
        rule: "math", "number" or "exact".
        timeout_s: CPU seconds that math-verify may take for one pair.
        workers: processes for math-verify at most; None takes one a core.

    Raises:
        ValueError: An argument is out of its range.
    """

    def __init__(
        self, rule: GradeRule, *, timeout_s: float = 5.0, workers: int | None = None
    ) -> None:
        rules = [name for name in get_args(GradeRule) if name != "code"]  # see CodeGrader
        if rule not in rules:
            names = ", ".join(rules)
            raise ValueError(f"grade: must be one of {names}, got {rule!r}")
        if not 0 < timeout_s < math.inf:
            raise ValueError(f"grade_timeout: must be seconds above 0, got {timeout_s}")
        if workers is not None and workers < 1:
            raise ValueError(f"workers: must be at least 1, got {workers}; None takes one a core")
        self.rule = rule
        self._pool = Pool(timeout_s, workers)

    def __enter__(self) -> Grader:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """End the worker processes; grading again starts new ones."""
        self._pool.close()

    def grade(self, pairs: Sequence[tuple[str, str]]) -> list[Verdict]:
        """Return one verdict a pair, in order.

        Args:
            pairs: gold answers, each with a prediction. Either may be a whole completion.

        Returns:
            "right" or "wrong"; "no_answer" where the prediction has nothing to compare; "timeout"
            where math-verify came to no result in two attempts.

        Raises:
            ValueError: A gold answer is empty.
            RuntimeError: math-verify cannot be loaded.
        """
        for index, (gold, _) in enumerate(pairs):
            if not gold.strip():
                raise ValueError(
                    f"gold: must be a text with an answer, got {gold!r} in pair {index}; "
                    "give the row an answer or leave it out"
                )
        verdicts = [self.grade_quickly(gold, prediction) for gold, prediction in pairs]
        left = [pair for pair, known in zip(pairs, verdicts, strict=True) if known is None]
        judged = iter(self._pool.judge(left))
        return [next(judged) if known is None else known for known in verdicts]

    def grade_quickly(self, gold: str, prediction: str) -> Verdict | None:
        """Return the verdict if it needs no math-verify, else None; the gold must not be empty."""
        if not prediction.strip():
            return "no_answer"
        if self.rule == "exact":
            return grade_exact(gold, prediction)
        if self.rule == "number":
            return grade_number(gold, prediction)
        if gold_kind(gold) in ("choice", "word", "text"):
            return grade_words(gold, prediction)
        return judge_quickly(gold, prediction)


def gold_kinds(golds: Iterable[str]) -> Counter[Kind]:
    """Count each kind of `gold_kind` among gold answers, or completions that end in one."""
    return Counter(map(gold_kind, golds))
