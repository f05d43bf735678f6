"""The wheel of `make wheel` is installed and runs where there is no compiler."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from leaf_distill.grading.sandbox.process import unavailable

ROOT = Path(__file__).resolve().parents[1]
TOOLS = ("cc", "c++", "gcc", "g++", "clang", "clang++", "cmake", "ninja", "make", "nvcc")

CHECK = """
import torch, leaf_ext
from leaf_ext import memory

info = leaf_ext.build_info()
assert info["backends"] == ("cpu",), info
assert info["torch"].split("+")[0] == torch.__version__.split("+")[0], info
grad = torch.randn(7, 33)
norm = leaf_ext.grad_norm(grad, backend="cpu")
torch.testing.assert_close(norm, leaf_ext.grad_norm(grad, backend="reference"))
assert memory._module() is not None
print(leaf_ext.__file__)
"""


def run(*command: str | Path, folder: Path, path: str) -> str:
    # Python's own variables would lead back to the sources.
    variables = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    done = subprocess.run(
        command, cwd=folder, env={**variables, "PATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def python_files(folder: Path) -> set[str]:
    return {str(file.relative_to(folder.parent)) for file in folder.rglob("*.py")}


@pytest.mark.slow
@pytest.mark.skipif(
    not (Path(sys.prefix) / ".wheel").exists(), reason="`make test-slow` sets up what builds wheels"
)
def test_the_wheel_runs_without_a_compiler(tmp_path: Path) -> None:
    dist, path = tmp_path / "dist", os.environ["PATH"]
    run("make", "wheel", f"VENV={sys.prefix}", f"DIST={dist}", folder=ROOT, path=path)
    wheel, sdist = *dist.glob("*.whl"), *dist.glob("*.tar.gz")
    version = importlib.metadata.version("leaf-distill")
    assert sdist.name == f"leaf_distill-{version}.tar.gz"
    named = rf"leaf_distill-{version}-cp310-abi3-manylinux_2_\d+_{os.uname().machine}\.whl"
    assert re.fullmatch(named, wheel.name)

    with zipfile.ZipFile(wheel) as file:
        names = {name for name in file.namelist() if ".dist-info/" not in name}
    sources = python_files(ROOT / "leaf_ext") | python_files(ROOT / "python" / "leaf_distill")
    assert {name for name in names if name.endswith(".py")} == sources
    # torch's libraries stay out of it.
    modules = {"leaf_ext/_C.abi3.so", "leaf_ext/_memory.abi3.so"}
    assert {name for name in names if ".so" in name} == modules

    run(sys.executable, "-m", "venv", tmp_path / "venv", folder=tmp_path, path=path)
    bare = str(tmp_path / "venv" / "bin")
    assert [tool for tool in TOOLS if shutil.which(tool, path=bare)] == []
    python = Path(bare) / "python"
    pip = (python, "-m", "pip", "install", "-q", "--disable-pip-version-check")
    # PyPI has no "+cpu"; an index that has it gives it for the public version too.
    torch = f"torch=={importlib.metadata.version('torch').partition('+')[0]}"
    run(*pip, torch, folder=tmp_path, path=bare)
    run(*pip, wheel, folder=tmp_path, path=bare)
    loaded = run(python, "-c", CHECK, folder=tmp_path, path=bare)
    assert Path(loaded.strip()).is_relative_to(tmp_path / "venv")
    assert run("leaf", "--version", folder=tmp_path, path=bare).strip() == version
    described = run("leaf", "env", folder=tmp_path, path=bare)
    assert version in described
    # Its package is below the standard library, which programs may read.
    assert ("can be confined" in described) == (unavailable() == "")
