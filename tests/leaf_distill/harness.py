"""The environments of other projects: the harnesses, and TRL."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def run(*command: str | Path, cwd: Path, within: str = "harness", **environment: str) -> str:
    """Run Python in an environment of `make test-slow`, offline, and return what it prints."""
    python = Path(sys.prefix) / within / "bin" / "python"
    assert python.is_file(), f"{within} is not installed; run: make test-slow"
    home = {"HF_HOME": str(cwd / "hub"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [python, *command],
        cwd=cwd,
        env={**inherited, **home, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def write_lines(path: Path, rows: Iterable[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read_lines(text: str) -> list[Any]:
    return [json.loads(line) for line in text.splitlines()]
