"""Turns pytest-benchmark's JSON into a Markdown table.

    python benchmarks/report.py build/benchmark.json [--output FILE]

The table is printed and written to benchmarks/results/<processor>.md.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
COLUMNS = (
    "op", "case", "variant", "best ms", "median ms", "GB/s", "of copy", "peak extra MiB", "x eager",
)  # fmt: skip


def rows(benchmarks: list[dict[str, Any]]) -> Iterator[tuple[str, ...]]:
    eager = {
        (b["extra_info"]["op"], b["extra_info"]["case"]): b["stats"]["min"]
        for b in benchmarks
        if b["extra_info"]["variant"] == "eager"
    }
    for benchmark in benchmarks:
        info, stats = benchmark["extra_info"], benchmark["stats"]
        bandwidth = info["bytes"] / stats["min"] / 1e9
        baseline = eager.get((info["op"], info["case"]))
        peak = info["peak_extra_mib"]
        yield (
            info["op"],
            info["case"],
            info["variant"],
            f"{stats['min'] * 1e3:.2f}",
            f"{stats['median'] * 1e3:.2f}",
            f"{bandwidth:.1f}",
            f"{bandwidth / info['copy_gbps']:.0%}",
            "-" if peak is None else f"{peak:.0f}",
            "-" if baseline is None else f"{baseline / stats['min']:.2f}",
        )


def table(data: dict[str, Any]) -> str:
    machine, benchmarks = data["machine_info"], data["benchmarks"]
    cpu = machine.get("cpu", {}).get("brand_raw") or machine["machine"]
    extension = machine["leaf_ext"]
    lines = [
        f"# Ops on {cpu}",
        "",
        f"- {data['datetime'][:10]}, {machine['system']} {machine['release']}, "
        f"Python {machine['python_version']}, torch {machine['torch']}, "
        f"{machine['threads']} threads",
        f"- leaf_ext {extension['version']}, {extension['compiler']}, "
        f"{extension['instruction_set']}",
        f"- command: `{machine['command']}`",
        f"- copy bandwidth in this run: {benchmarks[0]['extra_info']['copy_gbps']:.1f} GB/s "
        "(bytes read and written)",
        "",
        "Losses: forward and backward. Each result was compared with the float64 reference before "
        "it was timed.",
        "GB/s counts the bytes that must move (each input read once, each result written once), at "
        "the best time; `of copy` is its share of the copy bandwidth. Peak extra memory: how far "
        "the process's resident memory rose during one call. `x eager`: eager PyTorch's best time "
        "divided by this one.",
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|---|---|---|" + "---:|" * (len(COLUMNS) - 3),
    ]
    lines += ["| " + " | ".join(row) + " |" for row in rows(benchmarks)]
    return "\n".join(lines) + "\n"


def file_name(data: dict[str, Any]) -> str:
    machine = data["machine_info"]
    cpu = machine.get("cpu", {}).get("brand_raw") or machine["machine"]
    return re.sub(r"[^a-z0-9]+", "-", cpu.lower()).strip("-") + ".md"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("json", type=Path, help="written by pytest --benchmark-json")
    parser.add_argument("--output", type=Path, help="the table's file")
    arguments = parser.parse_args()
    data = json.loads(arguments.json.read_text())
    if not data["benchmarks"]:
        parser.error(f"{arguments.json} holds no benchmark: did the run fail?")
    output = arguments.output or RESULTS / file_name(data)
    text = table(data)
    print(text, end="")
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(text)


if __name__ == "__main__":
    main()
