"""Python of the docs that trains, or takes what was trained, runs on the embedded pair."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from leaf_distill.cli import main
from leaf_distill.demo.run import ASSETS
from leaf_distill.demo.task import make_problems

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(autouse=True)
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A directory with the names of the docs: both models, rows to train on, held-out rows."""
    for role in ("student", "teacher"):
        shutil.copytree(ASSETS / role, tmp_path / role)
    rows = [problem.as_row() for problem in make_problems(8, seed=1, mix={"clean": 1.0})]
    for place in ("runs/math/rows.jsonl", "test.jsonl"):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / place).write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)


def python_of(page: str) -> str:
    (code,) = re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), flags=re.DOTALL)
    return str(code)


@pytest.mark.parametrize("text", ["user: you have 7 apples?", "Tom has 12 apples."])
@pytest.mark.parametrize("template", ["chatml", "llama3", "llama2", "dated"])
@pytest.mark.parametrize("kind", ["bytes", "trimmed", "metaspace"])
def test_the_example_masks_the_users_text_and_none_of_the_template(
    kind: str, template: str, text: str, make_tokenizer: Callable[..., PreTrainedTokenizerFast]
) -> None:
    script = (DOCS.parent / "examples" / "own_training_loop.py").read_text()
    (function,) = re.findall(r"^def render.*?(?=^def batch)", script, re.DOTALL | re.MULTILINE)
    tokenizer = make_tokenizer(kind, template)
    names: dict[str, Any] = {"tokenizer": tokenizer}
    exec(function, names)
    ids, inside = names["render"](text)
    masked = tokenizer.decode([one for one, is_text in zip(ids, inside, strict=True) if is_text])
    # A blank that is a token of its own has no characters where a tokenizer trims offsets.
    assert "".join(masked.split()) == "".join(text.split())


def test_the_trainer_of_the_page_on_training_runs() -> None:
    code = python_of("reference/training.md")
    short = code.replace("max_steps=1000", "max_steps=2").replace("eval_steps=100", "eval_steps=1")
    assert short.count("steps=") == code.count("steps=") and short != code
    names: dict[str, object] = {}
    exec(short, names)
    log = names["trainer"].state.log_history  # type: ignore[attr-defined]
    assert [entry["step"] for entry in log if "eval_loss" in entry] == [1, 2]
    assert Path("student-leaf/model.safetensors").exists()


def test_an_adapter_is_merged_as_the_guide_says() -> None:
    command = "distill --student ./student --teacher ./teacher --dataset runs/math --lora_r 4"
    run = "--max_steps 2 --learning_rate 0.01 --output_dir runs/math/adapter"
    assert main([*command.split(), *run.split()]) == 0
    exec(python_of("guides/lora.md"), {})
    before, after = (AutoModelForCausalLM.from_pretrained(name) for name in ("student", "merged"))
    changed = [
        name
        for name, weight in after.named_parameters()
        if not torch.equal(weight, before.get_parameter(name))
    ]
    assert changed and not any("lora" in name for name in changed)
