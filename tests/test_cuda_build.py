"""The whole extension is built with its CUDA kernels and imported without a driver."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# Builds of torch for CUDA 13: the oldest that leaf_ext supports, and a newer one. Both are large.
TORCH = ("2.11.0", "2.14.1")
PACKAGES = ("numpy", "setuptools>=77", "wheel", "cmake", "ninja")

CHECK = """
import json, torch, leaf_ext
from leaf_ext import dispatch
norm = leaf_ext.grad_norm(torch.ones(3, 4))
reason = dispatch.missing("cuda", torch.device("cuda"), torch.float32)
print(json.dumps([leaf_ext.build_info(), norm.tolist(), reason, torch.cuda.is_available()]))
"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc")
@pytest.mark.parametrize("torch", TORCH)
def test_the_cuda_build_is_imported_without_a_driver(torch: str, tmp_path: Path) -> None:
    python = tmp_path / "venv" / "bin" / "python"
    source = tmp_path / "source"
    ignored = shutil.ignore_patterns(".git", ".venv", "build", "outputs", "*.so", "__pycache__")
    shutil.copytree(ROOT, source, ignore=ignored)
    variables = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    variables |= {
        "PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}",
        "LEAF_BUILD_CUDA": "1",
        "LEAF_CUDA_ARCHS": "90",
        "CUDA_VISIBLE_DEVICES": "",
    }

    def run(*command: str | Path) -> str:
        done = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        return done.stdout

    run(sys.executable, "-m", "venv", tmp_path / "venv")
    run(python, "-m", "pip", "install", "-q", f"torch=={torch}", *PACKAGES)
    run(python, "-m", "pip", "install", "-q", "--no-build-isolation", "--no-deps", source)
    info, norm, reason, has_gpu = json.loads(run(python, "-c", CHECK))
    assert info["backends"] == ["cpu", "cuda"] and info["cuda_architectures"] == ["90"]
    assert norm == [2.0, 2.0, 2.0]
    assert not has_gpu and reason == "torch sees no GPU"
