"""Compiles the CUDA kernels and reports their registers; a spilled register is an error.

    python tools/check_registers.py [--json] [80 90 100]

It needs nvcc and no GPU. It prints a Markdown table, or JSON, of the assembler's report: registers
a thread, bytes of a thread's stack, of spilled registers, and of static shared memory.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

CSRC = Path(__file__).resolve().parents[1] / "csrc"
ARCHITECTURES = ("80", "90", "100")
COLUMNS = ("source", "kernel", "sm", "registers", "stack", "spilled", "shared")

ENTRY = re.compile(
    r"Function properties for (?P<kernel>\w+)\n"
    r" *(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores,"
    r" (?P<loads>\d+) bytes spill loads\n"
    r".*Used (?P<registers>\d+) registers(?:.*?(?P<shared>\d+) bytes smem)?"
)


def report(source: Path, architecture: str) -> str:
    """Return nvcc's report on a source. A warning is an error."""
    command = ["nvcc", f"-arch=sm_{architecture}", "-std=c++17", f"-I{CSRC / 'include'}"]
    command += ["--Werror=all-warnings", "-Xptxas=-v", "-cubin", "-o", "/dev/null", str(source)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout}")
    return done.stdout


def readable(kernel: str) -> str:
    """Return name and template arguments of a mangled kernel, without namespaces and parameters."""
    name = subprocess.check_output(["c++filt", kernel], text=True).strip()
    name = name.replace("(anonymous namespace)::", "").removeprefix("void ")
    return re.sub(r"\w+::", "", re.sub(r"\(.*", "", name))


def kernels(text: str, source: Path, architecture: str) -> Iterator[dict[str, str | int]]:
    """Yield one row for each kernel of a report."""
    if text.count("Compiling entry function") != len(found := list(ENTRY.finditer(text))):
        sys.exit(f"nvcc's report reads differently from what was expected:\n{text}")
    for entry in found:
        yield {
            "source": source.name,
            "kernel": readable(entry["kernel"]),
            "sm": architecture,
            "registers": int(entry["registers"]),
            "stack": int(entry["stack"]),
            "spilled": int(entry["stores"]) + int(entry["loads"]),
            "shared": int(entry["shared"] or 0),
        }


def measure(architectures: list[str]) -> list[dict[str, str | int]]:
    jobs = [(s, a) for s in sorted((CSRC / "cuda").glob("*.cu")) for a in architectures]
    with ThreadPoolExecutor(2) as pool:
        reports = list(pool.map(lambda job: report(*job), jobs))
    return [row for job, text in zip(jobs, reports, strict=True) for row in kernels(text, *job)]


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("architectures", nargs="*", default=ARCHITECTURES)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    rows = measure(list(arguments.architectures))
    if arguments.json:
        print(json.dumps(rows, indent=1))
    else:
        print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
        for row in rows:
            print(f"| {' | '.join(str(row[column]) for column in COLUMNS)} |")
    spilling = [f"{row['kernel']} (sm_{row['sm']})" for row in rows if row["spilled"]]
    if spilling:
        print(f"registers are spilled by {', '.join(spilling)}", file=sys.stderr)
    return 1 if spilling or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
