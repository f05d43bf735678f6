"""The commands that are printed to be typed next: what they say is what the settings were."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from leaf_distill.cli import parse
from leaf_distill.config import json_object
from leaf_distill.detection.cells import Setting
from leaf_distill.detection.config import DetectConfig
from leaf_distill.next_steps import after_detect, after_distill, after_sweep, changed
from leaf_distill.wording import command_line

MODELS = {"student": "s", "teacher": "t", "dataset": "d", "output_dir": "my runs"}


@pytest.mark.parametrize(
    "settings",
    [
        {"system_prompt": ""},
        {"system_prompt": "- be brief\n- be right"},
        {"chat_template_kwargs": {"enable_thinking": False}, "trust_remote_code": True},
        {"columns": {"prompt": "question"}, "threshold": 0.25, "level": "both", "max_rows": 3},
    ],
)
def test_a_command_has_the_settings_that_are_not_defaults(settings: dict[str, Any]) -> None:
    config = DetectConfig(**MODELS, **settings)
    line = command_line(("leaf", "detect"), changed(vars(config), DetectConfig), 80)
    words = shlex.split(line.replace("\\\n", ""))
    assert parse("detect", words[2:]) == (config,)


def proposed(
    arm: Path, capsys: pytest.CaptureFixture[str], *settings: Setting
) -> list[tuple[DetectConfig, str]]:
    """Return the detections that a sweep names, each with the line above it."""
    after_sweep(arm, settings)
    lines = capsys.readouterr().out.replace("\\\n", "").splitlines()
    pairs = zip(lines[1::2], lines[::2], strict=True)
    return [(parse("detect", shlex.split(line)[2:])[0], above) for line, above in pairs]


def test_levels_with_different_proposals_have_a_detection_each(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arm = DetectConfig(**MODELS, level="both", grade="number", widen="word")
    (tmp_path / "funnel.json").write_text(json.dumps({"settings": vars(arm)}))
    one = Setting("instruction", "gap", "absolute", "span", "word", 0.2)
    other = Setting("response", "gap", "absolute", "collective", "token", 0.4)
    (found, first), (last, second) = proposed(tmp_path, capsys, one, other)
    assert (found.level, found.strategy, found.widen, found.threshold) == (
        *("instruction", "span", "word", 0.2),
    )
    assert (last.level, last.strategy, last.widen, last.response_threshold) == (
        *("response", "collective", "token", 0.4),
    )
    assert found.grade == last.grade == "number"
    assert "instruction level" in first and "response level" in second
    alike = Setting("response", "gap", "absolute", "span", "word", 0.4)
    ((both, _),) = proposed(tmp_path, capsys, one, alike)
    assert (both.level, both.threshold, both.response_threshold) == ("both", 0.2, 0.4)
    ((alone, _),) = proposed(tmp_path, capsys, other)
    assert alone.level == "response" and alone.strategy == "collective"
    assert proposed(tmp_path, capsys) == []


def test_a_proposal_is_not_undone_by_the_preset_of_the_arm(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arm = DetectConfig(**MODELS, preset="paper")
    (tmp_path / "funnel.json").write_text(json.dumps({"settings": vars(arm)}))
    assert arm.widen == "token"
    best = Setting("instruction", arm.score, arm.rule, arm.strategy, "word", 0.35)
    ((found, _),) = proposed(tmp_path, capsys, best)
    assert (found.widen, found.threshold) == ("word", 0.35)


def test_the_own_setting_leads_to_the_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arm = DetectConfig(**MODELS, system_prompt="")
    (tmp_path / "funnel.json").write_text(json.dumps({"settings": vars(arm)}))
    own = Setting("instruction", arm.score, arm.rule, arm.strategy, arm.widen, arm.threshold)
    after_sweep(tmp_path, [own])
    line = capsys.readouterr().out.replace("\\\n", "").splitlines()[1]
    arguments, config = parse("distill", shlex.split(line)[2:])
    assert (arguments.student, config.system_prompt) == ("s", "")


@pytest.mark.parametrize(
    ("scored", "kept", "named"),
    [(0, 0, []), (9, 0, ["report"]), (10, 0, ["report", "sweep"]), (9, 1, ["report", "distill"])],
)
def test_a_detection_names_what_has_something_to_show(
    scored: int, kept: int, named: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = vars(DetectConfig(**MODELS))
    after_detect(tmp_path, settings, scored=scored, kept=kept)
    out = capsys.readouterr().out
    assert re.findall(r"^ *leaf (\w+)", out, re.MULTILINE) == named
    assert ("what was tried" in out) == (scored > 0 and not kept)


@pytest.mark.parametrize("rows", [None, "mine.csv"])
def test_the_evaluation_after_a_training_reads_the_columns_of_its_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], rows: str | None
) -> None:
    mapping = '{"prompt": "exercise", "answer": "result"}'
    arm = DetectConfig(**MODELS, columns=mapping, grade="number")
    (tmp_path / "funnel.json").write_text(json.dumps({"settings": vars(arm)}))
    given = [f"--dataset={tmp_path}", "--student=s", "--teacher=t", "--output_dir=out"]
    given += [f"--eval_dataset={rows}", "--eval_strategy=epoch"] if rows else []
    after_distill(*parse("distill", given))
    line = capsys.readouterr().out.replace("\\\n", "").splitlines()[1]
    (config,) = parse("evaluate", shlex.split(line)[2:])
    assert (config.dataset, config.grade) == (rows or "TEST.jsonl", "number")
    assert json_object(config.columns, "columns") == (None if rows else json.loads(mapping))
