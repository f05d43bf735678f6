"""A training whose passes are packed is the training whose passes are padded."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from distill_pair import (
    TEMPLATE,
    WORDS,
    assert_same,
    losses,
    make_config,
    make_rows,
    make_student,
    make_teacher,
    make_tokenizer,
    weights,
)
from torch import Tensor

from leaf_distill.training.trainer import LeafTrainer

LORA = {"r": 2, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}


def test_packing_changes_nothing_beside_a_longer_prompt_and_in_an_adapter(tmp_path: Path) -> None:
    from peft import LoraConfig

    def train(packing: bool) -> LeafTrainer:
        settings = {"max_steps": 5, "max_batch_tokens": 60, "kd_weight": 0.4}
        trainer = LeafTrainer(
            make_student().double(),
            make_teacher().double(),
            make_config(tmp_path, packing=packing, gradient_checkpointing=True, **settings),
            make_rows(cross=4),
            make_rows(5, 4),
            make_tokenizer(),
            teacher_processing_class=make_tokenizer("w39 w38 " + TEMPLATE),
            peft_config=LoraConfig(**LORA),  # type: ignore[arg-type]
        )
        trainer.train()
        return trainer

    packed, padded = train(True), train(False)
    assert_same(weights(packed.model), weights(padded.model), 1e-10)
    assert losses(packed) == pytest.approx(losses(padded), rel=1e-6)
    measured, expected = packed.evaluate(), padded.evaluate()
    for name in ("eval_loss", "eval_kd_loss", "eval_cd_loss", "eval_agreement"):
        assert measured[name] == pytest.approx(expected[name], rel=1e-6), name


class _Passes:
    """The tokens of each forward pass of a model, rows and columns."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.shapes: list[tuple[int, int]] = []
        model.get_input_embeddings().register_forward_hook(self._see)  # type: ignore[operator]

    def _see(self, module: Any, args: Any, output: Tensor) -> None:
        self.shapes.append((output.shape[0], output.shape[1]))


def test_a_packed_pass_holds_tokens_of_rows_alone(tmp_path: Path) -> None:
    student, teacher = make_student(), make_teacher()
    rows = make_rows(16, 0)
    settings = {"num_train_epochs": 1, "max_batch_tokens": 70}
    config = make_config(tmp_path, per_device_train_batch_size=8, **settings)
    trainer = LeafTrainer(student, teacher, config, rows, None, make_tokenizer())
    assert trainer.train_dataset is not None
    tokens = sum(len(one.renderings["student"]) for one in trainer.train_dataset.examples)
    seen = [_Passes(student), _Passes(teacher)]
    trainer._objective.teacher.rows_alone = False  # as on other devices than a CPU
    trainer.train()
    for passes in seen:
        # Before the first step, rows are tried: one on which the heads are checked, two to pack.
        packed = [columns for rows, columns in passes.shapes if rows == 1 and columns > 20]
        assert sum(packed) == tokens and max(packed) <= 70
        assert len(packed) < 16
    assert student.config._attn_implementation == teacher.config._attn_implementation == "sdpa"


def test_rows_are_padded_where_a_model_mixes_them(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def mixing() -> Any:
        torch.manual_seed(0)
        return hf.Lfm2ForCausalLM(
            hf.Lfm2Config(
                vocab_size=len(WORDS),
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=2,
                layer_types=["conv", "full_attention"],
            )
        ).double()

    results = []
    for packing in (True, False):
        student = mixing()
        config = make_config(tmp_path, max_steps=3, max_batch_tokens=60, packing=packing)
        with caplog.at_level(logging.INFO, logger="leaf_distill"):
            LeafTrainer(
                student, make_teacher().double(), config, make_rows(), None, make_tokenizer()
            ).train()
        results.append(weights(student))
    assert_same(*results, 1e-10)
    (line,) = [one for one in caplog.messages if "padded" in one]
    assert line == (
        "the student's rows are padded: Lfm2ForCausalLM does not keep packed rows apart"
    )
