"""Spans and cuts for a grid of settings, from the row cache alone: no model is loaded.

What `leaf detect` measured on an arm's rows does not depend on the threshold, the rule, the
strategy or the widening. So these are tried out in one process; where the answers to a cut are in
the cache, because some arm has asked for them, the cut is validated as well.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from leaf_distill.data.example import Example, remaining
from leaf_distill.detection.answers import open_cache
from leaf_distill.detection.arm_run import ArmRun
from leaf_distill.detection.cells import (
    Cell,
    Place,
    configured,
    count,
    empty_cells,
)
from leaf_distill.detection.config import DetectConfig
from leaf_distill.detection.judge import JUDGES
from leaf_distill.detection.spans import find_spans
from leaf_distill.detection.swept_arm import cut_characters
from leaf_distill.models.loading import NotLoaded

Verdict = tuple[str | None, bool]
"""The student's verdict on a cut prompt, and whether the cut is kept."""


@dataclass(frozen=True)
class Swept:
    """The cells of a sweep, what could not be computed and why, and the arm's settings."""

    cells: Sequence[Cell]
    missing: Sequence[str]
    config: DetectConfig


def sweep_arm(
    arm: Path, config: DetectConfig, thresholds: Sequence[float], grid: Mapping[str, Sequence[str]]
) -> Swept:
    """Compute every cell of a grid on the rows of an arm.

    Args:
        arm: its directory.
        config: its settings, from `read_settings`.
        thresholds: for either level; its own is tried too.
        grid: values of score, rule, strategy and widen; its own are tried together.

    Raises:
        ValueError: a file of the arm, a tokenizer or a saliency in the cache is missing, or no row
            has scores.
        StoreError: the cache cannot be read.
    """
    return _Sweep(arm, config).cells(thresholds, grid)


class _Sweep(ArmRun):
    """Finds the spans of an arm's rows many times."""

    def cells(self, thresholds: Sequence[float], grid: Mapping[str, Sequence[str]]) -> Swept:
        config = self.own
        with open_cache(config) as self.cache:
            self._begin()
            if not self._measured:
                raise ValueError(
                    f"run_dir: must be an arm with scored rows, got {self.arm}, which has none; "
                    "its funnel.json says where its rows left"
                )
            self._verdicts: dict[object, Verdict | None] = {}
            found: list[Cell] = []
            missing: list[str] = []
            before = cut_characters(self.arm)
            for cell in empty_cells(config, thresholds, grid, self._measured):
                setting = cell.setting
                try:
                    self._fill(cell, configured(config, setting), before)
                    found.append(cell)
                except NotLoaded:
                    known = setting.score in self._suspicion or setting.score == "gap"
                    missing.append(_missing(setting.strategy if known else setting.score))
                except ValueError as error:  # settings that do not go with those of the arm
                    missing.append(f"{setting.strategy} was not tried: {error}")
        advice = [*dict.fromkeys(missing)]
        return Swept(found, advice, config)

    def _fill(
        self,
        cell: Cell,
        config: DetectConfig,
        before: Mapping[Place, set[int]],
    ) -> None:
        self.config = config
        self.judge = self._judge(config)
        response = cell.setting.level == "response"
        own = [one for one in self._measured if bool(one.segment) == response]
        # A run measures perplexity on both levels at once, and 16-bit values are of their batches.
        together = config.strategy == "perplexity"
        fresh = self._with_suspicion(config, self._measured if together else own)
        find_spans(fresh, config)
        self._propose(fresh)
        fresh = [one for one in fresh if bool(one.segment) == response]
        count(cell, fresh, before)
        self._look_up(cell, fresh)

    def _look_up(self, cell: Cell, views: Sequence[Example]) -> None:
        """Validate the candidates whose answers are in the cache."""
        found: dict[int, list[Verdict | None]] = {one.row_id: [] for one in views}
        for view in views:
            for candidate in remaining(view.candidates):
                found[view.row_id].append(self._verdict(view, candidate))
        given = [verdict for verdicts in found.values() for verdict in verdicts]
        cell.candidates = sum(len(view.candidates) for view in views)
        cell.usable, cell.known = len(given), sum(verdict is not None for verdict in given)
        cell.kept = sum(verdict is not None and verdict[1] for verdict in given)
        if "student" not in JUDGES[self.config.validate] or self.config.relabel:
            return  # nobody knows where the student is right
        for row_id, verdicts in found.items():
            known = [verdict[0] == "right" for verdict in verdicts if verdict is not None]
            whole = len(known) == len(verdicts)
            cell.shares[row_id] = (sum(known) / max(len(known), 1)) if whole else None

    def _verdict(self, view: Example, candidate: Example) -> Verdict | None:
        """Return the verdicts of a candidate, None where an answer is missing."""
        key = (view.row_id, view.segment, candidate.cut, candidate.inserted)
        if key not in self._verdicts:
            alone = view.derived()
            alone.candidates = [candidate]
            try:
                self.judge.validate([alone])
            except NotLoaded:
                self._verdicts[key] = None
            else:
                given = candidate.answers.get("student")
                verdict = given.verdict if given else None
                self._verdicts[key] = verdict, candidate.outcome is None
        return self._verdicts[key]


def _missing(name: str) -> str:
    return (
        f"{name} needs model passes that are not in the cache: run the same `leaf detect` once "
        "with it."
    )
