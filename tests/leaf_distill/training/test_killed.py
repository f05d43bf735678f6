"""A real process is killed at any moment, also while it saves; the weights are the same bytes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from distill_pair import make_rows, make_student, make_teacher, make_tokenizer

STEPS = 14
SETTINGS = {
    "originals_per_step": 8,
    "per_device_train_batch_size": 2,
    "max_steps": STEPS,
    "learning_rate": 0.01,
    "logging_steps": 1,
    "save_steps": 1,
    "eval_strategy": "steps",
    "eval_steps": 3,
    "eval_answers": 2,
    "max_new_tokens": 4,
    "grade": "exact",
    "use_cpu": True,
}
TIMES = ("runtime", "per_second", "seconds", "preparation_time")


def command(directory: Path, output: Path, **settings: Any) -> list[str]:
    models = (("student", make_student(attention_dropout=0.2)), ("teacher", make_teacher()))
    for name, model in models:
        model.save_pretrained(directory / name)
        make_tokenizer().save_pretrained(directory / name)
    rows = {"dataset": make_rows(20, 7), "eval_dataset": make_rows(4, 2, seed=1)}
    for name, lines in rows.items():
        # As `leaf detect` writes them.
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (directory / f"{name}.jsonl").write_text(text)
    paths = {name: directory / name for name in ("student", "teacher")}
    paths |= {name: directory / f"{name}.jsonl" for name in rows}
    options = {**paths, **SETTINGS, "output_dir": output, **settings}
    return ["distill", *(f"--{name}={value}" for name, value in options.items())]


def log_of(output: Path) -> list[dict[str, float]]:
    """The log without times; a run that was killed after its last step has no line of the end."""
    log = json.loads((output / "metrics.json").read_text())["log"]
    return [
        {name: value for name, value in entry.items() if not any(word in name for word in TIMES)}
        for entry in log
        if "train_loss" not in entry
    ]


def same(one: Any, two: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, two)
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(same(one[key], two[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(two) and all(map(same, one, two))
    return bool((one == two).all()) if hasattr(one, "all") else bool(one == two)


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [{}, {"save_total_limit": 1}, {"load_best_model_at_end": True, "save_steps": 3}],
    ids=["two kept", "one kept", "the best"],
)
def test_a_killed_run_ends_with_the_same_bytes(tmp_path: Path, settings: dict[str, Any]) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}

    def call(*words: str) -> str:
        done = subprocess.run(
            [sys.executable, *words], env=environment, capture_output=True, text=True, timeout=900
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    straight, killed = tmp_path / "straight", tmp_path / "killed"
    call("-m", "leaf_distill", *command(tmp_path, straight, **settings))
    words = command(tmp_path, killed, **settings)
    script = str(Path(__file__).with_name("killed_runs.py"))
    counts = json.loads(call(script, "0", "25", "8", str(killed), *words).splitlines()[-1])
    assert counts["killed"] >= 3 and counts["half"] >= 1, counts

    weights = "model.safetensors"
    assert (killed / weights).read_bytes() == (straight / weights).read_bytes()
    names = [{one.name for one in output.glob("checkpoint-*")} for output in (straight, killed)]
    assert names[0] == names[1]
    for name in names[0]:
        for file in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
            ours, theirs = (
                torch.load(output / name / file, weights_only=False)
                for output in (straight, killed)
            )
            assert same(ours, theirs), f"{name}/{file}"
    assert log_of(killed) == log_of(straight)
