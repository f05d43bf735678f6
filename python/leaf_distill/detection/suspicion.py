"""Scores beside the gap of the gradient norms, as one value a token that is high on confounders."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from leaf_distill.data.example import ROLES, Example, Floats, Role
from leaf_distill.detection.alignment import pool
from leaf_distill.detection.config import DetectConfig
from leaf_distill.detection.intervention import interventions, shortlist, suspicion_of
from leaf_distill.detection.judge import Judge
from leaf_distill.detection.scores import score_changes, score_perplexity
from leaf_distill.detection.substitution import Vocabulary

FLOOR: Final = 1e-4
"""Norms below this share of the row's largest count as that in a logarithm: one token to which a
model does not react at all would otherwise set the scale of all others."""

STUDENT_WEIGHT: Final = 0.5
"""The student's weight in "log_gap", of a study on problems with known distractors."""


def set_suspicion(
    judge: Judge,
    examples: Sequence[Example],
    config: DetectConfig,
    vocabulary: Vocabulary | None = None,
) -> None:
    """Set `suspicion` of aligned examples, for each score but "gap".

    An example with a log-probability that is not finite leaves.

    These are made of the gradient norms s: "log_gap" is 0.5 log s_student - log s_teacher;
    "log_ratio" is log s_student - log s_teacher, which ranks the tokens of a row as the ratio of
    norms divided by their sums; "rank" is the difference of their ranks in the row; "student" is
    the student's norm alone, "teacher" the teacher's with a minus sign.

    "perplexity" is the student's negative log-likelihood of the token, "random" a number drawn by
    `seed`, row_id and segment.

    "lens" is |log p_student - log p_teacher| of each prompt token, of forward passes alone (LENS,
    arXiv 2601.21244, with the teacher as the reference). "intervention" changes the words that the
    gap shortlists, and compares how far the two models' answers move (see `intervention`); the
    replacements come from the vocabulary, which is needed unless `draws` is 0.
    """
    if config.score in OF_NORMS:
        for example in examples:
            student, teacher = (example.norms[role] for role in ROLES)
            example.suspicion = OF_NORMS[config.score](student, teacher).astype(np.float32)
    elif config.score == "random":
        for example in examples:
            draw = random.Random(f"{config.seed}/{example.row_id}/{example.segment}/score")
            count = len(example.norms["student"])
            example.suspicion = np.asarray([draw.random() for _ in range(count)], dtype=np.float32)
    elif config.score == "perplexity":
        values = score_perplexity(judge.use("student"), examples, config, judge.cache)
        for example, ours in zip(examples, values, strict=True):
            example.suspicion = ours
            _leave_unless_finite(example, "student", ours)
    elif config.score == "lens":
        _set_lens(judge, examples, config)
    elif config.score == "intervention":
        _set_interventions(judge, examples, config, vocabulary)


def logs(norms: Floats) -> npt.NDArray[np.float64]:
    """Return the logarithms of norms of at least `FLOOR` of the row's largest; 0 if all are 0."""
    wide = norms.astype(np.float64)
    largest = wide.max(initial=0.0)
    return np.log(np.maximum(wide, FLOOR * largest)) if largest > 0 else np.zeros_like(wide)


def ranks(values: Floats) -> npt.NDArray[np.float64]:
    """Return the rank of each value, from 0 for the lowest; equal ones have their mean rank."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    found: npt.NDArray[np.float64] = (np.cumsum(counts) - (counts + 1) / 2)[place]
    return found


OF_NORMS: Final[Mapping[str, Callable[[Floats, Floats], npt.NDArray[Any]]]] = {
    "log_gap": lambda student, teacher: STUDENT_WEIGHT * logs(student) - logs(teacher),
    "log_ratio": lambda student, teacher: logs(student) - logs(teacher),
    "rank": lambda student, teacher: ranks(student) - ranks(teacher),
    "student": lambda student, teacher: student,
    "teacher": lambda student, teacher: -teacher,
}
"""The scores that are made of both models' norms on the domain, high on confounders."""


def _set_lens(judge: Judge, examples: Sequence[Example], config: DetectConfig) -> None:
    teacher = score_perplexity(judge.use("teacher"), examples, config, judge.cache)
    student = score_perplexity(judge.use("student"), examples, config, judge.cache)
    for example, theirs, ours in zip(examples, teacher, student, strict=True):
        offsets = [example.renderings[role].offsets for role in ("teacher", "student")]
        inside = [one[one[:, 0] >= 0] for one in offsets]
        example.suspicion = np.abs(ours - pool(theirs, *inside))
        for role, values in (("student", ours), ("teacher", theirs)):
            _leave_unless_finite(example, role, values)


def _leave_unless_finite(example: Example, role: str, values: Floats) -> None:
    if not np.isfinite(values).all():
        detail = f"the {role}'s log-probability of a token is NaN or infinite"
        example.leave("detect", f"{role}_not_finite", detail)


def _set_interventions(
    judge: Judge,
    examples: Sequence[Example],
    config: DetectConfig,
    vocabulary: Vocabulary | None,
) -> None:
    assert vocabulary is not None or config.draws == 0
    units = [shortlist(example, config.shortlist) for example in examples]
    changes = [
        interventions(example, chosen, config, vocabulary)
        for example, chosen in zip(examples, units, strict=True)
    ]
    proposals = [[changed for _, changed in one] for one in changes]
    values: dict[Role, list[Floats]] = {
        role: score_changes("kl", judge.use(role), examples, config, judge.cache, proposals)
        for role in reversed(ROLES)
    }
    for at, example in enumerate(examples):
        own = {role: found[at] for role, found in values.items()}
        example.suspicion = suspicion_of(example, units[at], changes[at], own)
