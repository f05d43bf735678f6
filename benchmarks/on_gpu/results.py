"""The measured lines, and the ratios between them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from . import jobs

Row = dict[str, Any]


class Results:
    """Rows by op, case and variant; a ratio is None where one of its numbers is missing."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = list(rows)
        self._timed = {
            (row["op"], row["case"], row["variant"]): row
            for row in rows
            if row["status"] == "timed"
        }

    def timed(self, op: str, case: object, variant: str) -> Row | None:
        return self._timed.get((op, str(case), variant))

    @property
    def copy_rate(self) -> float | None:
        """Bytes a second, read and written, of a copy on the device."""
        row = next((r for (op, *_), r in self._timed.items() if op == jobs.COPY), None)
        return row["bytes"] / row["seconds"] if row else None

    def share_of_copy(self, op: str, case: object, variant: str) -> float | None:
        row, rate = self.timed(op, case, variant), self.copy_rate
        return row["bytes"] / row["seconds"] / rate if row and rate else None

    def times_faster(self, op: str, case: object, variant: str, than: str) -> float | None:
        row, other = self.timed(op, case, variant), self.timed(op, case, than)
        return other["seconds"] / row["seconds"] if row and other else None
