"""Writes the page of results: targets, measurements, and jobs without a number.

    python -m on_gpu.report OUTPUT/results.jsonl [--tiny]

It prints the targets. The exit status is 1 if one of our own lines failed.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from leaf_ext.testing import cases

from . import table
from .worker import rows_of

NOTES = """\
Medians of the device's own time, by CUDA events: launches are queued while the device is busy, so
the host's time to launch is not in it. Before each repetition the arguments are made anew and the
L2 cache is read full of something else. Losses: forward and backward. Before it was timed, each
result was compared: the loss with torch in float32, 64 rows of the gradient (or of the result) with
the reference in float64; `error` is their relative distance.

`narrow`: float32 logits, their gradient in bfloat16 in their memory. `of copy`: the rate of the
bytes that must move (each input read once, each result written once) over that of the copy. `extra
GB`: the most that was allocated during a call beyond what is still there after it. `x other`: the
other's time divided by this one; `of bare products`: this time divided by theirs. torch's compiler
gets one shape an op and its detection stops at the scores, as eager's does; liger's chunked JSD is
taken at beta = 0; `orda` of dual_kl is the kernel under its loss, which has no public name;
liger KLDiv counts the two float32 log-softmaxes, by torch, that it needs."""

COLUMNS = ("op", "case", "variant", "ms", "10 %", "90 %", "error", "of copy", "extra GB")
COMPARED = ("x eager", "x compiled", "x liger KLDiv", "x liger chunked JSD", "x orda")
_BF16, _TRAINING = cases.GPU_KL_CASES, cases.GPU_TRAINING_CASES
_LINEAR, _LONG = cases.GPU_LINEAR_CASES, cases.GPU_LONG_LINEAR_CASES
# For an H100: op, variant, measure, limit (lower for "of copy" and "x", otherwise upper), cases.
TARGETS: list[tuple[str, str, str, float, Sequence[object]]] = [
    ("dual_kl", "cuda narrow rows", "of copy", 0.80, _TRAINING[:3]),
    ("dual_kl", "cuda inplace", "of copy", 0.85, _BF16),
    ("dual_kl", "cuda inplace", "x compiled", 5.0, _BF16[:1]),
    ("dual_kl", "cuda inplace", "x liger KLDiv", 6.0, _BF16),
    ("dual_kl", "cuda inplace", "x orda", 3.0, _BF16),
    ("dual_kl", "triton inplace", "of copy", 0.45, _BF16),
    ("linear_dual_kl", "cuda", "of bare products", 1.15, _LINEAR),
    ("linear_dual_kl", "cuda", "x liger chunked JSD", 1.7, _LINEAR),
    ("linear_dual_kl", "cuda", "x orda", 3.0, _LINEAR),
    ("linear_dual_kl", "cuda", "extra GB", 3.3, [*_LINEAR[:2], *_LONG]),
    ("linear_dual_kl", "cuda", "extra GB", 4.4, _LINEAR[2:]),
    ("grad_norm", "cuda", "of copy", 0.90, cases.GPU_NORM_CASES),
    ("detect_spans", "cuda graph", "us", 25.0, cases.GPU_SPANS_CASES[:1]),
]


class Results:
    """Lines by job; a measure is None if one of its numbers is missing."""

    def __init__(self, rows: Iterable[dict[str, Any]]) -> None:
        self.rows = {table.Job(*row["job"]): row for row in rows}
        self.timed = {job: row for job, row in self.rows.items() if row["status"] == "timed"}

    def measure(self, name: str, job: table.Job) -> float | None:
        row, other = self.timed.get(job), name.partition(" ")[2]
        if row is None:
            return None
        if name in ("ms", "us"):
            return float(row["seconds"]) * {"ms": 1e3, "us": 1e6}[name]
        if name in ("10 %", "90 %"):
            return float(row["spread"][name == "90 %"]) * 1e3
        if name in ("error", "extra GB"):
            value = row["error"] if name == "error" else row["extra"]
            return value if value is None or name == "error" else value / 1e9
        than = self.timed.get(table.COPY if other == "copy" else job._replace(variant=other))
        if than is None:
            return None
        faster = float(than["seconds"] / row["seconds"])
        if other == "copy":
            return faster * float(row["bytes"] / than["bytes"])
        return faster if name.startswith("x ") else 1 / faster


def written(name: str, value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}" if name == "of copy" else f"{value:.3g}"


def targets(results: Results) -> Iterator[Sequence[str]]:
    for op, variant, name, limit, table_of_cases in TARGETS:
        jobs = [table.Job(op, str(case), variant) for case in table_of_cases]
        found = {job.case: results.measure(name, job) for job in jobs}
        values = [value for value in found.values() if value is not None]
        least = name == "of copy" or name.startswith("x ")
        reached = "yes" if len(values) == len(jobs) else "partly" if values else "not measured"
        if any((value < limit) if least else (value > limit) for value in values):
            reached = "no"
        wanted = f"{'>=' if least else '<='} {written(name, limit)}"
        measured = "; ".join(f"{case}: {written(name, value)}" for case, value in found.items())
        yield f"`{op}` {variant}", name, wanted, reached, measured


def markdown(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    yield "| " + " | ".join(columns) + " |"
    yield "|" + "---|" * len(columns)
    for row in rows:
        yield "| " + " | ".join(cell.replace("|", "/") for cell in row) + " |"


def page(path: Path, tiny: bool) -> str:
    """Return the page of a file of results, with the jobs that were not reached in time."""
    results, machine = Results(rows_of(path)), json.loads(path.read_text().splitlines()[0])
    planned = [job for group in table.groups(tiny) for job in table.jobs(group)]
    lines = [f"# Ops on {machine['GPU']}", "", "## Targets", "", "For an H100, of one run.", ""]
    lines += markdown(("what", "measure", "wanted", "reached", "measured"), targets(results))
    lines += ["", "## Results", "", NOTES, ""]
    names = (*COLUMNS[3:], *COMPARED, "of bare products")
    timed = [job for job in planned if job in results.timed]
    rows = [(*job, *(written(name, results.measure(name, job)) for name in names)) for job in timed]
    lines += markdown((*COLUMNS[:3], *names), rows)
    lines += ["", "## Without a number", ""]
    missing = {"status": "left out", "note": "the time was spent"}
    without = ((job, results.rows.get(job, missing)) for job in planned if job not in timed)
    reasons = ((*job, f"{row['status']}: {row['note']}") for job, row in without)
    lines += markdown(("op", "case", "variant", "why"), reasons)
    lines += ["", "## Machine", "", *(f"- {name}: {value}" for name, value in machine.items())]
    return "\n".join(lines) + "\n"


def main() -> int:
    results, tiny = Path(sys.argv[1]), "--tiny" in sys.argv
    gpu = json.loads(results.read_text().splitlines()[0])["GPU"].split(",")[0]
    text, name = page(results, tiny), re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-") + ".md"
    (results.parent / name).write_text(text)
    if not tiny:  # notes below the last table are kept
        kept = Path(__file__).resolve().parents[1] / "results" / name
        notes = kept.read_text().partition("\n## Notes\n") if kept.exists() else ("", "", "")
        kept.write_text(text + notes[1] + notes[2])
    print(text[text.index("## Targets") : text.index("## Results")])
    rows = [row for row in rows_of(results) if row["job"][2].startswith(("cuda", "triton"))]
    bad = [row for row in rows if row["status"] in ("failed", "refused")]
    print(*(f"{' '.join(row['job'])}: {row['note']}" for row in bad), sep="\n")
    print(f"{len(bad)} of {len(rows)} lines of ours failed")
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
