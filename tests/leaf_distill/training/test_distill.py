"""`leaf distill` from files to a checkpoint that loads, described by its card."""

from __future__ import annotations

import json
import logging
import os
import re
import resource
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from distill_pair import make_config, make_rows, make_student, make_teacher, make_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from leaf_distill.io import StoreError, locked
from leaf_distill.models.loading import load_model
from leaf_distill.training.config import DistillArguments
from leaf_distill.training.distill import distill
from leaf_distill.training.trainer import LeafTrainer


@pytest.fixture
def pair(tmp_path: Path) -> dict[str, str]:
    for name, model in (("student", make_student()), ("teacher", make_teacher())):
        model.save_pretrained(tmp_path / name)
        make_tokenizer().save_pretrained(tmp_path / name)
    return {"student": str(tmp_path / "student"), "teacher": str(tmp_path / "teacher")}


def write_table(path: Path, rows: list[dict[str, Any]]) -> None:
    names = dict.fromkeys(name for row in rows for name in row)
    lines = [{**names, **row} for row in rows]  # Arrow takes the columns of the first
    pq.write_table(pa.Table.from_pylist(lines), path)


def write_run(directory: Path, rows: list[dict[str, Any]]) -> str:
    """Write the files of a finished run of `leaf detect` that distillation reads."""
    directory.mkdir()
    (directory / "run.json").write_text("{}")
    write_table(directory / "dataset.parquet", rows)
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
        "| kd_weight | pool |",
    ):
        assert words in card


def test_other_rows_are_all_originals(
    tmp_path: Path, pair: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
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
    result = distill(arguments, config)
    metrics = result.metrics
    assert str(result.output_dir) in repr(result) and "weights" not in repr(result)
    assert metrics["rows"]["originals"] == 5 and metrics["rows"]["counterfactuals"] == 0
    assert metrics["log"][0]["steps_without_cf"] == 1
    assert "the dataset has no counterfactuals: this is plain distillation;" in caplog.text
    assert "by plain distillation" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("warmup_steps", [5, 2])
def test_a_warm_up_that_never_ends_is_said_and_the_last_step_is_logged(
    warmup_steps: int, tmp_path: Path, pair: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    arguments = DistillArguments(**pair, dataset=write_run(tmp_path / "run", make_rows(8, 4)))
    config = make_config(
        tmp_path / "out", max_steps=3, warmup_steps=warmup_steps, logging_steps=100
    )
    metrics = distill(arguments, config).metrics
    advice = "the warm-up never ends: lower warmup_steps or raise max_steps"
    assert (advice in caplog.text) is (warmup_steps == 5)
    assert [log["step"] for log in metrics["log"] if "loss" in log][-1] == 3
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| max_steps | 3 |" in card and "epochs" not in card


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
        assert f"goes on from {tmp_path / 'out' / 'checkpoint-2'}" in caplog.text
        with pytest.raises(KeyboardInterrupt):
            distill(arguments, make_config(tmp_path / "unsaved", max_steps=5))
        assert "nothing to go on from yet" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="leaf_distill"):
        resumed = distill(arguments, make_config(tmp_path / "out", **saving))
    assert "checkpoint-2" in caplog.text
    students = [
        AutoModelForCausalLM.from_pretrained(result.output_dir).state_dict()
        for result in (whole, resumed)
    ]
    assert all(torch.equal(students[0][name], students[1][name]) for name in students[0])
    with pytest.raises(ValueError, match=r"kd_weight was 'pool' and is now 0.5\n"):
        distill(arguments, make_config(tmp_path / "out", kd_weight=0.5, **saving))


def test_an_unfinished_run_and_a_damaged_file_are_named(
    tmp_path: Path, pair: dict[str, str]
) -> None:
    run = Path(write_run(tmp_path / "run", make_rows(4, 1)))
    config = make_config(tmp_path / "out")
    file = run / "dataset.parquet"
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"dataset.parquet"):
        distill(DistillArguments(**pair, dataset=str(run)), config)
    file.unlink()
    with pytest.raises(ValueError, match="must be the run directory of a finished"):
        distill(DistillArguments(**pair, dataset=str(run)), config)


def weights(directory: Path) -> bytes:
    return (directory / "model.safetensors").read_bytes()


SAVING = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3}
"""Three steps of 8 originals end in the middle of the second epoch over 12."""


def test_a_finished_run_stays_as_it_is(tmp_path: Path, pair: dict[str, str]) -> None:
    dataset = write_run(tmp_path / "run", make_rows(12, 5))
    arguments, output = DistillArguments(**pair, dataset=dataset), tmp_path / "out"
    first = distill(arguments, make_config(output, **SAVING))
    trained, card = weights(output), (output / "README.md").read_text()
    again = distill(arguments, make_config(output, **SAVING))
    assert again.metrics == json.loads(json.dumps(first.metrics))
    assert weights(output) == trained and (output / "README.md").read_text() == card

    # Nobody else's file is overwritten, and a damaged one is not taken for the student.
    damaged = (output / "model.safetensors").read_bytes()[:-1] + b"x"
    (output / "model.safetensors").write_bytes(damaged)
    with pytest.raises(ValueError, match=r"model\.safetensors has changed; delete that file"):
        distill(arguments, make_config(output, **SAVING))
    assert (output / "model.safetensors").read_bytes() == damaged

    # Its weights were lost (or it was killed before the end): what is left is to save them.
    (output / "model.safetensors").unlink()
    late = distill(arguments, make_config(output, resume_from_checkpoint="True", **SAVING))
    assert weights(output) == trained and not (output / "checkpoint-4").exists()
    steps = [[log for log in run.metrics["log"] if "loss" in log] for run in (first, late)]
    assert steps[0] == steps[1]

    afresh = make_config(output, resume_from_checkpoint="false", **SAVING)
    assert distill(arguments, afresh).metrics["train"]["train_loss"] > 0
    assert weights(output) == trained


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"chat_template": "foo"}, "chat_template"),
        ({"max_length": 5}, r"must have a row to train on, got 9 too_long \(row 0: "),
        ({"eval_on_start": True}, "eval_dataset: must be given with eval_on_start"),
        ({"report_to": "foo"}, "foo"),
        ({"optim": "rmsprop", "optim_args": "foo"}, "unpack"),
    ],
)
def test_refused_settings_leave_the_directory_free(
    settings: dict[str, Any], message: str, tmp_path: Path, pair: dict[str, str]
) -> None:
    arguments = DistillArguments(**pair, dataset=write_run(tmp_path / "run", make_rows(8, 1)))
    with pytest.raises(ValueError, match=message) as refused:
        distill(arguments, make_config(tmp_path / "out", max_steps=1, **settings))
    raised_in = traceback.extract_tb(refused.value.__traceback__)[-1].filename
    assert "leaf_distill" in Path(raised_in).parts or "optim_args" in settings
    assert not (tmp_path / "out" / "run.json").exists()


@pytest.mark.parametrize(
    "setting",
    [{"per_device_eval_batch_size": 0}, {"deepspeed": "nope.json"}, {"lr_scheduler_type": "nope"}],
)
def test_settings_of_the_base_class_are_refused_in_our_words(
    setting: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(ValueError) as refused:
        make_config(tmp_path / "out", **setting)
    raised_in = traceback.extract_tb(refused.value.__traceback__)[-1].filename
    assert "leaf_distill" in Path(raised_in).parts


def test_what_decides_the_weights_decides_whose_the_directory_is(
    tmp_path: Path, pair: dict[str, str]
) -> None:
    dataset, output = write_run(tmp_path / "run", make_rows(8, 2)), tmp_path / "out"
    arguments = DistillArguments(**pair, dataset=dataset)
    first = distill(arguments, make_config(output, max_steps=1))
    for setting in (
        {"data_seed": 7},
        {"dataloader_drop_last": True},
        {"optim": "sgd"},
        {"adam_beta2": 0.9},
        {"bf16": True},
        {"neftune_noise_alpha": 5.0},
        {"lr_scheduler_kwargs": {"num_cycles": 2}},
    ):
        with pytest.raises(ValueError, match=f"{next(iter(setting))} was "):
            distill(arguments, make_config(output, max_steps=1, **setting))
    bfloat16 = DistillArguments(**pair, dataset=dataset, teacher_dtype="bfloat16")
    with pytest.raises(ValueError, match=r"teacher_dtype was 'auto' and is now 'bfloat16'"):
        distill(bfloat16, make_config(output, max_steps=1))
    incidental = {"logging_steps": 3, "save_steps": 7, "per_device_train_batch_size": 2}
    same = distill(arguments, make_config(output, max_steps=1, **incidental))
    assert same.metrics == json.loads(json.dumps(first.metrics))


def test_an_old_generation_config_is_saved_without_its_sampling(
    tmp_path: Path, pair: dict[str, str]
) -> None:
    file = Path(pair["student"]) / "generation_config.json"
    file.write_text('{"temperature": 0.6, "length_penalty": 2.0, "repetition_penalty": 1.1}')
    arguments = DistillArguments(**pair, dataset=write_run(tmp_path / "run", make_rows(8, 1)))
    distill(arguments, make_config(tmp_path / "out", max_steps=1))
    saved = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert saved.keys().isdisjoint({"temperature", "length_penalty"})
    assert saved["repetition_penalty"] == 1.1


def test_rows_that_cannot_be_read_are_counted(tmp_path: Path, pair: dict[str, str]) -> None:
    file = tmp_path / "rows.jsonl"
    lines = [{"prompt": "w1 w2", "completion": f"w{i}" if i else ""} for i in range(4)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    arguments = DistillArguments(**pair, dataset=str(file))
    metrics = distill(arguments, make_config(tmp_path / "out", max_steps=1)).metrics
    assert metrics["rows"]["left_out"] == {"empty_completion": 1}
    assert [entry["row_id"] for entry in metrics["left_out"]] == [0]
    assert "left out: 1 empty_completion" in (tmp_path / "out" / "README.md").read_text()

    file.write_text(json.dumps(lines[0]) + "\n")
    with pytest.raises(ValueError, match="got 1 empty_completion"):
        distill(arguments, make_config(tmp_path / "other", max_steps=1))


def test_max_rows_takes_rows_without_row_id(tmp_path: Path, pair: dict[str, str]) -> None:
    rows = make_rows(8, 0)
    for row in rows:
        del row["row_id"]
    arguments = DistillArguments(**pair, dataset=write_run(tmp_path / "run", rows), max_rows=3)
    metrics = distill(arguments, make_config(tmp_path / "out", max_steps=1)).metrics
    assert metrics["rows"]["originals"] == 3


def test_other_prompts_than_the_teachers_or_detections_are_named(
    tmp_path: Path, pair: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    teacher = make_tokenizer()
    teacher.chat_template = f"<unk> {teacher.chat_template}"
    teacher.save_pretrained(pair["teacher"])
    run = write_run(tmp_path / "run", make_rows(8, 1))
    detected = {"settings": {"chat_template": "auto", "system_prompt": "w1"}}
    (Path(run) / "funnel.json").write_text(json.dumps(detected))
    distill(DistillArguments(**pair, dataset=run), make_config(tmp_path / "out", max_steps=1))
    assert "chat templates are different" in caplog.text
    assert "system_prompt is None, but `leaf detect` scored with 'w1'" in caplog.text
    assert "chat_template is" not in caplog.text


@pytest.mark.parametrize(
    ("strategy", "room"),
    [("no", 0.5), ("steps", 0.5), ("steps", 1.1)],
    ids=["final weights", "a checkpoint's weights", "its optimizer"],
)
def test_a_full_disk_is_told_and_the_same_command_goes_on(
    strategy: str, room: float, tmp_path: Path, pair: dict[str, str]
) -> None:
    """The limit on a file's size fails as a full disk does, in the writers of weights."""
    arguments = DistillArguments(**pair, dataset=write_run(tmp_path / "run", make_rows(12, 5)))
    settings = {**SAVING, "save_strategy": strategy}
    whole = distill(arguments, make_config(tmp_path / "whole", **settings))
    limit = int(room * len(weights(whole.output_dir)))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
    try:
        with pytest.raises(StoreError, match=r"the disk is full: .*free some space"):
            distill(arguments, make_config(tmp_path / "out", **settings))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    distill(arguments, make_config(tmp_path / "out", **settings))
    assert weights(tmp_path / "out") == weights(whole.output_dir)


def trained_steps(metrics: dict[str, Any]) -> list[int]:
    return [log["step"] for log in metrics["log"] if "loss" in log]


def test_what_a_kill_left_of_a_checkpoint_takes_no_whole_ones_place(
    tmp_path: Path, pair: dict[str, str]
) -> None:
    """At the kill one of three checkpoints was being deleted, and one being saved."""
    arguments = DistillArguments(**pair, dataset=write_run(tmp_path / "run", make_rows(12, 5)))
    output, settings = tmp_path / "out", {**SAVING, "save_total_limit": None}
    distill(arguments, make_config(output, **settings))
    trained = weights(output)
    (output / "metrics.json").unlink()
    (output / "checkpoint-1" / "optimizer.pt").unlink()
    (output / "checkpoint-3" / "manifest.json").unlink()
    os.utime(output / "checkpoint-1", (2**31, 2**31))  # newer than all others
    distill(arguments, make_config(output, **{**settings, "save_total_limit": 2}))
    assert {one.name for one in output.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-3"}
    assert weights(output) == trained


# ---- whose a directory is ----


@pytest.mark.parametrize("name", ["README.md", "config.json", "model.safetensors", "checkpoint-2"])
def test_files_of_others_are_not_overwritten(
    name: str, tmp_path: Path, pair: dict[str, str]
) -> None:
    """Not even a checkpoint is gone on from, which no run of `leaf distill` here has written."""
    output = tmp_path / "out"
    output.mkdir()
    (output / "notes.txt").write_text("kept")
    if name == "checkpoint-2":
        (output / name).mkdir()
    else:
        (output / name).write_text("theirs")
    arguments = DistillArguments(**pair, dataset=write_run(tmp_path / "run", make_rows(8, 1)))
    with pytest.raises(ValueError, match=rf"output_dir: must be empty .*, got .*out with {name}"):
        distill(arguments, make_config(output, max_steps=1))
    assert sorted(path.name for path in output.iterdir()) == sorted([name, "notes.txt"])
    if name == "checkpoint-2":
        (output / name).rmdir()
    else:
        assert (output / name).read_text() == "theirs"
        (output / name).unlink()
    distill(arguments, make_config(output, max_steps=1))  # notes.txt is in nobody's way
    assert (output / "notes.txt").read_text() == "kept"


@pytest.mark.parametrize("name", ["~nobody-here/rows", "x" * 300])
def test_what_can_be_no_dataset(name: str, tmp_path: Path, pair: dict[str, str]) -> None:
    arguments = DistillArguments(**pair, dataset=name)
    with pytest.raises(ValueError, match=r"^dataset: "):
        distill(arguments, make_config(tmp_path / "out"))
    given = replace(arguments, dataset=write_run(tmp_path / "run", make_rows(8, 1)))
    with pytest.raises(ValueError, match=r"^eval_dataset: "):
        distill(replace(given, eval_dataset=name), make_config(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_an_input_is_no_output(tmp_path: Path, pair: dict[str, str]) -> None:
    run = write_run(tmp_path / "run", make_rows(8, 1))
    arguments = DistillArguments(**pair, dataset=run)
    for directory in (pair["student"], pair["teacher"], run):
        before = {path: path.read_bytes() for path in Path(directory).iterdir()}
        with pytest.raises(ValueError, match="output_dir: must be empty or hold a run"):
            distill(arguments, make_config(directory, max_steps=1))
        assert {path: path.read_bytes() for path in Path(directory).iterdir()} == before
    with pytest.raises(ValueError, match=r"output_dir: must be a directory, got .* which is none"):
        distill(arguments, make_config(f"{run}/dataset.parquet", max_steps=1))


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path, pair: dict[str, str]) -> None:
    arguments = DistillArguments(**pair, dataset=write_run(tmp_path / "run", make_rows(12, 5)))
    distill(arguments, make_config(tmp_path / "one", **SAVING))
    checkpoint = str(tmp_path / "one" / "checkpoint-2")
    named = {**SAVING, "resume_from_checkpoint": checkpoint}
    with pytest.raises(
        ValueError, match=r"got .*one, where\n  kd_weight was 'pool' and is now 0\.5"
    ):
        distill(arguments, make_config(tmp_path / "two", kd_weight=0.5, **named))
    assert not (tmp_path / "two" / "run.json").exists()
    metrics = distill(arguments, make_config(tmp_path / "two", **named)).metrics
    assert trained_steps(metrics) == [1, 2, 3]
    assert weights(tmp_path / "one") == weights(tmp_path / "two")
    (tmp_path / "one" / "run.json").unlink()
    with pytest.raises(ValueError, match=r"got .*checkpoint-2, which has no run\.json beside it"):
        distill(arguments, make_config(tmp_path / "three", **named))


def test_only_what_changes_the_result_is_compared(tmp_path: Path, pair: dict[str, str]) -> None:
    arguments = DistillArguments(**pair, dataset=write_run(tmp_path / "run", make_rows(8, 1)))
    output = tmp_path / "out"
    distill(arguments, make_config(output, max_steps=1))
    written = json.loads((output / "run.json").read_text())
    assert len(written) < 60 and "logging_steps" not in written
    # A later version knows another setting, and an earlier one a setting less.
    written["setting_of_later"] = 1
    del written["neftune_noise_alpha"]
    (output / "run.json").write_text(json.dumps(written))
    distill(arguments, make_config(output, max_steps=1))
    with pytest.raises(ValueError) as refused:
        other = DistillArguments(**{**pair, "teacher": pair["student"]}, dataset=arguments.dataset)
        distill(other, make_config(output, max_steps=1, weight_decay=0.1))
    teacher, decay = str(refused.value).splitlines()[1:-1]  # long paths are shown in part
    assert re.fullmatch(r"  teacher was '.*teacher' and is now '.*student'", teacher)
    assert decay == "  weight_decay was 0.0 and is now 0.1"


def test_one_process_works_in_a_directory(tmp_path: Path, pair: dict[str, str]) -> None:
    arguments = DistillArguments(**pair, dataset=write_run(tmp_path / "run", make_rows(8, 1)))
    with locked(tmp_path / "out"), pytest.raises(StoreError, match="nother process"):
        distill(arguments, make_config(tmp_path / "out", max_steps=1))
    distill(arguments, make_config(tmp_path / "out", max_steps=1))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"teacher": "./nowhere"}, "nowhere"),
        ({"dataset": "./nowhere.jsonl"}, "nowhere.jsonl"),
        ({"eval_dataset": "./nowhere.jsonl"}, "nowhere.jsonl"),
        ({"teacher_dtype": "float17"}, "float17"),
        ({"lora_r": 2, "lora_target_modules": ["no_such_layer"]}, "no_such_layer"),
    ],
)
def test_what_is_wrong_is_found_before_the_claim(
    wrong: dict[str, Any], message: str, tmp_path: Path, pair: dict[str, str]
) -> None:
    right = {**pair, "dataset": write_run(tmp_path / "run", make_rows(8, 1))}
    config = make_config(tmp_path / "out", max_steps=1)
    with pytest.raises(ValueError, match=message):
        distill(DistillArguments(**{**right, **wrong}), config)
    assert not (tmp_path / "out" / "run.json").exists()
    distill(DistillArguments(**right), config)


# ---- numbers that are not finite, more steps ----


class _Overflow(TrainerCallback):
    """Stands for a learning rate that drives the weights out of float32 in the second step."""

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
        if state.global_step == 2 and args.learning_rate > 1:
            with torch.no_grad():
                model.lm_head.weight.mul_(1e38).mul_(1e38)


def test_a_lower_learning_rate_goes_on_where_numbers_were_not_finite(
    tmp_path: Path, pair: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    train = LeafTrainer.train

    def overflowing(self: LeafTrainer, *words: Any, **options: Any) -> Any:
        self.add_callback(_Overflow())
        return train(self, *words, **options)

    monkeypatch.setattr(LeafTrainer, "train", overflowing)
    arguments = DistillArguments(**pair, dataset=write_run(tmp_path / "run", make_rows(12, 5)))
    output = tmp_path / "out"
    with pytest.raises(RuntimeError, match=r"not finite.*Lower learning_rate and run the same"):
        distill(arguments, make_config(output, learning_rate=2.0, **SAVING))
    assert not (output / "model.safetensors").exists()
    assert not (output / "metrics.json").exists()
    assert [path.name for path in output.glob("checkpoint-*")] == ["checkpoint-1"]
    result = distill(arguments, make_config(output, learning_rate=1e-3, **SAVING))
    assert trained_steps(result.metrics) == [1, 2, 3]
    with pytest.raises(ValueError, match=r"learning_rate was 0\.001 and is now 0\.002"):
        distill(arguments, make_config(output, learning_rate=2e-3, **SAVING))


def test_max_steps_can_be_extended_and_not_shortened(tmp_path: Path, pair: dict[str, str]) -> None:
    arguments = DistillArguments(**pair, dataset=write_run(tmp_path / "run", make_rows(12, 5)))
    output = tmp_path / "out"
    first = distill(arguments, make_config(output, **SAVING))
    longer = distill(arguments, make_config(output, **{**SAVING, "max_steps": 5}))
    assert trained_steps(longer.metrics) == [1, 2, 3, 4, 5]
    loss = [log["loss"] for log in longer.metrics["log"] if "loss" in log]
    assert loss[:3] == [log["loss"] for log in first.metrics["log"] if "loss" in log]
    assert longer.metrics["train"]["train_loss"] == pytest.approx(sum(loss) / 5)
    with pytest.raises(ValueError, match="max_steps was 5 and is now 3"):
        distill(arguments, make_config(output, **SAVING))
    unsaved = make_config(tmp_path / "unsaved", max_steps=1)
    distill(arguments, unsaved)
    with pytest.raises(ValueError, match=r"max_steps: must stay as it was, since .* no checkpoint"):
        distill(arguments, unsaved.with_changes(max_steps=2))


def test_a_run_that_starts_over_forgets_the_checkpoints_after_it(
    tmp_path: Path, pair: dict[str, str]
) -> None:
    arguments = DistillArguments(**pair, dataset=write_run(tmp_path / "run", make_rows(12, 5)))
    output = tmp_path / "out"
    distill(arguments, make_config(output, **{**SAVING, "save_total_limit": None}))
    again = {**SAVING, "save_strategy": "no", "resume_from_checkpoint": f"{output}/checkpoint-1"}
    distill(arguments, make_config(output, **again))
    assert [path.name for path in output.glob("checkpoint-*")] == ["checkpoint-1"]


# ---- the dataset and the card ----


def test_a_run_with_arms_gives_its_only_one_or_lists_them(
    tmp_path: Path, pair: dict[str, str]
) -> None:
    run = tmp_path / "run"
    (run / "arms").mkdir(parents=True)
    (run / "run.json").write_text("{}")
    write_run(run / "arms" / "span", make_rows(8, 4))
    config = make_config(tmp_path / "out", max_steps=1)
    metrics = distill(DistillArguments(**pair, dataset=str(run)), config).metrics
    assert metrics["rows"]["counterfactuals"] == 4
    write_run(run / "arms" / "random_spans", make_rows(8, 2))
    with pytest.raises(
        ValueError, match=r"run: must have one arm, got 2 \(random_spans, span\); name one"
    ):
        distill(DistillArguments(**pair, dataset=str(run)), config)
    arm = DistillArguments(**pair, dataset=str(run / "arms" / "random_spans"))
    metrics = distill(arm, make_config(tmp_path / "control", max_steps=1)).metrics
    assert metrics["rows"]["counterfactuals"] == 2


@pytest.mark.parametrize("strategy", ["span", "random_spans"])
def test_the_card_says_what_was_done(strategy: str, tmp_path: Path, pair: dict[str, str]) -> None:
    rows = make_rows(8, 4)
    for row in rows:
        row["strategy"] = strategy if row["branch"] == "counterfactual" else None
    run = write_run(tmp_path / "run", rows)
    settings = {"strategy": strategy, "threshold": 0.15, "rule": "absolute", "validate": "teacher"}
    (Path(run) / "funnel.json").write_text(json.dumps({"settings": settings}))
    config = make_config(tmp_path / "out", max_steps=4, logging_steps=2)
    metrics = distill(DistillArguments(**pair, dataset=run), config).metrics
    card = (tmp_path / "out" / "README.md").read_text()
    for words in (
        f"| strategy | {strategy} |",
        "| threshold | 0.15 |",
        "| rule | absolute |",
        "| validate | teacher |",
        f"sha256 of the rows {metrics['dataset_sha256'][:16]}",
        "training, mean of steps 1 to 1 | training, mean of steps 3 to 4",
        f"over the whole run: {metrics['train']['train_loss']:.4f}",
    ):
        assert words in card, words
    assert ("as a control of [LeaF]" in card) is (strategy == "random_spans")
    assert ("with their confounding tokens cut out" in card) is (strategy == "span")


def test_the_card_counts_the_rows_of_other_kinds(tmp_path: Path, pair: dict[str, str]) -> None:
    rows = make_rows(8, 4, cross=3)
    rows[9]["context"] = 3
    rows += [{**rows[8], "candidate_id": 9, "accepted": False, "reason": "student_wrong"}]
    config = make_config(tmp_path / "out", max_steps=1)
    dataset = write_run(tmp_path / "run", rows)
    metrics = distill(DistillArguments(**pair, dataset=dataset), config).metrics
    counted = [metrics["rows"][kind] for kind in ("counterfactuals", "cross", "responses")]
    assert counted == [7, 3, 1]
    assert metrics["rows"]["left_out"] == {"not_accepted": 1}
    card = (tmp_path / "out" / "README.md").read_text()
    assert (
        "8 originals and 7 counterfactuals, 3 with another prompt for the teacher than for the "
        "student and 1 cut in the beginning of the response, ("
    ) in card
    assert "left out: 1 not_accepted" in card


def test_the_teachers_prompts_decide_whose_the_directory_is(
    tmp_path: Path, pair: dict[str, str]
) -> None:
    rows = make_rows(8, 4, cross=1)
    config = make_config(tmp_path / "out", max_steps=1)
    arguments = DistillArguments(**pair, dataset=write_run(tmp_path / "run", rows))
    distill(arguments, config)
    rows[-1]["teacher_prompt"] = [{"role": "user", "content": "w1"}]
    write_table(tmp_path / "run" / "dataset.parquet", rows)
    with pytest.raises(
        ValueError, match=r"the content of dataset .* has changed, or what is taken"
    ):
        distill(arguments, config)


# ---- adapters ----


def test_lora_trains_an_adapter_that_trains_on(tmp_path: Path, pair: dict[str, str]) -> None:
    pytest.importorskip("peft")
    dataset = write_run(tmp_path / "run", make_rows(12, 5))
    arguments = DistillArguments(**pair, dataset=dataset, lora_r=2)
    settings = {"learning_rate": 3e-2, **SAVING}
    first = distill(arguments, make_config(tmp_path / "first", **settings))
    saved = {path.name for path in first.output_dir.iterdir()}
    assert "adapter_model.safetensors" in saved and "model.safetensors" not in saved
    assert (
        "| LoRA | rank 2, alpha 4, all linear layers but the head |"
        in (first.output_dir / "README.md").read_text()
    )
    again = distill(arguments, make_config(tmp_path / "first", **settings))
    assert again.metrics == json.loads(json.dumps(first.metrics))  # it is finished
    adapter = first.output_dir / "adapter_model.safetensors"
    trained = adapter.read_bytes()
    for start in ("True", str(first.output_dir / "checkpoint-2"), "false"):
        adapter.unlink()
        distill(arguments, make_config(first.output_dir, resume_from_checkpoint=start, **settings))
        assert adapter.read_bytes() == trained

    onward = DistillArguments(
        student=str(first.output_dir), teacher=pair["teacher"], dataset=dataset
    )
    second = distill(onward, make_config(tmp_path / "second", **settings))
    ends = [run.metrics["log"] for run in (first, second)]
    assert ends[1][0]["loss"] < ends[0][0]["loss"]  # it starts from what was learned
    assert (second.output_dir / "adapter_model.safetensors").is_file()
    merged = load_model(str(second.output_dir)).state_dict()
    before = load_model(pair["student"]).state_dict()
    assert any(not torch.equal(merged[name], before[name]) for name in before)
    with pytest.raises(ValueError, match=r"lora_r \(peft_config\): must be left out"):
        both = DistillArguments(
            student=str(first.output_dir), teacher=pair["teacher"], dataset=dataset, lora_r=2
        )
        distill(both, make_config(tmp_path / "third", **settings))


def test_a_card_tells_that_a_run_became_longer(tmp_path: Path, pair: dict[str, str]) -> None:
    arguments = DistillArguments(**pair, dataset=write_run(tmp_path / "run", make_rows(12, 5)))
    saving = {"save_strategy": "steps", "save_steps": 1}
    distill(arguments, make_config(tmp_path / "out", max_steps=2, **saving))
    assert "changed on the way" not in (tmp_path / "out" / "README.md").read_text()
    longer = distill(arguments, make_config(tmp_path / "out", max_steps=3, **saving))
    assert longer.metrics["changes"] == ["max_steps was 2 and is now 3"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| changed on the way | max_steps was 2 and is now 3 |" in card
    again = distill(arguments, make_config(tmp_path / "out", max_steps=3, **saving))
    assert again.metrics["changes"] == longer.metrics["changes"]


def test_an_adapter_names_its_base_from_everywhere(
    tmp_path: Path, pair: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    student = Path(pair["student"])
    monkeypatch.chdir(student.parent)
    arguments = DistillArguments(
        student=student.name,
        teacher=pair["teacher"],
        dataset=write_run(tmp_path / "run", make_rows(12, 5)),
        lora_r=2,
    )
    distill(arguments, make_config(tmp_path / "out", max_steps=1))
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(student)


def test_a_refused_run_leaves_no_directory(tmp_path: Path, pair: dict[str, str]) -> None:
    arguments = DistillArguments(
        **pair, dataset=write_run(tmp_path / "run", make_rows(12, 5)), lora_target_modules=["no"],
        lora_r=2,
    )  # fmt: skip
    with pytest.raises(ValueError, match="lora_r"):
        distill(arguments, make_config(tmp_path / "out", max_steps=1))
    assert not (tmp_path / "out").exists()
