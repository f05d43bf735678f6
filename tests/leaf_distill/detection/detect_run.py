"""Runs of stage 1 on the tiny pair, and what their results must add up to."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import detect_pair
import pyarrow.parquet as pq

from leaf_distill.config import DetectConfig
from leaf_distill.detection.pipeline import DetectResult, detect

ROWS = detect_pair.make_rows()
CONFOUNDED = [detect_pair.misled(row) for row in ROWS]


def settings(
    pair: dict[str, str], root: Path, rows: list[dict[str, Any]] = ROWS, **changes: Any
) -> dict[str, Any]:
    root.mkdir(parents=True, exist_ok=True)
    common = {"grade": "exact", "max_new_tokens": 4, "max_batch_tokens": 150, "threshold": 0.15}
    dataset = detect_pair.write_rows(root / "rows.jsonl", rows)
    places = {"output_dir": str(root / "run"), "cache_dir": str(root / "cache")}
    return {**pair, **common, **places, "dataset": dataset, **changes}


def run(*args: Any, **changes: Any) -> DetectResult:
    return detect(DetectConfig(**settings(*args, **changes)))


def table(path: Path) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = pq.read_table(path).to_pylist()
    return lines


def counts(result: DetectResult) -> list[int]:
    return [entry["rows"] for entry in result.funnel["stages"]]


def reasons(result: DetectResult, unit: str = "rows") -> dict[str, int]:
    return {
        entry["reason"]: entry["count"] for entry in result.funnel["left"] if entry["unit"] == unit
    }


def check_sums(result: DetectResult, total: int) -> None:
    """Rows in = rows at the end + rows left, and every outcome is in the table once."""
    stages = result.funnel["stages"]
    rows = [entry["rows"] for entry in stages if entry["unit"] == "rows"]
    cuts = [entry["rows"] for entry in stages if entry["unit"] == "candidates"]
    assert rows[0] == total == rows[-1] + sum(reasons(result).values())
    assert cuts[0] == cuts[1] + sum(reasons(result, "candidates").values())
    outcomes = table(result.outcomes)
    keys = [(line["row_id"], line["segment"], line["candidate_id"]) for line in outcomes]
    assert len(set(keys)) == len(keys)
    own = {line["row_id"]: line for line in reversed(outcomes) if line["candidate_id"] < 0}
    views = sum(key[2] < 0 for key in keys) - len(own)
    assert len(own) == total and len(keys) == total + views + cuts[0]
    gone = [sum(reasons(result, unit).values()) for unit in ("prompts", "beginnings")]
    assert views == sum(gone) + sum(
        line["reason"] == "kept" and line is not own[line["row_id"]] and line["candidate_id"] < 0
        for line in outcomes
    )
    kept = sum(line["candidate_id"] >= 0 for line in outcomes if line["reason"] == "kept")
    assert sum(line["reason"] == "kept" for line in own.values()) == rows[-1] and kept == cuts[1]
    branches = Counter(line["branch"] for line in table(result.dataset))
    assert branches == Counter({"original": rows[1], "counterfactual": cuts[1]}) + Counter()
