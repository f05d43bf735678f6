"""A run that was killed goes on from its newest whole checkpoint as if nothing had been."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from distill_pair import (
    assert_same,
    losses,
    make_config,
    make_rows,
    make_student,
    make_teacher,
    make_tokenizer,
    make_trainer,
    weights,
)
from transformers import TrainerCallback

from leaf_distill.training.checkpoint import checkpoint_fault, find_checkpoint, write_manifest
from leaf_distill.training.trainer import LeafTrainer


class _Kill(TrainerCallback):
    """Stands for Ctrl-C after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


class _Began(TrainerCallback):
    """Keeps the step that training went on from."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.at = state.global_step


SAVING = {
    "save_strategy": "steps",
    "save_steps": 1,
    "save_total_limit": None,
    "per_device_train_batch_size": 2,
}


def dropout_trainer(directory: Path, **settings: Any) -> LeafTrainer:
    """With dropout, so that the random state must be right too."""
    student, rows = make_student(attention_dropout=0.2), make_rows()
    config = make_config(directory, **{**SAVING, "num_train_epochs": 2, **settings})
    return LeafTrainer(student, make_teacher(), config, rows, None, make_tokenizer())


def test_a_run_of_failed_rows_goes_on_bit_for_bit(tmp_path: Path) -> None:
    rows = make_rows(9, 4)
    for at, row in enumerate(rows):
        row["student_verdict"] = "wrong" if at < 3 else "right"

    def trainer(name: str) -> LeafTrainer:
        settings = {**SAVING, "failed_share": 0.5, "originals_per_step": 4, "num_train_epochs": 3}
        return make_trainer(tmp_path / name, rows, **settings)

    straight, killed = trainer("straight"), trainer("killed")
    straight.train()
    killed.add_callback(_Kill(6))  # in the second of three epochs
    with pytest.raises(KeyboardInterrupt):
        killed.train()
    resumed = trainer("killed")
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == straight.state.global_step == 9
    assert_same(weights(resumed.model), weights(straight.model))


def test_rows_that_do_not_say_what_the_student_fails_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^failed_share: must come with rows that the student f"):
        make_trainer(tmp_path, failed_share=0.5)


# Three steps an epoch, and one step is lost: it goes on in the first, between both, in the second.
@pytest.mark.parametrize("killed_after", [2, 4, 5])
def test_resuming_gives_the_same_weights_bit_for_bit(tmp_path: Path, killed_after: int) -> None:
    straight = dropout_trainer(tmp_path / "straight")
    straight.train()
    assert straight.state.global_step == 6

    killed = dropout_trainer(tmp_path / "killed")
    killed.add_callback(_Kill(killed_after))
    with pytest.raises(KeyboardInterrupt):
        killed.train()
    resumed, began = dropout_trainer(tmp_path / "killed"), _Began()
    resumed.add_callback(began)
    resumed.train(resume_from_checkpoint=True)
    # The kill came before that step was saved.
    assert began.at == killed_after - 1
    assert resumed.state.global_step == 6
    assert_same(weights(resumed.model), weights(straight.model))
    assert losses(resumed)[killed_after - 1 :] == losses(straight)[killed_after - 1 :]


FAULTS = {
    "trainer_state.json": None,
    "model.safetensors": -1,
    "manifest.json": -10,
    "optimizer.pt": -100,
    "rng_state.pth": None,
}


@pytest.mark.parametrize(("name", "cut"), FAULTS.items(), ids=FAULTS)
def test_half_a_checkpoint_is_passed_over_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, cut: int | None
) -> None:
    dropout_trainer(tmp_path, max_steps=3).train()
    newest = tmp_path / "checkpoint-3"
    assert checkpoint_fault(newest) is None
    file = newest / name
    if cut is None:
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:cut])
    resumed, began = dropout_trainer(tmp_path, max_steps=4), _Began()
    resumed.add_callback(began)
    with caplog.at_level(logging.WARNING, logger="leaf_distill"):
        resumed.train(resume_from_checkpoint=True)
    assert began.at == 2
    assert f"checkpoint-3 is not whole ({name}" in caplog.text
    file.unlink(missing_ok=True)
    with pytest.raises(
        ValueError, match=r"must be a whole checkpoint, got .*checkpoint-3 \(.*missing"
    ):
        dropout_trainer(tmp_path, max_steps=4).train(resume_from_checkpoint=str(newest))


def test_resuming_without_a_checkpoint_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must find a whole checkpoint, got none in"):
        make_trainer(tmp_path).train(resume_from_checkpoint=True)


def test_flipped_bits_are_found_and_the_older_checkpoint_is_taken(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    dropout_trainer(tmp_path, max_steps=3).train()
    for name in ("model.safetensors", "optimizer.pt"):
        file = tmp_path / "checkpoint-3" / name
        good = file.read_bytes()
        middle = len(good) // 2
        file.write_bytes(good[:middle] + bytes([good[middle] ^ 1]) + good[middle + 1 :])
        resumed = dropout_trainer(tmp_path, max_steps=4)
        with caplog.at_level(logging.WARNING, logger="leaf_distill"):
            assert find_checkpoint(True, tmp_path).endswith("checkpoint-2")
        assert f"checkpoint-3 is not whole ({name} is damaged)" in caplog.text
        file.write_bytes(good)
    resumed.add_callback(began := _Began())
    resumed.train(resume_from_checkpoint=True)
    assert began.at == 3


def test_weights_that_are_not_finite_are_neither_saved_nor_taken(tmp_path: Path) -> None:
    trainer = dropout_trainer(tmp_path, max_steps=3)
    trainer.train()
    with torch.no_grad():
        trainer.model.lm_head.weight[0, 0] = torch.nan
    with pytest.raises(RuntimeError, match=r"weights are not finite after step 3.*learning_rate"):
        trainer.save_model()
    assert not (tmp_path / "model.safetensors").exists()
    trainer.model.save_pretrained(tmp_path / "checkpoint-3")
    write_manifest(tmp_path / "checkpoint-3")
    fault = checkpoint_fault(tmp_path / "checkpoint-3")
    assert fault == "model.safetensors has values that are not finite"
    assert find_checkpoint(True, tmp_path).endswith("checkpoint-2")


def test_the_mean_loss_covers_the_whole_run(tmp_path: Path) -> None:
    """Logs are due every third step, and the kill comes after the second."""
    settings = {"logging_steps": 3, "logging_first_step": False, "max_steps": 5}
    straight = dropout_trainer(tmp_path / "straight", **settings)
    output = straight.train()
    every = dropout_trainer(tmp_path / "every", max_steps=5)
    every.train()
    expected = sum(losses(every)) / 5
    assert output.metrics["train_loss"] == output.training_loss == pytest.approx(expected)

    killed = dropout_trainer(tmp_path / "killed", **settings)
    killed.add_callback(_Kill(3))
    with pytest.raises(KeyboardInterrupt):
        killed.train()
    resumed = dropout_trainer(tmp_path / "killed", **settings)
    assert resumed.train(resume_from_checkpoint=True).training_loss == output.training_loss


def test_a_checkpoint_of_the_last_step_is_taken_as_it_is(tmp_path: Path) -> None:
    straight = dropout_trainer(tmp_path, max_steps=3)
    straight.train()
    again = dropout_trainer(tmp_path, max_steps=3)
    output = again.train(resume_from_checkpoint=True)
    assert output.global_step == 3 and not (tmp_path / "checkpoint-4").exists()
    assert_same(weights(again.model), weights(straight.model))


def test_more_steps_go_on_as_if_they_had_been_asked_for_at_once(tmp_path: Path) -> None:
    schedule = {"lr_scheduler_type": "constant", "warmup_steps": 0}
    straight = dropout_trainer(tmp_path / "straight", max_steps=5, **schedule)
    straight.train()
    dropout_trainer(tmp_path / "longer", max_steps=3, **schedule).train()
    longer = dropout_trainer(tmp_path / "longer", max_steps=5, **schedule)
    longer.train(resume_from_checkpoint=True)
    assert_same(weights(longer.model), weights(straight.model))


def test_a_resumed_run_takes_the_learning_rate_of_its_settings(tmp_path: Path) -> None:
    dropout_trainer(tmp_path, max_steps=3, warmup_steps=0).train()
    lower = dropout_trainer(tmp_path, max_steps=6, warmup_steps=0, learning_rate=1e-4)
    lower.train(resume_from_checkpoint=True)
    rates = [log["learning_rate"] for log in lower.state.log_history if "loss" in log]
    # The cosine over six steps, at half of it after three.
    assert rates[3] == pytest.approx(1e-4 * (0.5 + 0.5 * math.cos(math.pi * 3 / 6)))
    assert rates[2] > 1e-3
