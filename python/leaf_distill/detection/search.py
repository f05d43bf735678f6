"""From stored saliencies to candidates: the steps of stage 1 that need no model, in seconds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from leaf_distill.data.dataset import Message, Rejection, Row
from leaf_distill.detection.counterfactual import Candidate, candidates
from leaf_distill.detection.pair import ROLES, Pair, chunks
from leaf_distill.detection.spans import Detection, PromptSaliency, SpanSettings, detect_rows

RANGES = pa.list_(pa.list_(pa.int64()))

DETECTIONS = pa.schema(
    [
        ("row_id", pa.int64()),
        ("offsets", RANGES),
        ("slot", pa.list_(pa.int64())),
        ("prunable", pa.list_(pa.bool_())),
        ("teacher_saliency", pa.list_(pa.float32())),
        ("student_saliency", pa.list_(pa.float32())),
        ("score", pa.list_(pa.float32())),
        ("confounder", pa.list_(pa.bool_())),
        ("token_spans", RANGES),
        ("spans", RANGES),
        ("reason", pa.string()),
        ("detail", pa.string()),
    ]
)
CANDIDATES = pa.schema(
    [
        ("row_id", pa.int64()),
        ("candidate_id", pa.int64()),
        ("cut", RANGES),
        *((role, pa.int32()) for role in ROLES),
        ("reason", pa.string()),
        ("detail", pa.string()),
    ]
)


@dataclass(frozen=True)
class Saliencies:
    """One model's finished saliency stage: its table and its fingerprint."""

    table: pa.Table
    fingerprint: str


def detect_spans(
    pair: Pair, saliencies: Mapping[str, Saliencies]
) -> tuple[pa.Table, str, list[Rejection]]:
    """Return the detections of all scored rows by row_id, their fingerprint, and who left."""
    config = pair.config
    settings = SpanSettings(
        threshold=config.threshold,
        rule=config.rule,
        cap=config.cap,
        teacher_max=config.teacher_max,
        join_gap=config.join_gap,
        min_length=config.min_length,
    )
    where = {
        role: {row_id: at for at, row_id in enumerate(side.table["row_id"].to_pylist())}
        for role, side in saliencies.items()
    }

    def compute(batch: Sequence[int]) -> Iterator[dict[str, object]]:
        sides = {
            role: [_prompt_saliency(side.table, where[role][row_id]) for row_id in batch]
            for role, side in saliencies.items()
        }
        found, left = detect_rows(sides["teacher"], sides["student"], settings)
        for detection in found:
            yield _detection_line(detection)
        for item in left:
            line: dict[str, object] = dict.fromkeys(DETECTIONS.names)
            yield line | {"row_id": item.row_id, "reason": item.reason, "detail": item.detail}

    stage = pair.stage(
        "detect",
        DETECTIONS,
        {**vars(settings), **{role: side.fingerprint for role, side in saliencies.items()}},
    )
    table = stage.run(chunks(sorted(where["teacher"])), compute, desc="detect")
    left = [
        Rejection(line["row_id"], -1, "detect", line["reason"], line["detail"])
        for line in table.select(["row_id", "reason", "detail"]).to_pylist()
        if line["reason"]
    ]
    scored = table.filter(pc.is_null(table["reason"])).sort_by("row_id")
    return scored, stage.fingerprint, left


def _prompt_saliency(table: pa.Table, index: int) -> PromptSaliency:
    line = table.slice(index, 1).to_pylist()[0]
    position = np.asarray(line["position"], dtype=np.int64)
    return PromptSaliency(
        row_id=line["row_id"],
        norms=np.asarray(line["norms"], dtype=np.float32)[position],
        position=position,
        offsets=np.stack([line["start"], line["stop"]], axis=1).astype(np.int64),
        prunable=np.asarray(line["prunable"], dtype=np.bool_),
        invalid=line["invalid"],
    )


def _detection_line(found: Detection) -> dict[str, object]:
    return {
        "row_id": found.row_id,
        "offsets": found.offsets.tolist(),
        "slot": found.slot,
        "prunable": found.prunable,
        "teacher_saliency": found.teacher,
        "student_saliency": found.student,
        "score": found.score,
        "confounder": found.confounder,
        "token_spans": found.spans,
        "spans": found.characters,
        "reason": None,
        "detail": None,
    }


def _detection(line: Mapping[str, Any]) -> Detection:
    def array(name: str, dtype: type) -> Any:
        return np.asarray(line[name], dtype=dtype)

    return Detection(
        row_id=line["row_id"],
        offsets=array("offsets", np.int64),
        slot=array("slot", np.int64),
        prunable=array("prunable", np.bool_),
        teacher=array("teacher_saliency", np.float32),
        student=array("student_saliency", np.float32),
        score=array("score", np.float32),
        confounder=array("confounder", np.bool_),
        spans=tuple((start, stop) for start, stop in line["token_spans"]),
    )


def cut_messages(row: Row, text: str) -> tuple[Message, ...]:
    """Return the row's messages with another text in the user's last turn."""
    return (*row.messages[:-1], {"role": "user", "content": text})


def prune(
    pair: Pair, rows: Mapping[int, Row], detections: pa.Table, upstream: str
) -> tuple[list[dict[str, Any]], list[Rejection]]:
    """Return all candidates by row as lines of CANDIDATES, and which rows and candidates left.

    A line with a reason is a candidate that came to nothing; it is in the second list as well.
    """
    config = pair.config
    where = {row_id: at for at, row_id in enumerate(detections["row_id"].to_pylist())}

    def compute(batch: Sequence[int]) -> Iterator[dict[str, object]]:
        for row_id in batch:
            detection = _detection(detections.slice(where[row_id], 1).to_pylist()[0])
            text = rows[row_id].messages[-1]["content"]
            found, left = candidates(text, detection, strategy=config.strategy, seed=config.seed)
            for item in found:
                yield _candidate_line(pair, rows[row_id], item)
            for gone in left:
                line: dict[str, object] = dict.fromkeys(CANDIDATES.names)
                yield line | {
                    "row_id": row_id,
                    "candidate_id": gone.candidate_id,
                    "reason": gone.reason,
                    "detail": gone.detail,
                }

    stage = pair.stage(
        "prune",
        CANDIDATES,
        {
            "detect": upstream,
            "strategy": config.strategy,
            "seed": config.seed if config.strategy.startswith("random") else None,
            "max_length": pair.max_length,
        },
    )
    table = stage.run(chunks(list(where)), compute, desc="prune")
    lines = table.sort_by([("row_id", "ascending"), ("candidate_id", "ascending")]).to_pylist()
    left = [
        Rejection(line["row_id"], line["candidate_id"], "prune", line["reason"], line["detail"])
        for line in lines
        if line["reason"]
    ]
    return [line for line in lines if line["candidate_id"] >= 0], left


def _candidate_line(pair: Pair, row: Row, item: Candidate) -> dict[str, object]:
    line: dict[str, object] = dict.fromkeys(CANDIDATES.names)
    line |= {"row_id": item.row_id, "candidate_id": item.candidate_id, "cut": item.cut}
    try:
        lengths = pair.prompt_lengths(cut_messages(row, item.text))
    except ValueError as error:
        return line | {"reason": "not_renderable", "detail": str(error)}
    if max(lengths.values()) >= pair.max_length:
        detail = f"the cut prompt has {max(lengths.values())} of {pair.max_length} tokens"
        return line | {"reason": "prompt_too_long", "detail": detail}
    return line | lengths
