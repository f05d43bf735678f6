"""The overview in front of the samples: its numbers are those of the files."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from html_page import Element, Page
from report_run import CONFIG, add_cut, scored, write_run

from leaf_distill.demo.run import MIX, detection_config, write_problems
from leaf_distill.demo.task import make_problems
from leaf_distill.detection.pipeline import detect
from leaf_distill.evaluation.charts import COLORS, INK, QUIET, RULE
from leaf_distill.io import write_json
from leaf_distill.report import write_report
from leaf_distill.statistics import wilson_interval

ROWS = 80


@pytest.fixture(scope="module")
def arms(tmp_path_factory: pytest.TempPathFactory) -> dict[float, Path]:
    """Two arms of the embedded pair on the same rows, by threshold."""
    root = tmp_path_factory.mktemp("run")
    rows = write_problems(root / "rows.jsonl", make_problems(ROWS, seed=3, mix=MIX))
    config = detection_config(rows, root)
    return {one: detect(replace(config, threshold=one)).arm for one in (0.1, 0.3)}


@pytest.fixture(scope="module")
def page(arms: dict[float, Path]) -> Page:
    return Page(write_report(arms[0.1]))


def page_of(root: Path, *examples: Any, **settings: Any) -> Page:
    return Page(write_report(write_run(root, examples, **settings)))


def samples_of(arm: Path) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = pq.read_table(arm / "samples.parquet").to_pylist()
    return lines


def stages_of(arm: Path) -> dict[str, int]:
    stages = json.loads((arm / "funnel.json").read_text())["stages"]
    return {stage["stage"]: stage["rows"] for stage in stages}


def tables(page: Page, cls: str) -> list[list[list[str]]]:
    """The cells of each table of a class, without its head."""
    return [
        [
            [cell.text.strip() for cell in line.children if isinstance(cell, Element)]
            for line in table.find("tbody")[0].find("tr")
        ]
        for table in page.root.find("table", cls=cls)
    ]


def bars(figure: Element) -> list[tuple[str, int]]:
    """The range and the number of each bar, from the table below a histogram."""
    (table,) = figure.find("table", cls="plain")
    lines = table.find("tbody")[0].find("tr")
    return [(one.find("th")[0].text, int(one.find("td")[0].text.replace(",", ""))) for one in lines]


def marked(figure: Element) -> list[int]:
    """The marked part of each bar, from the same table."""
    (table,) = figure.find("table", cls="plain")
    lines = table.find("tbody")[0].find("tr")
    return [int(one.find("td")[1].text.replace(",", "")) for one in lines]


def widths(page: Page, at: int = 0) -> list[float]:
    return [
        float(rect.attributes["width"] or "")
        for rect in page.root.find("table", cls="steps")[at].find("rect")
    ]


def test_the_funnel_has_the_counts_of_the_files_on_one_scale(
    page: Page, arms: dict[float, Path]
) -> None:
    samples, stages = samples_of(arms[0.1]), stages_of(arms[0.1])
    tried = [one for sample in samples for one in sample["candidates"]]
    kept = sum(one["kept"] for one in tried)
    spanned = len({sample["row_id"] for sample in samples if sample["spans"]})
    marked = len({sample["row_id"] for sample in samples})
    assert 0 < kept < len(tried) and 0 < spanned <= marked < ROWS
    funnel = tables(page, "steps")[0]
    assert [(line[0], line[1], line[3]) for line in funnel] == [
        ("rows", str(ROWS), ""),
        ("student wrong, teacher right", str(marked), f"{marked / ROWS:.1%} of rows"),
        ("with suspect spans", str(spanned), f"{spanned / ROWS:.1%} of rows"),
        ("candidates: changed texts", str(len(tried)), f"{len(tried) / marked:.1f} a searched row"),
        ("kept counterfactuals", str(kept), f"{kept / len(tried):.1%} of candidates"),
    ]
    top = max(ROWS, len(tried))
    shares = [100 * count / top for count in (ROWS, marked, spanned, len(tried), kept)]
    assert widths(page) == pytest.approx(shares, abs=0.01)
    (lead,) = page.root.find("p", cls="lead")
    assert lead.text == (
        f"Of {ROWS} rows, the student fails {marked} that the teacher solves. The run made "
        f"{len(tried)} changed texts of them, and {kept} ({kept / len(tried):.1%}) passed "
        "validation."
    )
    assert stages["kept counterfactuals"] == kept


def test_every_candidate_is_kept_or_has_its_reason(page: Page, arms: dict[float, Path]) -> None:
    tried = [one for sample in samples_of(arms[0.1]) for one in sample["candidates"]]
    reasons = Counter(one["reason"].replace("_", " ") for one in tried if not one["kept"])
    fates = tables(page, "steps")[1]
    kept = sum(one["kept"] for one in tried)
    assert {line[0]: int(line[1]) for line in fates} == {"kept": kept, **reasons}
    assert [line[3] for line in fates] == [f"{int(line[1]) / len(tried):.1%}" for line in fates]
    assert fates[0][0] == "kept" and sum(int(line[1]) for line in fates) == len(tried)


def test_kept_rates_have_wilson_s_intervals(page: Page, arms: dict[float, Path]) -> None:
    samples = samples_of(arms[0.1])
    tried = [one for sample in samples for one in sample["candidates"]]
    kept = sum(one["kept"] for one in tried)
    rows = len({s["row_id"] for s in samples if any(one["kept"] for one in s["candidates"])})
    section = page.root.find("section", id="overview")[0].text
    low, high = (100 * end for end in wilson_interval(kept, len(tried)))
    assert f"{100 * kept / len(tried):.1f}% of the candidates (95% interval {low:.1f} to" in section
    low, high = (100 * end for end in wilson_interval(rows, ROWS))
    assert f"{rows} rows have a kept counterfactual: {100 * rows / ROWS:.1f}% of all" in section
    assert f"({low:.1f} to {high:.1f}%)" in section


def test_scores_are_those_of_prunable_tokens_with_the_threshold(
    page: Page, arms: dict[float, Path]
) -> None:
    samples = samples_of(arms[0.1])
    scores = [
        score
        for sample in samples
        for score, may in zip(sample["score"], sample["prunable"], strict=True)
        if may
    ]
    figure = page.root.find("figure", cls="histogram")[0]
    shown = bars(figure)
    assert len(shown) == 40 and shown[0][0] == "0.000 to 0.025" and shown[-1][0].endswith("1.000")
    for at, (_, count) in enumerate(shown):
        last = at == 39
        assert count == sum(at / 40 <= s < (at + 1) / 40 or (last and s == 1) for s in scores)
    assert marked(figure) == [
        sum(
            at / 40 <= score < (at + 1) / 40
            for sample in samples
            for score, flag in zip(sample["score"], sample["confounder"], strict=True)
            if flag
        )
        for at in range(40)
    ]
    assert len(figure.find("rect", cls="marked")) == 4  # 0.1 is the end of the fourth bar
    (line,) = figure.find("span", cls="limit")
    assert line.text == "threshold 0.1" and line.attributes["style"] == "left:10.00%"
    assert figure.find("path")[0].attributes["d"] == "M10.00 0V100"
    flagged = sum(sum(sample["confounder"]) for sample in samples)
    note = f"{flagged} of {len(scores):,} prunable tokens ({flagged / len(scores):.1%}) were"
    assert note in figure.find("figcaption")[0].text
    label = figure.find("svg")[0].attributes["aria-label"]
    assert label is not None and note in label


@pytest.mark.parametrize("changes", [{"rule": "quantile"}, {"threshold": 0.5, "teacher_max": 0.0}])
def test_only_flagged_tokens_are_marked(tmp_path: Path, changes: dict[str, Any]) -> None:
    # Of the scores 0, 1/3, 1/3, 2/3 and 1 three stand left of the line, and one is flagged.
    example = scored(0, "one two three four five")
    example.score = np.array([0, 1 / 3, 1 / 3, 2 / 3, 1], dtype=np.float32)
    example.confounder = np.array([False, True, False, False, False])
    page = page_of(tmp_path, example, config=replace(CONFIG, **changes))
    figure = page.root.find("figure", cls="histogram")[0]
    assert {at: count for at, count in enumerate(marked(figure)) if count} == {13: 1}
    (part,) = figure.find("rect", cls="marked")
    assert (part.attributes["y"], part.attributes["height"]) == ("50.000", "50.000")
    assert part.find("title")[0].text == "0.325 to 0.350: 2 tokens, 1 flagged"
    assert len(figure.find("rect")) == 40 + 1


def test_span_lengths_are_tokens(page: Page, arms: dict[float, Path]) -> None:
    lengths: Counter[int] = Counter()
    for sample in samples_of(arms[0.1]):
        for start, stop in sample["spans"]:
            lengths[sum(a < stop and start < b for a, b in sample["offsets"])] += 1
    figure = page.root.find("figure", cls="histogram")[1]
    shown = {int(name): count for name, count in bars(figure) if count}
    assert shown == lengths
    assert f"{sum(lengths.values())} spans" in figure.find("figcaption")[0].text
    assert figure.find("p", cls="name")[0].text == "tokens of the student in a span"


def test_long_spans_share_the_last_bar(tmp_path: Path) -> None:
    text = " ".join(f"w{at}" for at in range(60))
    spans = [(0, 1), (2, 14), (15, 28), (30, 59)]
    figure = page_of(tmp_path, scored(0, text, spans=spans)).root.find("figure", cls="histogram")[1]
    assert {name: count for name, count in bars(figure) if count} == {"1": 1, "12": 1, "13+": 2}


def cut_strings(samples: list[dict[str, Any]]) -> Iterator[tuple[str, bool]]:
    for sample in samples:
        for one in sample["candidates"]:
            for start, stop in one["cut"]:
                if text := re.sub(r"\s+", " ", sample["text"][start:stop]).strip():
                    yield text, one["kept"]


def test_cut_strings_are_counted(page: Page, arms: dict[float, Path]) -> None:
    made = list(cut_strings(samples_of(arms[0.1])))
    cut, kept = Counter(text for text, _ in made), Counter(text for text, kept in made if kept)
    (shown,) = tables(page, "strings")
    assert len(shown) == min(15, len(cut))
    assert [(int(line[1]), int(line[2])) for line in shown] == [
        (cut[line[0]], kept[line[0]]) for line in shown
    ]
    assert [int(line[1]) for line in shown] == sorted(cut.values(), reverse=True)[: len(shown)]
    note = f"{len(shown)} of {len(cut)} different strings; {len(made)} passages were cut"
    assert note in page.root.find("section", id="overview")[0].text


def test_strings_are_normalized_shortened_and_no_markup(tmp_path: Path) -> None:
    evil = "<img src=x>"
    long = "y" * 100
    text = f"a\n  b {evil} {long} a b  end"
    example = scored(0, text)
    for start, stop, reason in ((0, 6, None), (len(text) - 8, len(text) - 5, "student_wrong")):
        add_cut(example, [(start, stop)], reason)
    at = text.index(evil)
    add_cut(example, [(at, at + len(evil)), (at + len(evil) + 1, at + len(evil) + 101)])
    add_cut(example, [(1, 4)])  # blanks alone are no string
    page = page_of(tmp_path, example)
    (shown,) = tables(page, "strings")
    assert [line[:3] for line in shown] == [
        ["a b", "2", "1"],
        [evil, "1", "1"],
        [f"{'y' * 79}…", "1", "1"],
    ]
    assert not page.root.find("img")


def test_arms_stand_side_by_side_with_intervals(arms: dict[float, Path]) -> None:
    for own, arm in arms.items():
        shown = {line[0].split()[0]: line for line in tables(Page(write_report(arm)), "arms")[0]}
        assert sorted(shown) == sorted(path.name for path in arms.values())
        for threshold, other in arms.items():
            line, stages = shown[other.name], stages_of(other)
            assert ("(this page)" in line[0]) == (threshold == own)
            tried, kept = stages["candidates"], stages["kept counterfactuals"]
            marked = stages["marked: student wrong, teacher right"]
            assert line[1:4] == [str(marked), str(tried), str(kept)]
            low, high = (100 * end for end in wilson_interval(kept, tried))
            assert line[4] == f"{100 * kept / tried:.1f}%, {low:.1f} to {high:.1f}%"
            repaired = sum(
                any(one["student_verdict"] == "right" for one in sample["candidates"])
                for sample in samples_of(other)
            )
            low, high = (100 * end for end in wilson_interval(repaired, marked))
            assert line[5] == f"{100 * repaired / marked:.1f}%, {low:.1f} to {high:.1f}%"


def test_one_arm_has_nothing_beside_it(tmp_path: Path) -> None:
    page = page_of(tmp_path, add_cut(scored(0, "one two"), [(0, 3)]))
    (tmp_path / "arms" / "kd").mkdir()  # the originals of `leaf compare` are no arm
    again = Page(write_report(tmp_path / "arms" / "span"))
    for one in (page, again):
        assert not one.root.find("table", cls="arms") and not one.root.find("section", id="arms")
        assert "Arms" not in [link.text for link in one.root.find("a")]


def test_links_lead_to_the_sections_of_the_page(page: Page) -> None:
    places = [link.attributes["href"] for link in page.root.find("a")]
    assert places[:3] == ["#overview", "#arms", "#stages"] and "#samples" in places
    for place in places:
        assert place and len(page.root.find(id=place.removeprefix("#"))) == 1


def test_a_page_with_no_candidates(tmp_path: Path) -> None:
    example = scored(0, "one two", spans=[])
    example.leave("prune", "no_span")
    page = page_of(tmp_path, example)
    assert "No changed text was made of them, so there is no counterfactual." in page.root.text
    assert [line[:2] for line in tables(page, "steps")[0]][-2:] == [
        ["candidates: changed texts", "0"],
        ["kept counterfactuals", "0"],
    ]
    assert len(page.root.find("table", cls="steps")) == 1  # there is no fate to show
    assert not page.root.find("table", cls="strings")
    assert len(page.root.find("figure", cls="histogram")) == 1  # there is no span to measure


def test_a_page_with_no_scored_row(tmp_path: Path) -> None:
    page = page_of(tmp_path, stages=[], left=[], nll={})
    overview = page.root.find("section", id="overview")[0]
    assert not overview.find("figure") and not overview.find("table")
    # Where every row left at the first stages, the bars say so.
    gone = scored(0, "one")
    gone.leave("mark", "student_right")
    page = page_of(tmp_path / "left", gone=[gone])
    assert [line[1] for line in tables(page, "steps")[0]] == ["1", "0", "0", "0", "0"]
    assert widths(page) == [100, 0, 0, 0, 0]


@pytest.mark.parametrize(
    ("changes", "lines", "steps"),
    [
        ({"rule": "quantile"}, ["cap 0.5"], 5),
        ({"strategy": "random_spans"}, ["threshold 0.1"], 5),
        ({"strategy": "cumulative"}, [], 4),
        ({"strategy": "search"}, [], 4),
        ({"strategy": "distractors"}, [], 4),
        ({"threshold": 0.7}, ["threshold 0.7"], 5),
    ],
)
def test_the_threshold_is_a_line_where_the_strategy_has_one(
    tmp_path: Path, changes: dict[str, Any], lines: list[str], steps: int
) -> None:
    page = page_of(tmp_path, scored(0, "one two"), config=replace(CONFIG, **changes))
    figure, *rest = page.root.find("figure", cls="histogram")
    assert [one.text for one in figure.find("span", cls="limit")] == lines
    assert ("no threshold" in figure.text) == (not lines) == (not rest)
    assert len(tables(page, "steps")[0]) == steps


def test_prompts_and_responses_have_their_own_scores_and_threshold(tmp_path: Path) -> None:
    view = scored(0, "Let us see.")
    view.messages = ({"role": "user", "content": "How many?"},)
    view.prefix, view.segment = "Let us see.", 1
    config = replace(CONFIG, level="both")
    page = page_of(tmp_path, scored(0, "one two"), view, config=config)
    found = page.root.find("figure", cls="histogram")
    assert [figure.find("b")[0].text for figure in found] == [
        "Scores of the tokens in prompts.",
        "Lengths of the spans in prompts.",
        "Scores of the tokens in responses.",
        "Lengths of the spans in responses.",
    ]
    limits = [one.text for figure in found for one in figure.find("span", cls="limit")]
    assert limits == ["threshold 0.1", "threshold 0.15"]


def test_an_arm_of_another_shape_is_one_sentence(tmp_path: Path) -> None:
    arm = write_run(tmp_path, [scored(0, "one")])
    other = tmp_path / "arms" / "other"
    other.mkdir()
    write_json(other / "funnel.json", {"stages": [{"stage": "rows in"}]})
    with pytest.raises(ValueError, match=r"must be as LeaF writes it") as caught:
        write_report(arm)
    assert str(caught.value).startswith(str(other / "funnel.json"))


def test_the_colors_of_charts_follow_the_page(page: Page) -> None:
    style = page.root.find("style")[0].text
    for color in (INK, QUIET, RULE, *COLORS):
        assert f'"{color}"]' in style
    for color in COLORS:  # each line has a color of its own in the dark, and all but one a pattern
        assert style.count(f'.scores [stroke="{color}"]') == 1 + (color != COLORS[0])


def test_a_kept_cut_stands_on_top(page: Page, arms: dict[float, Path]) -> None:
    (example,) = page.root.find("figure", cls="example")
    drawn = " ".join(one.text for one in example.find("text"))
    kept = {
        row["row_id"]
        for row in samples_of(arms[0.1])
        if any(one["kept"] for one in row["candidates"])
    }
    (title,) = example.find("title")
    assert int(title.text.removeprefix("Row ").partition(":")[0]) in kept
    assert "wrong" in drawn and "right" in drawn


def test_without_a_kept_cut_there_is_no_example(tmp_path: Path) -> None:
    assert not page_of(tmp_path, scored(0, "one two three")).root.find("figure", cls="example")
