"""Which score finds the known distractors: each score of `leaf detect` on the rows of a student."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pyarrow.parquet as pq
from measures import Row, as_json, unmentioned
from problems import Problem, as_rows
from settings import Profile

from leaf_distill.detection.config import DetectConfig, Score, Strategy
from leaf_distill.detection.pipeline import detect
from leaf_distill.detection.truth import tokens_inside
from leaf_distill.detection.units import phrases
from leaf_distill.io import make_directory, write_bytes

SCORES: Mapping[str, Mapping[str, Any]] = {
    "gap (LeaF, Eq. 3-5)": {"score": "gap"},
    "log_gap": {"score": "log_gap"},
    "log_ratio": {"score": "log_ratio"},
    "rank": {"score": "rank"},
    "lens": {"score": "lens"},
    "intervention": {"score": "intervention", "shortlist": 4, "draws": 1},
    "student's gradient": {"score": "student"},
    "teacher's gradient, low": {"score": "teacher"},
    "perplexity": {"score": "perplexity"},
    "random": {"score": "random"},
}
"""Each score by the settings of `leaf detect`."""

CONTROL = "no model: number not in the label"
ORACLE = "oracle: the true distractors"

MAX_NEW_TOKENS = 16
SCORING: Mapping[str, Any] = {"strategy": "collective", "validate": "none"}
"""An arm for its scores alone, on whose cuts no model is asked."""


def offered(changes: Mapping[str, Any]) -> bool:
    """Return whether `leaf detect` has the score and the strategy of some settings."""
    choices = {"score": get_args(Score), "strategy": get_args(Strategy)}
    return all(changes.get(name, known[0]) in known for name, known in choices.items())


def write_rows(path: Path, rows: Sequence[Mapping[str, str]]) -> Path:
    """Write rows as JSON lines; return the path."""
    make_directory(path.parent)
    write_bytes(path, "".join(json.dumps(row) + "\n" for row in rows).encode())
    return path


def settings_of(
    root: Path, student: str, problems: Sequence[Problem], name: str, profile: Profile
) -> DetectConfig:
    """Return the settings of detection on the adversarial form of some problems.

    Args:
        root: of the study.
        student: the name of its checkpoint in `root`/pair.
        problems: the rows.
        name: of the run directory in `root`/`student`.
        profile: the size of the study.
    """
    place = root / student
    rows = write_rows(place / f"{name}.jsonl", as_rows(problems, "adversarial"))
    return DetectConfig(
        student=str(root / "pair" / student),
        teacher=str(root / "pair" / "teacher"),
        dataset=str(rows),
        output_dir=str(place / name),
        cache_dir=str(root / "cache"),
        dtype="float32",
        grade="exact",
        max_new_tokens=MAX_NEW_TOKENS,
        select=profile.select,  # type: ignore[arg-type]
    )


def score_rows(config: DetectConfig, problems: Sequence[Problem]) -> list[dict[str, Any]]:
    """Return the rows that the student fails and the teacher solves, with all scores, as JSON."""
    arms = {
        name: {one["row_id"]: one for one in samples_of(replace(config, **SCORING, **changes))}
        for name, changes in SCORES.items()
        if offered(changes)
    }
    first = next(iter(arms.values()))
    return [
        as_json(_row(problems[at], {name: samples[at] for name, samples in arms.items()}))
        for at in first
        if all(at in samples for samples in arms.values())
    ]


def samples_of(config: DetectConfig) -> list[dict[str, Any]]:
    """Return the scored rows of an arm."""
    samples: list[dict[str, Any]] = pq.read_table(detect(config).samples).to_pylist()
    return samples


def _row(problem: Problem, samples: Mapping[str, dict[str, Any]]) -> Row:
    sample = next(iter(samples.values()))
    offsets = np.array(sample["offsets"], dtype=np.int64)
    prunable = np.array(sample["prunable"])
    planted = tokens_inside(offsets, problem.ranges)
    suspicion = {name: -np.array(one["score"], dtype=np.float64) for name, one in samples.items()}
    suspicion |= {
        CONTROL: unmentioned(problem.adversarial, offsets, problem.label),
        ORACLE: planted.astype(np.float64),
    }
    starts = [start for start, _ in phrases(problem.adversarial, [(0, len(problem.adversarial))])]
    phrase = np.searchsorted(starts, (offsets[:, 0] + offsets[:, 1]) // 2, side="right") - 1
    tokens = phrase[prunable]
    inside = np.bincount(tokens, planted[prunable], minlength=len(starts))
    total = np.bincount(tokens, minlength=len(starts))
    number = [any(char.isdigit() for char in problem.adversarial[a:b]) for a, b in offsets]
    return Row(
        student=0,  # the caller knows whose row it is
        problem=problem.name,
        planted=planted[prunable],
        number=np.array(number)[prunable],
        phrase=tokens,
        planted_phrase=(2 * inside >= total) & (total > 0),
        suspicion={name: values[prunable] for name, values in suspicion.items()},
    )
