"""Results of the other commands on the report page."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from html_page import Element, Page
from report_run import scored, write_run

from leaf_distill.io import write_json
from leaf_distill.report import write_report
from leaf_distill.report.heat import LEVELS

LOG: list[dict[str, Any]] = [
    {"step": 5, "kd_loss": 0.8, "cd_loss": 0.4},
    {"step": 10, "kd_loss": 0.4},
    {"step": 15, "kd_loss": float("nan")},
    {"epoch": 1},
]
TRAINING = {"rows": {"originals": 30, "counterfactuals": 12}, "log": LOG}


def interval(right: int) -> tuple[float, float]:
    return right / 1600 - 0.02, right / 1600 + 0.02


def evaluation(right: int) -> dict[str, Any]:
    return {
        "command": "evaluate",
        "rows": 1600,
        "accuracy": right / 1600,
        "interval": interval(right),
        "counts": {"right": right, "no_answer": 1600 - right},
    }


def arm(name: str, right: int, *difference: float, trained: bool = True) -> dict[str, Any]:
    training = {"model": "m", "steps": 100, "counterfactuals": 12, "tokens": 51200}
    return {
        "name": name,
        "training": training if trained else None,
        "accuracy": right / 1600,
        "interval": interval(right),
        "difference": difference or None,
    }


@pytest.fixture
def run(tmp_path: Path) -> Path:
    write_run(tmp_path, [scored(0, "one")])
    return tmp_path


def put(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, value)


def lines(page: Page) -> list[Element]:
    table = page.root.find("table", cls="evaluations")[0]
    return table.find("tbody")[0].find("tr")


def test_a_run_without_results_has_no_such_section(run: Path) -> None:
    assert "Distillation" not in Page(write_report(run)).root.text
    put(run / "other" / "metrics.json", {"something": 1})
    assert "Distillation" not in Page(write_report(run)).root.text


@pytest.mark.parametrize("place", ["leaf", "students/leaf"])
def test_training_curves_with_their_axis(run: Path, place: str) -> None:
    put(run / place / "metrics.json", TRAINING)
    figure = Page(write_report(run)).root.find("figure", cls="curve")[0]
    caption = figure.find("figcaption")[0].text
    assert "30 originals and 12 counterfactuals" in caption and "originals 0.8 to 0.4" in caption
    points = [line.attributes["points"] for line in figure.find("polyline")]
    assert points == ["0.00,0.00 100.00,50.00", "0.00,50.00 0.00,50.00"]
    # The axis stands beside the plot, in a column of its own, and so under no curve.
    chart = figure.find("div", cls="chart")[0]
    assert [one.text for one in chart.find("div", cls="axis")[0].find("span")] == ["0.8", "0"]
    assert not chart.find("svg")[0].find("span")
    assert [one.text for one in chart.find("p", cls="ends")[0].find("span")] == [
        "step 5",
        "step 10",
    ]


@pytest.mark.parametrize("place", ["eval", "evaluation/eval"])
def test_an_accuracy_is_a_point_with_an_interval(run: Path, place: str) -> None:
    put(run / place / "metrics.json", evaluation(1200))
    (line,) = lines(Page(write_report(run)))
    low, high = (100 * bound for bound in interval(1200))
    for text in ("75.0%", "1,600 rows", "400 no answer", f"{low:.1f} to"):
        assert text in line.text
    svg = line.find("svg")[0]
    assert svg.attributes["aria-label"] == f"75.0 percent, {low:.1f} to {high:.1f}"
    assert not svg.find("rect")  # a bar would be read as the value
    assert svg.find("path", cls="point")[0].attributes["d"] == "M75.00 5h0.001"
    assert f"M{low:.2f} 5H{high:.2f}" in (svg.find("path")[1].attributes["d"] or "")


@pytest.mark.parametrize("place", ["", "evaluation"])
def test_an_evaluation_on_benchmarks_names_them(run: Path, place: str) -> None:
    for model, right in (("base", 400), ("mine", 1200)):
        measured = {**evaluation(right), "benchmark": {"name": "gsm8k"}, "metric": "pass@1"}
        put(run / place / "gsm8k" / model / "metrics.json", measured)
    shown = lines(Page(write_report(run)))
    assert [line.find("th")[0].text for line in shown] == [
        "base, gsm8k pass@1",
        "mine, gsm8k pass@1",
    ]
    assert "75.0%" in shown[1].text


def test_a_comparison_is_one_table_with_its_evaluations(run: Path) -> None:
    arms = [
        arm("untrained", 800, -0.1, -0.13, -0.07, trained=False),
        arm("kd", 960),
        arm("span", 1040, 0.05, 0.02, 0.08),
    ]
    put(run / "compare.json", {"reference": "kd", "problems": 1600, "arms": arms})
    put(run / "evaluation" / "kd" / "metrics.json", evaluation(960))
    put(run / "evaluation" / "span" / "metrics.json", evaluation(1041))  # a later evaluation
    page = Page(write_report(run))
    shown = lines(page)
    assert [line.find("th")[0].text for line in shown] == ["untrained", "kd", "span", "span"]
    untrained, kd, span, later = (line.text for line in shown)
    assert "\N{MINUS SIGN}10.0\N{MINUS SIGN}13.0 to \N{MINUS SIGN}7.0" in untrained
    assert "steps" not in untrained and "steps" not in later
    assert "640 no answer" in kd and "12 cut prompts, 100 steps, 51,200 tokens" in kd
    assert "65.0%" in span and "+5.0+2.0 to +8.0" in span and "no answer" not in span
    assert "65.1%" in later and "559 no answer" in later
    assert "Difference from kd, points" in page.root.text


def curve(score: str, role: str, kind: str, *difference: float) -> dict[str, Any]:
    return {
        **{"score": score, "role": role, "kind": kind, "rows": 12},
        **{"shares": [0.0, 0.5], "nll": [2.0, 1.5], "area": 1.75, "interval": [1.5, 2.0]},
        "difference": difference[0] if difference else None,
        "difference_interval": difference[1:] or None,
    }


def analysis(*lines: dict[str, Any], arm: str = "span") -> dict[str, Any]:
    return {"command": "analyze", "curves": {"arm": arm, "lines": lines}}


def test_curves_of_scores_are_plots_and_a_table_for_each_model(run: Path) -> None:
    put(run / "analysis" / "analysis.json", {"command": "analyze", "curves": None})
    assert "insertion" not in Page(write_report(run)).root.text
    lines = [
        curve("gap", "teacher", "deletion", -0.25, -0.5, -0.125),
        curve("random", "teacher", "deletion"),
        curve("gap", "student", "deletion", -0.25, -0.5, 0.125),
        curve("random", "student", "deletion"),
        curve("gap", "student", "insertion", 0.25, 0.125, 0.5),
        curve("random", "student", "insertion"),
    ]
    put(run / "analysis" / "analysis.json", analysis(*lines))
    page = Page(write_report(run))
    teacher, student = page.root.find("table", cls="curves")
    gap, random = (one.text for one in student.find("tbody")[0].find("tr"))
    assert "1.7501.500 to 2.000" in gap and "12 rows" in student.find("thead")[0].text
    minus = "\N{MINUS SIGN}"
    assert f"{minus}0.250{minus}0.500 to +0.125" in gap and "not told apart" in gap
    assert "+0.250+0.125 to +0.500" in gap and gap.endswith("better\n")
    assert "better" not in random
    first = teacher.find("tbody")[0].find("tr")[0].text
    assert "better" in first and "no rows" in first  # no insertion was measured
    plots = [len(one.find("svg")) for one in page.root.find("div", cls="scores")]
    assert plots == [1, 2]
    assert "random ranks: 1; comparisons, over models and kinds of curves: 3." in page.root.text


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("leaf/metrics.json", {"log": []}),
        ("leaf/metrics.json", {**TRAINING, "log": [3]}),
        ("leaf/metrics.json", {**TRAINING, "log": [{"kd_loss": 1}]}),
        ("leaf/metrics.json", {**TRAINING, "log": [{"step": 1, "kd_loss": 10**400}]}),
        ("students/a/metrics.json", {**TRAINING, "rows": 3}),
        ("eval/metrics.json", {**evaluation(3), "interval": [1]}),
        ("eval/metrics.json", {**evaluation(3), "accuracy": None}),
        ("eval/metrics.json", {**evaluation(3), "counts": {"a": "b"}}),
        ("eval/metrics.json", []),
        ("gsm8k/a/metrics.json", {**evaluation(3), "benchmark": {"name": "gsm8k"}}),
        ("compare.json", {"reference": "kd", "problems": 1}),
        (
            "compare.json",
            {"reference": "kd", "problems": 1, "arms": [{**arm("kd", 3), "difference": [1, 2]}]},
        ),
        ("analysis/analysis.json", []),
        ("analysis/analysis.json", {"command": "analyze", "curves": 3}),
        ("analysis/analysis.json", analysis({"score": "gap"})),
        ("analysis/analysis.json", analysis(curve("gap", "student", "deletion", 1.0, 2.0))),
    ],
)
def test_results_of_another_shape_are_one_sentence(run: Path, name: str, value: object) -> None:
    put(run / name, value)
    with pytest.raises(ValueError, match=r"must be as LeaF writes it|must hold a JSON") as caught:
        write_report(run)
    assert str(caught.value).startswith(str(run / name)) and "\n" not in str(caught.value)


def test_names_in_results_become_no_markup(run: Path) -> None:
    evil = "<img src=x onerror=alert(1)>'\""
    reached = {"reference": evil, "problems": 1600, "arms": [arm(evil, 960, 0.1, 0.0, 0.2)]}
    put(run / "compare.json", reached)
    put(run / "<img src=x>" / "metrics.json", {**evaluation(800), "counts": {evil: 800}})
    put(run / "<b onclick=x>" / "metrics.json", TRAINING)
    lines = [curve(evil, evil, "deletion", 0.0, 0.0, 0.0)]
    put(run / "analysis" / "analysis.json", analysis(*lines, arm=evil))
    page = Page(write_report(run))
    assert (
        not page.root.find("img") and "<img" not in page.source and "<b onclick" not in page.source
    )
    # A curve's names are in the remark, the heading, the table, and twice and once in the plot.
    assert page.root.text.replace("\N{RIGHT SINGLE QUOTATION MARK}", "'").count(evil) == 3 + 6


def token_line(row_id: int, candidate_id: int = -1, **changes: Any) -> dict[str, Any]:
    return {
        "row_id": row_id,
        "candidate_id": candidate_id,
        "branch": "original" if candidate_id < 0 else "counterfactual",
        "completion": "a <b>é\n<end>",
        "tokens": [[0, 1], [1, 5], [5, 6], [5, 6], [6, 7], [7, 12]],
        "kl_before": [0.0, 4.0, 0.25, 1.0, None, 0.75],
        "kl_after": [0.0, 1.0, 0.0, 0.25, 0.0, 0.25],
        "temperature": 1.0,
        **changes,
    }


def put_lines(place: Path, *lines: dict[str, Any]) -> None:
    put(place / "metrics.json", TRAINING)
    (place / "token_kl.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def layer(page: Page) -> Element:
    (one,) = page.root.find("details", cls="layer")
    return one


def test_the_kl_of_tokens_is_two_texts_on_one_scale(run: Path) -> None:
    put(run / "leaf" / "metrics.json", TRAINING)
    assert not Page(write_report(run)).root.find("details", cls="layer")
    put_lines(run / "leaf", token_line(3), token_line(3, 0, kl_before=[0.5] * 6))
    shown = layer(Page(write_report(run)))
    first = "2 rows, 0.82 (1 not finite) to 0.25 nats on average"
    assert first in shown.find("summary")[0].text
    each = "Originals: 1.20 (1 not finite) to 0.25 nats. Counterfactuals: 0.50 to 0.25 nats."
    assert each in shown.text
    assert "A KL that is not finite has the strongest color and is in no mean." in shown.text
    assert "Row 3, original 1.20 (1 not finite) to 0.25" in " ".join(shown.text.split())
    assert "Row 3, counterfactual 0 0.50 to 0.25" in " ".join(shown.text.split())
    before, after = shown.find("figure")[0].find("div", cls="map")
    assert before.text == after.text == "a <b>é\n<end>"
    colors = [one.attributes["class"] for one in before.find("span")]
    # The root of each of the scale's end, 4; of the two bytes of é the stronger one.
    assert colors == ["c0", f"c{LEVELS}", "c10", f"c{LEVELS} nl", "c9"]
    assert [one.attributes["class"] for one in after.find("span")][1:3] == ["c10", "c5"]
    titles = [one.attributes["title"] for one in before.find("span")]
    assert titles[1] == "before 4.0000 nats · after 1.0000 nats"
    assert titles[2] == (
        "before 0.2500 nats · after 0.0000 nats\nbefore 1.0000 nats · after 0.2500 nats"
    )
    assert titles[3] == "before not finite · after 0.0000 nats"
    assert "4.00 nats" in shown.find("div", cls="ticks")[0].text


def test_the_layer_of_the_pages_own_arm_is_open(run: Path) -> None:
    for name in ("another", "span"):
        put_lines(run / "students" / name, token_line(3))
    layers = Page(write_report(run)).root.find("details", cls="layer")
    assert ["open" in one.attributes for one in layers] == [False, True]
    shutil.rmtree(run / "students" / "span")
    assert "open" in layer(Page(write_report(run))).attributes


def test_a_training_whose_end_was_not_measured_shows_its_start(run: Path) -> None:
    put_lines(run / "leaf", token_line(3, kl_after=None))
    shown = layer(Page(write_report(run)))
    assert "1.20 (1 not finite) before nats on average" in shown.find("summary")[0].text
    assert "The student after the training was not measured." in shown.text
    assert len(shown.find("div", cls="map")) == 1


def test_kls_that_are_all_infinite_are_shown(run: Path) -> None:
    put_lines(run / "leaf", token_line(3, kl_before=[None] * 6, kl_after=[0.0] * 6))
    shown = layer(Page(write_report(run)))
    assert "1 rows, not finite to 0.000 nats" in shown.find("summary")[0].text
    before, after = shown.find("div", cls="map")
    assert f"c{LEVELS}" in str(before.find("span")[0].attributes["class"])
    assert after.find("span")[0].attributes["class"] == "c0"
    put_lines(run / "leaf", token_line(3, kl_before=None, kl_after=None))
    assert not Page(write_report(run)).root.find("details", cls="layer")


@pytest.mark.parametrize(
    ("changes", "there", "missing"),
    [
        ({"temperature": 2.0}, ["of each token at temperature 2, on"], ["stored", "finite has"]),
        ({"stored": "topk"}, ["at least the number shown"], ["at temperature"]),
        ({"stored": "hidden"}, ["The teacher is a stored one."], ["at least"]),
        ({"stored": None}, ["of each token, on"], ["stored", "at least"]),
    ],
)
def test_the_layer_says_temperature_and_teacher(
    run: Path, changes: dict[str, Any], there: list[str], missing: list[str]
) -> None:
    put_lines(run / "leaf", token_line(3, kl_before=[1.0] * 6, **changes))
    (words,) = (one.text for one in layer(Page(write_report(run))).find("p", cls="quiet"))
    assert all(one in words for one in there) and not any(one in words for one in missing)


def test_of_other_arms_few_rows_are_shown(run: Path) -> None:
    for name in ("another", "span"):
        put_lines(run / "students" / name, *(token_line(row) for row in range(16)))
    other, own = Page(write_report(run)).root.find("details", cls="layer")
    assert (len(other.find("figure")), len(own.find("figure"))) == (3, 16)
    assert "The first 3 rows are shown." in other.text and "rows are shown" not in own.text
    assert "16 rows, " in other.find("summary")[0].text


def test_line_separators_of_unicode_split_no_line(run: Path) -> None:
    text = "a\u2028b\u2029c\x85\n"
    line = token_line(3, completion=text, tokens=[[at, at + 1] for at in range(6)])
    put(run / "leaf" / "metrics.json", TRAINING)
    content = json.dumps(line, ensure_ascii=False) + "\n"
    (run / "leaf" / "token_kl.jsonl").write_text(content, encoding="utf-8")
    maps = layer(Page(write_report(run))).find("div", cls="map")
    assert [one.text for one in maps] == [text, text]


@pytest.mark.parametrize(
    "line",
    [
        [],
        {"row_id": 3},
        token_line(3, kl_before=[1.0]),
        token_line(3, kl_before=["a"] * 6),
        token_line(3, tokens=[[0]] * 6),
        {**token_line(3), "row_id": "<b>"},
    ],
)
def test_token_kl_of_another_shape_is_one_sentence(run: Path, line: Any) -> None:
    put_lines(run / "leaf", line)
    with pytest.raises(ValueError, match=r"token_kl\.jsonl: must be as LeaF writes it"):
        write_report(run)


def test_names_and_texts_of_tokens_become_no_markup(run: Path) -> None:
    evil = "<img src=x onerror=alert(1)>"
    put_lines(
        run / "leaf",
        token_line(3, completion=evil * 2, branch=evil),
        token_line(4, completion="", tokens=[], kl_before=[], kl_after=[]),
    )
    page = Page(write_report(run))
    assert not page.root.find("img") and "<img" not in page.source
    assert layer(page).text.count(evil) >= 4
