"""The report on prompts and beginnings of responses, several turns, other edits and scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import detect_pair
import pyarrow.parquet as pq
import pytest
from html_page import Element, Page
from report_run import CONFIG, add_cut, judge, scored, write_run

from leaf_distill.data.example import Example, Range
from leaf_distill.detection.config import DetectConfig
from leaf_distill.detection.counterfactual import changed
from leaf_distill.detection.pipeline import detect
from leaf_distill.report import write_report


def page_of(root: Path, *examples: Example, **changes: Any) -> Page:
    """The page of a run with changed settings."""
    arm = write_run(root, examples, config=replace(CONFIG, **changes))
    return Page(write_report(arm))


def beginning(row_id: int, prefix: str, segment: int = 1, **columns: Any) -> Example:
    """A beginning of a response, as a view of a row."""
    view = scored(row_id, prefix, **columns)
    view.messages = ({"role": "user", "content": "How many?"},)
    view.prefix, view.segment, view.completion = prefix, segment, " So it is 36."
    return view


def substitute(example: Example, ranges: Sequence[Range], texts: Sequence[str]) -> Example:
    """Add a kept candidate in which other texts stand in place of ranges."""
    candidate = changed(example, ranges, texts)
    candidate.candidate_id, candidate.cut = len(example.candidates), tuple(ranges)
    candidate.inserted, candidate.strategy = tuple(texts), "span"
    judge(candidate, None)
    example.candidates.append(candidate)
    return example


def names_of(article: Element) -> list[str]:
    return [level.text for level in article.find("b", cls="level")]


def test_the_levels_of_a_row_stand_together(tmp_path: Path) -> None:
    rows = [
        add_cut(scored(4, "one two three"), [(0, 3)], "student_wrong"),
        add_cut(beginning(4, "Let us see."), [(0, 3)]),
        beginning(4, "Let us see. Tom has 4.", 2),
        scored(5, "four five"),
    ]
    page = page_of(tmp_path, *rows, level="both", segments=3)
    samples = page.samples()
    assert list(samples) == [4, 5]
    assert names_of(samples[4]) == ["Prompt", "Response, segment 1", "Response, segments 1 to 2"]
    assert names_of(samples[5]) == ["Prompt"]
    assert samples[4].attributes["data-group"] == "kept"
    assert samples[4].find("header")[0].text.strip().startswith("Row 4\n1 of 2 counterfactuals")
    texts = [panel.text for panel in samples[4].find("div", cls="map")]
    assert texts[::3] == ["one two three", "Let us see.", "Let us see. Tom has 4."]
    heads = [table.find("th")[0].text for table in samples[4].find("table")]
    assert heads == ["Prompt", "Beginning of the response", "Beginning of the response"]
    asides = [aside.find("summary")[0].text for aside in samples[4].find("details", cls="aside")]
    assert sum("The prompt, 1 message" in aside for aside in asides) == 2
    assert sum("The rest of the response" in aside for aside in asides) == 2
    assert "2 of 2 scored rows" in page.root.text


def test_prompt_is_open_above_a_response_that_stands_alone(tmp_path: Path) -> None:
    views = [beginning(0, "Let us see."), beginning(0, "Let us see. Tom has 4.", 2)]
    page = page_of(tmp_path, *views, level="response")
    asides = page.samples()[0].find("details", cls="aside")
    opened = [aside.find("summary")[0].text for aside in asides if "open" in aside.attributes]
    assert opened == ["The prompt, 1 message"]
    assert "How many?" in page.samples()[0].text


def test_an_answer_that_is_the_completion_is_not_repeated(tmp_path: Path) -> None:
    whole = "Let us see. So it is 36."
    page = page_of(tmp_path, beginning(0, "Let us see.", answer=whole), level="response")
    assert "Right answer" not in page.root.text


def test_a_substitute_stands_behind_the_struck_text(tmp_path: Path) -> None:
    text = "Sam has 40 apples, and 4 pears."
    example = substitute(scored(0, text), [(4, 7), (11, 17)], ["buys", "stones"])
    page = page_of(tmp_path, example, edit="substitute")
    shown = page.root.find("div", cls="candidate")[0]
    assert [one.text for one in shown.find("del")] == ["has", "apples"]
    assert [one.text for one in shown.find("ins")] == ["buys", "stones"]
    kept = "".join(c if isinstance(c, str) else c.text for c in shown.children if not _is_del(c))
    assert kept == example.candidates[0].text == "Sam buys 40 stones, and 4 pears."
    assert [panel.text for panel in page.root.find("div", cls="map")] == [text] * 3
    facts = page.root.find("dl", cls="facts")[0].text
    assert "replaced by words of the same class, up to 3 times" in facts
    assert "what stands in its place" in page.root.text


def _is_del(child: Element | str) -> bool:
    return isinstance(child, Element) and child.tag == "del"


def test_user_turns_are_named_where_they_begin(tmp_path: Path) -> None:
    before = [
        {"role": "user", "content": "one two"},
        {"role": "assistant", "content": "Good."},
    ]
    example = scored(0, "three four", before=before)
    example.turns = (0, 2)
    whole = scored(0, example.text)
    for name in ("offsets", "slot", "prunable", "saliency", "score", "confounder"):
        setattr(example, name, getattr(whole, name))
    candidate = changed(example, [(4, 7)])
    candidate.candidate_id, candidate.cut, candidate.strategy = 0, ((4, 7),), "span"
    judge(candidate, None)
    example.candidates.append(candidate)
    page = page_of(tmp_path, example)
    for panel in page.root.find("div", cls="map"):
        assert panel.text == "one twothree four"
        marks = panel.find("span", cls="turn")
        assert [mark.attributes["data-name"] for mark in marks] == ["user turn 1", "user turn 2"]
    assert len(page.root.find("div", cls="candidate")[0].find("span", cls="turn")) == 2
    aside = page.root.find("details", cls="aside")[0].text
    assert "1 other message of the prompt" in aside and "assistant Good." in aside


@pytest.mark.parametrize(
    ("changes", "legend", "end"),
    [
        ({}, "Score: gap of the gradients", "student only"),
        ({"score": "lens"}, "Score: lens", "models differ most"),
        ({"score": "intervention"}, "Score: intervention", "student changes most"),
    ],
)
def test_the_scale_names_its_score(
    tmp_path: Path, changes: dict[str, Any], legend: str, end: str
) -> None:
    page = page_of(tmp_path, scored(0, "one"), **changes)
    scale = page.root.find("div", cls="legend")[0].find("figure")[1]
    assert scale.find("figcaption")[0].text.startswith(legend)
    assert scale.find("p", cls="ends")[0].text.startswith(end)


@pytest.mark.parametrize(
    ("strategy", "chosen"),
    [
        ("random_tokens", "tokens that are drawn at random"),
        ("random_spans", "runs of tokens at random places"),
        ("student_saliency", "loss reacts most, as many as the score flags"),
        ("teacher_saliency", "loss reacts least, as many as the score flags"),
        ("perplexity", "the tokens that the student finds least likely"),
    ],
)
def test_a_control_says_what_it_cuts_and_that_this_is_not_what_the_score_found(
    tmp_path: Path, strategy: str, chosen: str
) -> None:
    row = add_cut(scored(0, "one two three"), [(8, 13)])
    page = page_of(tmp_path, row, strategy=strategy)
    head = page.root.find("header", cls="title")[0].text
    assert "To compare with, " in head and chosen in head and "A control: " in head
    assert "mislead" not in head and "sway" not in head
    caption = page.samples()[0].find("figcaption", cls="readout")[0].text
    assert "The control cuts tokens of its own choice (struck through)" in caption
    assert "takes only the number of tokens from it" in page.root.text


@pytest.mark.parametrize("strategy", ["span", "collective"])
def test_an_arm_that_cuts_what_the_score_found_is_no_control(tmp_path: Path, strategy: str) -> None:
    text = page_of(tmp_path, scored(0, "one two"), strategy=strategy, score="lens").root.text
    assert "Tokens that mislead the student" in text
    assert "whose probability the two models judge most differently are cut out" in text
    assert "To compare with" not in text and "The control" not in text


def test_both_thresholds_stand_on_the_scale(tmp_path: Path) -> None:
    page = page_of(tmp_path, scored(0, "one"), level="both")
    cutoffs = [one.text for one in page.root.find("span", cls="cutoff")]
    assert cutoffs == ["0.1", "0.15"]
    assert "at most 0.1 in prompts and 0.15 in responses" in page.root.text
    page = page_of(tmp_path / "response", scored(0, "one"), level="response")
    assert [one.text for one in page.root.find("span", cls="cutoff")] == ["0.15"]


def test_settings_that_are_not_the_defaults_are_listed(tmp_path: Path) -> None:
    page = page_of(tmp_path, scored(0, "one"))
    assert "Not the defaults" not in page.root.text
    page = page_of(tmp_path / "changed", scored(0, "one"), threshold=0.2, widen="clause")
    facts = page.root.find("dl", cls="facts")[0].text
    assert "Not the defaults" in facts and "threshold 0.2, widen clause" in facts
    assert "whole clauses" in facts


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"cross_branch": True}, "the teacher alone reads the changed one."),
        ({"relabel": True}, "if the grader finds it right."),
        (
            {"relabel": True, "guard": "agreement", "agreement": 7},
            "if most of 7 further answers agree with it.",
        ),
    ],
)
def test_what_training_reads_is_said(
    tmp_path: Path, changes: dict[str, Any], sentence: str
) -> None:
    title = page_of(tmp_path, scored(0, "one"), **changes).root.find("header", cls="title")[0]
    assert sentence in title.text
    plain = page_of(tmp_path / "plain", scored(0, "one")).root.find("header", cls="title")[0]
    assert not plain.find("p", cls="note")


def test_a_text_that_is_not_of_its_messages_is_refused(tmp_path: Path) -> None:
    arm = write_run(tmp_path, [scored(0, "one two")])
    table = pq.read_table(arm / "samples.parquet")
    at = table.schema.get_field_index("text")
    pq.write_table(table.set_column(at, "text", [["six"]]), arm / "samples.parquet")
    with pytest.raises(ValueError, match=r"row 0 has a text that is not of its messages"):
        write_report(arm)


def test_a_real_run_at_both_levels_with_substitutes(
    tmp_path: Path,
    pair: dict[str, str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = []
    for row in detect_pair.make_rows(16):
        response = f"ann has {row['answer']} apples . the sticker says two . {row['answer']}"
        rows.append({**row, "completion": response})
    config = DetectConfig(
        **pair,
        dataset=detect_pair.write_rows(tmp_path / "rows.jsonl", rows),
        output_dir=str(tmp_path / "run"),
        cache_dir=str(tmp_path / "cache"),
        grade="number",
        max_new_tokens=8,
        level="both",
        edit="substitute",
        threshold=0.2,
    )
    monkeypatch.setenv("COLUMNS", "80")
    result = detect(config)
    printed = capsys.readouterr().out.splitlines()
    assert any(line.startswith("beginnings of responses that left: ") for line in printed)
    assert max(len(line) for line in printed if str(tmp_path) not in line) <= 80
    lines = pq.read_table(result.samples).to_pylist()
    page = Page(write_report(result.arm, samples=100))
    for row_id, article in page.samples().items():
        views = [line for line in lines if line["row_id"] == row_id]
        texts = [panel.text for panel in article.find("div", cls="map")]
        assert texts[::3] == [view["text"] for view in views]
        found = [new.text for new in article.find("ins")]
        assert found == [
            new for view in views for one in view["candidates"] for new in one["inserted"]
        ]
        # The models answered the whole prompt before the row was divided into levels.
        assert "wrong" in article.find("tbody")[0].find("tr")[0].text
    assert page.root.find("ins")


def test_levels_that_left_are_said_apart_from_the_rows(tmp_path: Path) -> None:
    left = [
        {"stage": "mark", "reason": "student_right", "count": 3, "unit": "rows"},
        {"stage": "mark", "reason": "student_right", "count": 8, "unit": "beginnings"},
        {"stage": "validate", "reason": "no_valid_cut", "count": 2, "unit": "prompts"},
    ]
    arm = write_run(tmp_path, [scored(0, "one")], config=replace(CONFIG, level="both"), left=left)
    page = Page(write_report(arm))
    items = [item.text for item in page.root.find("table", cls="stages")[0].find("li")]
    assert items == ["3 student right"]
    assert "Prompts that left: 2 no valid cut." in page.root.text
    assert "Beginnings of responses that left: 8 student right." in page.root.text
    assert (
        "may"
        not in Page(write_report(write_run(tmp_path / "plain", [scored(0, "one")])))
        .root.find("section")[0]
        .text
    )


def test_the_original_has_a_line_only_where_it_was_answered(tmp_path: Path) -> None:
    example = add_cut(scored(0, "one two", answers={}), [(0, 3)])
    page = page_of(tmp_path, example, select="all")
    assert "the whole prompt" not in page.root.text and page.root.find("tr", cls="kept")
    asked = add_cut(scored(0, "one two"), [(0, 3)])
    assert "the whole prompt" in page_of(tmp_path / "asked", asked).root.text
