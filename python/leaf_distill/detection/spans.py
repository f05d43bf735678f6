"""From both models' gradient norms to confounding spans of the user's text (Eq. 3-5)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

import leaf_ext
from leaf_distill.config import DetectConfig
from leaf_distill.data.example import ROLES, Example, Floats, Range

ROWS_A_CALL = 256
"""Rows that share one padded call of the op; the results do not depend on it."""


def find_spans(examples: Sequence[Example], config: DetectConfig) -> None:
    """Set saliency, score, confounder and spans of each example from its norms.

    A row leaves with a reason where a model's loss or norm is not finite, where the two renderings
    split the user's text differently, or where it has no domain token. A row without a span stays.
    """
    aligned = [example for example in examples if _align(example)]
    for start in range(0, len(aligned), ROWS_A_CALL):
        _detect(aligned[start : start + ROWS_A_CALL], config)


def _align(example: Example) -> bool:
    """Set offsets, slot and prunable, which both models share; False where the row leaves."""
    student, teacher = (example.renderings[role] for role in ROLES)
    for role in ROLES:
        if not (np.isfinite(example.nll[role]) and np.isfinite(example.norms[role]).all()):
            detail = f"the {role}'s loss or gradient is NaN or infinite"
            example.leave("detect", f"{role}_not_finite", detail)
            return False
    inside = teacher.domain, student.domain
    offsets = teacher.offsets[inside[0]], student.offsets[inside[1]]
    prunable = teacher.prunable[inside[0]], student.prunable[inside[1]]
    if not (np.array_equal(*offsets) and np.array_equal(*prunable)):
        detail = (
            f"the two renderings split the user's text into {len(offsets[0])} and "
            f"{len(offsets[1])} tokens, or differ in its whitespace"
        )
        example.leave("detect", "different_renderings", detail)
    elif not len(offsets[0]):
        example.leave("detect", "empty_domain", "no token lies within the user's text")
    else:
        example.offsets, example.prunable = offsets[0], prunable[0]
        example.slot = _slots(*(np.flatnonzero(one) for one in inside))
    return example.outcome is None


def _slots(teacher: npt.NDArray[np.int64], student: npt.NDArray[np.int64]) -> npt.NDArray[np.int32]:
    """Return increasing slots, 1 further where both models have two domain tokens side by side.

    Elsewhere a slot stays free: it is a token outside the domain to the op, and no span crosses it.
    """
    gap = (np.diff(teacher) > 1) | (np.diff(student) > 1)
    return np.concatenate(([0], np.cumsum(1 + gap))).astype(np.int32)


def _detect(examples: Sequence[Example], config: DetectConfig) -> None:
    slots = [_known(example.slot) for example in examples]
    width = max(int(slot[-1]) + 1 for slot in slots)
    norms = np.zeros((2, len(examples), width), dtype=np.float32)
    masks = np.zeros((2, len(examples), width), dtype=np.bool_)
    for at, (example, slot) in enumerate(zip(examples, slots, strict=True)):
        norms[0, at, slot], norms[1, at, slot] = example.norms["teacher"], example.norms["student"]
        masks[0, at, slot], masks[1, at, slot] = True, _known(example.prunable)
    found = leaf_ext.detect_spans(
        torch.from_numpy(norms[0]),
        torch.from_numpy(norms[1]),
        torch.from_numpy(masks[0]),
        prunable=torch.from_numpy(masks[1]),
        threshold=config.threshold,
        rule=config.rule,
        cap=config.cap,
        teacher_max=config.teacher_max,
        join_gap=config.join_gap,
        min_length=config.min_length,
    )
    score, confounder, runs = found.score.numpy(), found.confounder.numpy(), found.tolist()
    for at, (example, slot) in enumerate(zip(examples, slots, strict=True)):
        example.saliency = {role: normalize(example.norms[role]) for role in ROLES}
        example.score, example.confounder = score[at, slot], confounder[at, slot]
        example.spans = tuple(
            (int(np.searchsorted(slot, start)), int(np.searchsorted(slot, stop)))
            for start, stop in runs[at]
        )


def _known(array: npt.NDArray[np.generic] | None) -> npt.NDArray[np.generic]:
    assert array is not None  # set by _align
    return array


def normalize(norms: Floats) -> Floats:
    """Return (s - min s) / (max s - min s) in float32, 0 where all are equal (Eq. 3)."""
    low, high = norms.min(), norms.max()
    if high == low:
        return np.zeros_like(norms)
    scaled: Floats = ((norms - low) / (high - low)).astype(np.float32)
    return scaled


def characters(example: Example, span: Range) -> Range:
    """Return the characters [start, stop) of the user's text that a span of tokens covers."""
    assert example.offsets is not None
    covered = example.offsets[span[0] : span[1]]
    return int(covered[:, 0].min()), int(covered[:, 1].max())
