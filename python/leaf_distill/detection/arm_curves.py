"""The deletion and insertion curves of scores on the rows of an arm."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, get_args

from leaf_distill.data.example import ROLES, Floats
from leaf_distill.detection.answers import cache_directory, open_cache
from leaf_distill.detection.arm_run import ArmRun
from leaf_distill.detection.cache import FILE
from leaf_distill.detection.config import DetectConfig, Score
from leaf_distill.detection.curves import Curve, deletion_curves, summarize_curves
from leaf_distill.detection.spans import evidence, normalize
from leaf_distill.models.loading import NotLoaded

REFERENCE: Final = "random"
"""The score that the others are compared with."""


def arm_curves(
    arm: Path, config: DetectConfig, scores: Sequence[str], *, load: bool
) -> list[dict[str, Any]] | None:
    """Return the mean curves of scores on an arm's rows, for both models (`summarize_curves`).

    They are a property of the scored rows: the arm's own score, threshold and strategy do not
    change them.

    Args:
        arm: its directory.
        config: its settings, from `read_settings`.
        scores: those of `leaf detect`; "random" is always beside them.
        load: whether models may be loaded for what the cache lacks.

    Returns:
        A line for each model, kind and score; None where something is lacking.

    Raises:
        ValueError: a file of the arm or a tokenizer is missing, or a model is another one than that
            of the run.
        StoreError: the cache cannot be read.
    """
    if not load and not (cache_directory(config) / FILE).exists():
        return None  # else an empty one would be made
    asked = {*scores, REFERENCE}
    # In 16 bits a loss is known by its batch, so that the order of the scores must not matter.
    names = [name for name in get_args(Score) if name in asked]
    try:
        return _Curves(arm, config, load=load).lines(names, load=load)
    except NotLoaded:
        return None


class _Curves(ArmRun):
    """Ranks the tokens of an arm's rows by many scores."""

    def lines(self, names: Sequence[Score], *, load: bool) -> list[dict[str, Any]] | None:
        with open_cache(self.own) as self.cache:
            if not load and all(one.model.exact for one in self.pair.values()):
                # One view tells that the cache has no curves; all take long to render.
                self._curves(names, most=1)
            return summarize_curves(self._curves(names), reference=REFERENCE) or None

    def _curves(self, names: Sequence[Score], *, most: int | None = None) -> list[Curve]:
        """Return the curves of all views that have each score, or of the first `most` views."""
        self._begin(most=most)
        views = self._measured
        settings = {name: replace(self.own, score=name) for name in names}
        for name, config in settings.items():
            self._with_suspicion(config, self._measured)
            views = [one for one in views if id(one) in self._suspicion[name]]
        ranks: dict[str, list[Floats]] = {}
        for name, config in settings.items():
            pairs = [evidence(one) for one in self._with_suspicion(config, views)]
            ranks[name] = [normalize(student) - normalize(teacher) for teacher, student in pairs]
        return [
            curve
            for role in ROLES
            for curve in deletion_curves(self.judge.use(role), views, ranks, self.own, self.cache)
        ]
