"""The report page: every character shown, cuts struck through, nothing injected or fetched."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from html_page import Page

from leaf_distill.detection.output import SAMPLES
from leaf_distill.io import StoreError
from leaf_distill.report import write_report
from leaf_distill.report.data import choose
from leaf_distill.report.heat import LEVELS

REPLIES = [f"{model}_{part}" for model in ("teacher", "student") for part in ("answer", "verdict")]
FUNNEL: dict[str, Any] = {
    "stages": [
        {"stage": "rows in", "rows": 40, "unit": "rows"},
        {"stage": "answered", "rows": 38, "unit": "rows"},
        {"stage": "marked: student wrong, teacher right", "rows": 3, "unit": "rows"},
        {"stage": "candidates", "rows": 8, "unit": "candidates"},
        {"stage": "kept counterfactuals", "rows": 2, "unit": "candidates"},
    ],
    "left": [
        {"stage": "predict", "reason": "student_cut_off", "count": 2, "unit": "rows"},
        {"stage": "mark", "reason": "student_right", "count": 35, "unit": "rows"},
        {"stage": "validate", "reason": "student_wrong", "count": 6, "unit": "candidates"},
    ],
    "settings": {"student": "/home/me/models/tiny", "teacher": "org/big", "dataset": "data.jsonl",
                 "threshold": 0.1, "rule": "absolute", "strategy": "span", "validate": "both"},
    "templates": ["The system prompts differ."],
    "versions": {"torch": "2.13.0"},
    "seconds": {"predict": 12.345678},
}  # fmt: skip


def candidate(cut: Sequence[Sequence[int]], *, kept: bool, reason: str = "") -> dict[str, Any]:
    return {
        "cut": [list(part) for part in cut],
        "teacher_answer": "36",
        "student_answer": "36" if kept else "41",
        "teacher_verdict": "right",
        "student_verdict": "right" if kept else "wrong",
        "kept": kept,
        "reason": reason,
    }


def row(row_id: int, text: str, **changes: Any) -> dict[str, Any]:
    """A row as stage 1 stores it: words with their leading space as tokens."""
    offsets = [list(match.span()) for match in re.finditer(r"\s*\S+|\s+", text)]
    count = len(offsets)
    made = {
        "row_id": row_id,
        "messages": [{"role": "user", "content": text}],
        "user_text": text,
        "completion": "The answer is 36.",
        "answer": "36",
        "offsets": offsets,
        "teacher_saliency": [i / max(count - 1, 1) for i in range(count)],
        "student_saliency": [1 - i / max(count - 1, 1) for i in range(count)],
        "score": [i / max(count - 1, 1) for i in range(count)],
        "confounder": [i == 0 for i in range(count)],
        "prunable": [not text[start:stop].isspace() for start, stop in offsets],
        "spans": offsets[:1],
        "teacher_answer": "36",
        "student_answer": "41",
        "teacher_verdict": "right",
        "student_verdict": "wrong",
        "candidates": [],
    }
    return {**made, **changes}


def run_directory(root: Path, rows: list[dict[str, Any]], **files: Any) -> Path:
    root.mkdir(exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=SAMPLES), root / "samples.parquet")
    for name, value in {"funnel": FUNNEL, **files}.items():
        (root / f"{name}.json").write_text(json.dumps(value), encoding="utf-8")
    return root


HARD_TEXTS = {
    "plain": "Sam has 40 apples.  Five are small. How many?",
    "newlines": "\n\nline one\r\n\tline two\n\n  end  \n",
    "markup": "<script>alert(1)</script></div></del>&amp;&lt; \" onclick='x' {{ 7*7 }} {% raw %}",
    "unicode": "e\u0301 👩‍👩‍👧 \U0001d518 漢字 \u200b zero",
    "right to left": "כמה תפוחים יש \u202e לי? كم تفاحة؟",
}


@pytest.mark.parametrize("text", HARD_TEXTS.values(), ids=HARD_TEXTS)
def test_every_character_is_shown_in_all_three_maps(tmp_path: Path, text: str) -> None:
    page = Page(write_report(run_directory(tmp_path, [row(0, text)])))
    assert [panel.text for panel in page.root.find("div", cls="map")] == [text] * 3
    assert "\r" not in page.source  # a browser would read a bare one as a line feed
    assert len(page.root.find("script")) == 1
    assert not [e for e in page.root.find() for name in e.attributes if name.startswith("on")]
    assert "49" not in page.root.find("article")[0].text


def test_control_characters_are_shown_by_their_pictures(tmp_path: Path) -> None:
    page = Page(write_report(run_directory(tmp_path, [row(0, "a\x00b\x07\x7fc")])))
    assert [panel.text for panel in page.root.find("div", cls="map")] == ["a␀b␇␡c"] * 3


def test_prompt_of_five_thousand_tokens(tmp_path: Path) -> None:
    text = " ".join(f"word{i}" for i in range(5000))
    cut = [[text.index(f" word{i}"), text.index(f" word{i}") + 9] for i in (2500, 3500)]
    rows = [row(0, text, spans=cut, candidates=[candidate(cut, kept=True)])]
    page = Page(write_report(run_directory(tmp_path, rows)))
    assert [panel.text for panel in page.root.find("div", cls="map")] == [text] * 3
    shown = page.root.find("div", cls="candidate")[0]
    assert [cut.text for cut in shown.find("del")] == [" word2500", " word3500"]
    assert len(shown.text) < 1000
    assert " word2499 word2500 word2501 " in shown.text


def test_struck_text_is_the_cut_and_underlined_text_the_spans(tmp_path: Path) -> None:
    text = "Sam has 40 apples, 5 of them small, and 4 pears. How many?"
    spans = [[18, 34], [40, 47]]
    candidates = [candidate(spans[:1], kept=True), candidate([[0, 3], [41, 47]], kept=False)]
    page = Page(
        write_report(run_directory(tmp_path, [row(3, text, spans=spans, candidates=candidates)]))
    )
    for shown, made in zip(page.root.find("div", cls="candidate"), candidates, strict=True):
        assert shown.text == text
        assert [d.text for d in shown.find("del")] == [text[a:b] for a, b in made["cut"]]
    maps = page.root.find("div", cls="map")
    for panel in maps:
        assert "".join(u.text for u in panel.find("u")) == "".join(text[a:b] for a, b in spans)
    struck = "".join(d.text for d in maps[2].find("del"))
    assert struck == text[0:3] + text[18:34] + text[41:47]
    assert not maps[0].find("del")


def test_colors_and_exact_numbers_follow_the_values(tmp_path: Path) -> None:
    changes = {
        "teacher_saliency": [0.0, 0.5, 1.0],
        "student_saliency": [1.0, 0.25, 0.0],
        "score": [0.0, 0.5, 1.0],
        "confounder": [True, False, False],
    }
    page = Page(write_report(run_directory(tmp_path, [row(0, "one two three", **changes)])))
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


def test_answers_verdicts_and_fates(tmp_path: Path) -> None:
    long = "Let us think step by step. " * 30 + "So it is <b>41</b>."
    rows = [
        row(
            7,
            "one two three",
            student_answer=long,
            candidates=[
                candidate([[0, 3]], kept=True),
                candidate([[3, 7]], kept=False, reason="student_cut_off"),
            ],
        )
    ]
    page = Page(write_report(run_directory(tmp_path, rows)))
    original, kept, dropped = page.root.find("table", cls="answers")[0].find("tbody")[0].find("tr")
    assert "✓ right" in original.text and "✗ wrong" in original.text and long in original.text
    assert original.find("summary")[0].text.endswith("So it is <b>41</b>.")
    assert "kept" in kept.text and "✗" not in kept.text
    assert "left out" in dropped.text and "student answer cut off" in dropped.text


def test_missing_answers_scores_and_candidates(tmp_path: Path) -> None:
    nothing = dict.fromkeys(REPLIES)
    unvalidated = {**candidate([[0, 3]], kept=True), **nothing, "reason": None}
    flagged = {
        name: [None, float("nan")] for name in ("teacher_saliency", "student_saliency", "score")
    }
    rows = [
        row(0, "one two", **nothing, answer=None, candidates=[unvalidated]),
        row(1, "one two", spans=[], candidates=None, **flagged),
        row(2, "", offsets=[], spans=[], student_answer=""),
    ]
    page = Page(write_report(run_directory(tmp_path, rows)))
    samples = page.samples()
    assert list(samples) == [0, 1, 2]
    assert samples[0].text.count("not asked") == 4
    assert "No span was detected" in samples[1].text
    assert "(empty)" in samples[2].text


def test_empty_run(tmp_path: Path) -> None:
    page = Page(write_report(run_directory(tmp_path, [], funnel={"stages": [], "left": []})))
    assert "No row was scored" in page.root.text
    assert "The funnel is empty" in page.root.text


def test_funnel_and_settings(tmp_path: Path) -> None:
    page = Page(write_report(run_directory(tmp_path, [row(0, "one")])))
    lines = page.root.find("table", cls="funnel")[0].find("tbody")[0].find("tr")
    shown = [line.find("th")[0].text for line in lines]
    assert shown == [stage["stage"] for stage in FUNNEL["stages"]]
    assert [[item.text for item in line.find("li")] for line in lines] == [
        [],
        ["2 student answer cut off"],
        ["35 student right"],
        [],
        ["6 student wrong"],
    ]
    widths = [line.find("rect")[0].attributes["width"] for line in lines]
    assert widths == ["100.00", "95.00", "7.50", "100.00", "25.00"]
    facts = page.root.find("dl", cls="facts")[0].text
    for shown in ("models/tiny", "org/big", "data.jsonl", "score at most 0.1"):
        assert shown in facts
    for shown in ("The system prompts differ.", "2.13.0", "12.35"):
        assert shown in page.root.text


def test_results_of_distillation_and_evaluation(tmp_path: Path) -> None:
    log = [{"step": 5, "kd_loss": 0.8, "cd_loss": 0.4}, {"step": 10, "kd_loss": 0.4}, {"epoch": 1}]
    found = {
        "leaf": {"rows": {"originals": 30, "counterfactuals": 12}, "log": log},
        "eval": {"rows": 1600, "accuracy": 0.75, "interval": [0.5, 0.9],
                 "counts": {"right": 1200, "no_answer": 400}},
        "other": {"something": 1},
    }  # fmt: skip
    directory = run_directory(tmp_path, [row(0, "one")])
    assert "Distillation" not in Page(write_report(directory)).root.text
    for name, metrics in found.items():
        (directory / name).mkdir()
        (directory / name / "metrics.json").write_text(json.dumps(metrics), encoding="utf-8")
    page = Page(write_report(directory))
    caption = page.root.find("figure", cls="curve")[0].find("figcaption")[0].text
    assert "30 originals and 12 counterfactuals" in caption and "originals 0.8 to 0.4" in caption
    points = [line.attributes["points"] for line in page.root.find("polyline")]
    assert points == ["0.00,0.00 100.00,50.00", "0.00,50.00"]
    line = page.root.find("table", cls="funnel")[1].find("tbody")[0]
    assert "75.0%" in line.text and "1,600 rows" in line.text and "400 no answer" in line.text
    assert line.find("svg")[0].attributes["aria-label"] == "50.0 to 90.0 percent"


def test_nothing_that_a_run_holds_becomes_markup(tmp_path: Path) -> None:
    evil = "<img src=x onerror=alert(1)>'\""
    settings = dict.fromkeys(("student", "teacher", "dataset", "strategy", "validate", evil), evil)
    funnel = {
        "stages": [{"stage": evil, "rows": 1}],
        "left": [{"stage": evil, "reason": evil, "count": 1}],
        "settings": {**settings, "threshold": 0.1},
        "templates": [evil],
        "versions": {evil: evil},
    }
    hostile = {
        **row(0, evil, completion=evil, answer=evil, **dict.fromkeys(REPLIES, evil)),
        "messages": [{"role": evil, "content": evil}, {"role": "user", "content": evil}],
        "candidates": [
            {**candidate([[0, 4]], kept=False, reason=evil), "teacher_answer": evil * 20}
        ],
    }
    page = Page(write_report(run_directory(tmp_path, [hostile], funnel=funnel)))
    assert not page.root.find("img") and "<img" not in page.source
    assert page.root.text.count(evil) > 40


def test_page_is_one_file_that_fetches_nothing_and_repeats(tmp_path: Path) -> None:
    rows = [row(i, "https://example.org/x.js and one", candidates=[candidate([[0, 5]], kept=True)])
            for i in range(3)]  # fmt: skip
    directory = run_directory(tmp_path / "run", rows)
    first = write_report(directory)
    second = write_report(directory, output=tmp_path / "elsewhere" / "page.html")
    assert first == directory / "report.html" and first.read_bytes() == second.read_bytes()
    page = Page(first)
    for element in page.root.find():
        assert element.tag not in {
            "link",
            "img",
            "iframe",
            "object",
            "embed",
            "base",
            "form",
            "image",
        }
        assert not {"src", "href", "srcset", "action", "data"} & set(element.attributes)
    style = page.root.find("style")[0].text
    assert "url(" not in style and "@import" not in style and "http" not in style
    assert "http" not in page.root.find("script")[0].text
    policy = page.root.find("meta", http_equiv="Content-Security-Policy")[0].attributes["content"]
    assert policy is not None and policy.startswith("default-src 'none'")


def test_choice_of_rows(tmp_path: Path) -> None:
    cut = [[0, 3]]
    rows = [row(i, "one two") for i in range(10, 14)]
    rows[1]["candidates"] = [candidate(cut, kept=False)]
    rows[2]["candidates"] = [candidate(cut, kept=False), candidate(cut, kept=True)]
    rows[3]["candidates"] = [candidate(cut, kept=True)]
    directory = run_directory(tmp_path, rows)
    assert list(Page(write_report(directory)).samples()) == [12, 13, 11, 10]
    assert list(Page(write_report(directory, samples=1)).samples()) == [12]
    assert list(Page(write_report(directory, row_ids=[11, 10, 11])).samples()) == [11, 10]
    assert Page(write_report(directory, samples=0)).samples() == {}
    assert choose(["kept"] * 30 + ["rejected"] * 30, 20) == [*range(15), *range(30, 35)]
    with pytest.raises(ValueError, match=r"row_ids: row 99 is not in .*samples\.parquet"):
        write_report(directory, row_ids=[99])
    with pytest.raises(ValueError, match="samples must be 0 or more"):
        write_report(directory, samples=-1)


def test_what_is_not_a_run_directory_is_said(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="is not a directory"):
        write_report(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"has no funnel\.json"):
        write_report(tmp_path)
    directory = run_directory(tmp_path / "run", [row(0, "one")])
    samples = directory / "samples.parquet"
    good = samples.read_bytes()
    samples.unlink()
    with pytest.raises(FileNotFoundError, match=r"has no samples\.parquet"):
        write_report(directory)
    samples.write_bytes(good[:50])
    with pytest.raises(ValueError, match=r"samples\.parquet cannot be read"):
        write_report(directory)
    pq.write_table(pa.table({"row_id": [1]}), samples)
    with pytest.raises(ValueError, match="has no column messages, user_text"):
        write_report(directory)
    samples.write_bytes(good)
    (directory / "funnel.json").write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match=r"funnel\.json is not valid JSON"):
        write_report(directory)


def test_a_page_that_cannot_be_written_is_a_sentence(tmp_path: Path) -> None:
    directory = run_directory(tmp_path / "run", [row(0, "one")])
    with pytest.raises(StoreError, match=r"funnel\.json.* could not be written: .*done stays"):
        write_report(directory, output=directory / "funnel.json" / "report.html")
    with pytest.raises(StoreError, match="could not be written"):
        write_report(directory, output=tmp_path)
