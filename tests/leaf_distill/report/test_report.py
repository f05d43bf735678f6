"""The report page: every character shown, cuts struck through, nothing injected or fetched."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from html_page import Element, Page
from report_run import CONFIG, RIGHT, add_cut, propose_cuts, scored, write_run

from leaf_distill.data.example import Answer, Example, Role
from leaf_distill.detection.config import DetectConfig
from leaf_distill.io import StoreError
from leaf_distill.report import write_report
from leaf_distill.report.data import choose
from leaf_distill.report.heat import LEVELS


def page_of(root: Path, *examples: Example, **settings: Any) -> Page:
    return Page(write_report(write_run(root, examples, **settings)))


HARD_TEXTS = {
    "plain": "Sam has 40 apples.  Five are small. How many?",
    "newlines": "\n\nline one\r\n\tline two\n\n  end  \n",
    "markup": "<script>alert(1)</script></div></del>&amp;&lt; \" onclick='x' {{ 7*7 }} {% raw %}",
    "unicode": "e\u0301 👩‍👩‍👧 \U0001d518 漢字 \u200b zero",
    "right to left": "כמה תפוחים יש \u202e לי? كم تفاحة؟",
}


@pytest.mark.parametrize("text", HARD_TEXTS.values(), ids=HARD_TEXTS)
def test_every_character_is_shown_in_all_three_maps(tmp_path: Path, text: str) -> None:
    page = page_of(tmp_path, scored(0, text))
    assert [panel.text for panel in page.root.find("div", cls="map")] == [text] * 3
    assert "\r" not in page.source  # a browser would read a bare one as a line feed
    assert len(page.root.find("script")) == 1
    assert not [e for e in page.root.find() for name in e.attributes if name.startswith("on")]
    assert "49" not in page.root.find("article")[0].text


def test_control_characters_are_shown_by_their_pictures(tmp_path: Path) -> None:
    page = page_of(tmp_path, scored(0, "a\x00b\x07\x7fc"))
    assert [panel.text for panel in page.root.find("div", cls="map")] == ["a␀b␇␡c"] * 3


def test_prompt_of_five_thousand_tokens(tmp_path: Path) -> None:
    text = " ".join(f"word{i}" for i in range(5000))
    example = scored(0, text, spans=[(2500, 2501), (3500, 3501)])
    propose_cuts(example, None, strategy="collective")
    page = page_of(tmp_path, example)
    assert [panel.text for panel in page.root.find("div", cls="map")] == [text] * 3
    shown = page.root.find("div", cls="candidate")[0]
    assert [cut.text for cut in shown.find("del")] == [" word2500", " word3500"]
    assert len(shown.text) < 200
    assert " word2499 word2500 word2501 " in shown.text


def test_struck_text_is_the_cut_and_underlined_text_the_spans(tmp_path: Path) -> None:
    text = "Sam has 40 apples, 5 of them small, and 4 pears. How many?"
    example = scored(3, text, spans=[(4, 8), (9, 11)])
    cuts = [[(18, 34)], [(0, 3), (41, 47)]]
    for one, reason in zip(cuts, (None, "student_wrong"), strict=True):
        add_cut(example, one, reason)
    page = page_of(tmp_path, example)
    for shown, made in zip(page.root.find("div", cls="candidate"), cuts, strict=True):
        assert shown.text == text
        assert [d.text for d in shown.find("del")] == [text[a:b] for a, b in made]
    maps = page.root.find("div", cls="map")
    for panel in maps:
        assert "".join(u.text for u in panel.find("u")) == " 5 of them small, 4 pears."
    struck = "".join(d.text for d in maps[2].find("del"))
    assert struck == text[0:3] + text[18:34] + text[41:47]
    assert not maps[0].find("del")


def test_a_cut_inside_a_word_or_number_is_remarked(tmp_path: Path) -> None:
    text = "Sam has 72 apples"
    example = scored(0, text)
    for one in ([(3, 7)], [(8, 9)], [(7, 10)], [(0, 1)]):
        add_cut(example, one)
    page = page_of(tmp_path, example, notes={"cut_inside_word": 2})
    cells = [shown.text for shown in page.root.find("tr", cls="kept")]
    assert ["cuts inside a word or number" in cell for cell in cells] == [False, True, False, True]
    assert "cuts that begin or end inside a word or number: 2" in page.root.text


def test_each_cut_shows_the_text_around_it_only(tmp_path: Path) -> None:
    text = " ".join(f"word{i}" for i in range(100))
    example = propose_cuts(scored(0, text, spans=[(10, 11), (50, 51), (90, 91)]), *[None] * 3)
    page = page_of(tmp_path, example)
    for shown, index in zip(page.root.find("div", cls="candidate"), (10, 50, 90), strict=True):
        assert f" word{index - 1} word{index} word{index + 1} " in shown.text
        assert len(shown.text) < 120
        kept = shown.text.replace(" […] ", "")
        assert all(word in text.split() for word in kept.split())  # no word is broken


def test_colors_and_exact_numbers_follow_the_values(tmp_path: Path) -> None:
    example = scored(0, "one two three")
    example.saliency = {
        "teacher": np.array([0.0, 0.5, 1.0], np.float32),
        "student": np.array([1.0, 0.25, 0.0], np.float32),
    }
    page = page_of(tmp_path, example)
    teacher, student, score = page.root.find("div", cls="map")
    assert [c.attributes["class"] for c in teacher.find("span")] == ["a0", "a10", f"a{LEVELS}"]
    assert [c.attributes["class"] for c in student.find("span")] == [f"a{LEVELS}", "a5", "a0"]
    assert [c.attributes["class"] for c in score.find("span")] == [f"b{LEVELS}", "b2", "b0"]
    titles = [c.attributes["title"] for c in score.find("span")]
    assert (
        titles[0]
        == "teacher 0.000 · student 1.000 · gap \N{MINUS SIGN}1.000 · score 0.000 · confounder"
    )
    assert titles[1] == "teacher 0.500 · student 0.250 · gap +0.250 · score 0.500"
    for cell in [*teacher.find("span"), *score.find("span")]:
        assert f".{cell.attributes['class']} {{ background" in page.source


def answer_columns(sample: Element) -> list[str]:
    head = sample.find("table", cls="answers")[0].find("thead")[0]
    titles = [cell.text for cell in head.find("th")]
    assert titles[0] == "Prompt" and titles[-1] == "Outcome"
    return [title.partition("\N{RIGHT SINGLE QUOTATION MARK}")[0] for title in titles[1:-1]]


def test_answers_verdicts_and_outcomes(tmp_path: Path) -> None:
    long = "Let us think step by step. " * 30 + "So it is <b>41</b>."
    answers: dict[Role, Answer] = {**RIGHT, "student": Answer(long, 90, "wrong")}
    example = scored(7, "one two three", answers=answers, spans=[(0, 1), (1, 2)])
    page = page_of(tmp_path, propose_cuts(example, None, "student_cut_off"))
    assert answer_columns(page.samples()[7]) == ["Teacher", "Student"]
    original, kept, dropped = page.root.find("table", cls="answers")[0].find("tbody")[0].find("tr")
    assert "✓ right" in original.text and "✗ wrong" in original.text and long in original.text
    assert original.find("summary")[0].text.endswith("So it is <b>41</b>.")
    assert "kept" in kept.text and "✗" not in kept.text
    assert "left out" in dropped.text and "student answer cut off" in dropped.text
    assert "not asked" in dropped.text  # the teacher is asked only where the student is right


def test_models_that_were_not_asked_have_no_column(tmp_path: Path) -> None:
    def unvalidated(**changes: Any) -> Example:
        example = scored(0, "one two", **changes)
        add_cut(example, [(0, 3)])
        example.candidates[0].answers = {}
        return example

    config = replace(CONFIG, validate="none", select="all")
    page = page_of(tmp_path / "all", unvalidated(answers={}), config=config)
    assert answer_columns(page.samples()[0]) == []
    assert "not asked" not in page.root.text and "the whole prompt" not in page.root.text
    page = page_of(tmp_path / "wrong", unvalidated(), config=replace(CONFIG, validate="none"))
    assert "not asked" not in page.root.text
    assert page.samples()[0].text.count("✗ wrong") == 1
    example = unvalidated(answers={})
    example.candidates[0].answers = {"teacher": RIGHT["teacher"]}
    config = replace(CONFIG, validate="teacher", select="all")
    page = page_of(tmp_path / "teacher", example, config=config)
    assert answer_columns(page.samples()[0]) == ["Teacher"]


def test_missing_numbers_answers_and_candidates(tmp_path: Path) -> None:
    flagged = scored(1, "one two", spans=[])
    flagged.score = np.full(2, np.nan, np.float32)
    empty = scored(2, "", spans=[], answers={"student": Answer("", 0, "no_answer")}, answer=None)
    samples = page_of(tmp_path, flagged, empty).samples()
    assert list(samples) == [1, 2]
    assert "No span was detected" in samples[1].text
    assert "score none" in (samples[1].find("span", cls="a0")[0].attributes["title"] or "")
    assert "(empty)" in samples[2].text and "Right answer" not in samples[2].text


def test_earlier_messages_are_shown_whole(tmp_path: Path) -> None:
    call = {"id": "c1", "arguments": {"city": "Ulm"}}
    before = [
        {"role": "system", "content": "Be brief."},
        {"role": "assistant", "content": "", "tool_calls": [call]},
    ]
    odd = {"role": "system", "content": "hm", "tool_calls": "text in place of a list"}
    page = page_of(
        tmp_path, scored(0, "one", before=before), scored(1, "two", before=[odd]), scored(2, "six")
    )
    samples = page.samples()
    shown = samples[0].find("details", cls="aside")[0].text
    for part in (
        "2 other messages of the prompt",
        "system Be brief.",
        "assistant",
        '"city": "Ulm"',
    ):
        assert part in shown
    assert "text in place of a list" in samples[1].text
    assert "of the prompt" not in samples[2].text


def test_empty_run(tmp_path: Path) -> None:
    page = page_of(tmp_path, stages=[], left=[], nll={})
    assert "No row was scored" in page.root.text
    assert "The funnel is empty" in page.root.text


def rows_that_left(count: int, stage: str, reason: str) -> list[Example]:
    rows = [Example(100 + i, ({"role": "user", "content": "x"},), "y") for i in range(count)]
    for row in rows:
        row.leave(stage, reason)
    return rows


def test_funnel_settings_and_losses(tmp_path: Path) -> None:
    rows = [propose_cuts(scored(i, "one two three four"), None) for i in range(2)]
    rows.append(add_cut(scored(2, "one two"), [(0, 3)], "student_wrong"))
    rows[2].leave("validate", "no_valid_cut")
    left = [
        *rows_that_left(2, "predict", "student_cut_off"),
        *rows_that_left(35, "mark", "student_right"),
    ]
    page = page_of(tmp_path, *rows, gone=left)
    lines = page.root.find("table", cls="stages")[0].find("tbody")[0].find("tr")
    assert [(line.find("th")[0].text, line.find("td")[0].text) for line in lines] == [
        ("rows in", "40"),
        ("usable: originals of the dataset", "40"),
        ("answered", "38"),
        ("marked: student wrong, teacher right", "3"),
        ("scored", "3"),
        ("with candidates", "3"),
        ("with counterfactuals", "2"),
        ("candidates", "3"),
        ("kept counterfactuals", "2"),
    ]
    reasons = [[item.text for item in line.find("li")] for line in lines]
    assert [reason for reason in reasons if reason] == [
        ["2 student answer cut off"],
        ["35 student right"],
        ["1 no valid cut"],
        ["1 student wrong"],
    ]
    widths = [line.find("rect")[0].attributes["width"] for line in lines]
    assert widths[:3] == ["100.00", "100.00", "95.00"] and widths[-2:] == ["100.00", "66.67"]
    facts = page.root.find("dl", cls="facts")[0].text
    for shown in ("models/tiny", "org/big", "data.jsonl", "score at most 0.1", "one span"):
        assert shown in facts
    for shown in ("The system prompts differ.", "2.13.0", "12.35", "arm span"):
        assert shown in page.root.text
    assert "teacher 0.25 on average, 0.25 at most" in page.root.text
    assert page.samples()[0].text.count("teacher 0.25, student 1.5 nats a token") == 1


@pytest.mark.parametrize(
    ("changes", "phrases"),
    [
        ({"strategy": "student_saliency"}, ["tokens of the highest student saliency (a control)"]),
        ({"strategy": "perplexity"}, ["tokens of the highest perplexity (a control)"]),
        ({"rule": "quantile"}, ["lowest 10% of tokens, score at most 0.5"]),
        ({"teacher_max": 0.3, "validate": "none"}, ["at most 0.3", "every cut is kept"]),
        ({"dataset": ""}, ["rows in memory"]),
    ],
)
def test_settings_are_phrased(
    tmp_path: Path, changes: Mapping[str, Any], phrases: list[str]
) -> None:
    config: DetectConfig = replace(CONFIG, **changes)
    facts = page_of(tmp_path, scored(0, "one"), config=config).root.find("dl", cls="facts")[0].text
    for phrase in phrases:
        assert phrase in facts


def test_nothing_that_a_run_holds_becomes_markup(tmp_path: Path) -> None:
    evil = "<img src=x onerror=alert(1)>'\""
    answers: dict[Role, Answer] = {
        "teacher": Answer(evil * 20, 1, evil),
        "student": Answer(evil, 1, evil),
    }
    before = [{"role": evil, "content": evil}]
    example = scored(0, evil, completion=evil, answer=evil, answers=answers, before=before)
    example.candidates = propose_cuts(scored(0, evil), evil).candidates
    config = replace(CONFIG, student=evil, teacher=evil, dataset=evil)
    settings = {**vars(config), "strategy": evil, "validate": evil, evil: {evil: evil}}
    page = page_of(
        tmp_path,
        example,
        config=config,
        arm=evil,
        stages=[{"stage": evil, "rows": 1, "unit": evil}],
        left=[{"stage": evil, "reason": evil, "count": 1, "unit": evil}],
        settings=settings,
        notes={evil: 1},
        nll={evil: {"mean": 1.0, "max": 1.0}},
        templates=[evil],
        versions={evil: evil},
    )
    assert not page.root.find("img") and "<img" not in page.source
    assert page.root.text.count(evil) > 40


def test_page_is_one_file_that_fetches_nothing_and_repeats(tmp_path: Path) -> None:
    rows = [propose_cuts(scored(i, "https://example.org/x.js and one"), None) for i in range(3)]
    arm = write_run(tmp_path / "run", rows)
    first = write_report(tmp_path / "run")
    second = write_report(arm, output=tmp_path / "elsewhere" / "page.html")
    assert first == arm / "report.html" and first.read_bytes() == second.read_bytes()
    assert write_report(arm) == first  # an earlier page is replaced
    page = Page(first)
    fetching = {"link", "img", "iframe", "object", "embed", "base", "form", "image"}
    for element in page.root.find():
        assert element.tag not in fetching
        assert not {"src", "srcset", "action", "data"} & set(element.attributes)
        assert (element.attributes.get("href") or "#").startswith("#")
    style = page.root.find("style")[0].text
    assert "url(" not in style and "@import" not in style and "http" not in style
    assert "http" not in page.root.find("script")[0].text
    policy = page.root.find("meta", http_equiv="Content-Security-Policy")[0].attributes["content"]
    assert policy is not None and policy.startswith("default-src 'none'")


def test_choice_of_rows(tmp_path: Path) -> None:
    rows = [scored(i, "one two three") for i in range(10, 14)]
    add_cut(rows[1], [(0, 3)], "student_wrong")
    add_cut(add_cut(rows[2], [(0, 3)], "student_wrong"), [(3, 7)])
    add_cut(rows[3], [(0, 3)])
    arm = write_run(tmp_path, rows)
    assert list(Page(write_report(arm)).samples()) == [12, 13, 11, 10]
    assert list(Page(write_report(arm, samples=1)).samples()) == [12]
    assert list(Page(write_report(arm, row_ids=[11, 10, 11])).samples()) == [11, 10]
    assert Page(write_report(arm, samples=0)).samples() == {}
    assert choose(["kept"] * 30 + ["rejected"] * 30, 20) == [*range(15), *range(30, 35)]
    with pytest.raises(
        ValueError, match=r"^row_ids \(--row\): must be of the 4 scored rows .*, got 99;"
    ):
        write_report(arm, row_ids=[99])
    with pytest.raises(ValueError, match=r"^samples: must be 0 or more, got -1;"):
        write_report(arm, samples=-1)


def test_arms_side_by_side_are_named(tmp_path: Path) -> None:
    first = write_run(tmp_path, [scored(0, "one")])
    second = write_run(tmp_path, [scored(0, "one")], config=replace(CONFIG, threshold=0.2))
    with pytest.raises(ValueError, match="must have one arm, got 2"):
        write_report(tmp_path)
    assert "arm span-threshold-0.2" in Page(write_report(second)).root.text
    assert "arm span-threshold" not in Page(write_report(first)).root.text


def test_an_arm_is_found_from_inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arm = write_run(tmp_path, [scored(0, "one")])
    monkeypatch.chdir(arm)
    assert write_report(".").samefile(arm / "report.html")


def test_a_page_that_cannot_be_written_is_a_sentence(tmp_path: Path) -> None:
    arm = write_run(tmp_path, [scored(0, "one")])
    with pytest.raises(StoreError, match=r"funnel\.json.* must be a place to write to"):
        write_report(arm, output=arm / "funnel.json" / "report.html")
    os.mkfifo(tmp_path / "pipe")
    for name in ("pipe", "", "."):
        with pytest.raises(ValueError, match=r"^output: must be a"):
            write_report(arm, output=tmp_path / name)
    with pytest.raises(ValueError, match=r"^output: must be a file, got ''"):
        write_report(arm, output="")
    assert (tmp_path / "pipe").is_fifo()
    before = (arm / "samples.parquet").read_bytes()
    with pytest.raises(ValueError, match=r"^output: must be a new file or an earlier report"):
        write_report(arm, output=arm / "samples.parquet")
    assert (arm / "samples.parquet").read_bytes() == before


def test_text_that_utf8_cannot_hold_is_replaced(tmp_path: Path) -> None:
    arm = write_run(tmp_path, [scored(0, "one")])
    path = arm / "funnel.json"
    summary = json.loads(path.read_text())
    path.write_text(json.dumps({**summary, "templates": ["broken \ud800 text"]}))
    assert "broken ? text" in Page(write_report(arm)).root.text
