"""Builds leaf_ext._C and leaf_ext._memory: drives CMake and ninja, by CMakeLists.txt.

Environment: LEAF_BUILD_EXT=0 builds a pure-Python wheel (the reference backend only);
LEAF_BUILD_CUDA is auto, 0 or 1; LEAF_CUDA_ARCHS lists compute capabilities ("80;90;100"); MAX_JOBS
limits the parallel compilations.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
MODULES = ("_C", "_memory")


def torch_version() -> str:
    """The version of the torch that the extension is built for; stops where it is not visible."""
    try:
        import torch
    except ImportError as error:
        raise SystemExit(
            "leaf_ext is compiled against the torch that it will run with, and this build sees "
            "none. Install torch, then run: pip install --no-build-isolation . "
            "(or set LEAF_BUILD_EXT=0 for a build without compiled kernels)"
        ) from error
    return str(torch.__version__)


def program(name: str) -> str:
    """The path of a build tool: beside the interpreter that runs this, or from PATH."""
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if found is None:
        raise SystemExit(f"leaf_ext: building needs {name}; run: pip install cmake ninja")
    return found


class CMakeBuild(build_ext):
    """Builds each extension as the CMake target of the same name."""

    def build_extension(self, ext: Extension) -> None:
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        # One folder per Python and torch, kept between builds: only what changed is compiled.
        folder = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}-torch{torch_version()}"
        cmake = program("cmake")
        archs = ";".join(os.environ.get("LEAF_CUDA_ARCHS", "").replace(";", " ").split())
        configure = [
            *(cmake, "-S", ROOT, "-B", folder, "-G", "Ninja"),
            f"-DPython_EXECUTABLE={sys.executable}",
            # An isolated build leaves the cached path of a ninja that no longer exists.
            f"-DCMAKE_MAKE_PROGRAM={program('ninja')}",
            f"-DLEAF_CUDA={os.environ.get('LEAF_BUILD_CUDA', 'auto')}",
            # Without the variable the default is used, not the value of an earlier build.
            f"-DLEAF_CUDA_ARCHS={archs}" if archs else "-ULEAF_CUDA_ARCHS",
        ]
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        self.run_tool(configure)
        self.run_tool([cmake, "--build", folder, "--parallel", jobs])
        output.parent.mkdir(parents=True, exist_ok=True)
        # The file is renamed into place, because a running process keeps the mapped old file.
        fresh = output.with_suffix(".new")
        shutil.copy2(folder / output.name, fresh)
        fresh.replace(output)

    def copy_extensions_to_source(self) -> None:
        super().copy_extensions_to_source()
        # Earlier builds left a file for one version of Python, which Python prefers.
        for stale in (ROOT / "leaf_ext").glob("_*.cpython-*.so"):
            stale.unlink()

    def run_tool(self, command: list[str | Path]) -> None:
        try:
            subprocess.run(command, check=True)
        except subprocess.CalledProcessError as error:
            raise SystemExit(
                "leaf_ext: the compiled kernels could not be built; the first 'CMake Error' or "
                "'error:' above says why (they need a C++20 compiler, such as g++ 12 or newer). "
                "LEAF_BUILD_EXT=0 installs without them, much slower."
            ) from error


compiled = os.environ.get("LEAF_BUILD_EXT", "1") != "0"
setup(
    ext_modules=[
        Extension(f"leaf_ext.{name}", sources=[], py_limited_api=True)
        for name in MODULES
        if compiled
    ],
    cmdclass={"build_ext": CMakeBuild},
    # The oldest Python that the modules load under, as in CMakeLists.txt.
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if compiled else {},
)
