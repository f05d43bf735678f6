"""Every benchmark runs at tiny size, and its report has a line for each.

The run on a GPU is rehearsed without one.
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
    """Rehearse all but the build, with the CPU kernels instead of the CUDA kernels."""
    # The package that this test has imported, from wherever it was built.
    package = str(Path(importlib.import_module("leaf_ext").__file__ or "").parents[1])
    command = [sys.executable, "benchmarks/gpu.py", "--tiny", "--output", str(tmp_path)]
    run = subprocess.run(
        [*command, "--steps", "smoke,timings,counters,checks,sizes"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": package},
    )
    assert run.returncode == 0, run.stdout + run.stderr + (tmp_path / "logs.txt").read_text()
    assert len(list(tmp_path.iterdir())) <= 8
    machine, *lines = map(json.loads, (tmp_path / "results.jsonl").read_text().splitlines())
    assert machine["GPU"] == "none (a rehearsal)"
    rows = {tuple(line["job"]): line for line in lines}.values()  # the last line of each job
    without = [row["job"][2] for row in rows if row["status"] != "timed"]
    assert all(variant.startswith(("liger", "orda")) for variant in without), without
    page = (tmp_path / "none-a-rehearsal.md").read_text()
    assert all("| " + " | ".join(row["job"]) + " |" in page for row in rows)
    summary = (tmp_path / "summary.md").read_text()
    assert "## Targets" in page and "## Targets" in summary
    assert all(f"| {step} | passed |" in summary for step in ("smoke", "timings", "sizes"))


@pytest.mark.slow
def test_distillation_steps_are_timed_in_the_run_on_a_gpu(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/gpu.py", "--tiny", "--output", str(tmp_path)]
    command += ["--steps", "distillation"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment())
    assert run.returncode == 0, run.stdout + (tmp_path / "logs.txt").read_text()
    lines = (tmp_path / "distillation" / "results.jsonl").read_text().splitlines()
    found = [json.loads(line)["what"] for line in lines]
    assert found == ["CPU", "packed", "padded", "plain"]


def environment() -> dict[str, str]:
    paths = ("benchmarks", "tests", *sys.path)
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths), "TRITON_INTERPRET": "1"}


def test_what_the_time_does_not_allow_is_said(tmp_path: Path) -> None:
    results = str(tmp_path / "results.jsonl")
    for module in (["worker", results, "--seconds=0", "--tiny"], ["report", results, "--tiny"]):
        command = [sys.executable, "-m", f"on_gpu.{module[0]}", *module[1:]]
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment())
        assert run.returncode == 0, run.stderr
    page = (tmp_path / "none-a-rehearsal.md").read_text()
    assert "| dual_kl | 8192x128256-bf16 | cuda inplace | left out: the time was spent |" in page


def test_a_job_that_ended_its_process_is_not_tried_again(tmp_path: Path) -> None:
    results, job = tmp_path / "results.jsonl", ["copy", "1 GiB", "copy"]
    begun = {"job": job, "status": "failed", "note": "the process ended in it"}
    results.write_text('{"GPU": "some"}\n' + json.dumps(begun) + "\n")
    command = [sys.executable, "-m", "on_gpu.worker", str(results), "--seconds=0", "--tiny"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, env=environment())
    assert json.loads(results.read_text().splitlines()[-1]) == begun


def test_failures_are_written_as_they_happen(tmp_path: Path) -> None:
    """A run that is stopped prints no failures."""
    (tmp_path / "test_it.py").write_text(
        "import os\ndef test_a():\n    assert 1 == 2\ndef test_b():\n    os._exit(1)\n"
    )
    known = environment() | {"LEAF_FAILURES": str(tmp_path / "failures.txt")}
    command = [sys.executable, "-m", "pytest", "-p", "on_gpu.failures", str(tmp_path)]
    known["PYTHONPATH"] = f"{ROOT / 'benchmarks'}{os.pathsep}{known['PYTHONPATH']}"
    subprocess.run(command, cwd=tmp_path, capture_output=True, env=known)
    text = (tmp_path / "failures.txt").read_text()
    assert "test_it.py::test_a (call)" in text and "assert 1 == 2" in text


STARTED = "the device works\ndual_kl plain: ok\n"
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
    log: str, status: int | None, state: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    steps = importlib.import_module("steps")
    ended = {0: "passed", None: "out of time"}.get(status, "failed")
    made = steps.Outcome("memcheck", ended, 1.0, "the last line")
    assert steps.judged_by_sanitizer(made, log).state == state
