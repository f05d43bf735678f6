"""Run directories for the report, written from examples by the functions of `leaf detect`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from text_friends import cut

from leaf_distill.data.example import ROLES, Answer, Example, Range, Role
from leaf_distill.data.prompt import Renderer
from leaf_distill.detection.arms import arm_name
from leaf_distill.detection.config import DetectConfig
from leaf_distill.detection.counterfactual import propose
from leaf_distill.detection.funnel import funnel
from leaf_distill.detection.output import write_dataset, write_samples
from leaf_distill.io import write_json

WRONG: dict[Role, Answer] = {
    "teacher": Answer("36", 2, "right"),
    "student": Answer("41", 2, "wrong"),
}
RIGHT: dict[Role, Answer] = {role: Answer("36", 2, "right") for role in ROLES}
CONFIG = DetectConfig(student="/home/me/models/tiny", teacher="org/big", dataset="data.jsonl")


def scored(
    row_id: int,
    text: str,
    *,
    spans: Sequence[Range] = ((0, 1),),
    answers: Mapping[Role, Answer] = WRONG,
    answer: str | None = "36",
    completion: str = "The answer is 36.",
    before: Sequence[dict[str, Any]] = (),
) -> Example:
    """A row with saliencies, whose tokens are words with their leading space."""
    offsets = [match.span() for match in re.finditer(r"\s*\S+|\s+", text)]
    count = len(offsets)
    ramp = np.linspace(0, 1, count, dtype=np.float32)
    return Example(
        row_id=row_id,
        messages=(*before, {"role": "user", "content": text}),
        completion=completion,
        answer=answer,
        answers=dict(answers),
        nll={"teacher": 0.25, "student": 1.5},
        offsets=np.array(offsets, dtype=np.int64).reshape(count, 2),
        slot=np.arange(count),
        prunable=np.array([not text[start:stop].isspace() for start, stop in offsets], dtype=bool),
        saliency={"teacher": ramp, "student": ramp[::-1]},
        score=ramp,
        confounder=np.arange(count) == 0,
        spans=tuple(spans),
    )


def propose_cuts(example: Example, *reasons: str | None, strategy: Any = "span") -> Example:
    """Cut the spans, as `leaf detect` does; a reason leaves a candidate out, None keeps it."""
    propose(example, DetectConfig(strategy=strategy, widen="token"))
    for candidate, reason in zip(example.candidates, reasons, strict=True):
        judge(candidate, reason)
    return example


def add_cut(example: Example, ranges: Sequence[Range], reason: str | None = None) -> Example:
    """Add a candidate with exactly these characters cut."""
    shorter = cut(example.text, ranges)
    candidate = Example(
        row_id=example.row_id,
        messages=(*example.messages[:-1], {"role": "user", "content": shorter}),
        completion=example.completion,
        candidate_id=len(example.candidates),
        cut=tuple(ranges),
        strategy="span",
    )
    judge(candidate, reason)
    example.candidates.append(candidate)
    return example


def judge(candidate: Example, reason: str | None) -> None:
    if reason is None:
        candidate.answers = dict(RIGHT)
    else:
        verdict = reason.removeprefix("student_")
        candidate.answers = {"student": Answer("41", 2, verdict)}
        candidate.leave("validate", reason)


def write_run(
    root: Path,
    examples: Sequence[Example],
    *,
    config: DetectConfig = CONFIG,
    gone: Sequence[Example] = (),
    renderers: Mapping[Role, Renderer] = MappingProxyType({}),
    **changes: Any,
) -> Path:
    """Write a run directory with one arm, and return the arm; `gone` are rows without scores."""
    arm = root / "arms" / arm_name(config)
    arm.mkdir(parents=True, exist_ok=True)
    names = {role: {"name": getattr(config, role), "sha256": "0" * 64} for role in ROLES}
    write_json(root / "run.json", names)
    dataset = write_dataset(arm, examples, "{}")
    write_samples(arm, examples, renderers)
    summary = {
        **funnel([*examples, *gone], config),
        "arm": arm.name,
        "settings": asdict(config),
        "models": {role: "0" * 64 for role in ROLES},
        "dataset_sha256": dataset.name,
        "templates": ["The system prompts differ."],
        "versions": {"torch": "2.13.0"},
        "seconds": {"predict": 12.345678},
        **changes,
    }
    write_json(arm / "funnel.json", summary)
    return arm
