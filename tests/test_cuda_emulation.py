"""The CUDA kernels, executed on the CPU (tests/cuda_emulation).

They are compared with the CPU kernels, with sanitizers and in several orders of threads. That
faults would be found is tested, too: each one of a list is planted in a copy of a source, by a
change of its text.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cuda_emulation import build
from cuda_emulation.faults import PLANTED, SLOW_FAULTS

pytestmark = [
    pytest.mark.skipif(
        sys.platform != "linux" or platform.machine() != "x86_64",
        reason="the emulation switches stacks in x86-64 assembly for Linux",
    ),
    pytest.mark.skipif(shutil.which(build.COMPILER) is None, reason="there is no C++ compiler"),
]

FOLDER = build.CSRC.parent / "build" / "cuda_emulation"
OPS = ("grad_norm", "detect_spans", "dual_kl", "scale")


def run(program: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    settings = {f"LEAF_EMULATION_{name.upper()}": value for name, value in variables.items()}
    return subprocess.run(
        [program, *arguments],
        env={**os.environ, "ASAN_OPTIONS": "detect_leaks=0", **settings},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize("kind", ["asan", "race"])
@pytest.mark.parametrize("order", ["forward", "reverse", "random"])
@pytest.mark.parametrize(
    "case", ["sum", "warp", "reversed", "handed", "copied", "counts", "written", "threads"]
)
def test_what_is_right_runs(case: str, order: str, kind: str) -> None:
    done = run(build.selftest(FOLDER, kind), case, order=order)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("device", [{}, {"capability": "8.0"}, {"shared": "60000"}], ids=str)
def test_limits_of_a_launch(device: dict[str, str]) -> None:
    done = run(build.selftest(FOLDER, "asan"), "limits", **device)
    assert done.returncode == 0, done.stdout
    assert "refused: 1025 threads in a block" in done.stdout


FAULTS = {
    "barrier_in_branch": "16 threads wait in __syncthreads at.*barrier_in_branch.*_faults.cuh",
    "two_barriers": "meet at different barriers",
    "lane_exits": "names lane 3, which has exited",
    "partial_warp": "names lane 1, which the block does not have",
    "mask_lacks_caller": "the mask 0xfffffffe lacks lane 0",
    "mask_lacks_source": "lane 0 reads lane 16, which the mask 0x0000ffff lacks",
    "different_masks": "16 threads wait in __shfl_sync",
    "bad_rank": "no block 2 in a cluster of 2.*selftest_faults.cuh",
    "rank_of_global": "what is not shared memory",
    "arrives_twice": "arrives in its cluster twice",
    "never_waits": "exits, not waiting after it arrived",
    "waits_first": "waits for its cluster, not arrived",
    "no_wait_for_copies": "has not waited for its copies",
    "unwritten": r"wrong \(3\)",
    "no_barrier": r"wrong \(2\)",
}
FAULTS_BY_KIND = {
    "asan": {
        "no_last_barrier": "use-after-poison",
        "reads_before_start": "use-after-poison",
        "beyond_dynamic": "use-after-poison",
        "beyond_static": "index 8 out of bounds",
        "beyond_global": "heap-buffer-overflow",
        "misaligned": "misaligned address",
    },
    "race": {
        "no_last_barrier": "of a block that has not started or has ended",
        "reads_before_start": "of a block that has not started or has ended",
        "no_barrier": r"race: .*selftest.cu.*selftest.cu",
        "no_syncwarp": "nothing orders a read.*an earlier write by block 0, thread 0",
        "no_release": "nothing orders a read.*an earlier write by block 0, thread 0",
        "same_global": "nothing orders a write.*an earlier write by block 0",
    },
}


@pytest.mark.parametrize(
    ("kind", "case", "report"),
    [
        pytest.param(kind, case, report, id=f"{kind}-{case}")
        for kind, more in FAULTS_BY_KIND.items()
        for case, report in {**FAULTS, **more}.items()
    ],
)
def test_what_is_wrong_is_reported(kind: str, case: str, report: str) -> None:
    done = run(build.selftest(FOLDER, kind), case)
    assert done.returncode != 0
    assert re.search(report, done.stdout, re.DOTALL), done.stdout


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("kind", "order", "seed"),
    [
        ("asan", "forward", 0),
        ("asan", "random", 1),
        ("race", "random", 2),
        *(pytest.param(kind, "reverse", 0, marks=SLOW) for kind in ("asan", "race")),
        *(pytest.param("asan", "random", seed, marks=SLOW) for seed in range(3, 23)),
    ],
)
def test_kernels_agree_with_the_cpu(kind: str, order: str, seed: int) -> None:
    done = run(build.driver(FOLDER, kind), order=order, seed=str(seed), trace="1")
    assert done.returncode == 0, done.stdout
    assert re.findall(r"(\w+): done", done.stdout) == list(OPS)
    sizes = {int(size) for size in re.findall(r"cluster (\d+)", done.stdout)}
    assert sizes == {1, 2, 4, 8, 16}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=SLOW if name in SLOW_FAULTS else ()) for name in PLANTED]
)
def test_planted_fault_is_found(name: str, tmp_path: Path) -> None:
    fault = PLANTED[name]
    sources = tmp_path / "cuda"
    shutil.copytree(build.CSRC / "cuda", sources)
    text = (sources / fault.file).read_text()
    assert text.count(fault.old) == 1, f"{fault.file} has changed: plant this fault anew"
    (sources / fault.file).write_text(text.replace(fault.old, fault.new))
    driver = build.driver(FOLDER, fault.kind, sources / f"{fault.op}.cu", tmp_path)
    done = run(driver, fault.op)
    assert done.returncode != 0
    assert re.search(fault.report, done.stdout, re.DOTALL), done.stdout
