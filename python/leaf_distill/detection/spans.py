"""From the stored saliencies of both models to confounding spans of the user's text (Eq. 3-5)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

import leaf_ext
from leaf_distill.config import SpanRule
from leaf_distill.data.dataset import Rejection

ROWS_A_CALL = 256
"""Rows that share one padded call of the op; only its overhead depends on this number."""


@dataclass(frozen=True)
class PromptSaliency:
    """One model's saliency on the domain of one row.

    norms: float32 [d], the raw gradient norms of the domain tokens; position: int64 [d], where they
    stand in this model's sequence; offsets: int64 [d, 2], the characters [start, stop) of the
    user's text that each token covers; prunable: bool [d]; invalid: the model's loss or a norm is
    not finite.
    """

    row_id: int
    norms: npt.NDArray[np.float32]
    position: npt.NDArray[np.int64]
    offsets: npt.NDArray[np.int64]
    prunable: npt.NDArray[np.bool_]
    invalid: bool


@dataclass(frozen=True)
class SpanSettings:
    """How scores become spans; the meaning and the range of each is that of detect_spans."""

    threshold: float = 0.10
    rule: SpanRule = "absolute"
    cap: float = 0.5
    teacher_max: float | None = None
    join_gap: int = 0
    min_length: int = 1


@dataclass(frozen=True)
class Detection:
    """What was found in one row; every array has one entry for each domain token.

    teacher, student: float32 [d], min-max normalized (Eq. 3); score: float32 [d] (Eq. 5), low for
    a confounder; confounder, prunable: bool [d]; slot: int64 [d], by which tokens of neighboring
    slots stand side by side in both models' sequences; spans: [start, stop) indices of tokens.
    """

    row_id: int
    offsets: npt.NDArray[np.int64]
    slot: npt.NDArray[np.int64]
    prunable: npt.NDArray[np.bool_]
    teacher: npt.NDArray[np.float32]
    student: npt.NDArray[np.float32]
    score: npt.NDArray[np.float32]
    confounder: npt.NDArray[np.bool_]
    spans: tuple[tuple[int, int], ...]

    @property
    def characters(self) -> tuple[tuple[int, int], ...]:
        """The spans as [start, stop) characters of the user's text."""
        return tuple(token_range(self.offsets, span) for span in self.spans)


def token_range(offsets: npt.NDArray[np.int64], span: tuple[int, int]) -> tuple[int, int]:
    """Return the characters [start, stop) that the tokens [start, stop) cover."""
    covered = offsets[span[0] : span[1]]
    return int(covered[:, 0].min()), int(covered[:, 1].max())


def detect_rows(
    teacher: Sequence[PromptSaliency],
    student: Sequence[PromptSaliency],
    settings: SpanSettings,
) -> tuple[list[Detection], list[Rejection]]:
    """Compare two models row by row; the k-th entries of both must be the same row.

    A row leaves with a reason where a model's saliency is not finite, where the two renderings
    split the user's text differently, or where it has no domain token. A row without any span is
    returned like any other. ValueError where the rows of both sides do not correspond.
    """
    found: list[Detection] = []
    left: list[Rejection] = []
    pairs = []
    for one, other in zip(teacher, student, strict=True):
        if one.row_id != other.row_id:
            raise ValueError(
                f"student: needs row {one.row_id} beside the teacher's, came {other.row_id}"
            )
        reason = _obstacle(one, other)
        if reason:
            left.append(Rejection(one.row_id, -1, "detect", *reason))
        else:
            pairs.append((one, other, _slots(one.position, other.position)))
    for start in range(0, len(pairs), ROWS_A_CALL):
        found.extend(_detect_batch(pairs[start : start + ROWS_A_CALL], settings))
    return found, left


def _obstacle(teacher: PromptSaliency, student: PromptSaliency) -> tuple[str, str] | None:
    for name, side in (("teacher", teacher), ("student", student)):
        if side.invalid or not np.isfinite(side.norms).all():
            return f"{name}_not_finite", f"NaN or infinity in the {name}'s loss or gradient"
    if not np.array_equal(teacher.offsets, student.offsets):
        counts = f"{len(teacher.offsets)} and {len(student.offsets)} tokens"
        return "different_renderings", f"the models' templates split the prompt into {counts}"
    if not np.array_equal(teacher.prunable, student.prunable):
        return "different_renderings", "the models disagree about which tokens are whitespace"
    if not len(teacher.offsets):
        return "empty_domain", "no token lies wholly inside the user's text"
    return None


def _slots(teacher: npt.NDArray[np.int64], student: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return increasing slots, one further where both models have two domain tokens side by side.

    Elsewhere a slot stays free, which is a token outside the domain to the op: no span crosses it.
    """
    gap = (np.diff(teacher) > 1) | (np.diff(student) > 1)
    return np.concatenate(([0], np.cumsum(1 + gap)))


def _detect_batch(
    pairs: Sequence[tuple[PromptSaliency, PromptSaliency, npt.NDArray[np.int64]]],
    settings: SpanSettings,
) -> Iterator[Detection]:
    width = max(int(slot[-1]) + 1 for _, _, slot in pairs)
    norms = np.zeros((2, len(pairs), width), dtype=np.float32)
    masks = np.zeros((2, len(pairs), width), dtype=np.bool_)
    for index, (teacher, student, slot) in enumerate(pairs):
        norms[0, index, slot], norms[1, index, slot] = teacher.norms, student.norms
        masks[0, index, slot], masks[1, index, slot] = True, teacher.prunable
    spans = leaf_ext.detect_spans(
        torch.from_numpy(norms[0]),
        torch.from_numpy(norms[1]),
        torch.from_numpy(masks[0]),
        prunable=torch.from_numpy(masks[1]),
        threshold=settings.threshold,
        rule=settings.rule,
        cap=settings.cap,
        teacher_max=settings.teacher_max,
        join_gap=settings.join_gap,
        min_length=settings.min_length,
    )
    score, confounder, runs = spans.score.numpy(), spans.confounder.numpy(), spans.tolist()
    for index, (teacher, student, slot) in enumerate(pairs):
        yield Detection(
            row_id=teacher.row_id,
            offsets=teacher.offsets,
            slot=slot,
            prunable=teacher.prunable,
            teacher=normalize(teacher.norms),
            student=normalize(student.norms),
            score=score[index, slot],
            confounder=confounder[index, slot],
            spans=tuple(
                (int(np.searchsorted(slot, start)), int(np.searchsorted(slot, stop)))
                for start, stop in runs[index]
            ),
        )


def normalize(norms: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Return (s - min s) / (max s - min s) in float32, 0 where all are equal (Eq. 3)."""
    low, high = norms.min(), norms.max()
    if high == low:
        return np.zeros_like(norms)
    scaled: npt.NDArray[np.float32] = ((norms - low) / (high - low)).astype(np.float32)
    return scaled
