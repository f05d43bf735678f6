"""From both models' values of the tokens to confounding spans of the analyzed text (Eq. 3-5)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

import leaf_ext
from leaf_distill.data.example import ROLES, Example, Floats, Mask, Range
from leaf_distill.detection.alignment import pool
from leaf_distill.detection.config import DetectConfig

ROWS_A_CALL = 256
"""Rows that share one padded call of the op; the results do not depend on it."""


def align(examples: Sequence[Example]) -> None:
    """Set offsets, slot and prunable of each example, and the teacher's norms on these tokens.

    The tokens are the student's. Where the teacher splits the text differently, its norms are
    pooled over them (note "tokens_pooled"). A row leaves with a reason where a model's loss or norm
    is not finite, where the two renderings cover different text, or where it has no domain token.
    """
    for example in examples:
        _align(example)


def _align(example: Example) -> None:
    student, teacher = (example.renderings[role] for role in ROLES)
    for role in ROLES:
        if not (np.isfinite(example.nll[role]) and np.isfinite(example.norms[role]).all()):
            detail = f"the {role}'s loss or gradient is NaN or infinite"
            example.leave("detect", f"{role}_not_finite", detail)
            return
    offsets, theirs = student.offsets[student.domain], teacher.offsets[teacher.domain]
    text = example.text
    if not len(offsets):
        example.leave("detect", "empty_domain", "no token lies within the analyzed text")
        return
    example.offsets, example.prunable = offsets, student.prunable[student.domain]
    places = [np.flatnonzero(student.domain)]
    if np.array_equal(offsets, theirs):
        places.append(np.flatnonzero(teacher.domain))
    elif not np.array_equal(_covered(offsets, text), _covered(theirs, text)):
        detail = "the two renderings cover different parts of the analyzed text"
        example.leave("detect", "different_renderings", detail)
    else:
        example.notes.append("tokens_pooled")
        example.norms["teacher"] = pool(example.norms["teacher"], theirs, offsets)
    example.slot = _slots(places, example)


def _covered(offsets: npt.NDArray[np.int32], text: str) -> npt.NDArray[np.bool_]:
    """Return which characters, white space apart, a rendering's tokens cover."""
    change = np.zeros(len(text) + 1, dtype=np.int64)
    np.add.at(change, offsets[:, 0], 1)
    np.add.at(change, offsets[:, 1], -1)
    solid = np.fromiter((not one.isspace() for one in text), dtype=np.bool_, count=len(text))
    covered: npt.NDArray[np.bool_] = (np.cumsum(change[:-1]) > 0) & solid
    return covered


def _slots(places: Sequence[npt.NDArray[np.int64]], example: Example) -> npt.NDArray[np.int32]:
    """Return increasing slots, 1 further where the domain tokens stand side by side.

    Elsewhere a slot stays free: it is a token outside the domain to the op, and no span crosses it.
    """
    gap = np.zeros(len(places[0]) - 1, dtype=np.bool_)
    for place in places:
        gap |= np.diff(place) > 1
    assert example.offsets is not None
    starts = np.asarray([start for start, _ in example.parts])
    part = np.searchsorted(starts, example.offsets[:, 0], side="right")
    gap |= np.diff(part) > 0
    return np.concatenate(([0], np.cumsum(1 + gap))).astype(np.int32)


def find_spans(examples: Sequence[Example], config: DetectConfig) -> None:
    """Set saliency, score, confounder and spans of aligned examples.

    The score comes from the gap of the gradient norms, or from `suspicion` where that is set. A row
    without a span stays.
    """
    for threshold, chosen in (
        (config.threshold, [one for one in examples if not one.segment]),
        (config.response_threshold, [one for one in examples if one.segment]),
    ):
        for start in range(0, len(chosen), ROWS_A_CALL):
            _detect(chosen[start : start + ROWS_A_CALL], config, threshold)


def _detect(examples: Sequence[Example], config: DetectConfig, threshold: float) -> None:
    slots = [_known(example.slot) for example in examples]
    width = max(int(slot[-1]) + 1 for slot in slots)
    values = np.zeros((2, len(examples), width), dtype=np.float32)
    masks = np.zeros((2, len(examples), width), dtype=np.bool_)
    for at, (example, slot) in enumerate(zip(examples, slots, strict=True)):
        values[0, at, slot], values[1, at, slot] = evidence(example)
        masks[0, at, slot], masks[1, at, slot] = True, _may_be_cut(example, config.teacher_max)
    found = leaf_ext.detect_spans(
        torch.from_numpy(values[0]),
        torch.from_numpy(values[1]),
        torch.from_numpy(masks[0]),
        prunable=torch.from_numpy(masks[1]),
        threshold=threshold,
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


def _may_be_cut(example: Example, teacher_max: float | None) -> Mask:
    """Return which tokens may be confounders; with `suspicion` the op lacks the teacher's norms."""
    assert example.prunable is not None
    if example.suspicion is None or teacher_max is None:
        return example.prunable
    may: Mask = example.prunable & (normalize(example.norms["teacher"]) <= teacher_max)
    return may


def evidence(example: Example) -> tuple[Floats, Floats]:
    """Return the values [d] of teacher and student whose normalized gap is the score."""
    if example.suspicion is None:
        return example.norms["teacher"], example.norms["student"]
    # With a constant on the teacher's side, the lowest score is that of the highest suspicion.
    return np.zeros_like(example.suspicion), example.suspicion


def _known(array: npt.NDArray[np.generic] | None) -> npt.NDArray[np.generic]:
    assert array is not None  # set by align
    return array


def normalize(norms: Floats) -> Floats:
    """Return (s - min s) / (max s - min s) in float32, 0 where all are equal (Eq. 3)."""
    low, high = norms.min(), norms.max()
    if high == low:
        return np.zeros_like(norms)
    scaled: Floats = ((norms - low) / (high - low)).astype(np.float32)
    return scaled


def characters(example: Example, span: Range) -> Range:
    """Return the characters [start, stop) of the analyzed text that a span of tokens covers."""
    assert example.offsets is not None
    covered = example.offsets[span[0] : span[1]]
    return int(covered[:, 0].min()), int(covered[:, 1].max())
