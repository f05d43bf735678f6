"""A run on the rows of an arm, with what `leaf detect` measured on them, from the row cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from leaf_distill.data.example import ROLES, Example, Floats, remaining, views_of
from leaf_distill.detection.config import DetectConfig
from leaf_distill.detection.levels import analyzed_turns, set_views
from leaf_distill.detection.pipeline import Run
from leaf_distill.detection.scores import score_saliency
from leaf_distill.detection.spans import align
from leaf_distill.detection.swept_arm import models_of, searched_places, silent_servers
from leaf_distill.models.loading import NotLoaded

NO_SERVER: Any = {f"{role}_server_{name}": None for role in ROLES for name in ("url", "model")}


class ArmRun(Run):
    """A run that asks nothing, and finds spans or ranks tokens many times.

    Args:
        arm: its directory.
        config: its settings, from `read_settings`.
        load: whether models may be loaded for what the cache lacks; else `NotLoaded` is raised.

    Raises:
        ValueError: a file of the arm or a tokenizer is missing, or a model is another one than that
            of the run.
    """

    def __init__(self, arm: Path, config: DetectConfig, *, load: bool = False) -> None:
        models = models_of(arm, config, load=load)
        # These say how the original rows were read, and dataset.parquet has them as they were then.
        rows = replace(
            config, columns=None, max_rows=None, completion_source="dataset", **NO_SERVER
        )
        super().__init__(rows, models, str(arm / "dataset.parquet"))
        self.arm, self.own = arm, config
        for role, server in silent_servers(arm).items():
            self.pair[role] = replace(self.pair[role], server=server)

    def _begin(self, *, most: int | None = None) -> None:
        """Read what was measured on the arm's views, or on the first `most` of them.

        Raises:
            ValueError: a saliency is not in the cache, and no model may be loaded.
        """
        self._measured = self._scored(most)
        self._suspicion: dict[str, dict[int, Floats | None]] = {}
        self.config = self.own
        self.judge = self._judge(self.own)

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

    def _scored(self, most: int | None) -> list[Example]:
        """Return the views of the arm's rows that have scores, with what was measured."""
        config, searched = self.own, searched_places(self.arm)
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
        views = self._render(views[:most], whole=True)
        try:
            for role in reversed(ROLES):
                score_saliency(self.pair[role], views, config, self.cache)
        except NotLoaded as error:
            model = str(error).partition(":")[0]
            raise ValueError(
                f"cache_dir: must hold what `leaf detect` measured for {self.arm}, got "
                f"{self.cache.path} without the {model}'s saliency; give the cache of that run, or "
                "run it again"
            ) from error
        align(views)
        return list(remaining(views))
