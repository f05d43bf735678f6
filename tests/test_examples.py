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


SLOW = {"smollm2.py": "KL(teacher, student) on the held-out rows, before and after: "}
"""Examples on real models, which need the demo extra; each with a line that it prints."""


def run(example: Path, directory: Path) -> subprocess.CompletedProcess[str]:
    search = os.pathsep.join((str(ROOT), str(ROOT / "python"), os.environ.get("PYTHONPATH", "")))
    done = subprocess.run(
        [sys.executable, example],
        cwd=directory,
        env={**os.environ, "PYTHONPATH": search, "LEAF_CACHE_DIR": str(directory / "cache")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done


FAST = sorted(path for path in (ROOT / "examples").glob("*.py") if path.name not in SLOW)


@pytest.mark.parametrize("example", FAST, ids=lambda p: p.name)
def test_an_example_runs(example: Path, tmp_path: Path) -> None:
    done = run(example, tmp_path)
    lines = LINES.get(example.name, ())
    for found, expected in zip(done.stdout.splitlines(), lines, strict=bool(lines)):
        assert found.startswith(expected)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_an_example_on_real_models_runs(name: str, tmp_path: Path) -> None:
    (line,) = (
        line
        for line in run(ROOT / "examples" / name, tmp_path).stdout.splitlines()
        if line.startswith(SLOW[name])
    )
    before, after = map(float, line.removeprefix(SLOW[name]).split())
    assert after < before
