"""Turns the JSON of a run into a page of Markdown."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from . import jobs
from .results import Results, Row
from .targets import targets

COLUMNS = (
    *("op", "case", "variant", "ms", "10-90 % of runs", "GB/s", "of copy", "extra MB", "error"),
    *("x eager", "x compiled", "x liger", "of products"),
)
_LIGER = {"dual_kl": "liger KLDiv", "linear_dual_kl": "liger chunked JSD"}

NOTES = """\
Medians of the device's own time, by CUDA events: launches are queued while the device is busy, so
the host's time to launch is not in it. Before each repetition the arguments are made anew and the
L2 cache is overwritten. Losses: forward and backward. Each result was compared with the reference
in float64 before it was timed; `error` is the relative distance of its gradient (norms and scores:
of the result itself).

GB/s counts the bytes that must move (each input read once, each result written once); `of copy` is
its share of the copy bandwidth. `extra MB`: the most that was allocated during a call beyond what
is still there after it (results and gradients). `x eager`, `x compiled`, `x liger` (KLDiv from
logits, or the chunked JSD at beta = 0): the other's time divided by this one. `of products`: this
time divided by that of the bare matrix products. Peers compute a mean over rows of weight 1. `quack
cross entropy` is another function, of one tensor of logits that it reads once: a yardstick.
`compiled` detection stops at the scores."""


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], text: int) -> Iterator[str]:
    """The first `text` columns are text, the others numbers."""
    yield "| " + " | ".join(columns) + " |"
    yield "|" + "---|" * text + "---:|" * (len(columns) - text)
    for row in rows:
        yield "| " + " | ".join(row) + " |"


def _number(value: float | None, form: str = ".2f") -> str:
    return "-" if value is None else format(value, form)


def _line(results: Results, row: Row) -> tuple[str, ...]:
    op, case, variant = row["op"], row["case"], row["variant"]
    low, high = (f"{value * 1e3:.3f}" for value in row["spread"])
    extra = row.get("extra_bytes")
    products = results.times_faster(op, case, variant, "bare products")
    error = row.get("gradient_error", row.get("loss_error"))
    faster = [
        results.times_faster(op, case, variant, than)
        for than in ("eager", "compiled", _LIGER.get(op, "none"))
    ]
    return (
        *(op, case, variant, f"{row['seconds'] * 1e3:.3f}", f"{low}-{high}"),
        f"{row['bytes'] / row['seconds'] / 1e9:.0f}",
        _number(results.share_of_copy(op, case, variant), ".0%"),
        _number(None if extra is None else extra / 1e6, ".0f"),
        _number(error, ".1e"),
        *map(_number, faster),
        _number(None if products is None else 1 / products),
    )


def page(data: dict[str, Any]) -> str:
    results = Results(data["rows"])
    timed = [r for r in results.rows if r["status"] == "timed" and r["op"] != jobs.COPY]
    rest = [r for r in results.rows if r["status"] != "timed"]
    rate = results.copy_rate
    lines = [f"# Ops on {data['gpu']}", ""]
    lines += [f"- {name}: {value}" for name, value in data["machine"].items()]
    lines += [
        f"- run: {data['date']}, `{data['command']}`",
        f"- copy on the device: {_number(rate and rate / 1e9, '.0f')} GB/s (read and written)",
    ]
    lines += ["", "## Targets", "", "Set for an H100, as ratios within one run.", ""]
    wanted = ("what", "wanted", "reached", "measured")
    lines += table(wanted, (target.cells() for target in targets(results)), text=4)
    lines += ["", "## Results", "", NOTES, ""]
    lines += table(COLUMNS, (_line(results, row) for row in timed), text=3)
    if rest:
        lines += ["", "## Without a number", ""]
        lines += table(("op", "case", "variants", "why"), _reasons(rest), text=4)
    if data["kernels"]:
        lines += ["", "## Kernels", "", "Registers that the compiler spills lie on the stack.", ""]
        names = ("kernel", "registers", "stack bytes", "static shared bytes")
        cells = ([f"`{k['kernel']}`", *map(str, list(k.values())[1:])] for k in data["kernels"])
        lines += table(names, cells, text=1)
    return "\n".join(lines) + "\n"


def _reasons(rows: Sequence[Row]) -> Iterator[tuple[str, ...]]:
    """Variants of a case that have the same reason share a line."""
    groups: dict[tuple[str, str, str], list[str]] = {}
    for row in rows:
        why = f"{row['status']}: {row['note']}".replace("|", "/")
        groups.setdefault((row["op"], row["case"], why), []).append(row["variant"])
    for (op, case, why), variants in groups.items():
        yield op, case, ", ".join(variants), why


def file_name(gpu: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-") + ".md"
