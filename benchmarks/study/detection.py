"""Which score finds the known distractors: each score of `leaf detect` on the rows of a student."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
from measures import Floats, Row, as_json, unmentioned
from problems import Problem, as_rows
from settings import Profile

from leaf_distill.data.example import ROLES, Range, Role
from leaf_distill.detection.answers import open_cache
from leaf_distill.detection.arm_run import ArmRun
from leaf_distill.detection.config import DetectConfig, Select
from leaf_distill.detection.counterfactual import cut_units, make_candidate, ranked_units
from leaf_distill.detection.pipeline import detect
from leaf_distill.detection.scores import score_changes
from leaf_distill.detection.spans import find_spans
from leaf_distill.detection.suspicion import logs
from leaf_distill.detection.swept_arm import read_settings
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
GAP = next(iter(SCORES))

CONTROL = "no model: number not in the label"
ORACLE = "oracle: the true distractors"
FALL = "fall of the student's loss without the phrase"
WEIGHTS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5)
"""The student's weights in log_gap that are tried on development problems."""

MAX_NEW_TOKENS = 16
SCORING: Mapping[str, Any] = {"strategy": "collective", "validate": "none"}
"""An arm for its scores alone, on whose cuts no model is asked."""


def write_rows(path: Path, rows: Sequence[Mapping[str, str]]) -> Path:
    """Write rows as JSON lines; return the path."""
    make_directory(path.parent)
    write_bytes(path, "".join(json.dumps(row) + "\n" for row in rows).encode())
    return path


def settings_of(
    root: Path,
    student: str,
    problems: Sequence[Problem],
    name: str,
    select: Select,
    profile: Profile,
) -> DetectConfig:
    """Return the settings of detection on the adversarial form of some problems.

    Args:
        root: of the study.
        student: the name of its checkpoint in `root`/pair.
        problems: the rows.
        name: of the run directory in `root`/`student`.
        select: rows that are searched.
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
        max_batch_tokens=profile.max_batch_tokens,
        select=select,
    )


class Measured(ArmRun):
    """What `leaf detect` measured on the rows of an arm, and what more is measured on them here."""

    @classmethod
    def of(cls, config: DetectConfig) -> Self:
        """Run detection with some settings, unless that is done; return the run on its rows."""
        arm = detect(config).dataset.parent
        return cls(arm, read_settings(arm), load=True)

    def norms(self) -> dict[int, Mapping[Role, npt.NDArray[np.float32]]]:
        """Return the gradient norms [d] of both models, by row."""
        with open_cache(self.own) as self.cache:
            self._begin()
        return {one.row_id: one.norms for one in self._measured}

    def falls(self) -> dict[int, dict[Range, float]]:
        """Return how far the student's loss of the label falls without each phrase, by row.

        In nats a label. A phrase without which there is no usable prompt is left out.
        """
        with open_cache(self.own) as self.cache:
            self._begin()
            settings = replace(self.own, widen="phrase")
            rows = self._with_suspicion(settings, self._measured)
            find_spans(rows, settings)
            units = [ranked_units(row, settings) for row in rows]
            without = [
                [make_candidate(row, cut_units(row, [one]), settings, ()) for one in own]
                for row, own in zip(rows, units, strict=True)
            ]
            proposals = [[row, *own] for row, own in zip(rows, without, strict=True)]
            student = self.judge.use("student")
            losses = score_changes("nll", student, rows, settings, self.cache, proposals)
            self.judge.use(None)
        return {
            row.row_id: {
                one.range: float(now - loss)
                for one, cut, loss in zip(own, cuts, rest, strict=True)
                if cut.outcome is None and np.isfinite(loss)
            }
            for row, own, cuts, (now, *rest) in zip(rows, units, without, losses, strict=True)
        }


def score_rows(config: DetectConfig, problems: Sequence[Problem]) -> list[dict[str, Any]]:
    """Return the rows that are searched, with all scores, as JSON."""
    arms = {
        name: {one["row_id"]: one for one in samples_of(replace(config, **SCORING, **changes))}
        for name, changes in SCORES.items()
    }
    falls = Measured.of(replace(config, **SCORING)).falls()
    first = next(iter(arms.values()))
    found = []
    for at, sample in first.items():
        if all(at in samples for samples in arms.values()):
            scores = {name: -_floats(samples[at]["score"]) for name, samples in arms.items()}
            scores[FALL] = _of_phrases(_offsets(sample), falls[at])
            found.append(as_json(_row(problems[at], sample, scores)))
    return found


def weigh(config: DetectConfig, problems: Sequence[Problem]) -> list[dict[str, Any]]:
    """Return the same rows, with log_gap for each of WEIGHTS."""
    norms = Measured.of(replace(config, **SCORING)).norms()
    found = []
    for sample in samples_of(replace(config, **SCORING)):
        student, teacher = (logs(norms[sample["row_id"]][role]) for role in ROLES)
        scores = {f"{weight:g}": weight * student - teacher for weight in WEIGHTS}
        found.append(as_json(_row(problems[sample["row_id"]], sample, scores)))
    return found


def _of_phrases(offsets: npt.NDArray[np.int64], values: Mapping[Range, float]) -> Floats:
    """Return the value of each token's phrase; the lowest of all where it has none."""
    found = np.full(len(offsets), min(values.values(), default=0.0))
    middle = offsets.sum(axis=1) // 2
    for (start, stop), value in values.items():
        found[(start <= middle) & (middle < stop)] = value
    return found


def samples_of(config: DetectConfig) -> list[dict[str, Any]]:
    """Return the scored rows of an arm."""
    samples: list[dict[str, Any]] = pq.read_table(detect(config).samples).to_pylist()
    return samples


def _offsets(sample: Mapping[str, Any]) -> npt.NDArray[np.int64]:
    return np.array(sample["offsets"], dtype=np.int64)


def _floats(values: Any) -> Floats:
    return np.array(values, dtype=np.float64)


def _row(problem: Problem, sample: Mapping[str, Any], scores: Mapping[str, Floats]) -> Row:
    offsets, prunable = _offsets(sample), np.array(sample["prunable"])
    planted = tokens_inside(offsets, problem.ranges)
    suspicion = {
        **scores,
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
        template=problem.template,
        planted=planted[prunable],
        number=np.array(number)[prunable],
        phrase=tokens,
        planted_phrase=(2 * inside >= total) & (total > 0),
        suspicion={name: values[prunable] for name, values in suspicion.items()},
    )
