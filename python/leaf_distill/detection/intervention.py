"""The intervention score: how the answers of both models move when a word of the prompt changes.

A cheap score shortlists the words, since every change costs a pass of either model. A change moves
the answer's distribution by KL (see `answer_kl`); the score of a word is

    log((KL_student + 0.01) / (KL_teacher + 0.1))

with both KL averaged over the draws of its replacement. It is high where the student's answer hangs
on a word that the teacher's does not. It is a ratio because the plain difference goes to the words
that the answer rests on: they move the teacher further than any confounder. The constants say what
counts as no effect, so that two tiny KL make no large ratio. They were chosen on a toy study, see
docs.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np

from leaf_distill.data.example import ROLES, Example, Floats, Range, Role
from leaf_distill.detection.config import DetectConfig
from leaf_distill.detection.counterfactual import changed, replacement, tidied
from leaf_distill.detection.spans import normalize
from leaf_distill.detection.substitution import Vocabulary
from leaf_distill.detection.units import words

STUDENT_FLOOR: Final = 0.01
TEACHER_FLOOR: Final = 0.1


def intervention_score(kl_student: Floats, kl_teacher: Floats) -> Floats:
    """Return log((KL_student + 0.01) / (KL_teacher + 0.1)), float32 [n]; high is suspect."""
    student, teacher = kl_student.astype(np.float64), kl_teacher.astype(np.float64)
    score: Floats = np.log((student + STUDENT_FLOOR) / (teacher + TEACHER_FLOOR)).astype(np.float32)
    return score


def shortlist(example: Example, count: int) -> list[Range]:
    """Return the words, as token indices, with the lowest mean gap of the gradients (Eq. 4).

    A word is a prunable token, or the run of them whose characters it shares. Ties go to the
    earlier word. Where a text has no word borders, as in Chinese, each token stands for itself.

    Args:
        example: an aligned row with the norms of both models.
        count: the most words to return.
    """
    gap = normalize(example.norms["teacher"]) - normalize(example.norms["student"])
    units = word_units(example)
    means = [float(gap[start:stop].mean()) for start, stop in units]
    chosen = sorted(range(len(units)), key=lambda at: (means[at], at))[:count]
    return [units[at] for at in sorted(chosen)]


def word_units(example: Example) -> list[Range]:
    """Return the words of the analyzed text as ranges [start, stop) of its prunable tokens.

    Punctuation marks alone are none: without one a text loses its form more than its content, which
    moves the answers of both models.
    """
    assert example.offsets is not None and example.prunable is not None
    found = words(example.text, example.parts)
    starts = np.asarray([start for start, _ in found], dtype=np.int64)
    stops = np.asarray([stop for _, stop in found], dtype=np.int64)
    units: list[Range] = []
    last = -1
    for at in np.flatnonzero(example.prunable).tolist():
        start, stop = example.offsets[at].tolist()
        if not any(character.isalnum() for character in example.text[start:stop]):
            continue
        # The first word that ends behind the token's beginning, if the token reaches into it.
        word = int(np.searchsorted(stops, start, side="right"))
        inside = word < len(found) and starts[word] < stop
        if units and units[-1][1] == at and inside and word == last:
            units[-1] = (units[-1][0], at + 1)
        else:
            units.append((at, at + 1))
        last = word if inside else -1
    return units


def interventions(
    example: Example, units: Sequence[Range], config: DetectConfig, vocabulary: Vocabulary | None
) -> list[tuple[int, Example]]:
    """Return the changes of each unit, as its index and the row with the changed text.

    Args:
        example: an aligned row.
        units: token ranges, such as those of `shortlist`.
        config: `draws` replacements are drawn for a unit, or it is left out where that is 0 or
            where the vocabulary has no replacement. With the row_id and the segment, `seed` decides
            the draws.
        vocabulary: the words that replacements are drawn from; needed unless `draws` is 0.
    """
    changes: list[tuple[int, Example]] = []
    draw = random.Random(f"{config.seed}/{example.row_id}/{example.segment}/intervention")
    whole = words(example.text, example.parts)
    for index, unit in enumerate(units):
        one = _characters(example, unit, whole)
        texts = [
            replacement(example, one, vocabulary, draw)
            for _ in range(config.draws)
            if vocabulary is not None
        ]
        drawn = [other for other in texts if other is not None]
        changes += [(index, changed(example, [one], [other])) for other in dict.fromkeys(drawn)]
        if not drawn:
            changes.append((index, changed(example, tidied(example, [one]))))
    return changes


def suspicion_of(
    example: Example,
    units: Sequence[Range],
    changes: Sequence[tuple[int, Example]],
    values: Mapping[Role, Floats],
) -> Floats:
    """Return the intervention score of each token, float32 [d], high on confounders.

    Tokens outside the units have the lowest score of the row's units: nothing was measured on them,
    so that they are never more suspect than what was, and do not widen the range in which scores
    are normalized. It is 0 throughout where no change could be measured on both models.

    Args:
        example: an aligned row of d tokens.
        units: the token ranges that were changed.
        changes: as `interventions` returns them.
        values: for each model one value for each change, NaN where it could not be measured.
    """
    assert example.offsets is not None
    index = np.asarray([one for one, _ in changes], dtype=np.int64)
    measured = np.isfinite([values[role] for role in ROLES]).all(axis=0)
    means = {role: np.full(len(units), np.nan, dtype=np.float32) for role in ROLES}
    for at in np.unique(index[measured]):
        for role in ROLES:
            means[role][at] = values[role][measured & (index == at)].mean()
    score = intervention_score(means["student"], means["teacher"])
    known = np.isfinite(score)
    spread = np.zeros(len(example.offsets), dtype=np.float32)
    if known.any():
        spread[:] = score[known].min()
        for (start, stop), value in zip(units, score, strict=True):
            if np.isfinite(value):
                spread[start:stop] = value
    return spread


def _characters(example: Example, unit: Range, whole: Sequence[Range]) -> Range:
    """Return the characters of the words that a unit touches; of its tokens if it touches none.

    A token may hold the blank before its word, which stays, and a part of the next one.
    """
    assert example.offsets is not None
    covered = example.offsets[unit[0] : unit[1]]
    low, high = int(covered[:, 0].min()), int(covered[:, 1].max())
    touched = [one for one in whole if one[0] < high and low < one[1]]
    return (touched[0][0], touched[-1][1]) if touched else (low, high)
