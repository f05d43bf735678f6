"""What became of every row and candidate: counted, printed, and written down one by one."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
from rich.console import Console
from rich.table import Table

from leaf_distill.data.dataset import Rejection

ROW_STAGES = {
    "rows": None,
    "render": "usable: originals of the dataset",
    "predict": "answered",
    "mark": "marked: student wrong, teacher right",
    "detect": "scored",
    "prune": "with candidates",
    "validate": "with counterfactuals",
}
"""What a row that did not leave at this stage is called, in the order of the stages."""

KEPT = "kept counterfactuals"

FATES = pa.schema(
    [
        ("row_id", pa.int64()),
        ("candidate_id", pa.int64()),
        ("stage", pa.string()),
        ("reason", pa.string()),
        ("detail", pa.string()),
    ]
)


@dataclass
class Funnel:
    """Counts of one run: rows in, and who left where and why; the rest follows from them.

    A Rejection with candidate_id -1 takes its row out of the search for counterfactuals, once; any
    other takes one candidate out. `candidates` is the number of candidates that were proposed.
    """

    rows: int
    stages: tuple[str, ...] = tuple(ROW_STAGES)
    candidates: int = 0
    left: list[Rejection] = field(default_factory=list)

    def counts(self) -> list[dict[str, object]]:
        """Return stage, rows and unit, from what came in to what is kept."""
        gone = Counter(item.stage for item in self.left if item.candidate_id < 0)
        counts: list[dict[str, object]] = [{"stage": "rows in", "rows": self.rows, "unit": "rows"}]
        remaining = self.rows
        for stage, name in ROW_STAGES.items():
            remaining -= gone[stage]
            if name is not None and stage in self.stages:
                counts.append({"stage": name, "rows": remaining, "unit": "rows"})
        dropped = sum(item.candidate_id >= 0 for item in self.left)
        for name, number in (
            ("candidates", self.candidates),
            (KEPT, self.candidates - dropped),
        ):
            counts.append({"stage": name, "rows": number, "unit": "candidates"})
        return counts

    def reasons(self) -> list[dict[str, object]]:
        """Return stage, reason, count and unit, in the order of the stages, most frequent first."""
        order = list(ROW_STAGES)
        tally = Counter((item.candidate_id >= 0, item.stage, item.reason) for item in self.left)
        ranked = sorted(
            tally.items(), key=lambda entry: (entry[0][0], order.index(entry[0][1]), -entry[1])
        )
        return [
            {
                "stage": stage,
                "reason": reason,
                "count": count,
                "unit": "candidates" if is_candidate else "rows",
            }
            for (is_candidate, stage, reason), count in ranked
        ]

    def fates(self, kept: Iterable[tuple[int, int]]) -> pa.Table:
        """Return one line for each row and candidate: where it left and why, or `kept`.

        kept: (row_id, candidate_id) of all that stayed to the end, -1 for the row itself.
        """
        lines = [
            {
                "row_id": item.row_id,
                "candidate_id": item.candidate_id,
                "stage": item.stage,
                "reason": item.reason,
                "detail": item.detail,
            }
            for item in self.left
        ]
        lines += [
            {"row_id": row, "candidate_id": candidate, "stage": "dataset", "reason": "kept"}
            for row, candidate in kept
        ]
        lines.sort(key=lambda line: (line["row_id"], line["candidate_id"]))
        return pa.Table.from_pylist(lines, schema=FATES)

    def show(self, seconds: Mapping[str, float], notes: Sequence[str]) -> None:
        """Print the funnel as a table, and what the reader should know before trusting it."""
        table = Table(title="LeaF, stage 1", title_justify="left")
        table.add_column("stage")
        table.add_column("number", justify="right")
        table.add_column("left, and why")
        lines: dict[str, list[str]] = {}
        for reason in self.reasons():
            line = f"{reason['count']} {str(reason['reason']).replace('_', ' ')}"
            lines.setdefault(_shown_at(reason), []).append(line)
        for entry in self.counts():
            name = str(entry["stage"])
            table.add_row(name, str(entry["rows"]), "\n".join(lines.get(name, [])))
        console = Console()
        console.print(table)
        for note in notes:
            console.print(f"note: {note}", style="yellow", markup=False, soft_wrap=True)
        times = ", ".join(f"{name} {value:.1f}" for name, value in seconds.items())
        console.print(f"seconds: {times}", markup=False, soft_wrap=True)


def _shown_at(reason: Mapping[str, object]) -> str:
    """Return the line of the table that is lower for this reason."""
    if reason["unit"] == "candidates":
        return KEPT
    return ROW_STAGES[str(reason["stage"])] or str(ROW_STAGES["render"])


def replaced(path: Path, settings: Mapping[str, object]) -> str | None:
    """Say with which other settings the results beside this funnel.json were made, if any."""
    if not path.is_file():
        return None
    old = json.loads(path.read_text(encoding="utf-8"))["settings"]
    new = json.loads(json.dumps(settings))
    others = [f"{name} {old[name]!r}" for name in new if name in old and old[name] != new[name]]
    return f"This replaces the results of {', '.join(others)}" if others else None
