"""What a run of stage 1 takes from disk: killed, damaged, or with another setting."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import detect_pair
import pytest
import torch
from detect_run import CONFOUNDED, ROWS, check_sums, reasons, run, settings, table
from transformers import AutoModelForCausalLM

from leaf_distill.detection import pair as pair_module
from leaf_distill.detection import steps
from leaf_distill.detection.pipeline import DetectResult
from leaf_distill.io import StoreError


def content(root: Path) -> dict[str, bytes]:
    """All that must be the same in two runs: not the seconds, nor the name of the directory."""
    own = {"funnel.json", "run.json"}
    files = (path for path in (root / "run").rglob("*") if path.is_file() and path.name not in own)
    return {str(path.relative_to(root)): path.read_bytes() for path in files}


def test_other_settings_start_from_the_stored_norms(
    pair: dict[str, str], copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **options: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(pair_module, "load_model", refuse)
    spans = {}
    for name, changes in {
        "wide": {"threshold": 0.6},
        "quantile": {"rule": "quantile", "threshold": 0.3},
        "collective": {"strategy": "collective", "threshold": 0.6},
        "control": {"strategy": "random_spans", "max_batch_tokens": 9999},
    }.items():
        result = run(pair, copied, validate="none", **changes)
        check_sums(result, len(ROWS))
        spans[name] = [sample["spans"] for sample in table(result.samples)]
        cuts = [line for line in table(result.dataset) if line["branch"] == "counterfactual"]
        assert {line["strategy"] for line in cuts} == {changes.get("strategy", "span")}
        if name == "collective":
            assert len(cuts) == len(spans[name]) and spans[name] == spans["wide"]
    total = {name: sum(map(len, rows)) for name, rows in spans.items()}
    assert total["wide"] > total["control"]
    assert spans["quantile"] != spans["control"]


def test_the_same_command_again_computes_nothing(
    pair: dict[str, str], copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = content(copied)
    monkeypatch.setattr(pair_module, "load_model", None)
    run(pair, copied)
    assert content(copied) == before


@pytest.mark.parametrize(("function", "call"), [("generate", 2), ("generate", 9), ("saliency", 3)])
def test_interrupted_and_resumed_ends_with_the_same_bytes(
    pair: dict[str, str],
    finished: DetectResult,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    function: str,
    call: int,
) -> None:
    original, calls = getattr(steps, function), 0

    def interrupted(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            raise KeyboardInterrupt
        return original(*args, **options)

    monkeypatch.setattr(steps, function, interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(pair, tmp_path)
    monkeypatch.undo()
    assert not (tmp_path / "run/dataset.parquet").exists()
    run(pair, tmp_path)
    assert content(tmp_path) == content(finished.run_directory.parent)


def test_killed_and_resumed_ends_with_the_same_bytes(
    pair: dict[str, str], finished: DetectResult, tmp_path: Path
) -> None:
    file = tmp_path / "settings.json"
    file.write_text(json.dumps(settings(pair, tmp_path)))
    process = subprocess.Popen([sys.executable, detect_pair.__file__, str(file)])
    while process.poll() is None:
        if list(tmp_path.glob("run/stages/predict-teacher/*/part-*.parquet")):
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.005)
    assert process.wait() == -signal.SIGKILL
    run(pair, tmp_path)
    assert content(tmp_path) == content(finished.run_directory.parent)


def test_a_corrupt_part_is_named_and_recomputed(pair: dict[str, str], copied: Path) -> None:
    before = content(copied)
    (part, *_) = copied.glob("run/stages/saliency-teacher/*/part-00000.parquet")
    part.write_bytes(part.read_bytes()[:-20] + b"\0" * 20)
    with pytest.raises(StoreError, match=str(part)):
        run(pair, copied)
    part.unlink()
    run(pair, copied)
    assert content(copied) == before


def stage_directories(root: Path) -> set[tuple[str, ...]]:
    return {path.parts[-2:] for path in root.glob("run/stages/*/*")}


PREDICT = {f"{step}-{role}" for step in ("predict", "grade") for role in ("student", "teacher")}
SCORE = {"saliency-student", "saliency-teacher", "detect", "prune"}
OF_TEACHER = {"predict-teacher", "grade-teacher", "saliency-teacher", "detect", "prune"}
LABELLED = [{**row, "completion": f"{row['answer']} apples"} for row in ROWS]


@pytest.mark.parametrize(
    ("changes", "new"),
    [
        ({"max_batch_tokens": 99}, set()),
        ({"seed": 1}, set()),  # the strategy draws nothing
        ({"dtype": "float64"}, PREDICT | SCORE),
        ({"system_prompt": "be brief ."}, {"render"} | PREDICT | SCORE),
        ({"chat_template": "none"}, {"render"} | PREDICT | SCORE),
        ({"max_new_tokens": 5}, PREDICT),
        ({"grade": "number"}, {"grade-student", "grade-teacher"}),
        ({"grade_timeout": 6.0}, {"grade-student", "grade-teacher"}),
        ({"max_length": 39}, {"render", "prune"}),
        ({"rows": LABELLED}, {"render"} | SCORE),
        ({"weights": "teacher"}, OF_TEACHER),
        ({"threshold": 0.2}, {"detect", "prune"}),
        ({"strategy": "collective"}, {"prune"}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_a_changed_setting_makes_the_stages_new_that_depend_on_it(
    pair: dict[str, str], copied: Path, changes: dict[str, Any], new: set[str]
) -> None:
    changes = dict(changes)
    rows = changes.pop("rows", ROWS)
    if role := changes.pop("weights", None):
        pair = pair | {role: other_weights(pair[role], copied)}
    before = stage_directories(copied)
    run(pair, copied, rows, validate="none", **changes)
    assert {name for name, _ in stage_directories(copied) - before} == new


def other_weights(model: str, root: Path) -> str:
    """A model with another last norm, in the run's eyes under the same name."""
    other = str(shutil.copytree(model, root / "model"))
    network = AutoModelForCausalLM.from_pretrained(other)
    with torch.no_grad():
        network.model.norm.weight.mul_(1.0001)
    network.save_pretrained(other)
    path = root / "run/run.json"
    path.write_text(path.read_text().replace(json.dumps(model), json.dumps(other)))
    return other


def test_another_seed_draws_other_random_cuts(pair: dict[str, str], copied: Path) -> None:
    cuts = []
    for seed in (0, 1):
        before = stage_directories(copied)
        result = run(pair, copied, validate="none", strategy="random_spans", seed=seed)
        assert {name for name, _ in stage_directories(copied) - before} == {"prune"}
        cuts.append([line["cut"] for line in table(result.dataset)])
    assert cuts[0] != cuts[1]


def test_other_gold_answers_are_graded_anew(pair: dict[str, str], copied: Path) -> None:
    first = CONFOUNDED.index(True)
    (sample, *_) = table(copied / "run/samples.parquet")
    rows = [dict(row) for row in ROWS]
    rows[first]["answer"] = sample["student_answer"]
    result = run(pair, copied, rows)
    assert reasons(result)["student_right"] == CONFOUNDED.count(False) + 1
