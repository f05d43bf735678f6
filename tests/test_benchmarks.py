"""Every benchmark runs, at tiny size, and its report has a line for each.

What a GPU is to show is rehearsed here without one.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

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
        "linear_dual_kl": 7,
    }.items():
        found = {line.split(" | ")[2] for line in lines if line.startswith(f"| {op} ")}
        assert len(found) == variants, (op, found)
    assert run.stdout == table.read_text()
    note = "\n## Notes\n\nwritten by hand\n"
    table.write_text("an older table\n" + note)
    subprocess.run(report, cwd=ROOT, check=True, capture_output=True)
    assert table.read_text() == run.stdout + note


@pytest.mark.skipif(sys.platform != "linux", reason="there is no Triton elsewhere")
def test_the_run_on_a_gpu_is_rehearsed(tmp_path: Path) -> None:
    """All but the build: the CPU kernels stand for the CUDA ones, which peers cannot do."""
    command = [sys.executable, "benchmarks/gpu.py", "--tiny", "--output", str(tmp_path)]
    # The package that this test has imported, from wherever it was built.
    package = str(Path(importlib.import_module("leaf_ext").__file__ or "").parents[1])
    run = subprocess.run(
        [*command, "--steps", "tests,sanitizer,benchmarks"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": package},
    )
    logs = "".join(log.read_text()[-2000:] for log in tmp_path.glob("*.log"))
    assert run.returncode == 0, run.stdout + run.stderr + logs
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    without = [row for row in rows if row["status"] != "timed"]
    peers = ("liger", "quack")
    assert all(row["variant"].startswith(peers) for row in without), without
    page = (tmp_path / "no-gpu-rehearsal.md").read_text()
    for row in rows:
        line = f"| {row['op']} | {row['case']} | {row['variant']} |"
        assert row["op"] == "copy" or row in without or line in page
    assert "## Targets" in page and "## Targets" in (tmp_path / "summary.md").read_text()


def test_what_the_time_does_not_allow_is_said(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(("benchmarks", *sys.path))}
    command = [sys.executable, "-m", "on_gpu", str(tmp_path), "--seconds", "0.5", "--tiny"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert {row["status"] for row in rows} == {"left out"}
    assert "left out: the time was spent" in (tmp_path / "no-gpu-rehearsal.md").read_text()


STARTED = "the device works\ncall_dual_kl plain\n"
REPORT = """=========
========= Invalid __global__ read of size 4 bytes
=========     at void {}<float>(float *)+0x80
=========     by thread (1,0,0) in block (0,0,0)
=========
========= ERROR SUMMARY: 1 error
"""


@pytest.mark.parametrize(
    ("log", "status", "state"),
    [
        (STARTED + "all calls were made\n========= ERROR SUMMARY: 0 errors\n", 0, "passed"),
        (STARTED + REPORT.format("leaf::cuda::row_kernel"), 86, "failed"),
        (STARTED + "all calls were made\n" + REPORT.format("cutlass::Kernel"), 86, "passed"),
        (STARTED + "Traceback\nRuntimeError: dual_kl: invalid argument\n", 1, "failed"),
        (STARTED, None, "unfinished"),
        ("========= Device not supported. Please refer to the documentation\n", 1, "not available"),
    ],
    ids=["clean", "ours", "another's", "stopped", "too_slow", "no_tool"],
)
def test_a_tool_that_cannot_run_is_no_failure(
    log: str, status: int | None, state: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    steps = importlib.import_module("steps")
    command = steps.Command("memcheck", ["true"], tmp_path / "log", 60, os.environ, tmp_path)
    command.process.wait()
    command.log.write_text(log)
    monkeypatch.setattr(command, "wait", lambda: status)
    assert steps.judged_by_sanitizer(command).state == state
