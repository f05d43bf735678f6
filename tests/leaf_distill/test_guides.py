"""The quick start and the guide to one's own training loop run as they stand."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from leaf_distill.demo.run import ASSETS

DOCS = Path(__file__).parents[2] / "docs"


def test_the_guide_to_a_training_loop_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for role in ("student", "teacher"):
        shutil.copytree(ASSETS / role, tmp_path / role)
    monkeypatch.chdir(tmp_path)
    page = (DOCS / "guides" / "training-loop.md").read_text()
    names: dict[str, Any] = {}
    exec("\n".join(re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)), names)
    tokenizer = names["tokenizer"]
    assert [tokenizer.decode(names["prompt"][a:b]) for a, b in names["found"][0]] == ["8"]
    assert names["live"].sum() == 2 * len(names["answer"])  # labels of the original and of a cut
    assert names["weight"].sum() == pytest.approx(1.0)
    assert 0 < float(names["loss"].detach()) < 10


@pytest.mark.slow
def test_the_quick_start_runs(tmp_path: Path) -> None:
    page = (DOCS / "quickstart.md").read_text()
    blocks = re.findall(r"(?:^    .*\n)+", page, flags=re.MULTILINE)
    commands = [one for one in blocks if re.match(r"    (leaf|PAIR=)", one)]
    given = "".join(one for one in commands if "mine.jsonl" not in one)  # a file of the reader's
    assert given.count("leaf ") >= 5
    script = f'set -e\nleaf() {{ "{sys.executable}" -m leaf_distill "$@"; }}\n{given}'
    environment = {
        **os.environ,
        "LEAF_CACHE_DIR": str(tmp_path / "cache"),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    done = subprocess.run(
        ["bash", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    for name in ("arms/span/report.html", "student/metrics.json", "eval/results.md"):
        assert (tmp_path / "runs" / "first" / name).is_file()
    stages = re.findall(r"^    ([a-z:, ]+?)  +\d", page, flags=re.MULTILINE)
    assert len(stages) == 4
    assert all(stage in done.stdout for stage in stages)
