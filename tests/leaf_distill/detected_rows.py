"""Lines of dataset.jsonl as `leaf detect` writes them, one of each kind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

SYSTEM = {"role": "system", "content": "Be brief."}
FIRST = {"role": "user", "content": "Tom has 7 apples. Ann has 3."}
REPLY = {"role": "assistant", "content": "Good for them."}
LAST = {"role": "user", "content": "How many, by the way, has Tom?"}
PROMPT = [SYSTEM, FIRST, REPLY, LAST]
SHORTER = [SYSTEM, {**FIRST, "content": "Tom has 7 apples."}, REPLY, LAST]
BRIEFER = [*PROMPT[:3], {**LAST, "content": "How many has Tom?"}]
RESPONSE = "Let me think. Ann has 3. Tom has 7."


def span(message: int, start: int, stop: int) -> dict[str, int]:
    return {"message": message, "start": start, "stop": stop}


def line(branch: str = "original", candidate_id: int = -1, **columns: Any) -> dict[str, Any]:
    """A line for row 3 of the input."""
    made = {"parent_id": 3, "strategy": "span", "score": 0.05}
    response = columns.pop("response", RESPONSE)
    return {
        "row_id": 3,
        "candidate_id": candidate_id,
        "parent_id": None,
        "branch": branch,
        "prompt": PROMPT,
        "completion": [{"role": "assistant", "content": response}],
        "teacher_prompt": None,
        "answer": "7",
        "spans": [],
        "inserted": [],
        "context": 0,
        "segment": 0,
        "score": None,
        "accepted": True,
        "reason": None,
        "strategy": None,
        "student_verdict": None if branch == "cross" else "wrong",
        "provenance": None if branch == "original" else json.dumps({"seed": 0}),
        **({} if branch == "original" else made),
        **columns,
    }


def detected() -> list[dict[str, Any]]:
    """An original, and cuts in an early turn, in two turns, crossed and in the response."""
    early, late = span(1, 17, 28), span(3, 8, 21)
    inside = {"response": "Let me think. Tom has 7.", "context": 13, "segment": 1}
    return [
        line(),
        line("counterfactual", 0, prompt=SHORTER, spans=[early]),
        line("counterfactual", 1, prompt=[*SHORTER[:3], BRIEFER[3]], spans=[early, late]),
        line("cross", 2, teacher_prompt=SHORTER, spans=[early]),
        line("counterfactual", 3, spans=[span(4, 13, 24)], **inside),
    ]


def write(folder: Path, lines: list[dict[str, Any]]) -> None:
    """Write dataset.jsonl and dataset.parquet."""
    text = "".join(json.dumps(one) + "\n" for one in lines)
    (folder / "dataset.jsonl").write_text(text)
    pq.write_table(pa.Table.from_pylist(lines), folder / "dataset.parquet")
