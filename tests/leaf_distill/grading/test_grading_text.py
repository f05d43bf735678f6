"""The rules "number" and "exact", and bad settings."""

from __future__ import annotations

import psutil
import pytest

from leaf_distill.grading import Grader


@pytest.mark.parametrize(
    ("gold", "prediction", "verdict"),
    [
        ("72", "48 + 24 = 72.", "right"),
        ("1,234.50", "$1234.5", "right"),
        ("-3", "it is -3", "right"),
        ("-3", "it is \u22123", "right"),
        ("4", "7-4", "right"),
        ("4", "7 - 4", "right"),
        ("2500", "2.5e3", "right"),
        (".5", "0.5", "right"),
        ("5", ".5", "wrong"),
        ("0.1", "0.10000000000000001", "wrong"),
        ("12", "1,2", "wrong"),
        ("72", "72 of 73", "wrong"),
        ("72", "none", "no_answer"),
        ("72", "", "no_answer"),
        ("6 * 7 = 42 eggs for 3\n#### 42", "42", "right"),
        ("42", "6 * 7 = 42\n#### 42\n", "right"),
        ("42", "It is \\boxed{42}, which is 2 more than 40.", "right"),
        ("42", "42\n#### 41", "wrong"),
        ("42", "#### Step 1\nThe total is 42", "right"),
        ("20160", r"\boxed{20,\!160}", "right"),
        ("blue", "blue", "right"),
        ("blue", "The answer is blue.", "right"),
        ("blue", "7", "wrong"),
        ("B", "The answer is B.", "right"),
        ("yes", "The answer is no.", "wrong"),
    ],
)
def test_number(gold, prediction, verdict):
    before = len(psutil.Process().children())
    with Grader("number") as grader:
        assert grader.grade([(gold, prediction)]) == [verdict]
        assert len(psutil.Process().children()) == before  # needs no worker


def test_exact():
    with Grader("exact") as grader:
        pairs = [("a b", " a b\n"), ("a b", "a  b"), ("a", ""), ("1", "1.0"), ("1", r"\boxed{1}")]
        assert grader.grade(pairs) == ["right", "wrong", "no_answer", "wrong", "right"]


def test_bad_settings():
    with pytest.raises(
        ValueError, match=r"^grade: must be one of math, number, exact, got 'maths'"
    ):
        Grader("maths")
    for timeout_s in (0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match=r"^grade_timeout: must be seconds above 0"):
            Grader("math", timeout_s=timeout_s)
    with pytest.raises(ValueError, match=r"^workers: must be at least 1"):
        Grader("math", workers=-1)
