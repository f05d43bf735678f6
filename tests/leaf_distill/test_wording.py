"""Words for numbers and times, and lines that a terminal or a shell can take."""

from __future__ import annotations

import shlex

import pytest

from leaf_distill.wording import command_line, counted, duration, wrapped


def test_one_has_the_singular_and_every_other_number_the_plural() -> None:
    assert counted(1, "row") == "1 row" and counted(2.0, "row") == "2 rows"
    assert counted(12345, "row") == "12,345 rows" and counted(2.5, "row") == "2.5 rows"
    assert [counted(number, "pass", "passes") for number in (0, 1, 2)] == [
        "0 passes",
        "1 pass",
        "2 passes",
    ]


def test_times_are_words() -> None:
    assert [duration(s) for s in (0.4, 99, 100, 5999, 6001)] == [
        "0 s",
        "99 s",
        "2 min",
        "100 min",
        "1.7 h",
    ]


def test_lines_end_between_words_and_paths_stay_whole() -> None:
    text = "The table is in /a/long-path/that-has-no-blank/results.md and nowhere else\nat all"
    assert wrapped(text, 20).splitlines() == [
        "The table is in",
        "/a/long-path/that-has-no-blank/results.md",
        "and nowhere else",
        "at all",
    ]
    assert wrapped(text, None) == text


@pytest.mark.parametrize("width", [None, 20, 40, 80])
def test_a_shell_reads_a_command_as_it_was_whatever_the_width(width: int | None) -> None:
    options = {"model": ["a b", "c"], "dataset": "x.jsonl", "grade": None, "columns": '{"p": "q"}'}
    options |= {"system_prompt": "", "answer_prefix": "-- so"}
    line = command_line(("leaf", "evaluate"), options, width)
    words = ["leaf", "evaluate", "--model", "a b", "c", "--dataset", "x.jsonl"]
    words += ["--columns", '{"p": "q"}', "--system_prompt", "", "--answer_prefix=-- so"]
    assert shlex.split(line.replace("\\\n", "")) == words
    if width is None:
        assert "\n" not in line
    elif width >= 40:
        assert max(map(len, line.splitlines())) <= width
