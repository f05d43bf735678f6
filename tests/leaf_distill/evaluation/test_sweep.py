"""A sweep of detection's settings: its cells against the arms that `leaf detect` writes."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from detect_pair import make_rows, make_tokenizer, misled, write_rows
from transformers import AutoModelForCausalLM

from leaf_distill.cli import main
from leaf_distill.detection.cells import Cell, Setting
from leaf_distill.detection.config import DetectConfig
from leaf_distill.detection.pipeline import DetectResult, detect
from leaf_distill.evaluation.analyze import analyze
from leaf_distill.evaluation.config import AnalyzeConfig, SweepConfig
from leaf_distill.evaluation.proposal import propose_threshold, sentences
from leaf_distill.evaluation.sweep import LEGEND, SweepResult, sweep

ROWS = make_rows(40)
GRID: dict[str, Any] = {
    "thresholds": [0.05, 0.4, 0.9],
    "strategies": ["span", "collective", "random_spans"],
    "widenings": ["token", "word", "sentence"],
}


class Run:
    """Three arms on a pair whose weights are gone."""

    def __init__(self, pair: dict[str, str], root: Path) -> None:
        places = {role: shutil.copytree(path, root / role) for role, path in pair.items()}
        self.settings: dict[str, Any] = {
            **{role: str(place) for role, place in places.items()},
            **{"dataset": write_rows(root / "rows.jsonl", ROWS), "grade": "exact"},
            **{"max_new_tokens": 4, "threshold": 0.4},
            **{"output_dir": str(root / "run"), "cache_dir": str(root / "cache")},
        }
        self.arms = [
            self.detect(),
            self.detect(strategy="collective"),
            self.detect(threshold=0.9, widen="token"),
        ]
        for place in places.values():
            (place / "model.safetensors").unlink()

    def detect(self, **changes: Any) -> DetectResult:
        return detect(DetectConfig(**{**self.settings, **changes}))


@pytest.fixture(scope="module")
def run(pair: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Run:
    return Run(pair, tmp_path_factory.mktemp("swept"))


@pytest.fixture(scope="module")
def swept(run: Run) -> SweepResult:
    return sweep(SweepConfig(run_dir=str(run.arms[0].arm), **GRID))


def cell(result: SweepResult, **wanted: Any) -> Cell:
    (found,) = [
        one
        for one in result.cells
        if all(getattr(one.setting, name) == value for name, value in wanted.items())
    ]
    return found


def setting_of(arm: DetectResult) -> dict[str, Any]:
    names = ("strategy", "widen", "threshold")
    return {name: arm.funnel["settings"][name] for name in names}


def samples(arm: DetectResult) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = pq.read_table(arm.samples).to_pylist()
    return lines


def test_a_cell_is_the_arm_that_detection_writes_with_its_settings(
    run: Run, swept: SweepResult
) -> None:
    for at, arm in enumerate(run.arms):
        found = cell(swept, **setting_of(arm))
        stages = {one["stage"]: one["rows"] for one in arm.funnel["stages"]}
        assert found.current == (at == 0)
        assert found.rows == stages["scored"]
        assert found.hit == stages["with candidates"]
        assert found.kept == stages["kept counterfactuals"]
        asked = [
            [
                one["student_verdict"] == "right"
                for one in row["candidates"]
                if one["student_verdict"]
            ]
            for row in samples(arm)
        ]
        assert found.candidates == stages["candidates"]
        assert found.usable == found.known == sum(map(len, asked))
        shares = [float(np.mean(row or [0])) for row in asked]
        assert list(found.shares.values()) == pytest.approx(shares)
        assert found.spans == sum(len(row["spans"]) for row in samples(arm))


def characters(arm: DetectResult) -> set[tuple[int, int]]:
    return {
        (row["row_id"], at)
        for row in samples(arm)
        for one in row["candidates"]
        for start, stop in one["cut"]
        for at in range(start, stop)
    }


def test_overlap_and_size_are_counted_in_what_the_candidates_cut(
    run: Run, swept: SweepResult
) -> None:
    first, _, other = run.arms
    own, theirs = characters(first), characters(other)
    assert 0 < len(own & theirs) < len(own | theirs)
    assert cell(swept, **setting_of(first)).overlap == 1
    found = cell(swept, **setting_of(other))
    assert found.overlap == pytest.approx(len(own & theirs) / len(own | theirs))
    tokens = [
        any((row["row_id"], at) in theirs for at in range(*offsets))
        for row in samples(other)
        for offsets in row["offsets"]
    ]
    assert (found.tokens, found.tokens_cut) == (len(tokens), sum(tokens))


def test_what_no_arm_has_asked_is_unknown_and_not_guessed(swept: SweepResult) -> None:
    found = cell(swept, strategy="span", widen="sentence", threshold=0.4)
    assert found.usable > found.known
    assert not found.complete
    assert None in found.shares.values()


def test_a_sweep_loads_no_weights_and_takes_seconds(run: Run) -> None:
    start = time.perf_counter()
    result = sweep(SweepConfig(run_dir=str(run.arms[0].arm), **GRID))
    assert time.perf_counter() - start < 20
    assert len(result.cells) == len(GRID["thresholds"]) * 9
    with pytest.raises(ValueError, match="must be a directory with weights"):
        run.detect()  # nothing is left that could be loaded


def test_the_files_hold_the_cells_and_the_proposal(run: Run, swept: SweepResult) -> None:
    content = json.loads((swept.arm / "sweep.json").read_text())
    assert len(content["lines"]) == len(swept.cells)
    (proposal,) = content["proposals"]
    assert proposal["rows"] == run.arms[0].funnel["sources"][0]["marked"]
    assert "response_threshold" not in (page := (swept.arm / "sweep.md").read_text())
    assert "--threshold" in page and "settings have all answers" in page
    for name in ("sweep.svg", "sweep-size.svg", "sweep.csv"):
        assert (swept.arm / name).stat().st_size > 500


def test_the_thresholds_of_the_two_levels_have_cells_of_their_own(
    pair: dict[str, str], tmp_path: Path
) -> None:
    rows = [
        {**row, "completion": f"{row['prompt']} ann has {row['answer']} apples ."}
        for row in ROWS[:8]
    ]
    arm = detect(
        DetectConfig(
            **pair,
            dataset=write_rows(tmp_path / "rows.jsonl", rows),
            output_dir=str(tmp_path / "run"),
            cache_dir=str(tmp_path / "cache"),
            level="both",
            select="all",
            validate="none",
            max_length=60,
            threshold=0.3,
            response_threshold=0.6,
        )
    )
    result = sweep(SweepConfig(run_dir=str(arm.arm), thresholds=[0.3, 0.6], strategies=["span"]))
    assert len(result.cells) == 4
    for level, threshold in (("instruction", 0.3), ("response", 0.6)):
        found = cell(result, level=level, threshold=threshold)
        views = [one for one in samples(arm) if bool(one["segment"]) == (level == "response")]
        assert found.current
        assert found.rows == len({one["row_id"] for one in views}) > 0
        assert found.spans == sum(len(one["spans"]) for one in views) > 0
        assert found.kept == sum(one["kept"] for view in views for one in view["candidates"])
        assert found.overlap == 1
    assert all(
        one.cell is None and "student solves too" in one.doubts[0] for one in result.proposals
    )


def test_the_printed_table_says_what_is_partial_and_counts_its_own_lines(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    grid: dict[str, Any] = {"thresholds": [0.02, 0.9], "strategies": ["span", "random_spans"]}
    result = sweep(SweepConfig(run_dir=str(run.arms[0].arm), **grid))
    text = capsys.readouterr().out
    page = (result.arm / "sweep.md").read_text()
    head, _, table = text.partition("\u2500\n")
    lines = table.partition("\n\n")[0].splitlines()
    end = head.splitlines()[-2].index("kept") + len("kept")
    kept = [line[:end].split()[-1] for line in lines]
    assert len(lines) == len(result.cells)
    assert kept == [f"{one.kept}{'' if one.complete else '+'}" for one in result.cells]
    whole = sum(one.complete for one in result.cells)
    assert 0 < whole < len(lines)  # no arm has drawn random spans
    counted = f"{whole} of {len(lines)} settings have all answers"
    assert counted in " ".join(text.split()) and counted in page
    for sentence in LEGEND:
        assert sentence in text.splitlines() and sentence.replace("*", "\\*") in page
    content = json.loads((result.arm / "sweep.json").read_text())
    assert [line["kept"] for line in content["lines"]] == [one.kept for one in result.cells]


def test_scores_that_were_never_measured_are_named(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["sweep", "--run_dir", str(run.arms[0].arm), "--scores", "gap", "lens"]
    assert main([*words, "--thresholds", "0.4", "--strategies", "span"]) == 0
    assert "lens needs model passes that are not in the cache" in " ".join(
        capsys.readouterr().out.split()
    )


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        (["--run_dir", "RUN"], 1, "error: run_dir: RUN: must have one arm"),
        (["--run_dir", "GONE"], 1, "error: run_dir: GONE: must be the run directory of a `leaf "),
        (["--run_dir", "GONE"], 1, "got a path that does not exist; check it"),
        (["--run_dir", "BARE"], 1, "error: run_dir: BARE: must be the run directory of a finished"),
        (["--run_dir", "ARM", "--cache_dir", "EMPTY"], 1, "without the teacher's saliency"),
        (["--run_dir", "ARM", "--thresholds", "2"], 2, "must be numbers from 0 to 1, got '2'"),
        (["--run_dir", "ARM", "--strategies", "spam"], 2, "strategies: must be of span"),
    ],
)
def test_what_cannot_be_swept_is_refused_with_a_sentence(
    run: Run,
    tmp_path: Path,
    options: list[str],
    status: int,
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arm = run.arms[0]
    places = {"RUN": arm.run_directory, "ARM": arm.arm, "EMPTY": tmp_path / "empty"}
    places |= {"GONE": tmp_path / "gone", "BARE": tmp_path}
    words = [str(places.get(word, word)) for word in options]
    for name, place in places.items():
        message = message.replace(name, str(place))
    try:
        assert main(["sweep", *words]) == status
    except SystemExit as end:
        assert end.code == status
    assert message in " ".join(capsys.readouterr().err.split())


def made(threshold: float, shares: list[float], cut: int = 5, **changes: Any) -> Cell:
    setting = Setting("instruction", "gap", "absolute", "span", "word", threshold)
    given = {"usable": 1, "known": 1, "hit": 1, "current": False, **changes}
    return Cell(setting, shares=dict(enumerate(shares)), tokens_cut=cut, **given)


def test_the_cell_whose_cuts_repair_most_is_proposed_and_of_equal_ones_the_smallest_cut() -> None:
    half = [1.0, 0.0] * 50
    cells = [
        made(0.05, [0.0] * 100, current=True),
        made(0.10, half, cut=9),
        made(0.15, half, cut=7),
        made(0.20, [1.0] * 100, known=0),
    ]
    found = propose_threshold(cells)
    assert found.cell is cells[2]
    assert found.share is not None and found.share.mean == 0.5
    assert found.share.low < 0.5 < found.share.high
    assert [doubt.split()[:2] for doubt in found.doubts] == [["only", "3"], ["the", "best"]]


def test_thin_evidence_is_called_so() -> None:
    cells = [made(0.05, [0.0, 1.0], current=True), made(0.10, [1.0, 1.0])]
    doubts = " ".join(propose_threshold(cells).doubts)
    assert "it rests on 2 rows" in doubts
    assert "cannot be told from the arm's own setting" in doubts
    assert propose_threshold([made(0.1, [1.0], known=0)]).cell is None
    assert propose_threshold(cells, marked=False).cell is None


def test_settings_that_repair_alike_are_not_said_to_be_chosen_and_the_own_one_is_named() -> None:
    cells = [made(0.05, [1.0, 0.0] * 50, current=True), made(0.10, [1.0, 0.0] * 50)]
    found = propose_threshold(cells)
    assert found.cell is cells[0]
    (doubt,) = found.doubts
    assert doubt.startswith("all 2 settings") and "does not tell them apart" in doubt
    assert "which is the arm's own setting: a cut repairs 50.0 %" in sentences(found)[0]
    other = propose_threshold([cells[0], made(0.10, [1.0] * 100)])
    assert "own setting" not in sentences(other)[0]
    assert "flattered by the choice" in " ".join(other.doubts)


def test_a_setting_that_makes_no_cut_is_not_proposed() -> None:
    found = propose_threshold([made(0.1, [0.0, 0.0], usable=0, known=0)])
    assert found.cell is None
    assert found.doubts[0].startswith("no setting of span or collective has cuts")


def small(pair: dict[str, str], root: Path, **changes: Any) -> DetectResult:
    """A run on a few rows, in seconds."""
    rows = changes.pop("rows", ROWS[:12])
    settings: dict[str, Any] = {
        **{**pair, "dataset": write_rows(root / "rows.jsonl", rows), "grade": "exact"},
        **{"output_dir": str(root / "run"), "cache_dir": str(root / "cache"), "max_new_tokens": 4},
    }
    return detect(DetectConfig(**{**settings, **changes}))


def test_rows_without_a_usable_cut_are_hit_nowhere(pair: dict[str, str], tmp_path: Path) -> None:
    everything = {"select": "all", "threshold": 1.0, "strategy": "collective", "validate": "none"}
    arm = small(pair, tmp_path, rows=ROWS[:4], **everything)
    stages = {one["stage"]: one["rows"] for one in arm.funnel["stages"]}
    assert (stages["with candidates"], stages["candidates"]) == (0, 4)
    swept = sweep(SweepConfig(run_dir=str(arm.arm), thresholds=[1.0], strategies=["collective"]))
    own = next(one for one in swept.cells if one.current)
    assert (own.hit, own.candidates, own.usable) == (0, 4, 0)
    studied = analyze(AnalyzeConfig(run_dir=str(arm.arm)))
    (line,) = studied.sheets["arms"].lines
    assert (line["hit"], line["candidates"]) == (0, 4)


def test_an_arm_without_scored_rows_is_refused_before_a_file_is_written(
    pair: dict[str, str], tmp_path: Path
) -> None:
    arm = small(pair, tmp_path, rows=[row for row in ROWS if not misled(row)][:3])
    assert samples(arm) == []
    with pytest.raises(ValueError, match=r"^run_dir: must be an arm with scored rows, got .*span"):
        sweep(SweepConfig(run_dir=str(arm.arm)))
    assert not list(arm.arm.glob("sweep*"))


def test_a_cache_that_lacks_the_score_of_the_arm_is_refused_before_a_file_is_written(
    pair: dict[str, str], tmp_path: Path
) -> None:
    unasked = {"select": "all", "validate": "none", "rows": ROWS[:3]}
    arm = small(pair, tmp_path, **unasked, score="lens")
    other = str(tmp_path / "other")
    small(pair, tmp_path, **unasked, cache_dir=other)
    with pytest.raises(ValueError, match=r"^cache_dir: must hold what .* lens needs model passes"):
        sweep(SweepConfig(run_dir=str(arm.arm), cache_dir=other))
    assert not list(arm.arm.glob("sweep*"))


def test_a_sweep_finds_the_perplexity_of_both_levels_in_16_bits(
    pair: dict[str, str], tmp_path: Path
) -> None:
    rows = [
        {**row, "completion": f"{row['prompt']} ann has {row['answer']} apples ."}
        for row in ROWS[:8]
    ]
    arm = small(
        pair,
        tmp_path,
        rows=rows,
        **{"level": "both", "strategy": "perplexity", "dtype": "bfloat16", "max_length": 60},
        **{"select": "all", "validate": "none"},
    )
    result = sweep(
        SweepConfig(run_dir=str(arm.arm), thresholds=[0.1], strategies=["perplexity", "span"])
    )
    own = {one.setting.level: one for one in result.cells if one.current}
    assert set(own) == {"instruction", "response"}
    for level, found in own.items():
        views = [one for one in samples(arm) if bool(one["segment"]) == (level == "response")]
        assert found.overlap == 1
        assert found.spans == sum(len(one["spans"]) for one in views) > 0
        assert found.kept == sum(one["kept"] for view in views for one in view["candidates"]) > 0


def test_rows_that_one_of_two_scores_could_not_measure_are_left_out_of_the_comparison() -> None:
    current, best = made(0.05, [0.0] * 40, current=True), made(0.10, [1.0] * 40)
    del current.shares[3]
    for cells in ([current, best], [best, current]):
        found = propose_threshold(cells)
        assert found.cell is best
        assert not any("cannot be told" in doubt for doubt in found.doubts)


def test_an_arm_that_does_not_ask_the_student_on_cuts_is_not_told_to_try_more_thresholds(
    pair: dict[str, str], tmp_path: Path
) -> None:
    for changes in ({"validate": "teacher"}, {"validate": "none"}, {"relabel": True}):
        arm = small(pair, tmp_path, **changes)
        assert samples(arm)
        result = sweep(
            SweepConfig(run_dir=str(arm.arm), thresholds=[0.1], strategies=["span", "collective"])
        )
        (proposal,) = result.proposals
        (doubt,) = proposal.doubts
        assert proposal.cell is None
        assert "sweep one of validate both and without relabel" in doubt


def test_errors_name_options_of_the_sweep(run: Run, tmp_path: Path) -> None:
    arm = run.arms[0].arm
    short: dict[str, Any] = {"thresholds": [0.4], "strategies": ["span"]}
    copy = shutil.copytree(run.arms[0].run_directory, tmp_path / "run") / "arms" / arm.name
    (copy / "sweep.json").write_text("mine")
    with pytest.raises(ValueError, match=r"^run_dir: .*sweep\.json or sweep\.md .*; delete them$"):
        sweep(SweepConfig(run_dir=str(copy), **short))
    assert (copy / "sweep.json").read_text() == "mine"
    with pytest.raises(ValueError, match=r"^student: must be .*nowhere.*, which does not exist"):
        sweep(SweepConfig(run_dir=str(arm), **short, student=str(tmp_path / "nowhere")))


def test_a_sweep_of_models_in_memory_asks_where_their_tokenizers_are(
    pair: dict[str, str], tmp_path: Path
) -> None:
    config = DetectConfig(
        output_dir=str(tmp_path / "run"),
        cache_dir=str(tmp_path / "cache"),
        grade="exact",
        max_new_tokens=4,
    )
    models = {role: AutoModelForCausalLM.from_pretrained(path) for role, path in pair.items()}
    arm = detect(config, dataset=ROWS[:12], **models, processing_class=make_tokenizer()).arm
    short: dict[str, Any] = {"run_dir": str(arm), "thresholds": [0.1], "strategies": ["span"]}
    with pytest.raises(ValueError, match=r"^student: must be given for .* in memory.*--student"):
        sweep(SweepConfig(**short))
    with pytest.raises(ValueError, match=r"^teacher: must be given for .* in memory.*--teacher"):
        sweep(SweepConfig(**short, student=pair["student"]))
    (own,) = sweep(SweepConfig(**short, **pair)).cells
    assert own.current and own.known == own.usable > 0
