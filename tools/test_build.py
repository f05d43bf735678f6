"""Runs tests on a build of the extension other than the installed one.

    python tools/test_build.py build/v3 -DLEAF_ISA=x86-64-v3 -- tests/test_ops.py

It configures and compiles into the folder, copies the Python package beside the module, and runs
pytest there. With LEAF_SANITIZE=ON it preloads the runtime of the sanitizers, which Python lacks.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def build(folder: Path, options: list[str]) -> Path:
    """Build, and return the folder that is put on Python's path."""
    configure = ["cmake", "-S", str(ROOT), "-B", str(folder), "-G", "Ninja"]
    subprocess.run([*configure, f"-DPython_EXECUTABLE={sys.executable}", *options], check=True)
    subprocess.run(["cmake", "--build", str(folder)], check=True)
    packages = folder / "python"
    shutil.rmtree(packages, ignore_errors=True)
    ignored = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(ROOT / "leaf_ext", packages / "leaf_ext", ignore=ignored)
    for module in (*folder.glob("_C*.so"), *folder.glob("_memory*.so")):
        shutil.copy(module, packages / "leaf_ext")
    return packages


def environment(packages: Path, options: list[str]) -> dict[str, str]:
    variables = {**os.environ, "PYTHONPATH": str(packages.resolve())}
    if "-DLEAF_SANITIZE=ON" in options:
        compiler = os.environ.get("CXX", "c++")
        libraries = [
            subprocess.check_output([compiler, f"-print-file-name={name}"], text=True).strip()
            for name in ("libasan.so", "libubsan.so", "libstdc++.so")
        ]
        variables["LD_PRELOAD"] = " ".join(libraries)
        variables.setdefault("ASAN_OPTIONS", "detect_leaks=0")  # of Python itself
    return variables


def main(arguments: list[str]) -> int:
    split = arguments.index("--")
    (folder, *options), tests = arguments[:split], arguments[split + 1 :]
    packages = build(Path(folder), options)
    run = environment(packages, options)
    # The current folder must not be the root, because Python looks there first.
    where = "import leaf_ext; print(leaf_ext.__file__, leaf_ext.build_info())"
    subprocess.run([sys.executable, "-c", where], env=run, cwd=packages, check=True)
    paths = [str(ROOT / test) if (ROOT / test).exists() else test for test in tests]
    command = [sys.executable, "-m", "pytest", "-c", str(ROOT / "pyproject.toml"), *paths]
    return subprocess.run(command, env=run, cwd=packages).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
