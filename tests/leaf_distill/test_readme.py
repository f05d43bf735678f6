"""The README's code runs, on real models."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from leaf_distill import EvaluateConfig, evaluate
from leaf_distill.demo.run import ASSETS
from leaf_distill.demo.task import make_problems

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


def code_with(words: str) -> str:
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    (code,) = (block for block in blocks if words in block)
    return code


def test_the_loop_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for role in ("student", "teacher"):
        shutil.copytree(ASSETS / role, tmp_path / role)
    rows = [problem.as_row() for problem in make_problems(8, seed=1, mix={"clean": 1.0})]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(code_with("LeafTrainer"), names)
    before = (tmp_path / "student" / "model.safetensors").read_bytes()
    after = (tmp_path / "runs/math/mine" / "model.safetensors").read_bytes()
    assert after != before
    result = evaluate(EvaluateConfig(model="runs/math/mine", dataset="train.jsonl", grade="number"))
    assert sum(result.counts.values()) == 8
    assert names["run"].funnel["stages"][0]["rows"] == 8


def test_the_training_loop_of_the_readme_runs() -> None:
    student, teacher = model(8, 50), model(16, 64)
    input_ids, labels = torch.randint(50, (4, 9)), torch.randint(50, (4, 9))
    labels[:, :4] = -100
    counts = labels[:, 1:] != -100
    with torch.no_grad():
        teacher_hidden = teacher.model(input_ids).last_hidden_state[:, :-1].flatten(0, 1)
    names = {
        "student": student,
        "teacher": teacher,
        "input_ids": input_ids,
        "hidden": student.model(input_ids).last_hidden_state[:, :-1].flatten(0, 1),
        "teacher_hidden": teacher_hidden,
        "counts": counts.flatten(),
        "is_counterfactual": torch.tensor([0, 1, 0, 1]).bool().repeat_interleave(8),
        "is_user_text": torch.ones(4, 9, dtype=torch.bool),
        "student_grad": torch.randn(4, 9, 8),
        "teacher_grad": torch.randn(4, 9, 16),
    }
    exec(code_with("leaf_ext"), names)
    found, cuts = names["spans"].tolist(), names["cuts"]
    assert len(found) == 4 and all(found)
    assert [len(one) for one in cuts[0]] == [9 - stop + start for start, stop in found[0]]
    loss = names["loss"]
    assert 0 < float(loss.detach()) < 10
    loss.backward()
    assert student.lm_head.weight.grad.abs().sum() > 0
    assert teacher.lm_head.weight.grad is None


def test_the_readme_is_short() -> None:
    assert len(README.read_text().splitlines()) <= 150
