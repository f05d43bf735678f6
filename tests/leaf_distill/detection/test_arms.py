"""Run directories: arms side by side, and nothing of a user's is overwritten."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from detect_run import ROWS, run, table

from leaf_distill.data.source import find_arm
from leaf_distill.detection.arms import arm_name
from leaf_distill.detection.config import DetectConfig
from leaf_distill.io import StoreError, locked


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({}, "span"),
        ({"seed": 3, "max_rows": 5, "grade": "exact"}, "span"),
        ({"strategy": "random_spans", "seed": 3}, "random_spans-seed-3"),
        ({"strategy": "distractors", "seed": 3}, "distractors-seed-3"),
        ({"threshold": 0.05, "rule": "quantile"}, "span-threshold-0.05-rule-quantile"),
        ({"threshold": 0.1000001, "cap": 1.0}, "span-threshold-0.1000001-cap-1"),
        ({"teacher_max": 0.5, "validate": "none"}, "span-teacher_max-0.5-validate-none"),
        ({"edit": "substitute", "seed": 3}, "span-edit-substitute-seed-3"),
        ({"score": "intervention", "seed": 3}, "span-score-intervention-seed-3"),
        ({"score": "lens", "seed": 3}, "span-score-lens"),
        ({"turns": "1,-1"}, "span-turns-1+-1"),
    ],
)
def test_an_arm_is_named_by_what_decides_its_cuts(settings: dict[str, object], name: str) -> None:
    assert arm_name(DetectConfig(**settings)) == name  # type: ignore[arg-type]


def test_a_long_name_still_is_one_of_a_directory(tmp_path: Path) -> None:
    many = ",".join(map(str, range(1, 200)))
    names = {arm_name(DetectConfig(turns=f"{many},{last}")) for last in (300, 301)}
    assert len(names) == 2 and all(name.startswith("span-turns-1+2+3") for name in names)
    for name in names:
        (tmp_path / name).mkdir()


def test_arms_stand_side_by_side(pair: dict[str, str], copied: Path) -> None:
    arm = find_arm(copied / "run")
    assert arm.name == "span-threshold-0.15"
    before = {path: path.read_bytes() for path in arm.iterdir()}
    result = run(pair, copied, strategy="random_spans")
    assert result.arm == copied / "run/arms/random_spans-threshold-0.15"
    assert {path: path.read_bytes() for path in before} == before


def test_find_arm(pair: dict[str, str], copied: Path) -> None:
    (only,) = (copied / "run/arms").iterdir()
    assert find_arm(copied / "run") == only == find_arm(only)
    run(pair, copied, strategy="random_spans")
    with pytest.raises(
        ValueError, match=r"must have one arm, got 2 \(.*random_spans.*, span.*\); "
    ):
        find_arm(copied / "run")
    assert find_arm(only) == only
    with pytest.raises(ValueError, match="must be the run directory of a finished"):
        find_arm(copied)


def test_a_replaced_arm_says_what_was_there(
    pair: dict[str, str], copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arm = find_arm(copied / "run")
    (arm / "report.html").write_text("a page")
    run(pair, copied, max_rows=12)
    output = " ".join(capsys.readouterr().out.split())
    assert re.search(
        r"Earlier results of this arm, which had dataset '.*', max_rows None, are", output
    )
    assert "report.html shows the earlier results" in output
    assert (arm / "report.html").read_text() == "a page"


def test_the_seconds_that_grading_may_take_decide_results(
    pair: dict[str, str], copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(pair, copied, grade_timeout=9.0, server_timeout=9.0)
    output = " ".join(capsys.readouterr().out.split())
    (sentence,) = re.findall(r"Earlier results of this arm, which had (.*), are replaced", output)
    assert "grade_timeout 5.0" in sentence and "server_timeout" not in sentence


def test_other_models_are_refused_one_a_line(pair: dict[str, str], copied: Path) -> None:
    swapped = {"student": pair["teacher"], "teacher": pair["student"]}
    with pytest.raises(ValueError) as caught:
        run(swapped, copied)
    lines = str(caught.value).splitlines()
    assert lines[1].strip() == f"the student was {pair['student']} and is {pair['teacher']}"
    assert len(lines) == 4


def test_a_misspelled_model_claims_nothing(pair: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        run(pair | {"teacher": str(tmp_path / "nowhere")}, tmp_path)
    assert not (tmp_path / "run").exists()
    assert len(table(run(pair, tmp_path).dataset)) >= len(ROWS)


def test_a_model_that_cannot_be_loaded_claims_nothing(pair: dict[str, str], tmp_path: Path) -> None:
    broken = Path(shutil.copytree(pair["student"], tmp_path / "broken"))
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match="from which no model can be read"):
        run(pair | {"student": str(broken)}, tmp_path)
    assert not (tmp_path / "run/run.json").exists()
    run(pair, tmp_path)


def test_inputs_are_never_outputs(pair: dict[str, str], copied: Path) -> None:
    arm = find_arm(copied / "run")
    before = (arm / "dataset.jsonl").read_bytes()
    for changes in ({"dataset": str(arm / "dataset.jsonl")}, {"output_dir": pair["student"]}):
        with pytest.raises(ValueError, match="output_dir: must not be an input"):
            run(pair, copied, **changes)
    assert (arm / "dataset.jsonl").read_bytes() == before


def test_a_file_or_a_foreign_directory_is_refused(pair: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match=r"must be a directory, got .*file, which is none"):
        run(pair, tmp_path, output_dir=str(tmp_path / "file"))
    (tmp_path / "own/arms").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"with arms but no run\.json"):
        run(pair, tmp_path, output_dir=str(tmp_path / "own"))
    assert (tmp_path / "file").read_text() == "mine"


def test_a_directory_serves_one_process_at_a_time(pair: dict[str, str], tmp_path: Path) -> None:
    program = (
        "import sys\nfrom pathlib import Path\nfrom leaf_distill.io import locked\n"
        "with locked(Path(sys.argv[1])):\n print('held', flush=True)\n input()\n"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path / "run")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    with pytest.raises(StoreError, match="in use by another process"):
        run(pair, tmp_path)
    holder.kill()
    holder.wait()
    run(pair, tmp_path)


def test_the_lock_follows_no_link(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("mine")
    os.symlink(tmp_path / "precious", tmp_path / ".lock")
    with pytest.raises(StoreError), locked(tmp_path):
        pass
    assert (tmp_path / "precious").read_text() == "mine"
