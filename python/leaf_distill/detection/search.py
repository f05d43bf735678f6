"""The strategy "search": phrases are cut one after another, as long as that helps the student.

A confounder is often a clause with a number, and a prompt may have several. So one span rarely
repairs a row, and gradients alone do not say which clauses belong together. Here each cut is tried:
what a phrase costs the student is measured without it, and the teacher says whether it may go.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

from leaf_distill.data.example import Example
from leaf_distill.detection.config import DetectConfig
from leaf_distill.detection.counterfactual import (
    RankedUnit,
    cut_units,
    make_candidate,
    ranked_units,
)
from leaf_distill.detection.judge import Judge, said
from leaf_distill.detection.scores import score_changes

ROUNDING: Final = 0.01
"""In 16 bits, the share of a loss that a cut must take away to count: less is rounding."""

STAGE: Final = "search"
"""The name under which the seconds of its passes and answers are counted."""


@dataclass(eq=False)
class _Row:
    """A row during the search.

    Attributes:
        example: the row; its candidates are the cuts that were chosen so far.
        left: the units that are not cut, the most suspect first.
        cut: the units that are.
        text: the row with these cut.
        trials: the cuts of a round that lower the loss, the best first.
        reason, detail: why no unit is cut.
    """

    example: Example
    left: list[RankedUnit]
    text: Example
    cut: list[RankedUnit] = field(default_factory=list)
    trials: list[tuple[float, RankedUnit, Example]] = field(default_factory=list)
    reason: str = "no_span"
    detail: str = "no score tells one part of the text from another"


def search(
    judge: Judge,
    examples: Sequence[Example],
    config: DetectConfig,
    check: Callable[[Example, Example], None],
) -> dict[str, int]:
    """Set the candidates of scored examples: a cut of one phrase, of two, and so on.

    In each of at most `max_cuts` rounds, the `shortlist` most suspect phrases of a row that are not
    cut yet are tried, each beside what is cut already. Of those without which the student's loss of
    the completion is lower than before, the one with the lowest loss after which the teacher still
    answers correctly is cut. A row is done where the student is then right, or where none of them
    helps; it leaves if none ever did.

    Every candidate is validated afterwards as those of other strategies are; its answers are known.
    For a row a round takes at most `shortlist` forward passes of the student and one more, which
    compute the common beginning of the prompts once; one answer of the student, and one of the
    teacher or some more where it fails on the best cuts.

    Args:
        judge: the models.
        examples: scored rows.
        config: the settings.
        check: renders a candidate of a row; the candidate leaves where it cannot be used.

    Returns:
        What it asked, also where the cache knew: `student_losses`, changed prompts and those that
        they are compared with; `student_answers` and `teacher_answers`.
    """
    asked: Counter[str] = Counter(student_losses=0, student_answers=0, teacher_answers=0)
    rows = [_Row(one, ranked_units(one, config), one) for one in examples]
    active = rows
    for _ in range(config.max_cuts):
        asked["student_losses"] += _try(judge, active, config, check)
        active, answers = _ask_teacher(judge, active)
        asked["teacher_answers"] += answers
        if not active:
            break
        asked["student_answers"] += len(active)
        judge.answer("student", [row.example.candidates[-1] for row in active], STAGE)
        active = [row for row in active if not _is_right(row.example.candidates[-1], "student")]
    for row in rows:
        if not row.cut:
            row.example.leave("prune", row.reason, row.detail)
    return dict(asked)


def _try(
    judge: Judge,
    rows: Sequence[_Row],
    config: DetectConfig,
    check: Callable[[Example, Example], None],
) -> int:
    """Set the trials of each row: cuts of one more phrase that lower the student's loss.

    Returns the number of losses that were asked.
    """
    tried = [_trials(row, config, check) for row in rows]
    with judge.clock(STAGE):
        losses = score_changes(
            "nll",
            judge.use("student"),
            [row.example for row in rows],
            config,
            judge.cache,
            [
                [row.text, *(candidate for _, candidate in trials)]
                for row, trials in zip(rows, tried, strict=True)
            ],
        )
    margin = 1.0 if judge.pair["student"].model.exact else 1.0 - ROUNDING
    for row, trials, (now, *values) in zip(rows, tried, losses, strict=True):
        better = [
            (float(value), unit, candidate)
            for value, (unit, candidate) in zip(values, trials, strict=True)
            if value < margin * now
        ]
        row.trials = sorted(better, key=lambda one: (one[0], one[1].range))
        if row.left and not trials:
            row.reason, row.detail = "no_usable_cut", "no cut leaves a usable prompt"
        elif trials:
            row.reason = "no_helpful_cut"
            row.detail = "no phrase that was tried lowers the student's loss where it is cut"
    return sum(map(len, losses))


def _trials(
    row: _Row, config: DetectConfig, check: Callable[[Example, Example], None]
) -> list[tuple[RankedUnit, Example]]:
    """Return the usable cuts of one more phrase."""
    seen = [row.example.text, *(one.text for one in row.example.candidates)]
    found: list[tuple[RankedUnit, Example]] = []
    for unit in row.left:
        if len(found) == config.shortlist:
            break
        candidate = make_candidate(
            row.example, cut_units(row.example, [*row.cut, unit]), config, seen
        )
        if candidate.outcome is None:
            check(candidate, row.example)
        if candidate.outcome is None:
            found.append((unit, candidate))
    return found


def _ask_teacher(judge: Judge, rows: Sequence[_Row]) -> tuple[list[_Row], int]:
    """Make the best cut of each row after which the teacher is right.

    Returns the rows with one, and the number of answers that were asked.
    """
    asked = 0
    waiting = [row for row in rows if row.trials]
    found: set[int] = set()
    while waiting:
        asked += len(waiting)
        judge.answer("teacher", [row.trials[0][2] for row in waiting], STAGE)
        again = []
        for row in waiting:
            _, unit, candidate = row.trials.pop(0)
            if _is_right(candidate, "teacher"):
                row.text = candidate
                row.cut.append(unit)
                row.left.remove(unit)
                row.example.candidates.append(candidate)
                found.add(id(row))
            else:
                row.reason = f"teacher_{candidate.answers['teacher'].verdict}"
                row.detail = f"on each cut that helps the student: {said(candidate, 'teacher')}"
                if row.trials:
                    again.append(row)
        waiting = again
    return [row for row in rows if id(row) in found], asked


def _is_right(candidate: Example, role: str) -> bool:
    return candidate.answers[role].verdict == "right"  # type: ignore[index]
