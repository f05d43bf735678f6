"""Small models that know their answers; run as a script, an evaluation that is killed.

`python answering.py SETTINGS.json N` evaluates on benchmarks, and ends by SIGKILL when N batches
were stored.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))  # as a script

import torch
from distill_pair import make_model, make_tokenizer


def save_model(directory: Path, next_word: Callable[[int], int]) -> str:
    """Train for a moment to answer w_n with another word, for n below 20, and w39 without end."""
    student, tokenizer = make_model(3, hidden=32), make_tokenizer()
    texts = [
        f"<user> {before}w{n} <assistant> w{next_word(n)} <eos>"
        for n in range(20)
        for before in ("", "w30 ")
    ]
    texts.append("<user> w39 <assistant> w39 w39")
    ids = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")["input_ids"]
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2)
    for _ in range(100):
        labels = ids.masked_fill(ids == 0, -100)
        student(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    student.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return str(directory)


def write_rows(path: Path, numbers: list[int]) -> str:
    rows = [{"prompt": f"w{n}", "answer": f"w{n + 1}"} for n in numbers]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


if __name__ == "__main__":
    from detect_pair import kill_after

    from leaf_distill import EvaluateConfig, evaluate_benchmarks

    kill_after(int(sys.argv[2]))
    settings: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text())
    evaluate_benchmarks(EvaluateConfig(**settings))
