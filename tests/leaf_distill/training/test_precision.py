"""Adapters, gradient checkpointing and 16-bit students."""

from __future__ import annotations

import logging
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
    weights,
)
from torch.utils._python_dispatch import TorchDispatchMode

from leaf_distill.training.trainer import LeafTrainer


def make_lora(**config: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    return get_peft_model(make_student(**config), lora)


def train(directory: Path, student: Any, **settings: Any) -> LeafTrainer:
    teacher = make_teacher().to(student.dtype)
    config = make_config(directory, **{"max_steps": 3, **settings})
    trainer = LeafTrainer(student, teacher, config, make_rows(), None, make_tokenizer())
    trainer.train()
    return trainer


def test_a_lora_student_trains_its_adapter_only(tmp_path: Path) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model

    student = get_peft_model(
        make_student(), LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    )
    before, rows = weights(student), make_rows()
    config = make_config(tmp_path, num_train_epochs=4, learning_rate=3e-2)
    trainer = LeafTrainer(student, make_teacher(), config, rows, None, make_tokenizer())
    trainer.train()
    after = weights(student)
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert changed and all("lora_" in name for name in changed)
    assert student.get_output_embeddings().weight.grad is None
    assert losses(trainer)[-1] < losses(trainer)[0]
    trainer.save_model()
    saved = PeftModel.from_pretrained(make_student(), tmp_path)
    assert_same(weights(saved), after)


class _HeadGradients(TorchDispatchMode):
    """Notes for each loss whether a gradient of the head was asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.wanted: list[bool] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "linear_dual_kl" in str(func):
            names = [argument.name for argument in func._schema.arguments]
            self.wanted.append(args[names.index("head_grad_dtype")] is not None)
        return func(*args, **(kwargs or {}))


def test_a_frozen_head_costs_no_product_also_with_checkpointing(tmp_path: Path) -> None:
    trained = []
    for settings in ({}, {"gradient_checkpointing": True}):
        with _HeadGradients() as head:
            trainer = train(tmp_path, make_lora().double(), **settings)
        assert len(head.wanted) >= 6 and not any(head.wanted)
        trained.append(weights(trainer.model))
    assert_same(*trained, 1e-12)
    before = weights(make_lora().double())
    assert any(not torch.equal(trained[1][name], before[name]) for name in before)
    with _HeadGradients() as head:
        train(tmp_path, make_student(), max_steps=1)
    assert all(head.wanted[1:])  # the first one is of the check of the backend


def test_autocast_leaves_the_weights_in_float32(tmp_path: Path) -> None:
    student, seen = make_student(), set()
    projection = student.model.layers[0].self_attn.q_proj
    projection.register_forward_hook(lambda module, args, output: seen.add(output.dtype))
    before = weights(student)
    train(tmp_path, student, bf16=True, learning_rate=1e-5)
    assert torch.bfloat16 in seen
    for name, tensor in weights(student).items():
        assert tensor.dtype == torch.float32
        assert not torch.equal(tensor, before[name]), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_trainable_weights_of_16_bits_are_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, dtype: torch.dtype
) -> None:
    def warned(student: Any) -> str:
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="leaf_distill"):
            config = make_config(tmp_path, learning_rate=1e-5)
            LeafTrainer(student, make_teacher(), config, make_rows(), None, make_tokenizer())
        return caplog.text

    sentence = f"model: has trainable weights in {str(dtype)[6:]}, which round away most steps of"
    assert (sentence in warned(make_student().to(dtype))) is (dtype != torch.float32)
    # The weights of a frozen model may have any dtype: the adapter's are float32.
    assert "trainable" not in warned(make_lora(dtype=dtype))
