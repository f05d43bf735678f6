"""The report's section on the accuracy gained by cutting, and the verdicts of programs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from html_page import Page
from report_run import CONFIG, WRONG, propose_cuts, scored, write_run

from leaf_distill.data.example import Answer, Example
from leaf_distill.report import write_report

TEXT = "Sam has 40 apples. Five are small. How many?"


def row(row_id: int, source: str | None, *reasons: str | None) -> Example:
    spans = [(at, at + 1) for at in range(len(reasons))]
    example = propose_cuts(scored(row_id, TEXT, spans=spans), *reasons)
    example.source = source
    for candidate in example.candidates:
        candidate.source = source
    return example


def test_each_source_has_a_point_with_its_interval(tmp_path: Path) -> None:
    examples = [
        row(0, "math <b>", None, "student_wrong"),
        row(1, "math <b>", "student_wrong"),
        row(2, "code", "student_wrong"),
    ]
    page = Page(write_report(write_run(tmp_path, examples)))
    (table,) = page.root.find("table", cls="gain")
    lines = table.find("tbody")[0].find("tr")
    assert [line.find("th")[0].text for line in lines] == ["all", "code", "math <b>"]
    whole, code, math = ([cell.text.strip() for cell in line.find("td")] for line in lines)
    assert whole[:4] == ["3", "1", "33.3%, 6.1 to 79.2%", "25.0%of 4"]
    assert code[:4] == ["1", "0", "0.0%, 0.0 to 79.3%", "0.0%of 1"]
    assert math[:4] == ["2", "1", "50.0%, 9.5 to 90.5%", "33.3%of 3"]
    assert math[4].startswith("0.0% before") and "50.0% with the best cut, 25.0%" in math[4]
    assert not table.find("rect")  # a bar would be read as the value
    points = [line.find("path", cls="point")[0].attributes["d"] for line in lines]
    assert points == ["M33.33 5h0.001", "M0.00 5h0.001", "M50.00 5h0.001"]
    labels = [line.find("svg")[0].attributes["aria-label"] for line in lines]
    assert labels[2] == "50.0 percent, 9.5 to 90.5"


def test_a_source_without_a_cut_has_no_share_and_says_so(tmp_path: Path) -> None:
    uncut = row(1, "uncut")
    uncut.leave("prune", "no_span")
    page = Page(write_report(write_run(tmp_path, [row(0, "cut", None), uncut])))
    (table,) = page.root.find("table", cls="gain")
    line = table.find("tbody")[0].find("tr")[2]
    cells = [cell.text.strip() for cell in line.find("td")]
    assert line.find("th")[0].text == "uncut"
    assert cells == ["1", "", "no cut was made", "", "0.0% before"]
    assert not line.find("svg")


@pytest.mark.parametrize("validate", ["both", "none"])
def test_the_section_is_there_where_the_student_was_asked_twice(
    tmp_path: Path, validate: str
) -> None:
    arm = write_run(tmp_path, [row(0, None, None)], config=replace(CONFIG, validate=validate))
    page = Page(write_report(arm))
    shown = any(heading.text == "Pruning gain by source" for heading in page.root.find("h2"))
    assert shown == (validate == "both") == bool(page.root.find("table", cls="gain"))


def test_a_program_is_shown_with_its_lines_and_its_verdict(tmp_path: Path) -> None:
    program = "```python\ndef add(a, b):\n    return a - b\n```"
    for verdict, words in (
        ("error", "ended in an error"),
        ("timeout", "ran out of time"),
        ("memory", "ran out of memory"),
        ("no_program", "no program"),
    ):
        answers = {**WRONG, "student": Answer(program, 20, verdict)}
        arm = write_run(
            tmp_path / verdict,
            [scored(0, TEXT, answers=answers)],
            config=replace(CONFIG, grade="code", allow_code_execution=True),
        )
        page = Page(write_report(arm))
        assert program in [shown.text for shown in page.root.find("p", cls="text")]
        assert any(words in shown.text for shown in page.root.find("p", cls="verdict"))
    assert ".text { white-space: pre-wrap" in page.source


def test_a_timeout_is_the_grading_s_unless_programs_run(tmp_path: Path) -> None:
    answers = {**WRONG, "student": Answer("41", 2, "timeout")}
    page = Page(write_report(write_run(tmp_path, [scored(0, TEXT, answers=answers)])))
    assert "grading timed out" in page.root.find("table", cls="answers")[0].text
