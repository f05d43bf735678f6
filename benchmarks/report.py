"""Turns pytest-benchmark's JSON into a Markdown table.

    python benchmarks/report.py build/benchmark.json [--output FILE]

The table is printed and written to benchmarks/results/<processor>.md. Notes below it, from the
first heading "## " on, are kept.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
BASELINES = ("eager", "compiled", "bare products")
COLUMNS = (
    "op", "case", "variant", "best ms", "median ms", "GB/s", "of copy", "peak extra MiB",
    *(f"x {baseline}" for baseline in BASELINES),
)  # fmt: skip


def rows(benchmarks: list[dict[str, Any]]) -> Iterator[tuple[str, ...]]:
    best = {}
    for benchmark in benchmarks:
        info = benchmark["extra_info"]
        best[info["op"], info["case"], info["variant"]] = benchmark["stats"]["min"]

    def ratio(info: dict[str, Any], baseline: str) -> str:
        """Return the speed relative to the baseline, of the same kind if there is one."""
        own, same = (info["op"], info["case"]), info["variant"].partition(" ")[2]
        time = best.get((*own, f"{baseline} {same}"), best.get((*own, baseline)))
        if baseline == "bare products":
            time = info.get("bare_products_s")
        return "-" if time is None else f"{time / best[(*own, info['variant'])]:.2f}"

    for benchmark in benchmarks:
        info, stats = benchmark["extra_info"], benchmark["stats"]
        bandwidth = info["bytes"] / stats["min"] / 1e9
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
            *(ratio(info, baseline) for baseline in BASELINES),
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
        "the process's resident memory rose during one call. `x eager`, `x compiled`: the best "
        "time of eager and of compiled PyTorch divided by this one, with a frozen head if it has "
        "one; `x bare products`: that of the four matrix products alone, timed in turn with it.",
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|---|---|---|" + "---:|" * (len(COLUMNS) - 3),
    ]
    lines += ["| " + " | ".join(row) + " |" for row in rows(benchmarks)]
    return "\n".join(lines) + "\n"


def notes(output: Path) -> str:
    """Return the notes below the table of an earlier run."""
    _, heading, text = (output.read_text() if output.exists() else "").partition("\n## ")
    return heading + text


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
    output.write_text(text + notes(output))


if __name__ == "__main__":
    main()
