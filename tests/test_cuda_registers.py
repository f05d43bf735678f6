"""nvcc compiles the CUDA kernels for every architecture, without warnings and without spills."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc")
@pytest.mark.parametrize("architecture", ["80", "90", "100"])
def test_no_kernel_spills(architecture: str) -> None:
    command = [sys.executable, ROOT / "tools" / "check_registers.py", "--json", architecture]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kernels = json.loads(done.stdout)
    sources = {s.name for s in (CSRC / "cuda").glob("*.cu") if "__global__" in s.read_text()}
    assert {kernel["source"] for kernel in kernels} == sources
    assert all(kernel["spilled"] == 0 < kernel["registers"] for kernel in kernels)
