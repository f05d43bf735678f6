"""The examples run as they stand."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# The misleading number of each prompt is found, and is gone afterwards.
LINES = {
    "own_training_loop.py": (
        "spans: ['8']",
        "cut:   <user> leo has 12 nuts . the sticker says . leo drops 5 nuts .",
        "spans: ['13']",
        "cut:   <user> sam has 2 nuts . eva guesses . sam gets 6 more nuts .",
        "loss: ",
    )
}


@pytest.mark.parametrize("example", sorted((ROOT / "examples").glob("*.py")), ids=lambda p: p.name)
def test_an_example_runs(example: Path, tmp_path: Path) -> None:
    search = os.pathsep.join((str(ROOT), str(ROOT / "python"), os.environ.get("PYTHONPATH", "")))
    done = subprocess.run(
        [sys.executable, example],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": search},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    lines = LINES.get(example.name, ())
    for found, expected in zip(done.stdout.splitlines(), lines, strict=bool(lines)):
        assert found.startswith(expected)
    assert not list(tmp_path.iterdir())
