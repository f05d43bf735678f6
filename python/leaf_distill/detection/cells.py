"""The points of a grid of detection's settings, and what each makes of some rows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from leaf_distill.data.example import Example, Range, remaining
from leaf_distill.detection.config import DetectConfig
from leaf_distill.detection.counterfactual import WITHOUT_SPANS

Place = tuple[int, int]
"""A row, and the segment of its response that it is analyzed at; 0: the instruction level."""

AXES = ("score", "rule", "strategy", "widen")


@dataclass(frozen=True)
class Setting:
    """A point of the grid; `level` says which rows the threshold is for."""

    level: Literal["instruction", "response"]
    score: str
    rule: str
    strategy: str
    widen: str
    threshold: float


@dataclass
class Cell:
    """The cuts that a setting makes in the rows of its level.

    Attributes:
        setting: the setting.
        current: whether it is that of the arm.
        rows, hit: the scored rows, and those with a usable candidate, as the funnel counts them.
        tokens, tokens_cut: of all rows, and those that a candidate cuts, each counted once.
        spans: the detected spans.
        overlap: Jaccard index of the characters that its candidates and the arm's cut.
        candidates, usable: all, and those to be asked, which did not leave before the validation.
        known, kept: of these with answers in the cache, and those that pass the validation.
        shares: for each row, the chance that the student is right on a random one of its cuts; 0
            without a cut, None where an answer is missing.
    """

    setting: Setting
    current: bool
    rows: int = 0
    hit: int = 0
    tokens: int = 0
    tokens_cut: int = 0
    spans: int = 0
    overlap: float = 1.0
    candidates: int = 0
    usable: int = 0
    known: int = 0
    kept: int = 0
    shares: dict[int, float | None] = field(default_factory=dict)

    @property
    def measured(self) -> list[float]:
        """The shares that are known."""
        return [share for share in self.shares.values() if share is not None]

    @property
    def complete(self) -> bool:
        """Whether the answers to all cuts are known."""
        return self.known == self.usable

    @property
    def tried(self) -> bool:
        """Whether cuts were made, and the answers to all of them are known."""
        return self.complete and self.usable > 0


def empty_cells(
    config: DetectConfig,
    thresholds: Sequence[float],
    grid: Mapping[str, Sequence[str]],
    views: Sequence[Example],
) -> Iterator[Cell]:
    """Yield a cell for each point of the grid and each level that has rows, the arm's own first."""
    levels: dict[Literal["instruction", "response"], float] = {}
    if any(not one.segment for one in views):
        levels["instruction"] = config.threshold
    if any(one.segment for one in views):
        levels["response"] = config.response_threshold
    for level, own in levels.items():
        score, rule, strategy, unit = (getattr(config, name) for name in AXES)
        current = Setting(level, score, rule, strategy, unit, own)
        points = [
            Setting(level, score, rule, strategy, unit, float(threshold))
            for score in grid["score"]
            for rule in grid["rule"]
            for strategy in grid["strategy"]
            for unit in grid["widen"]
            for threshold in sorted({*thresholds, own})
        ]
        points = [
            replace(point, threshold=own, rule=rule) if point.strategy in WITHOUT_SPANS else point
            for point in points
        ]
        for point in dict.fromkeys((current, *points)):
            yield Cell(point, current=point == current)


def configured(config: DetectConfig, setting: Setting) -> DetectConfig:
    """Return the configuration at a point of the grid; its threshold is that of both levels."""
    changes: dict[str, Any] = {name: getattr(setting, name) for name in AXES}
    changes |= {"threshold": setting.threshold, "response_threshold": setting.threshold}
    return replace(config, **changes)


def characters_of(ranges: Iterable[Sequence[int]]) -> set[int]:
    """Return the positions that ranges [start, stop) cover."""
    return {at for start, stop in ranges for at in range(start, stop)}


def count(cell: Cell, views: Sequence[Example], before: Mapping[Place, set[int]]) -> None:
    """Count spans, tokens and the overlap with the arm."""
    both = either = 0
    for view in views:
        assert view.offsets is not None
        ranges: list[Range] = [part for one in view.candidates for part in one.cut]
        chosen = characters_of(ranges)
        earlier = before.get((view.row_id, view.segment), set())
        both, either = both + len(chosen & earlier), either + len(chosen | earlier)
        touched = [any(at in chosen for at in range(start, stop)) for start, stop in view.offsets]
        cell.tokens, cell.tokens_cut = cell.tokens + len(touched), cell.tokens_cut + sum(touched)
        cell.spans += len(view.spans)
    cell.rows = len({view.row_id for view in views})
    cell.hit = len({view.row_id for view in views if any(remaining(view.candidates))})
    cell.overlap = both / either if either else 1.0
