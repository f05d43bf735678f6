"""Scores beside the gap of the gradient norms, as one value a token that is high on confounders."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from leaf_distill.config import DetectConfig
from leaf_distill.data.example import Example
from leaf_distill.detection.alignment import pool
from leaf_distill.detection.judge import Judge
from leaf_distill.detection.scores import score_perplexity


def set_suspicion(judge: Judge, examples: Sequence[Example], config: DetectConfig) -> None:
    """Set `suspicion` of aligned examples for the scores that do not come from gradients.

    "lens" is |log p_student - log p_teacher| of each prompt token, of forward passes alone (LENS,
    arXiv 2601.21244, with the teacher as the reference).
    """
    if config.score == "lens":
        _set_lens(judge, examples, config)


def _set_lens(judge: Judge, examples: Sequence[Example], config: DetectConfig) -> None:
    teacher = score_perplexity(judge.use("teacher"), examples, config, judge.cache)
    student = score_perplexity(judge.use("student"), examples, config, judge.cache)
    for example, theirs, ours in zip(examples, teacher, student, strict=True):
        offsets = [example.renderings[role].offsets for role in ("teacher", "student")]
        inside = [one[one[:, 0] >= 0] for one in offsets]
        example.suspicion = np.abs(ours - pool(theirs, *inside))
