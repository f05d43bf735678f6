"""The rows of stage 2: those of `leaf detect` with their branch, or any other dataset's."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from leaf_distill.data.collator import summarize
from leaf_distill.data.dataset import Rejection, load_rows
from leaf_distill.training.config import DistillArguments

logger = logging.getLogger(__name__)

DistillRow = dict[str, Any]
"""A row in the layout of `dataset.parquet`; only prompt and completion must be there."""


def read_distill_rows(
    arguments: DistillArguments, source: str, split: str, max_rows: int | None
) -> tuple[list[DistillRow], list[Rejection]]:
    """Rows of `leaf detect` with their branch, or any other rows, which are all originals."""
    path = Path(source).expanduser()
    if path.is_dir() and (path / "run.json").is_file():
        path = path / "dataset.parquet"
        if not path.is_file():
            raise ValueError(
                f"dataset: {source} is a run of `leaf detect` that is not finished; run the same "
                "command again, it goes on where it stopped"
            )
    rows = _branched_rows(path) if path.is_file() else None
    if rows is None:
        columns = arguments.columns if isinstance(arguments.columns, dict) else None
        plain, left = load_rows(source, split=split, columns=columns, max_rows=max_rows)
        if not plain:
            raise ValueError(f"dataset: no row of {source} can be used: {summarize(left)}")
        if left:
            reasons = summarize(left)
            logger.warning("dataset: %d rows of %s left out: %s", len(left), source, reasons)
        return [
            {"row_id": row.row_id, "prompt": list(row.messages), "completion": row.completion}
            for row in plain
        ], left
    if max_rows is None:
        return rows, []
    ids = [row.get("row_id", position) for position, row in enumerate(rows)]
    originals = [
        row_id
        for row_id, row in zip(ids, rows, strict=True)
        if row.get("branch") != "counterfactual"
    ]
    kept = set(originals[:max_rows])
    return [row for row_id, row in zip(ids, rows, strict=True) if row_id in kept], []


def _branched_rows(path: Path) -> list[DistillRow] | None:
    """The rows of a file in the layout of `dataset.parquet` or `dataset.jsonl`, else None."""
    try:
        if path.suffix == ".parquet":
            if "branch" not in pq.read_schema(path).names:
                return None
            table: list[DistillRow] = pq.read_table(path).to_pylist()
            return table
        if path.suffix == ".jsonl":
            with path.open(encoding="utf-8") as file:
                if '"branch"' in file.readline():
                    file.seek(0)
                    return [json.loads(line) for line in file if line.strip()]
    except (pa.ArrowException, ValueError) as error:
        raise ValueError(f"dataset: {path} cannot be read: {error}") from error
    return None
