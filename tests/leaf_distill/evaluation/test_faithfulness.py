"""Deletion and insertion curves in `leaf analyze`: where they come from and what they say."""

from __future__ import annotations

import csv
import json
import re
import shutil
from pathlib import Path
from typing import Any, get_args
from xml.etree import ElementTree

import pytest
from detect_pair import make_rows, misled, write_rows

from leaf_distill.cli import main
from leaf_distill.data.example import Example, Rendering
from leaf_distill.detection.answers import PromptedModel
from leaf_distill.detection.arm_curves import arm_curves
from leaf_distill.detection.config import DetectConfig, Score
from leaf_distill.detection.pipeline import DetectResult, detect
from leaf_distill.detection.swept_arm import read_settings
from leaf_distill.evaluation.analyze import AnalyzeResult, analyze
from leaf_distill.evaluation.charts import RULE
from leaf_distill.evaluation.config import AnalyzeConfig
from leaf_distill.evaluation.faithfulness import ScoreCurves, curve_sheet, than_random
from leaf_distill.report import write_report

ROWS = [row for row in make_rows(40) if misled(row)][:8]
NO_CURVES = "The scores have no deletion and insertion curves"


def run(pair: dict[str, str], root: Path, **changes: Any) -> DetectResult:
    settings: dict[str, Any] = {
        **{**pair, "dataset": write_rows(root / "rows.jsonl", ROWS), "grade": "exact"},
        **{"output_dir": str(root / "run"), "cache_dir": str(root / "cache"), "max_new_tokens": 4},
        **{"select": "all", "validate": "none"},
    }
    return detect(DetectConfig(**{**settings, **changes}))


def moved(pair: dict[str, str], root: Path) -> dict[str, str]:
    return {role: str(shutil.copytree(path, root / role)) for role, path in pair.items()}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_curves_are_measured_where_models_may_be_loaded_and_kept_for_the_next_analysis(
    pair: dict[str, str], tmp_path: Path, dtype: str
) -> None:
    places = moved(pair, tmp_path)
    arm = run(places, tmp_path, dtype=dtype)
    settings: dict[str, Any] = {"run_dir": str(arm.run_directory)}
    before = analyze(AnalyzeConfig(**settings))
    assert before.curves is None and not before.sheets["curves"].lines
    assert before.advice[-1].startswith(NO_CURVES) and "--curves" in before.advice[-1]
    measured = analyze(AnalyzeConfig(**settings, curves=True))
    assert measured.curves is not None
    for place in places.values():
        (Path(place) / "model.safetensors").unlink()
    again = analyze(AnalyzeConfig(**settings))
    assert again.curves == measured.curves
    names = {*get_args(Score)} - {"intervention"}
    assert {one["score"] for one in measured.curves.lines} == names
    assert len(measured.curves.lines) == len(names) * 2 * 2  # models and kinds
    assert not any(NO_CURVES in text for text in again.advice)


@pytest.fixture(scope="module")
def studied(
    pair: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> tuple[DetectResult, AnalyzeResult]:
    """Two arms of one run, and the curves of two scores beside random ranks."""
    root = tmp_path_factory.mktemp("studied")
    run(pair, root, strategy="collective")
    arm = run(pair, root)
    words = ["analyze", "--run_dir", str(arm.run_directory), "--scores", "gap", "lens", "--curves"]
    assert main(words) == 0
    return arm, analyze(AnalyzeConfig(run_dir=str(arm.run_directory), scores=["gap", "lens"]))


def test_curves_of_some_scores_stay_until_their_losses_are_gone(
    pair: dict[str, str], tmp_path: Path
) -> None:
    arm = run(pair, tmp_path)
    settings: dict[str, Any] = {"run_dir": str(arm.run_directory)}
    measured = analyze(AnalyzeConfig(**settings, curves=True, scores=["gap", "student"]))
    again = analyze(AnalyzeConfig(**settings))  # asks for all scores, most of them never measured
    assert measured.curves is not None and again.curves == measured.curves
    own = again.directory / "curves-of-mine.csv"
    own.write_text("")
    gone = analyze(AnalyzeConfig(**settings, cache_dir=str(tmp_path / "empty")))
    assert gone.curves is None
    assert [*gone.directory.glob("curves*")] == [own]


def test_the_gap_finds_the_word_that_misleads_the_student(
    studied: tuple[DetectResult, AnalyzeResult],
) -> None:
    curves = studied[1].curves
    assert curves is not None and {one["rows"] for one in curves.lines} == {len(ROWS)}
    (gap,) = [
        one
        for one in curves.lines
        if (one["score"], one["role"], one["kind"]) == ("gap", "student", "deletion")
    ]
    assert gap["difference_interval"][1] < 0  # the confounders go first, and the loss falls
    assert than_random(gap) == "better"


def test_the_files_hold_the_curves_and_say_how_many_scores_were_compared(
    studied: tuple[DetectResult, AnalyzeResult], capsys: pytest.CaptureFixture[str]
) -> None:
    directory, curves = studied[1].directory, studied[1].curves
    assert curves is not None and curves.arm == "collective-select-all-validate-none"  # the first
    assert "random ranks: 2; comparisons, over models and kinds of curves: 8." in curves.remark
    assert f"With {len(ROWS)} rows they are too narrow" in curves.remark
    page = (directory / "analysis.md").read_text()
    assert "## Deletion and insertion at equal size" in page and curves.remark in page
    for kind in ("deletion", "insertion"):
        for role in ("student", "teacher"):
            name = f"curves-{kind}-{role}.svg"
            assert f"({name})" in page
            image = ElementTree.fromstring((directory / name).read_text())
            lines = [one for one in image.iter() if one.tag.endswith("polyline")]
            # Each curve has a line, a short one at each of 6 points, and one in the legend.
            assert sum(one.get("stroke") == "#c2570c" for one in lines) == 1 + 6 + 1
    table = list(csv.DictReader((directory / "curves.csv").read_text().splitlines()))
    assert len(table) == len(curves.lines) == 12
    assert {one["than random"] for one in table if one["score"] == "random"} == {""}
    content = json.loads((directory / "analysis.json").read_text())["curves"]
    assert content["arm"] == curves.arm and content["remark"] == curves.remark
    assert [one["than_random"] for one in content["lines"]] == [
        than_random(one) for one in curves.lines
    ]


def test_the_report_of_any_arm_of_the_run_shows_them(
    studied: tuple[DetectResult, AnalyzeResult], tmp_path: Path
) -> None:
    curves = studied[1].curves
    assert curves is not None
    page = write_report(studied[0].arm, output=tmp_path / "page.html").read_text()
    assert "Deletion and insertion" in page and curves.remark in page
    lines = re.findall("<polyline[^>]*>", page)
    assert sum(RULE not in line for line in lines) == 4 * 3 * (1 + 6 + 1)  # the rest are grids


@pytest.mark.parametrize("gone", ["cache", "student"])
def test_a_run_whose_cache_or_tokenizer_is_gone_is_analyzed_and_told_why_it_has_no_curves(
    pair: dict[str, str], tmp_path: Path, gone: str
) -> None:
    arm = run(moved(pair, tmp_path), tmp_path)
    shutil.rmtree(tmp_path / gone)
    found = analyze(AnalyzeConfig(run_dir=str(arm.run_directory)))
    assert found.curves is None and found.sheets["arms"].lines
    (note,) = [text for text in found.advice if NO_CURVES in text]
    assert ("does not exist" in note) == (gone == "student")
    assert not (tmp_path / gone).exists()


def test_moved_models_and_a_moved_cache_are_given(pair: dict[str, str], tmp_path: Path) -> None:
    places = moved(pair, tmp_path)
    arm = run(places, tmp_path)
    settings: dict[str, Any] = {"run_dir": str(arm.run_directory), "scores": ["gap"]}
    measured = analyze(AnalyzeConfig(**settings, curves=True)).curves
    for place in (*places.values(), str(tmp_path / "cache")):
        shutil.move(place, f"{place}-moved")
    there = {role: f"{place}-moved" for role, place in places.items()}
    cache = str(tmp_path / "cache-moved")
    assert analyze(AnalyzeConfig(**settings, **there, cache_dir=cache)).curves == measured
    with pytest.raises(ValueError, match=r"^student: must have the content .*; give --student"):
        other = {**there, "student": pair["teacher"]}
        analyze(AnalyzeConfig(**settings, **other, cache_dir=cache, curves=True))


def test_one_row_tells_that_the_cache_has_no_curves(
    pair: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arm = run(pair, tmp_path).arm
    rendered: set[int] = set()
    prompt = PromptedModel.prompt

    def watched(self: PromptedModel, example: Example) -> Rendering:
        rendered.add(example.row_id)
        return prompt(self, example)

    monkeypatch.setattr(PromptedModel, "prompt", watched)
    assert arm_curves(arm, read_settings(arm), ["gap"], load=False) is None
    assert len(rendered) == 1


def test_a_run_without_scored_rows_has_no_curves_and_no_note_of_them(
    pair: dict[str, str], tmp_path: Path
) -> None:
    solved = [row for row in make_rows(40) if not misled(row)][:3]
    rows = write_rows(tmp_path / "solved.jsonl", solved)
    arm = run(pair, tmp_path, dataset=rows, select="student_wrong")
    found = analyze(AnalyzeConfig(run_dir=str(arm.run_directory), curves=True))
    assert found.curves is None and not any(NO_CURVES in text for text in found.advice)


def test_a_score_that_is_none_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["analyze", "--run_dir", "runs/math", "--scores", "spam"])
    assert end.value.code == 2
    assert "scores: must be of gap, log_gap" in capsys.readouterr().err


def line(kind: str, *difference: float) -> dict[str, Any]:
    mean, low, high = difference
    return {
        **{"role": "student", "kind": kind, "score": "gap", "rows": 3, "area": 1.0},
        **{"interval": [0.5, 1.5], "difference": mean, "difference_interval": [low, high]},
    }


@pytest.mark.parametrize(
    ("kind", "difference", "told"),
    [
        ("deletion", (-0.2, -0.3, -0.1), "better"),
        ("deletion", (0.2, 0.1, 0.3), "worse"),
        ("insertion", (0.2, 0.1, 0.3), "better"),
        ("insertion", (-0.2, -0.3, -0.1), "worse"),
        ("deletion", (-0.2, -0.5, 0.1), "not told apart"),
        ("insertion", (0.0, 0.0, 0.0), "not told apart"),
    ],
)
def test_a_low_deletion_curve_and_a_high_insertion_curve_are_better(
    kind: str, difference: tuple[float, float, float], told: str
) -> None:
    found = curve_sheet(ScoreCurves("span", [line(kind, *difference)]))
    assert [one["than random"] for one in found.lines] == [told]
