"""The threshold that a sweep proposes, and what speaks against trusting it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from leaf_distill.detection.cells import Cell
from leaf_distill.evaluation.sheets import Estimate, estimate, estimated_difference
from leaf_distill.wording import counted

ENOUGH = 30
"""Rows below which a share says little: its interval is wider than 30 points."""

PROPOSED = ("span", "collective")
"""Strategies of which one is proposed; the others are controls."""


@dataclass(frozen=True)
class Proposal:
    """The best cell of a level, and what speaks against trusting it.

    Attributes:
        level: of the threshold.
        cell: the cell, None where no cell is measured.
        share: rows that a random one of its cuts repairs.
        doubts: sentences; none where the evidence is enough.
    """

    level: str
    cell: Cell | None
    share: Estimate | None
    doubts: Sequence[str]


def propose_threshold(cells: Sequence[Cell], *, marked: bool = True) -> Proposal:
    """Return the cell whose random cut repairs most rows; of equal ones that which cuts least.

    Args:
        cells: of one level, the arm's own among them.
        marked: whether the rows are ones that the student fails.
    """
    level: str = cells[0].setting.level
    if not marked:
        doubt = "its arm cuts rows that the student solves too; sweep one of select student_wrong"
        return Proposal(level, None, None, [doubt])
    if not any(one.shares for one in cells):
        doubt = (
            "its arm does not ask whether the student is right on a cut; sweep one of validate "
            "both and without relabel"
        )
        return Proposal(level, None, None, [doubt])
    ready = [
        one for one in cells if one.tried and one.measured and one.setting.strategy in PROPOSED
    ]
    if not ready:
        doubt = (
            f"no setting of {' or '.join(PROPOSED)} has cuts with an answer to each. Run `leaf "
            "detect` at some of the thresholds; where few rows were searched, first on more rows"
        )
        return Proposal(level, None, None, [doubt])
    best = max(ready, key=lambda one: (_mean(one), -one.tokens_cut))
    return Proposal(level, best, estimate(best.measured), list(_doubts(best, cells, ready)))


def _doubts(best: Cell, cells: Sequence[Cell], ready: Sequence[Cell]) -> Iterator[str]:
    if len(best.measured) < ENOUGH:
        rows = counted(len(best.measured), "row")
        yield f"it rests on {rows}; below {ENOUGH} a share says little"
    whole = sum(one.complete for one in cells)
    if whole < len(cells):
        yield (
            f"only {whole} of {len(cells)} settings have all answers: run `leaf detect` with the "
            "others, which then costs answers alone"
        )
    current = next((one for one in ready if one.current), None)
    alike = len({tuple(one.shares.items()) for one in ready}) == 1
    if len(ready) > 1 and alike:
        yield (
            f"all {len(ready)} settings ({' and '.join(PROPOSED)}) with all answers repair the "
            "same rows alike: this sweep does not tell them apart"
        )
        return
    if current is not None and current is not best:
        # A score that is not finite takes its rows out of its own cells alone.
        shares = [(current.shares.get(row), share) for row, share in best.shares.items()]
        pairs = [(one, two) for one, two in shares if one is not None and two is not None]
        change = estimated_difference([one for one, _ in pairs], [two for _, two in pairs])
        if change is not None and change.low <= 0:
            yield f"it cannot be told from the arm's own setting ({_points(change)} points)"
    if len(ready) > 1:
        yield (
            f"the best of {len(ready)} settings of {' or '.join(PROPOSED)} is flattered by the "
            "choice: confirm it on other rows"
        )


def _points(change: Estimate) -> str:
    mean, low, high = (f"{100 * value:+.1f}" for value in change)
    return f"{mean}, 95 % {low} to {high}"


def _mean(cell: Cell) -> float:
    return sum(cell.measured) / len(cell.measured)


def sentences(proposal: Proposal) -> list[str]:
    """Return what a proposal says: the setting, its evidence, and the doubts."""
    if proposal.cell is None or proposal.share is None:
        return [f"No threshold is proposed for the {proposal.level} level: {proposal.doubts[0]}."]
    setting = proposal.cell.setting
    mean, low, high = (f"{100 * value:.1f}" for value in proposal.share)
    name = "threshold" if proposal.level == "instruction" else "response_threshold"
    own = ", which is the arm's own setting" if proposal.cell.current else ""
    sentence = (
        f"Proposed for the {proposal.level} level: --{name} {setting.threshold:g} --strategy "
        f"{setting.strategy} --score {setting.score} --rule {setting.rule} --widen "
        f"{setting.widen}{own}: a cut repairs {mean} % ({low} to {high}) of "
        f"{counted(len(proposal.cell.measured), 'row')}."
    )
    return [sentence, *(f"But {doubt}." for doubt in proposal.doubts)]
