"""Runs a block of docs/guides/other-trainers.md with TRL, and prints what it trained on.

    python trl_step.py BLOCK.py

The block makes a `trainer` and trains it. Each printed line is a row: its tokens, and its labels.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch


def main(block: Path) -> None:
    names: dict[str, Any] = {}
    exec(compile(block.read_text(), block, "exec"), names)
    trainer = names["trainer"]
    assert trainer.state.global_step > 0
    assert all(torch.isfinite(weight).all() for weight in trainer.model.parameters())
    for row in trainer.train_dataset:
        print("ROW", json.dumps([row["input_ids"], row["labels"]]))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
