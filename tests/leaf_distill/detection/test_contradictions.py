"""Settings of `leaf detect` that contradict each other are one sentence, before anything runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from leaf_distill import cli
from leaf_distill.detection.config import DetectConfig

RELABEL: dict[str, Any] = {"relabel": True}
AGREEMENT: dict[str, Any] = {"relabel": True, "guard": "agreement"}
CODE: dict[str, Any] = {"grade": "code", "allow_code_execution": True}

CASES: list[tuple[dict[str, Any], str]] = [
    ({"level": "response", "cross_branch": True}, "cross_branch: must be false at the response"),
    ({"level": "both", "cross_branch": True}, "cross_branch: must be false at the response level"),
    ({"level": "response", **RELABEL}, "relabel: must be false at the response level, got true"),
    ({"level": "both", **RELABEL}, "relabel: must be false at the response level, got true"),
    ({"guard": "agreement"}, "guard: must be grader without relabel, got agreement; give"),
    ({**AGREEMENT, **CODE}, "guard: must be grader with grade code, got agreement"),
    ({**AGREEMENT, "cross_branch": True}, "cross_branch: must be false with guard agreement"),
    ({**RELABEL, "validate": "none"}, "validate: must be teacher or both with relabel"),
    ({**RELABEL, "preset": "release"}, "validate: must be teacher or both with relabel"),
    ({"edit": "substitute", "draws": 0}, "draws: must be at least 1 for edit substitute, got 0"),
    ({"segments": 1}, "segments: must be from 2 to 100, got 1"),
    ({"response_threshold": 1.5}, "response_threshold: must be from 0 to 1, got 1.5"),
    ({"agreement": 0}, "agreement: must be from 1 to 1000, got 0"),
    ({"draws": -1}, "draws: must be from 0 to 1000, got -1"),
    ({"turns": "0"}, "turns: must be all, last, or numbers of user turns as in 1,3, got '0'"),
    ({"turns": "1, 3"}, "turns: must be all, last, or numbers of user turns as in 1,3"),
    ({"turns": ""}, "turns: must be all, last, or numbers of user turns as in 1,3, got ''"),
    ({"level": "prompt"}, "level: must be one of instruction, response, both, got 'prompt'"),
    ({"target": "all"}, "target: must be one of rest, next, got 'all'"),
    (
        {"widen": "line"},
        "widen: must be one of token, word, phrase, clause, sentence, got 'line'",
    ),
    (
        {"strategy": "cumulative", "edit": "substitute"},
        "edit: must be delete with strategy cumulative, which cuts whole phrases, got substitute",
    ),
    ({"max_cuts": 0}, "max_cuts: must be at least 1, got 0"),
    ({"preset": "ours"}, "preset: must be one of paper, release, got 'ours'"),
]


@pytest.mark.parametrize(("settings", "sentence"), CASES)
def test_a_contradiction_is_one_sentence(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError) as caught:
        DetectConfig(**settings)
    said = str(caught.value)
    assert said.startswith(sentence) and "\n" not in said


@pytest.mark.parametrize(
    "settings",
    [
        {"edit": "substitute", "draws": 1},
        {"score": "intervention", "draws": 0},
        {**AGREEMENT, "edit": "substitute"},
        {**RELABEL, "cross_branch": True},
        {**RELABEL, "validate": "teacher"},
        {**RELABEL, "preset": "paper"},
        {"level": "both", "edit": "substitute", "turns": "-1,2"},
    ],
)
def test_what_fits_together_is_accepted(settings: dict[str, Any]) -> None:
    config = DetectConfig(**settings)
    assert {name: getattr(config, name) for name in settings} == settings


def test_the_command_says_it_and_writes_nothing(
    pair: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["detect", "--student", pair["student"], "--teacher", pair["teacher"]]
    argv += ["--dataset", "rows.jsonl", "--output_dir", str(tmp_path / "run")]
    with pytest.raises(SystemExit, match="2"):  # as argparse leaves
        cli.main([*argv, "--level", "response", "--cross_branch"])
    said = capsys.readouterr().err
    assert "cross_branch: must be false at the response level, got true" in said
    assert list(tmp_path.iterdir()) == []
