"""Checks that every `#pragma omp simd` loop of the CPU kernels became vector code in every clone.

    rm -rf build/vec  # GCC appends to its reports
    cmake -S . -B build/vec -G Ninja -DPython_EXECUTABLE="$(which python)" -DLEAF_VEC_REPORT=ON
    cmake --build build/vec --target leaf_cpu && python tools/check_vectorized.py build/vec

`make vectorized` runs these commands. The script reads GCC's reports, <build>/<source>.vec. Their
widths are those of a loop's narrowest type and are ignored; "couldn't vectorize loop" counts. GCC
places a loop at its first statement. That must be in the loop itself, not in a function inlined
there (hence `j` in the loops over pairs), and an outer loop needs a first statement of its own.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

KERNELS = Path(__file__).resolve().parents[1] / "csrc" / "cpu"


def marked_loops(source: Path) -> list[range]:
    """Return the lines of each loop that a pragma marks, from its head to its closing brace."""
    lines = source.read_text().splitlines()
    loops = []
    for pragma, line in enumerate(lines):
        if not line.startswith("#pragma omp simd"):
            continue
        last = pragma + 1
        if lines[last].endswith("{"):
            indent = lines[last][: len(lines[last]) - len(lines[last].lstrip())]
            last = next(i for i in range(last, len(lines)) if lines[i].startswith(indent + "}"))
        loops.append(range(pragma + 2, last + 2))
    return loops


def reported(report: Path, source: Path, message: str) -> set[int]:
    """Return the lines of a source for which GCC reports `message`."""
    pattern = rf"{re.escape(source.name)}:(\d+):\d+: {message}"
    return {int(line) for line in re.findall(pattern, report.read_text())}


def main(build: Path) -> int:
    failures = loops = 0
    for source in sorted(KERNELS.glob("*.[ch]*")):
        marked = marked_loops(source)
        loops += len(marked)
        # The loops of a header are reported in each source that uses them.
        reports = sorted(build.glob("*.vec" if source.suffix == ".h" else f"{source.stem}.vec"))
        done = set().union(*(reported(r, source, "optimized: loop vectorized") for r in reports))
        # Loops of a known, small number of steps are unrolled into vectors, not looped.
        done |= set().union(
            *(reported(r, source, "optimized: basic block part vectorized") for r in reports)
        )
        missed = set().union(*(reported(r, source, "missed: couldn't vector") for r in reports))
        for loop in marked:
            if missed.intersection(loop) or not done.intersection(loop):
                failures += 1
                print(f"{source}:{loop[0]}: not vector code in every clone")
    print(f"{loops} loops checked, {failures} failures")
    return 1 if failures or not loops else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
