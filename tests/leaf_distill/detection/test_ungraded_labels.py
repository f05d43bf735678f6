"""The teacher's answers may be the completions of rows that have nothing to grade them against."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from detect_run import ROWS, check_sums, run, table

PROMPTS = [{"prompt": row["prompt"]} for row in ROWS[:6]]
TESTS = {"tests": ["assert add(1, 2) == 3"]}


@pytest.mark.parametrize(
    ("grade", "fields"),
    [
        ("code", {"completion": "7"}),
        ("code", {"completion": "7", **TESTS, "canonical_solution": "def add(a, b): return 0"}),
        ("math", TESTS),
    ],
    ids=["no tests", "bad tests", "no gold"],
)
def test_where_a_run_grades_nothing_an_answer_has_no_verdict(
    pair: dict[str, str], tmp_path: Path, grade: str, fields: dict[str, Any]
) -> None:
    rows = [{**prompt, **fields} for prompt in PROMPTS]
    options = {"preset": "release", "completion_source": "teacher", "grade": grade}
    result = run(pair, tmp_path, rows, allow_code_execution=True, **options)
    check_sums(result, len(rows))
    lines = [line for line in table(result.dataset) if line["branch"] == "original"]
    found = [line["completion"][0]["content"] for line in lines]
    assert found == [row["answer"] for row in ROWS[: len(rows)]]
    assert {line["teacher_verdict"] for line in table(result.samples)} == {None}
