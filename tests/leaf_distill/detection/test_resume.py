"""A run that was killed goes on from its newest whole checkpoint as if nothing had been."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
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

from leaf_distill.training.checkpoint import checkpoint_fault
from leaf_distill.training.trainer import LeafTrainer


class _Kill(TrainerCallback):
    """Stands for Ctrl-C after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


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
    resumed = dropout_trainer(tmp_path / "killed")
    resumed.train(resume_from_checkpoint=True)
    # The kill came before that step was saved.
    assert resumed._initial_global_step == killed_after - 1
    assert resumed.state.global_step == 6
    assert_same(weights(resumed.model), weights(straight.model))
    assert losses(resumed)[killed_after - 1 :] == losses(straight)[killed_after - 1 :]


FAULTS = {
    "trainer_state.json": None,
    "model.safetensors": -1,
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
    resumed = dropout_trainer(tmp_path, max_steps=4)
    with caplog.at_level(logging.WARNING, logger="leaf_distill"):
        resumed.train(resume_from_checkpoint=True)
    assert resumed._initial_global_step == 2
    assert f"checkpoint-3 is not whole ({name}" in caplog.text
    file.unlink(missing_ok=True)
    with pytest.raises(ValueError, match=r"checkpoint-3 is not a whole checkpoint \(.*missing"):
        dropout_trainer(tmp_path, max_steps=4).train(resume_from_checkpoint=str(newest))


def test_resuming_without_a_checkpoint_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no whole checkpoint in"):
        make_trainer(tmp_path).train(resume_from_checkpoint=True)
