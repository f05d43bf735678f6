"""Scores beside the gap of the gradient norms, as one value a token that is high on confounders."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from leaf_distill.data.example import ROLES, Example, Floats, Role
from leaf_distill.detection.alignment import pool
from leaf_distill.detection.config import DetectConfig
from leaf_distill.detection.intervention import interventions, shortlist, suspicion_of
from leaf_distill.detection.judge import Judge
from leaf_distill.detection.scores import score_intervention, score_perplexity
from leaf_distill.detection.substitution import Vocabulary


def set_suspicion(
    judge: Judge,
    examples: Sequence[Example],
    config: DetectConfig,
    vocabulary: Vocabulary | None = None,
) -> None:
    """Set `suspicion` of aligned examples for the scores that do not come from gradients.

    An example with a log-probability that is not finite leaves.

    "lens" is |log p_student - log p_teacher| of each prompt token, of forward passes alone (LENS,
    arXiv 2601.21244, with the teacher as the reference). "intervention" changes the words that the
    gap shortlists, and compares how far the two models' answers move (see `intervention`); the
    replacements come from the vocabulary, which is needed unless `draws` is 0.
    """
    if config.score == "lens":
        _set_lens(judge, examples, config)
    elif config.score == "intervention":
        _set_interventions(judge, examples, config, vocabulary)


def _set_lens(judge: Judge, examples: Sequence[Example], config: DetectConfig) -> None:
    teacher = score_perplexity(judge.use("teacher"), examples, config, judge.cache)
    student = score_perplexity(judge.use("student"), examples, config, judge.cache)
    for example, theirs, ours in zip(examples, teacher, student, strict=True):
        offsets = [example.renderings[role].offsets for role in ("teacher", "student")]
        inside = [one[one[:, 0] >= 0] for one in offsets]
        example.suspicion = np.abs(ours - pool(theirs, *inside))
        for role, values in (("student", ours), ("teacher", theirs)):
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
        role: score_intervention(judge.use(role), examples, config, judge.cache, proposals)
        for role in reversed(ROLES)
    }
    for at, example in enumerate(examples):
        own = {role: found[at] for role, found in values.items()}
        example.suspicion = suspicion_of(example, units[at], changes[at], own)
