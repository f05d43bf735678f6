"""Checks that every `#pragma omp simd` loop of the CPU kernels became vector code in every clone.

    rm -rf build/vec  # GCC appends to its reports
    cmake -S . -B build/vec -G Ninja -DPython_EXECUTABLE="$(which python)" -DLEAF_VEC_REPORT=ON
    cmake --build build/vec && python csrc/check_vectorized.py build/vec

Reads GCC's own reports, <build>/<source>.vec.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

KERNELS = Path(__file__).resolve().parent / "cpu"
VECTOR_BYTES = {64: "x86-64-v4", 32: "x86-64-v3", 16: "the baseline"}


def marked_loops(source: Path) -> list[range]:
    """The lines of each loop that a pragma marks, from the pragma to the closing brace."""
    lines = source.read_text().splitlines()
    loops = []
    for pragma, line in enumerate(lines):
        if "#pragma omp simd" not in line:
            continue
        last = pragma + 1
        if lines[last].endswith("{"):
            indent = lines[last][: len(lines[last]) - len(lines[last].lstrip())]
            last = next(i for i in range(last, len(lines)) if lines[i].startswith(indent + "}"))
        loops.append(range(pragma + 1, last + 2))
    return loops


def vectorized(report: Path, source: Path) -> dict[int, set[int]]:
    """For each line of a source the widths in bytes with which loops on it were vectorized.

    GCC names a loop by its pragma or by some line of its body.
    """
    widths: dict[int, set[int]] = {}
    pattern = rf"{re.escape(source.name)}:(\d+):\d+: optimized: loop vectorized using (\d+) byte"
    for line, width in re.findall(pattern, report.read_text()):
        widths.setdefault(int(line), set()).add(int(width))
    return widths


def main(build: Path) -> int:
    failures = loops = 0
    for source in sorted(KERNELS.glob("*.cpp")):
        widths = vectorized(build / f"{source.stem}.vec", source)
        for loop in marked_loops(source):
            loops += 1
            found = set().union(*(widths.get(line, set()) for line in loop))
            for missing in sorted(VECTOR_BYTES.keys() - found):
                failures += 1
                print(f"{source}:{loop[1]}: not vectorized for {VECTOR_BYTES[missing]}")
    print(f"{loops} loops checked, {failures} failures")
    return 1 if failures or not loops else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
