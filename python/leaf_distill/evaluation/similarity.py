"""Jaccard similarity of the student's answers to references, before and after a cut (Figure 13)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from leaf_distill.evaluation.arms import Arm, Cut, Row
from leaf_distill.evaluation.sheets import Sheet, Value, estimate, estimated_difference

Reference = Literal["the label", "the teacher's answer"]
REFERENCES: tuple[Reference, ...] = ("the label", "the teacher's answer")

NOTE = (
    "Jaccard similarity of two texts: words in both, as a share of words in either. Words are "
    "runs of letters, digits and underscores in lower case, each counted once. Before: the "
    "student's answer to the whole prompt; after: the mean over its answers to a row's cuts. "
    "The label is the completion; the teacher's answer is that to the whole prompt, both "
    "times. Marked rows with a cut that the student was asked; 95 % intervals of a bootstrap "
    "over rows, paired for the difference. A shift may come from style or length alone, and "
    "the rows are failed ones: compare it with that of a random arm."
)


@dataclass(frozen=True)
class Shift:
    """The similarities of an arm's rows to one reference, before and after the cut."""

    arm: str
    reference: Reference
    before: tuple[float, ...]
    after: tuple[float, ...]


def words(text: str) -> set[str]:
    """Return the words of a text: runs of letters, digits and underscores, in lower case."""
    return set(re.findall(r"\w+", text.lower()))


def jaccard(one: str, other: str) -> float:
    """Return the share of common words among the words of two texts; 1 where neither has any."""
    first, second = words(one), words(other)
    either = first | second
    return len(first & second) / len(either) if either else 1.0


def shifts(arms: Sequence[Arm]) -> list[Shift]:
    """Return the similarities of the marked rows of each arm, to the label and to the teacher."""
    found = []
    for arm in arms:
        for reference in REFERENCES:
            values = list(_values(arm.of("marked"), reference))
            if values:
                before, after = zip(*values, strict=True)
                found.append(Shift(arm.name, reference, before, after))
    return found


def _values(rows: Sequence[Row], reference: Reference) -> Iterator[tuple[float, float]]:
    """Yield the similarity of each row before and after, the means over its cuts."""
    for row in rows:
        pairs = [pair for cut in row.cuts if (pair := _pair(cut, reference)) is not None]
        if pairs:
            before, after = zip(*pairs, strict=True)
            yield sum(before) / len(pairs), sum(after) / len(pairs)


def _pair(cut: Cut, reference: Reference) -> tuple[float, float] | None:
    whole, after = cut.whole, cut.student_answer
    text = whole.label if reference == "the label" else whole.teacher_answer
    if text is None or whole.student_answer is None or after is None:
        return None
    return jaccard(whole.student_answer, text), jaccard(after, text)


def similarity(found: Sequence[Shift]) -> Sheet:
    """Return the mean similarities before and after the cut, and their paired difference."""
    lines: list[dict[str, Value]] = [
        {
            "arm": one.arm,
            "similar to": one.reference,
            "rows": len(one.before),
            "before": estimate(one.before),
            "after": estimate(one.after),
            "difference": estimated_difference(one.before, one.after),
        }
        for one in found
    ]
    title = "Similarity of the student's answers (Figure 13)"
    return Sheet("similarity", title, lines, NOTE, percent=False)
