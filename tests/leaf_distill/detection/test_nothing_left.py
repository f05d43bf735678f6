"""A run that finds nothing says why, and quotes an answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from detect_run import ROWS, run

OTHER = [{**row, "answer": f"the {row['answer']}"} for row in ROWS]


def notes(*args: Any, **changes: Any) -> str:
    return " ".join(run(*args, **changes).funnel["templates"])


def test_no_marked_row_is_told_with_an_answer_of_the_teacher(
    pair: dict[str, str], tmp_path: Path
) -> None:
    found = notes(pair, tmp_path, OTHER)
    assert "No row is left to search: the student's 24 answers are 24 wrong; the teacher's" in found
    quoted = f"the answer ends '{ROWS[0]['answer']}', and its gold ends 'the {ROWS[0]['answer']}'."
    assert f"In row 0 {quoted} outcomes.parquet" in found
    assert "see --grade (now exact), --max_new_tokens and --chat_template." in found


def test_answers_that_are_cut_off_are_quoted_with_the_students(
    pair: dict[str, str], tmp_path: Path
) -> None:
    found = notes(pair, tmp_path, max_new_tokens=1)
    assert "24 answers are 24 cut off. In row 0 the answer ends '" in found


@pytest.mark.parametrize("relabel", [False, True])
def test_no_kept_cut_of_unmarked_rows_is_told_with_an_answer(
    pair: dict[str, str], tmp_path: Path, relabel: bool
) -> None:
    options: dict[str, Any] = {"select": "all", "relabel": relabel}
    found = notes(pair, tmp_path, OTHER, validate="both", **options)
    assert ("teacher wrong" if relabel else "student wrong") in found
    assert "No cut was kept: " in found and "The first: the answer ends '" in found
    assert "see --grade (now exact)" in found
    assert "No cut" not in notes(pair, tmp_path / "right", validate="both", **options)
    assert "No cut" not in notes(pair, tmp_path / "none", OTHER, validate="none", select="all")
