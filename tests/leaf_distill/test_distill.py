"""`leaf distill` from files to a checkpoint that loads, described by its card."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from distill_pair import make_config, make_rows, make_student, make_teacher, make_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from leaf_distill.distill import distill
from leaf_distill.distill_config import DistillArguments
from leaf_distill.trainer import LeafTrainer


@pytest.fixture
def pair(tmp_path: Path) -> dict[str, str]:
    for name, model in (("student", make_student()), ("teacher", make_teacher())):
        model.save_pretrained(tmp_path / name)
        make_tokenizer().save_pretrained(tmp_path / name)
    return {"student": str(tmp_path / "student"), "teacher": str(tmp_path / "teacher")}


def write_run(directory: Path, rows: list[dict[str, Any]]) -> str:
    """What distillation reads of a finished run of `leaf detect`."""
    directory.mkdir()
    (directory / "run.json").write_text("{}")
    pq.write_table(pa.Table.from_pylist(rows), directory / "dataset.parquet")
    return str(directory)


def test_a_run_of_detect_becomes_a_checkpoint(
    tmp_path: Path, pair: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    rows = make_rows(12, 5)
    arguments = DistillArguments(
        **pair,
        dataset=write_run(tmp_path / "run", rows),
        eval_dataset=write_run(tmp_path / "held_out", make_rows(4, 2, seed=1)),
    )
    output = tmp_path / "out"
    result = distill(arguments, make_config(output, num_train_epochs=4))
    assert capsys.readouterr().out.splitlines()[-1].startswith(f"The student is in {output}")

    model = AutoModelForCausalLM.from_pretrained(output)
    before = AutoModelForCausalLM.from_pretrained(pair["student"])
    assert not torch.equal(model.lm_head.weight, before.lm_head.weight)
    assert AutoTokenizer.from_pretrained(output)("w1 w2")["input_ids"] == [6, 7]
    assert (output / "generation_config.json").is_file()

    metrics = json.loads((output / "metrics.json").read_text())
    assert metrics == json.loads(json.dumps(result.metrics))
    assert metrics["rows"]["originals"] == 12 and metrics["rows"]["counterfactuals"] == 5
    logs = [log for log in metrics["log"] if "loss" in log]
    assert logs[-1]["loss"] < logs[0]["loss"]
    card = (output / "README.md").read_text()
    for words in (
        "arXiv:2506.07851",
        "12 originals and 5 counterfactuals",
        pair["teacher"],
        f"{logs[-1]['kd_loss']:.4f}",
        f"{metrics['eval']['eval_cd_loss']:.4f}",
        "pool (every token counts the same)",
    ):
        assert words in card


def test_other_rows_are_all_originals(tmp_path: Path, pair: dict[str, str]) -> None:
    file = tmp_path / "rows.jsonl"
    lines = [{"question": "w1 w2", "reply": f"w{i}"} for i in range(6)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    arguments = DistillArguments(
        **pair,
        dataset=str(file),
        columns='{"prompt": "question", "completion": "reply"}',
        max_rows=5,
    )
    config = make_config(tmp_path / "out", per_device_train_batch_size=8, num_train_epochs=1)
    metrics = distill(arguments, config).metrics
    assert metrics["rows"]["originals"] == 5 and metrics["rows"]["counterfactuals"] == 0
    assert metrics["log"][0]["steps_without_cf"] == 1


def test_max_rows_counts_originals_and_keeps_their_counterfactuals(
    tmp_path: Path, pair: dict[str, str]
) -> None:
    rows = make_rows(8, 4)
    for row, parent in zip(rows[8:], (0, 0, 3, 7), strict=True):
        row["row_id"] = parent
    arguments = DistillArguments(**pair, dataset=write_run(tmp_path / "run", rows), max_rows=4)
    metrics = distill(arguments, make_config(tmp_path / "out", max_steps=1)).metrics
    assert metrics["rows"]["originals"] == 4 and metrics["rows"]["counterfactuals"] == 3


class _Kill(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 3:
            raise KeyboardInterrupt


def test_the_same_command_goes_on_and_another_one_is_refused(
    tmp_path: Path,
    pair: dict[str, str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    arguments = DistillArguments(**pair, dataset=write_run(tmp_path / "run", make_rows(12, 5)))
    saving = {"save_strategy": "steps", "save_steps": 1, "max_steps": 5}
    whole = distill(arguments, make_config(tmp_path / "whole", **saving))

    train = LeafTrainer.train

    def killed(self: LeafTrainer, *words: Any, **options: Any) -> Any:
        self.add_callback(_Kill())
        return train(self, *words, **options)

    with monkeypatch.context() as patch:
        patch.setattr(LeafTrainer, "train", killed)
        with pytest.raises(KeyboardInterrupt):
            distill(arguments, make_config(tmp_path / "out", **saving))
    with caplog.at_level(logging.WARNING, logger="leaf_distill"):
        resumed = distill(arguments, make_config(tmp_path / "out", **saving))
    assert "checkpoint-2" in caplog.text
    students = [
        AutoModelForCausalLM.from_pretrained(result.output_dir).state_dict()
        for result in (whole, resumed)
    ]
    assert all(torch.equal(students[0][name], students[1][name]) for name in students[0])
    with pytest.raises(ValueError, match=r"kd_weight was 'pool' and is now '0.5'"):
        distill(arguments, make_config(tmp_path / "out", kd_weight="0.5", **saving))


def test_an_unfinished_run_and_a_damaged_file_are_named(
    tmp_path: Path, pair: dict[str, str]
) -> None:
    run = Path(write_run(tmp_path / "run", make_rows(4, 1)))
    config = make_config(tmp_path / "out")
    file = run / "dataset.parquet"
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"dataset.parquet cannot be read"):
        distill(DistillArguments(**pair, dataset=str(run)), config)
    file.unlink()
    with pytest.raises(ValueError, match="is not finished"):
        distill(DistillArguments(**pair, dataset=str(run)), config)
