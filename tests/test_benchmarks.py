"""Every benchmark runs, at tiny size, and its report has a line for each."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_every_benchmark_runs_and_is_reported(tmp_path: Path) -> None:
    measured, table = tmp_path / "benchmark.json", tmp_path / "table.md"
    command = [
        *("-m", "pytest", "benchmarks", "--tiny", "--benchmark-only"),
        *("-k", "not 256x32000 and not 4096x49152"),  # the same as 64x128256 when tiny
        f"--benchmark-json={measured}",
    ]
    run = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    report = [sys.executable, "benchmarks/report.py", str(measured), "--output", str(table)]
    run = subprocess.run(report, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    lines = table.read_text().splitlines()
    for op, variants in {
        "grad_norm": 4,
        "detect_spans": 4,
        "dual_kl": 5,
        "linear_dual_kl": 4,
    }.items():
        found = {line.split(" | ")[2] for line in lines if line.startswith(f"| {op} ")}
        assert len(found) == variants, (op, found)
    assert run.stdout == table.read_text()
