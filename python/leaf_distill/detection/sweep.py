"""Spans and cuts for a grid of settings, from the row cache alone: no model is loaded.

What `leaf detect` measured on an arm's rows does not depend on the threshold, the rule, the
strategy or the widening. So these are tried out in one process; where the answers to a cut are in
the cache, because some arm has asked for them, the cut is validated as well.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from leaf_distill.data.example import (
    ROLES,
    Example,
    Floats,
    remaining,
    views_of,
)
from leaf_distill.detection.answers import open_cache
from leaf_distill.detection.cells import (
    Cell,
    Place,
    configured,
    count,
    empty_cells,
)
from leaf_distill.detection.config import DetectConfig
from leaf_distill.detection.curves import deletion_curves, summarize_curves
from leaf_distill.detection.judge import JUDGES
from leaf_distill.detection.levels import analyzed_turns, set_views
from leaf_distill.detection.pipeline import Run
from leaf_distill.detection.scores import score_saliency
from leaf_distill.detection.spans import align, evidence, find_spans, normalize
from leaf_distill.detection.swept_arm import (
    cut_characters,
    models_of,
    searched_places,
    silent_servers,
)
from leaf_distill.models.loading import NotLoaded

Verdict = tuple[str | None, bool]
"""The student's verdict on a cut prompt, and whether the cut is kept."""

NO_SERVER: Any = {f"{role}_server_{name}": None for role in ROLES for name in ("url", "model")}


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
        ValueError: a file of the arm, a tokenizer or a saliency in the cache is missing.
        StoreError: the cache cannot be read.
    """
    return _sweep(arm, config).cells(arm, config, thresholds, grid)


def arm_curves(
    arm: Path, config: DetectConfig, scores: Sequence[str], *, load: bool
) -> list[dict[str, Any]] | None:
    """Return the deletion and insertion curves of scores on an arm's rows (`summarize_curves`).

    Args:
        arm, config: as for `sweep_arm`.
        scores: those of `leaf detect`; both saliencies and random ranks are always beside them.
        load: whether models may be loaded for what the cache lacks.

    Returns:
        A line for each model, kind and score; None where something is lacking.

    Raises:
        ValueError, StoreError: as `sweep_arm`; or a model is another one than that of the run.
    """
    try:
        return _sweep(arm, config, load=load).curves(arm, config, scores, load=load)
    except NotLoaded:
        return None


def _sweep(arm: Path, config: DetectConfig, *, load: bool = False) -> _Sweep:
    """Return a run on an arm's rows with its two models, known by their content alone or not."""
    models = models_of(arm, config, load=load)
    # These say how the original rows were read, and dataset.parquet has them as they were then.
    rows = replace(config, columns=None, max_rows=None, completion_source="dataset", **NO_SERVER)
    run = _Sweep(rows, models, str(arm / "dataset.parquet"))
    for role, server in silent_servers(arm).items():
        run.pair[role] = replace(run.pair[role], server=server)
    return run


class _Sweep(Run):
    """A run that asks nothing, and finds spans many times."""

    def cells(
        self,
        arm: Path,
        config: DetectConfig,
        thresholds: Sequence[float],
        grid: Mapping[str, Sequence[str]],
    ) -> Swept:
        with open_cache(config) as self.cache:
            self._begin(arm, config)
            found: list[Cell] = []
            missing: list[str] = []
            before = cut_characters(arm)
            for cell in empty_cells(config, thresholds, grid, self._measured):
                setting = cell.setting
                try:
                    self._fill(cell, configured(config, setting), before)
                    found.append(cell)
                except NotLoaded:
                    known = setting.score in self._suspicion or setting.score == "gap"
                    missing.append(setting.strategy if known else setting.score)
        advice = [_missing(name) for name in dict.fromkeys(missing)]
        return Swept(found, advice, config)

    def curves(
        self, arm: Path, config: DetectConfig, scores: Sequence[str], *, load: bool
    ) -> list[dict[str, Any]]:
        """Return the mean curves of each score and model, less those of random ranks."""
        with open_cache(config) as self.cache:
            self._begin(arm, config)
            changed = {name: replace(config, score=name) for name in scores}  # type: ignore[arg-type]
            for one in changed.values():
                self._with_suspicion(one, self._measured)
            known = [self._suspicion[name].keys() for name in scores]
            views = [one for one in self._measured if all(id(one) in ids for ids in known)]
            draw = np.random.default_rng(config.seed)
            ranks = {
                "student's gradient": [one.norms["student"] for one in views],
                "teacher's gradient, low": [-one.norms["teacher"] for one in views],
                "random": [draw.random(len(one.norms["student"]), np.float32) for one in views],
            }
            for name in scores:
                pairs = [evidence(one) for one in self._with_suspicion(changed[name], views)]
                ranks[name] = [
                    normalize(student) - normalize(teacher) for teacher, student in pairs
                ]
            if not load:
                self._look_for_losses(views, ranks)
            found = [
                curve
                for role in reversed(ROLES)
                for curve in deletion_curves(self.judge.use(role), views, ranks, config, self.cache)
            ]
        return summarize_curves(found, reference="random")

    def _look_for_losses(
        self, views: Sequence[Example], ranks: Mapping[str, Sequence[Floats]]
    ) -> None:
        """Raise NotLoaded where the first view has no curve in the cache, as after most runs.

        The prompts of all views take long to render. In 16 bits there is no short way: the loss of
        one view is known by the batch of all.
        """
        first = {name: rows[:1] for name, rows in ranks.items()}
        for role in ROLES:
            if self.pair[role].model.exact:
                deletion_curves(self.judge.use(role), views[:1], first, self.config, self.cache)

    def _begin(self, arm: Path, config: DetectConfig) -> None:
        self._measured = self._scored(arm, config)
        self._verdicts: dict[object, Verdict | None] = {}
        self._suspicion: dict[str, dict[int, Floats | None]] = {}
        self.config = config
        self.judge = self._judge(config)

    def _with_suspicion(self, config: DetectConfig, views: Sequence[Example]) -> list[Example]:
        """Return views as they were before spans were looked for, with the values of a score.

        Those without values, since one is not finite, are left out.
        """
        if config.score not in self._suspicion:
            copies = [replace(one, suspicion=None) for one in self._measured]
            self._set_suspicion(copies, config)
            self._suspicion[config.score] = {
                id(one): copy.suspicion
                for one, copy in zip(self._measured, copies, strict=True)
                if copy.outcome is None
            }
        values = self._suspicion[config.score]
        return [
            replace(one, candidates=[], notes=[], spans=(), suspicion=values[id(one)])
            for one in views
            if id(one) in values
        ]

    def _scored(self, arm: Path, config: DetectConfig) -> list[Example]:
        """Return the views of the arm's rows that have scores, with what was measured."""
        searched = searched_places(arm)
        for example in remaining(self.examples):
            example.turns = analyzed_turns(example, config.turns)
            set_views(example, config)
        whole = config.level != "response"  # else a row that was not divided has no view
        rows = [
            one
            for one in remaining(self.examples)
            if (one.row_id, None) in searched and (one.views or whole)
        ]
        views = [one for one in views_of(rows) if (one.row_id, one.segment) in searched]
        views = self._render(views, whole=True)
        try:
            for role in reversed(ROLES):
                score_saliency(self.pair[role], views, config, self.cache)
        except NotLoaded as error:
            model = str(error).partition(":")[0]
            raise ValueError(
                f"cache_dir: must hold what `leaf detect` measured for {arm}, got "
                f"{self.cache.path} without the {model}'s saliency; give the cache of that run, or "
                "run it again"
            ) from error
        align(views)
        scored = list(remaining(views))
        if not scored:
            raise ValueError(
                f"run_dir: must be an arm with scored rows, got {arm}, which has none; its "
                "funnel.json says where its rows left"
            )
        return scored

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
