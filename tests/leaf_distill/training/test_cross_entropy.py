"""The cross-entropy of the labels, alone and beside the distillation loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from distill_pair import (
    WORDS,
    make_config,
    make_rows,
    make_student,
    make_teacher,
    make_tokenizer,
    make_trainer,
)
from torch import Tensor

from leaf_distill.data.collator import collate
from leaf_distill.training.loss import count_labels
from leaf_distill.training.trainer import LeafTrainer


def plain_loss(trainer: LeafTrainer, model: Any, batch: Any, ce_weight: float) -> Tensor:
    """The loss of a batch with kd_weight 0.3 at temperature 2, from the full logits."""
    at, cut = batch["loss_mask"], batch["counterfactual"]
    student = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    teacher = trainer.teacher_model(
        input_ids=batch["teacher_input_ids"], attention_mask=batch["teacher_attention_mask"]
    ).logits
    labels = batch["input_ids"].roll(-1, 1)[at]
    z_s, z_t = student[at][:, : len(WORDS)], teacher[batch["teacher_loss_mask"]][:, : len(WORDS)]
    nll = torch.nn.functional.cross_entropy(z_s, labels, reduction="none")
    log_s, log_t = (z_s / 2).log_softmax(-1), (z_t / 2).log_softmax(-1)
    kl = (log_t.exp() * (log_t - log_s)).sum(-1)
    token = (1 - ce_weight) * 4 * kl + ce_weight * nll
    second = cut[at.nonzero()[:, 0]]
    return 0.3 * token[~second].mean() + 0.7 * token[second].mean()


@pytest.mark.parametrize("ce_weight", [0.0, 0.25, 1.0])
def test_the_loss_and_its_gradient_are_those_of_the_full_logits(
    tmp_path: Path, ce_weight: float
) -> None:
    config = make_config(
        tmp_path, ce_weight=ce_weight, kd_weight=0.3, temperature=2.0, backend="reference"
    )
    student, teacher = make_student().double(), make_teacher().double()
    trainer = LeafTrainer(student, teacher, config, make_rows(6, 4), None, make_tokenizer())
    assert trainer.train_dataset is not None
    batch = collate(trainer.train_dataset.examples)
    expected = plain_loss(trainer, student, batch, ce_weight)
    wanted = torch.autograd.grad(expected, list(student.parameters()))
    loss = trainer.compute_loss(student, batch, num_items_in_batch=count_labels(batch))
    found = torch.autograd.grad(loss, list(student.parameters()))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-10)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-12)


def test_fine_tuning_is_that_of_transformers_and_asks_no_teacher(tmp_path: Path) -> None:
    rows = make_rows(8, 0)
    trainer = make_trainer(tmp_path, rows, ce_weight=1.0, num_train_epochs=1)
    passes: list[Any] = []
    trainer.teacher_model.register_forward_pre_hook(lambda *given: passes.append(given))
    assert trainer.train_dataset is not None
    batch = collate(trainer.train_dataset.examples)
    labels = batch["input_ids"].masked_fill(~batch["loss_mask"].roll(1, 1), -100)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    expected = make_student().eval()(input_ids=ids, attention_mask=mask, labels=labels).loss.item()
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["loss"] == pytest.approx(expected, rel=1e-5)
    assert log["nll"] == pytest.approx(expected, rel=1e-5)
    evaluated = trainer.evaluate()
    assert evaluated["eval_loss"] == pytest.approx(evaluated["eval_nll"], rel=1e-6)
    for name in ("kd_loss", "cd_loss", "agreement", "teacher_entropy"):
        assert name not in log and f"eval_{name}" not in evaluated
    assert passes == []


def test_the_loss_of_an_evaluation_is_the_same_mix(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, ce_weight=0.25, kd_weight=1.0, temperature=2.0)
    found = trainer.evaluate()
    originals = [row for row in make_rows() if row["branch"] == "original"]
    nll = trainer.evaluate(originals, metric_key_prefix="only")["only_nll"]
    assert found["eval_nll"] != pytest.approx(nll, rel=1e-4)
    mixed = 0.75 * 4 * found["eval_kd_loss"] + 0.25 * nll
    assert found["eval_loss"] == pytest.approx(mixed, rel=1e-5)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"ce_weight": -0.1}, "^ce_weight: must be from 0 to 1, got -0.1"),
        ({"ce_weight": 1.1}, "^ce_weight: must be from 0 to 1, got 1.1"),
        (
            {"ce_weight": 1.0, "token_selection": "tip"},
            "^token_selection: must not need a teacher with ce_weight 1, got tip",
        ),
    ],
)
def test_weights_are_checked(tmp_path: Path, settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        make_config(tmp_path, **settings)
