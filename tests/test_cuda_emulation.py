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
OPS = ("grad_norm", "detect_spans", "dual_kl", "scale", "topk_kl")


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
    "case", ["sum", "warp", "reversed", "handed", "copied", "counts", "passed_on", "threads"]
)
def test_what_is_right_runs(case: str, order: str, kind: str) -> None:
    done = run(build.selftest(FOLDER, kind), case, order=order)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("device", [{}, {"capability": "8.0"}, {"shared": "60000"}], ids=str)
def test_limits_of_a_launch(device: dict[str, str]) -> None:
    done = run(build.selftest(FOLDER, "asan"), "limits", **device)
    assert done.returncode == 0, done.stdout
    assert "refused: 1025 threads in a block" in done.stdout


@pytest.mark.parametrize("asked", [{}, {"exp2_error": "2e-7"}, {"exp2_error": "1e-3", "seed": "7"}])
def test_powers_are_as_inexact_as_is_asked_for(asked: dict[str, str]) -> None:
    done = run(build.selftest(FOLDER, "asan"), "powers", **asked)
    assert done.returncode == 0, done.stdout


FAULTS = {
    "barrier_in_branch": "16 threads wait in __syncthreads at.*barrier_in_branch.*_faults.cuh",
    "two_barriers": "meet at different barriers",
    "lane_exits": "names lane 3, which has exited",
    "partial_warp": "names lane 1, which the block does not have",
    "mask_lacks_caller": "the mask 0xfffffffe lacks lane 0",
    "mask_lacks_source": "lane 0 reads lane 16, which the mask 0x0000ffff lacks",
    "different_masks": "16 threads wait in __shfl_sync",
    "bad_rank": "no block 2 in a cluster of 2.*selftest_faults.cuh",
    "arrives_twice": "arrives in its cluster twice",
    "never_waits": "exits, not waiting after it arrived",
    "waits_first": "waits for its cluster, not arrived",
    "copies_not_waited_for": "a block ends that has not waited for bytes",
    "expects_twice": "expect is called twice.*selftest_faults.cuh",
    "expects_in_global": "what is not shared memory",
    "expected_by_nobody": "nobody has called expect",
    "expected_by_another": "nothing orders the call of expect",
    "bytes_missing": "1 threads wait for bytes that arrive, 16 are missing.*bytes_missing",
    "bytes_never_sent": "a block ends, and bytes that it expects are not on their way",
    "bytes_left_over": "more bytes are on their way than are expected",
    "copies_odd_size": "a copy of 24 bytes, not of 16s",
    "copies_odd_address": "an address is no multiple of 16",
    "sends_before_start": "sent to a block that has not started",
    "sends_before_barrier": "nothing orders the call of expect",
    "sends_after_end": "sent to a block that has ended",
    "unwritten": r"wrong \(3\)",
    "no_barrier": r"wrong \(2\)",
}
FAULTS_BY_KIND = {
    "asan": {
        "beyond_dynamic": "use-after-poison",
        "beyond_static": "index 8 out of bounds",
        "beyond_global": "heap-buffer-overflow",
        "copies_beyond_global": "heap-buffer-overflow",
        "misaligned": "misaligned address",
    },
    "race": {
        "no_barrier": r"race: .*selftest.cu.*selftest.cu",
        "no_syncwarp": "nothing orders a read.*an earlier write by block 0, thread 0",
        "copies_waited_for_by_others": "a write by bytes on their way.*an earlier read by block 0",
        "copies_overwritten": "a read by bytes on their way.*an earlier write by block 0",
        "passed_on_unheard": "nothing orders a write by block 2.*an earlier read by block 0",
        "sum_before_barrier": "nothing orders a read.*an earlier write by block 0, thread 32",
        "sum_in_one_slot": "a write by bytes.*an earlier write by bytes on their way to block 0",
        "sum_not_waited_for": "a write by bytes on their way.*an earlier read by block 0",
        "sum_written_early": "nothing orders a write by block 1.*an earlier read by block 0",
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
