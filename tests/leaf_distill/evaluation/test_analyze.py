"""The studies on a run: values against counts made by hand from the files of small real runs."""

from __future__ import annotations

import csv
import io
import json
import shutil
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pyarrow.parquet as pq
import pytest
from detect_pair import make_rows, write_rows
from rich.console import Console

from leaf_distill.cli import main
from leaf_distill.detection.config import DetectConfig
from leaf_distill.detection.pipeline import DetectResult, detect
from leaf_distill.evaluation.analyze import analyze
from leaf_distill.evaluation.arms import read_arms
from leaf_distill.evaluation.config import AnalyzeConfig
from leaf_distill.evaluation.sheets import Estimate, Sheet, as_csv, estimate, printed, shown
from leaf_distill.evaluation.similarity import jaccard, words
from leaf_distill.statistics import wilson_interval

ROWS = [
    {**row, "source": "even" if at % 2 == 0 else "odd", "level": 1 + at % 3}
    for at, row in enumerate(make_rows())
]
ARMS: dict[str, dict[str, Any]] = {
    "span": {},
    "random": {"strategy": "random_spans"},
    "all": {"select": "all"},
    "lower": {"threshold": 0.02},
}


@pytest.fixture(scope="module")
def arms(pair: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, DetectResult]:
    """Four arms of one run, whose rows have a source and a level."""
    root = tmp_path_factory.mktemp("arms")
    common: dict[str, Any] = {
        **{**pair, "dataset": write_rows(root / "rows.jsonl", ROWS), "grade": "exact"},
        **{"max_new_tokens": 4, "max_batch_tokens": 150, "threshold": 0.15},
        **{"output_dir": str(root / "run"), "cache_dir": str(root / "cache")},
    }
    return {name: detect(DetectConfig(**{**common, **one})) for name, one in ARMS.items()}


@pytest.fixture(scope="module")
def studied(
    arms: dict[str, DetectResult], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    root = arms["span"].run_directory
    directory = tmp_path_factory.mktemp("studied") / "analysis"
    analyze(AnalyzeConfig(run_dir=str(root), output_dir=str(directory)))
    tables: dict[str, Any] = json.loads((directory / "analysis.json").read_text())["tables"]
    return directory, tables


def table(path: Path) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = pq.read_table(path).to_pylist()
    return lines


def line(tables: dict[str, Any], name: str, **keys: str) -> dict[str, Any]:
    (found,) = [one for one in tables[name]["lines"] if all(one[key] == keys[key] for key in keys)]
    return dict(found)


def verdicts(result: DetectResult) -> dict[int, list[bool]]:
    """Whether the student is right on each asked cut of each scored row."""
    return {
        sample["row_id"]: [
            cut["student_verdict"] == "right"
            for cut in sample["candidates"]
            if cut["student_verdict"] is not None
        ]
        for sample in table(result.samples)
    }


def marked(result: DetectResult) -> list[int]:
    gone = ("rows", "render", "predict", "mark")
    return [
        one["row_id"]
        for one in table(result.outcomes)
        if one["candidate_id"] < 0 and one["stage"] not in gone
    ]


def test_the_gain_is_the_share_of_right_cuts_of_the_rows_that_the_student_fails(
    arms: dict[str, DetectResult], studied: tuple[Path, dict[str, Any]]
) -> None:
    for name in ("span", "random"):
        right, rows = verdicts(arms[name]), marked(arms[name])
        shares = [float(np.mean(right.get(row) or [0])) for row in rows]
        found = line(studied[1], "gain", group="all", arm=arms[name].arm.name)
        assert (found["asked"], found["marked"]) == (len(ROWS), len(rows))
        assert found["cuts"] == sum(map(len, right.values()))
        assert found["a cut repairs"] == pytest.approx(np.mean(shares))
        any_right = [any(right.get(row, [])) for row in rows]
        assert found["some cut repairs"] == pytest.approx(np.mean(any_right))
        assert found["gained"] == pytest.approx(sum(shares) / len(ROWS))
        assert found["a cut repairs low"] <= np.mean(shares)


def test_the_groups_of_the_gain_are_the_sources_and_difficulties_of_the_rows(
    arms: dict[str, DetectResult], studied: tuple[Path, dict[str, Any]]
) -> None:
    name = arms["span"].arm.name
    lines = [one for one in studied[1]["gain"]["lines"] if one["arm"] == name]
    groups = [*(f"difficulty: {level}" for level in (1, 2, 3)), "source: even", "source: odd"]
    assert [one["group"] for one in lines] == ["all", *groups]
    even = line(studied[1], "gain", arm=name, group="source: even")
    assert even["marked"] == sum(row % 2 == 0 for row in marked(arms["span"]))
    for count in ("asked", "marked", "cuts"):
        by_source = sum(one[count] for one in lines if one["group"].startswith("source"))
        by_level = sum(one[count] for one in lines if one["group"].startswith("difficulty"))
        assert by_source == by_level == lines[0][count]


def test_the_difference_from_random_cuts_is_paired_by_row(
    arms: dict[str, DetectResult], studied: tuple[Path, dict[str, Any]]
) -> None:
    own, random = verdicts(arms["span"]), verdicts(arms["random"])
    rows = marked(arms["span"])
    found = line(studied[1], "random", group="all", arm=arms["span"].arm.name)
    expected = [np.mean(own.get(row) or [0]) - np.mean(random.get(row) or [0]) for row in rows]
    assert found["marked"] == len(rows)
    assert found["difference"] == pytest.approx(np.mean(expected))
    assert found["difference"] > 0.3  # the student is confounded by what is detected
    assert found["difference low"] > 0


def test_harm_is_counted_on_the_rows_that_the_student_solves(
    arms: dict[str, DetectResult], studied: tuple[Path, dict[str, Any]]
) -> None:
    right = verdicts(arms["all"])
    outcomes = [one for one in table(arms["span"].outcomes) if one["candidate_id"] < 0]
    solved = {one["row_id"] for one in outcomes if one["reason"] == "student_right"}
    cut = [row for row in right if right[row]]
    found = line(studied[1], "harm", group="all", arm=arms["all"].arm.name)
    broken = [1 - np.mean(right[row]) for row in cut if row in solved]
    assert found["solved, cut"] == len(broken) > 0
    assert found["a cut breaks"] == pytest.approx(np.mean(broken))
    assert found["all cut"] == len(cut)
    after = float(np.mean([np.mean(right[row]) for row in cut]))
    before = float(np.mean([row in solved for row in cut]))
    assert found["difference"] == pytest.approx(after - before)


def test_thresholds_stand_side_by_side_with_what_they_hit_and_keep(
    arms: dict[str, DetectResult], studied: tuple[Path, dict[str, Any]]
) -> None:
    directory, tables = studied
    for result in arms.values():
        found = line(tables, "arms", arm=result.arm.name)
        stages = {one["stage"]: one["rows"] for one in result.funnel["stages"]}
        assert found["candidates"] == stages["candidates"]
        assert found["kept"] == stages["kept counterfactuals"]
        assert found["hit"] == stages["with candidates"]
        assert found["threshold"] == f"{result.funnel['settings']['threshold']:g}"
    assert line(tables, "arms", arm=arms["all"].arm.name)["a cut repairs"] is None
    assert "thresholds.svg" in {path.name for path in directory.iterdir()}


@pytest.mark.parametrize(
    ("common", "thresholds"),
    [
        ({}, (0.15, 0.02000001)),  # more digits than a plot shows
        (
            {"turns": ",".join(map(str, range(1, 100)))},
            (0.15, 0.02),
        ),  # a name that ends in a digest
    ],
    ids=["digits", "long name"],
)
def test_arms_that_differ_in_their_threshold_alone_are_a_curve_whatever_their_names(
    arms: dict[str, DetectResult],
    tmp_path: Path,
    common: dict[str, Any],
    thresholds: tuple[float, float],
) -> None:
    settings = {**arms["span"].funnel["settings"], "preset": None, **common}
    names = []
    for value in thresholds:
        changes = {"threshold": value, "output_dir": str(tmp_path / "run")}
        names.append(detect(DetectConfig(**{**settings, **changes})).arm.name)
    assert len(set(names)) == 2
    found = analyze(AnalyzeConfig(run_dir=str(tmp_path / "run")))
    (plot,) = found.directory.glob("thresholds.svg")
    assert plot.read_text().count("<circle") == 2


def test_arms_that_differ_in_more_than_their_threshold_are_no_curve(
    arms: dict[str, DetectResult], tmp_path: Path
) -> None:
    settings = {**arms["span"].funnel["settings"], "output_dir": str(tmp_path / "run")}
    for changes in ({}, {"threshold": 0.02, "max_rows": 20}):
        detect(DetectConfig(**{**settings, **changes}))
    found = analyze(AnalyzeConfig(run_dir=str(tmp_path / "run")))
    assert not list(found.directory.glob("thresholds.svg"))


def test_similarity_is_that_of_the_answers_before_and_after_the_cut(
    arms: dict[str, DetectResult], studied: tuple[Path, dict[str, Any]]
) -> None:
    before, after = [], []
    for sample in table(arms["span"].samples):
        answers = [one["student_answer"] for one in sample["candidates"]]
        given = [one for one in answers if one is not None]
        if given:
            before.append(float(sample["student_answer"] == sample["completion"]))
            after.append(np.mean([one == sample["completion"] for one in given]))
    found = line(studied[1], "similarity", arm=arms["span"].arm.name, **{"similar to": "the label"})
    assert found["rows"] == len(before)
    assert (found["before"], found["after"]) == pytest.approx((np.mean(before), np.mean(after)))
    assert found["difference"] == pytest.approx(np.mean(after) - np.mean(before))


def test_a_row_that_is_searched_at_several_levels_counts_once(
    pair: dict[str, str], tmp_path: Path
) -> None:
    rows = [
        {**row, "completion": f"{row['prompt']} ann has {row['answer']} apples ."}
        for row in ROWS[:10]
    ]
    arm = detect(
        DetectConfig(
            **pair,
            dataset=write_rows(tmp_path / "rows.jsonl", rows),
            output_dir=str(tmp_path / "run"),
            cache_dir=str(tmp_path / "cache"),
            grade="exact",
            max_new_tokens=4,
            max_length=60,
            level="both",
            threshold=0.3,
        )
    )
    _, (read,) = read_arms(arm.run_directory)
    views = table(arm.samples)
    lines = [one for one in table(arm.outcomes) if one["candidate_id"] < 0]
    assert len(lines) > len(rows)  # views have lines of their own
    whole = arm.funnel["sources"][0]
    assert len(read.rows) == len(rows)
    assert len(read.of("marked")) == whole["marked"] > 0
    assert len(read.of("solved")) == whole["right"]
    for row in read.of("marked"):
        own = [one for one in views if one["row_id"] == row.row_id]
        assert len(row.cuts) == sum(len(one["candidates"]) for one in own)


def test_words_are_runs_of_letters_and_digits_in_lower_case() -> None:
    assert words("The answer is 3.5, the Answer_1!") == {
        "the",
        "answer",
        "is",
        "3",
        "5",
        "answer_1",
    }
    assert jaccard("a b c", "b c d") == 0.5
    assert jaccard("", "...") == 1.0 and jaccard("a", "") == 0.0


def test_the_files_are_a_page_tables_and_plots_that_parse(
    studied: tuple[Path, dict[str, Any]],
) -> None:
    directory, tables = studied[0], dict(studied[1])
    page = (directory / "analysis.md").read_text()
    assert "there is nothing left to break" in page and "gains exactly 0" in page
    assert not tables.pop("curves")["lines"] and not (directory / "curves.csv").exists()
    for name, content in tables.items():
        lines = list(csv.DictReader((directory / f"{name}.csv").read_text().splitlines()))
        assert len(lines) == len(content["lines"]) > 0
    plots = sorted(directory.glob("*.svg"))
    assert {"gain.svg", "arms.svg"} < {path.name for path in plots}
    for path in plots:
        assert ElementTree.fromstring(path.read_text()).tag.endswith("svg")
        assert f"({path.name})" in page


def test_the_control_of_cumulative_cuts_is_a_random_score(
    pair: dict[str, str], tmp_path: Path
) -> None:
    common: dict[str, Any] = {
        **{**pair, "dataset": write_rows(tmp_path / "rows.jsonl", ROWS), "grade": "exact"},
        **{"max_new_tokens": 4, "max_batch_tokens": 150, "strategy": "cumulative"},
        **{"output_dir": str(tmp_path / "run"), "cache_dir": str(tmp_path / "cache")},
    }
    config = AnalyzeConfig(run_dir=str(tmp_path / "run"))
    detect(DetectConfig(**common))
    alone = analyze(config)
    assert any("has no random arm" in one and "--score random" in one for one in alone.advice)
    detect(DetectConfig(**common, score="random", seed=3))
    both = analyze(config)
    assert not any("random arm" in one for one in both.advice)
    (line,) = [one for one in both.sheets["random"].lines if one["group"] == "all"]
    assert (line["arm"], line["random arm"]) == ("cumulative", "cumulative-score-random-seed-3")


def test_missing_controls_are_named_with_the_command_that_makes_them(
    arms: dict[str, DetectResult], tmp_path: Path
) -> None:
    arm = arms["span"].arm
    alone = analyze(
        AnalyzeConfig(
            run_dir=str(arms["span"].run_directory), arms=[arm.name], output_dir=str(tmp_path)
        )
    )
    assert not alone.sheets["harm"].lines and not alone.sheets["random"].lines
    assert any("--strategy random_spans" in text for text in alone.advice)
    assert any("--select all" in text for text in alone.advice)


def test_an_arm_that_is_no_control_by_a_setting_is_named_with_the_setting_and_the_value(
    arms: dict[str, DetectResult], tmp_path: Path
) -> None:
    lower, random, every = (arms[name].arm.name for name in ("lower", "random", "all"))
    found = analyze(
        AnalyzeConfig(
            run_dir=str(arms["span"].run_directory),
            arms=[lower, random, every],
            output_dir=str(tmp_path),
        )
    )
    own = [text for text in found.advice if text.startswith(lower)]
    assert own == [
        f"{lower} has no random arm ({random} has threshold 0.15, not 0.02): run the same "
        "`leaf detect` with `--strategy random_spans --threshold 0.02`.",
        f"{lower} says nothing of harm to solved rows ({every} has threshold 0.15, not 0.02): run "
        "the same `leaf detect` with `--select all --threshold 0.02`, which cuts them too.",
    ]


def test_a_setting_that_the_arm_does_not_have_is_to_be_left_out(
    arms: dict[str, DetectResult], tmp_path: Path
) -> None:
    root = shutil.copytree(arms["span"].run_directory, tmp_path / "run")
    path = root / "arms" / arms["random"].arm.name / "funnel.json"
    funnel = json.loads(path.read_text())
    funnel["settings"] |= {"max_rows": 20, "chat_template": "none"}
    path.write_text(json.dumps(funnel))
    span, random = arms["span"].arm.name, arms["random"].arm.name
    found = analyze(AnalyzeConfig(run_dir=str(root), arms=[span, random]))
    assert (
        f"{span} has no random arm ({random} has chat_template none, not auto, max_rows 20, not "
        "none): run the same `leaf detect` with `--strategy random_spans --chat_template auto` and "
        "without `--max_rows`."
    ) in found.advice


def test_where_no_cut_was_made_its_effect_is_empty_and_a_sentence_says_so(
    arms: dict[str, DetectResult], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {**arms["span"].funnel["settings"], "preset": None, "output_dir": str(tmp_path)}
    for strategy in ("span", "random_spans"):
        arm = detect(DetectConfig(**{**settings, "strategy": strategy, "min_length": 50}))
        assert not any(sample["candidates"] for sample in table(arm.samples))
    (whole, *_) = arm.funnel["sources"]
    capsys.readouterr()
    assert main(["analyze", "--run_dir", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    sentence = f"no cut was made in any of {whole['marked']} marked rows"
    assert " ".join(text.split()).count(sentence) == 2 and "0 (0" not in text
    tables = json.loads((tmp_path / "analysis" / "analysis.json").read_text())["tables"]
    effects = {
        "gain": ("a cut repairs", "some cut repairs", "gained"),
        "random": ("a cut repairs", "random repairs", "difference"),
        "arms": ("a cut repairs",),
    }
    for name, columns in effects.items():
        assert tables[name]["lines"]
        assert {one[column] for one in tables[name]["lines"] for column in columns} == {None}
    assert not list((tmp_path / "analysis").glob("*.svg"))


def test_an_arm_that_searched_no_row_is_named_first_and_gets_no_advice_on_controls(
    arms: dict[str, DetectResult], tmp_path: Path
) -> None:
    settings = {**arms["span"].funnel["settings"], "preset": None, "output_dir": str(tmp_path)}
    rows = [row for row in table(arms["span"].outcomes) if row["reason"] == "student_right"]
    solved = [ROWS[row["row_id"]] for row in rows[:3]]
    settings["dataset"] = write_rows(tmp_path / "rows.jsonl", solved)
    arm = detect(DetectConfig(**settings))
    found = analyze(AnalyzeConfig(run_dir=str(tmp_path)))
    (sentence,) = found.advice
    assert sentence.startswith(f"{arm.arm.name} searched no row (0 of 3 rows are marked)")


def test_no_line_of_a_printed_table_ends_inside_a_word() -> None:
    share = Estimate(0.512, 0.401, 0.622)
    line = {"arm": "span", "scored": 1319, "candidates": 2421, "rows kept": 9, "before": share}
    sheet = Sheet("a", "A", [{**line, "after": share, "difference": Estimate(-0.1, -0.2, 0.15)}])
    console = Console(width=72, file=io.StringIO(), record=True)
    console.print(printed(sheet, width=72))
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= 72
    for word in ("candidates", "difference", "scored", "before", "2,421"):
        assert word in text


def test_the_same_run_gives_the_same_bytes(
    arms: dict[str, DetectResult], studied: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    directory = tmp_path / "again"
    root = arms["span"].run_directory
    assert main(["analyze", "--run_dir", str(root), "--output_dir", str(directory)]) == 0
    for path in studied[0].iterdir():
        assert (directory / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    ("options", "argument", "message"),
    [
        (["--run_dir", "RUN", "--arms", "spam"], "arms", "must be of"),
        (
            ["--run_dir", "RUN/nowhere"],
            "run_dir",
            "nowhere: must be the run directory of a `leaf detect`, got a path that does not exist",
        ),
        (
            ["--run_dir", "RUN", "--output_dir", "TAKEN"],
            "output_dir",
            "damaged or of something else",
        ),
    ],
)
def test_what_cannot_be_analyzed_is_refused_with_a_sentence(
    arms: dict[str, DetectResult],
    tmp_path: Path,
    options: list[str],
    message: str,
    argument: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "analysis.md").write_text("mine")
    places = {"RUN": str(arms["span"].run_directory), "TAKEN": str(tmp_path)}
    for name, place in places.items():
        options = [option.replace(name, place) for option in options]
    assert main(["analyze", *options]) == 1
    assert message in (printed := capsys.readouterr().err)
    assert printed.startswith(f"leaf analyze: error: {argument}: ")
    assert (tmp_path / "analysis.md").read_text() == "mine"


def test_a_damaged_arm_is_named(arms: dict[str, DetectResult], tmp_path: Path) -> None:
    root = tmp_path / "run"
    shutil.copytree(arms["span"].run_directory, root)
    path = root / "arms" / arms["span"].arm.name / "samples.parquet"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="must be as LeaF writes it"):
        read_arms(root)


def test_an_estimate_is_shown_with_its_interval_and_takes_three_columns() -> None:
    sheet = Sheet("a", "A", [{"arm": "x", "difference": Estimate(0.1, -0.05, 0.25), "n": 1200}])
    assert shown(sheet) == [("arm", "difference", "n"), ("x", "+10.0 (-5.0 to +25.0)", "1,200")]
    assert (
        as_csv(sheet) == "arm,difference,difference low,difference high,n\nx,0.1,-0.05,0.25,1200\n"
    )
    assert estimate([]) is None
    assert estimate([1.0, 1.0]) == (1.0, *wilson_interval(2, 2))
    assert estimate([0.5, 0.5]) == (0.5, 0.5, 0.5)
