"""The README's code runs, on real models."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

README = Path(__file__).parents[2] / "README.md"


def model(hidden_size: int, vocabulary: int) -> LlamaForCausalLM:
    torch.manual_seed(hidden_size)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=hidden_size,
            intermediate_size=2 * hidden_size,
            num_hidden_layers=1,
            num_attention_heads=2,
        )
    )


def test_the_training_loop_of_the_readme_runs() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    labels = torch.randint(50, (4, 9))
    labels[:, :4] = -100
    names = {
        "torch": torch,
        "student": model(8, 50),
        "teacher": model(16, 64),
        "input_ids": torch.randint(50, (4, 9)),
        "labels": labels,
        "is_counterfactual": torch.tensor([False, True, False, True]),
        "teacher_grad": torch.randn(4, 9, 16),
        "student_grad": torch.randn(4, 9, 8),
        "is_user_text": torch.ones(4, 9, dtype=torch.bool),
    }
    exec(code, names)
    assert len(names["spans"]) == 4 and all(names["spans"])
    assert 0 < float(names["loss"].detach()) < 10
    assert names["student"].lm_head.weight.grad.abs().sum() > 0
    assert names["teacher"].lm_head.weight.grad is None
