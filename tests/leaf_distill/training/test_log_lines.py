"""The table that a training prints: a line for each log, with a head, within 80 columns."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest
from distill_pair import make_rows, make_trainer
from transformers import TrainerCallback

from leaf_distill.training.log_lines import plain_on_purpose

HEAD = ["step", "loss", "kl", "cut", "kl", "agree", "lr", "tok/s", "time", "left"]


def lines_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], **settings: object
) -> tuple[list[str], list[dict[str, float]]]:
    trainer = make_trainer(tmp_path, make_rows(12, 5), **settings)
    capsys.readouterr()
    trainer.train()
    return capsys.readouterr().out.splitlines(), trainer.state.log_history


def test_a_line_has_the_numbers_of_its_log(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines, logs = lines_of(tmp_path, capsys, max_steps=3, logging_steps=1)
    assert lines[0].split() == HEAD
    log = next(one for one in logs if "loss" in one and "cd_loss" in one)
    cells = next(line.split() for line in lines if line.split()[0] == f"{log['step']}/3")
    shown = [float(cell.replace(",", "")) for cell in cells[1:4]]
    assert shown == pytest.approx([log[name] for name in ("loss", "kd_loss", "cd_loss")], rel=6e-3)
    assert cells[4] == f"{log['agreement']:.0%}"
    assert float(cells[5]) == pytest.approx(log["learning_rate"], rel=0.06)
    assert cells[6] == f"{log['tokens_per_second']:,.0f}"
    assert [line.split()[0] for line in lines[1:4]] == ["1/3", "2/3", "3/3"]
    assert "left" not in lines[3] and lines[3].endswith(" s")
    assert lines[4].startswith("trained 3 steps in ") and len(lines) == 5
    assert max(map(len, lines)) <= 80
    assert "loss" in logs[0] and "tokens_per_second" in logs[0]  # what reporters get is whole


def test_the_time_begins_with_the_first_step(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What other callbacks measure before it is not in the time of the training."""
    hours, monotonic = [0], time.monotonic
    monkeypatch.setattr(time, "monotonic", lambda: monotonic() + 3600 * hours[0])

    class Slow(TrainerCallback):
        def on_train_begin(self, *_: object, **__: object) -> None:
            hours[0] += 100

    trainer = make_trainer(tmp_path, make_rows(8, 0), max_steps=2, logging_steps=1)
    trainer.add_callback(Slow())
    capsys.readouterr()
    trainer.train()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and not any(re.search(r"\d h\b", line) for line in lines)


def test_an_evaluation_has_a_line_with_its_name_and_accuracy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {"eval_strategy": "steps", "eval_steps": 1, "logging_steps": 1, "max_steps": 1}
    answers = {"eval_answers": 4, "grade": "exact", "max_new_tokens": 4}
    lines, logs = lines_of(tmp_path, capsys, **settings, **answers)
    log = next(one for one in logs if "eval_loss" in one)
    (line,) = (line for line in lines if "eval: " in line)
    assert f"eval: {log['eval_accuracy']:.1%} right" in line
    assert float(line.split()[1]) == pytest.approx(log["eval_loss"], rel=6e-3)
    assert len(line) <= 80


def test_without_counterfactuals_that_column_is_empty(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = make_trainer(tmp_path, make_rows(8, 0), max_steps=1, divergence="reverse_kl")
    capsys.readouterr()
    trainer.train()
    head, line, _ = capsys.readouterr().out.splitlines()
    start = head.index("cut rkl")
    assert line[start : start + len("cut rkl")].strip() == ""
    assert line[start - 9 : start - 2].strip() != ""


@pytest.mark.parametrize(
    ("counterfactuals", "settings", "said"),
    [
        (0, {}, "this is plain distillation;"),
        (0, {"ce_weight": 1.0}, "this is plain fine-tuning;"),
        (3, {}, ""),
    ],
)
def test_a_dataset_without_counterfactuals_is_said(
    counterfactuals: int,
    settings: dict[str, float],
    said: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    trainer = make_trainer(tmp_path, make_rows(8, counterfactuals), max_steps=1, **settings)
    trainer.train()
    found = [text for text in caplog.messages if "no counterfactuals" in text]
    assert len(found) == bool(said) and said in "".join(found)
    caplog.clear()
    with plain_on_purpose():
        trainer.train()
    assert "no counterfactuals" not in caplog.text


def test_the_head_comes_again_so_that_it_stays_on_the_screen(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines, _ = lines_of(tmp_path, capsys, max_steps=25, logging_steps=1)
    assert [at for at, line in enumerate(lines) if line.split() == HEAD] == [0, 21]
