"""Builds programs from CUDA sources with the host's compiler and the emulation.

    python tests/cuda_emulation/build.py build/cuda_emulation [plain] [asan] [race] ...

leaves <folder>/<kind>/selftest and <folder>/<kind>/driver. What is up to date is not built again.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
CSRC = HERE.parent.parent / "csrc"
COMPILER = os.environ.get("CXX", "g++")

# nvcc has no strict aliasing either.
FLAGS = ["-std=c++20", "-g", "-fno-strict-aliasing", "-Wall", "-Werror", "-Wno-unknown-pragmas"]
# Calls instead of inlined checks compile twice as fast. The check of returned functions' variables
# assumes one stack, but the emulation has many.
ADDRESS = ["-fsanitize=address", "-fno-omit-frame-pointer"]
ADDRESS += ["--param=asan-instrumentation-with-call-threshold=0", "--param=asan-use-after-return=0"]
UNDEFINED = ["-fsanitize=undefined", "-fno-sanitize-recover=all"]


class Kind(NamedTuple):
    """Flags for the CUDA sources. Optimizing small runs takes longer than it saves."""

    compile: list[str]
    link: list[str]


KINDS = {
    "plain": Kind(["-O0"], []),
    "address": Kind(["-O0", *ADDRESS], ADDRESS),  # compiles faster than with both
    "asan": Kind(["-O0", *ADDRESS, *UNDEFINED], [*ADDRESS, *UNDEFINED]),
    "race": Kind(["-O0", "-fsanitize=thread"], []),  # race.cpp replaces the library
}


def run(command: Sequence[str | Path]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}\n{done.stderr}")


def newest(folders: Iterable[Path]) -> float:
    headers = [path for folder in folders for path in folder.rglob("*.*h")]
    return max(path.stat().st_mtime for path in headers)


def compile_all(sources: Iterable[Path], folder: Path, flags: Sequence[str]) -> list[Path]:
    """Return object files; they are compiled again if a source or any header is newer."""
    folder.mkdir(parents=True, exist_ok=True)
    flags = [*FLAGS, *flags, f"-I{HERE / 'include'}", f"-I{CSRC / 'include'}", f"-I{CSRC}"]
    headers = newest([HERE, CSRC])

    def compile_one(source: Path) -> Path:
        target = folder / f"{source.stem}.o"
        made = target.stat().st_mtime if target.exists() else 0.0
        if made < max(headers, source.stat().st_mtime):
            run([COMPILER, *flags, "-x", "c++", "-c", source, "-o", target])
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(compile_one, sources))


def link(program: Path, objects: list[Path], kind: str) -> Path:
    if not program.exists() or any(o.stat().st_mtime > program.stat().st_mtime for o in objects):
        run([COMPILER, *KINDS[kind].link, *objects, "-o", program])
    return program


def emulation(folder: Path) -> list[Path]:
    sources = set(HERE.glob("*.cpp")) - set(HERE.glob("driver*"))
    return compile_all(sorted(sources), folder / "emulation", ["-O1"])


def selftest(folder: Path, kind: str) -> Path:
    kernels = compile_all([HERE / "selftest.cu"], folder / kind, KINDS[kind].compile)
    return link(folder / kind / "selftest", [*kernels, *emulation(folder)], kind)


def driver(folder: Path, kind: str, instead: Path | None = None, out: Path | None = None) -> Path:
    """Build the program that compares the ops with the CPU's.

    `instead` of the source of the same name in csrc/cuda another one can be taken, for runs of its
    op alone. Then `out` is where its object file and the program go.
    """
    # It comes first, because the linker keeps the first of equal inline functions.
    objects = compile_all([instead], out, KINDS[kind].compile) if instead and out else []
    others = "race" if instead else kind  # these exist
    ours = [s for s in (CSRC / "cuda").glob("*.cu") if not instead or s.name != instead.name]
    objects += compile_all(sorted(ours), folder / others / "cuda", KINDS[others].compile)
    cpu = sorted([*(CSRC / "cpu").glob("*.cpp"), *HERE.glob("driver*.cpp")])
    flags = ["-O1", "-fopenmp-simd", "-fno-math-errno", '-DLEAF_SINGLE_ISA="baseline"']
    objects += [*compile_all(cpu, folder / "cpu", flags), *emulation(folder)]
    return link((out or folder / kind) / "driver", objects, kind)


if __name__ == "__main__":
    for kind in sys.argv[2:] or KINDS:
        print(selftest(Path(sys.argv[1]), kind))
        print(driver(Path(sys.argv[1]), kind))
