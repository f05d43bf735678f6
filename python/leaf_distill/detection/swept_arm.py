"""Reads an arm: its settings, models and servers, the places that were searched and cut."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from leaf_distill.data.example import ROLES, Answer, Role
from leaf_distill.detection.cells import Place, characters_of
from leaf_distill.detection.config import DetectConfig
from leaf_distill.detection.gain import AFTER_MARKING
from leaf_distill.io import read_json, reading
from leaf_distill.models.loading import LazyModel, NotLoaded
from leaf_distill.models.protocol import Request
from leaf_distill.models.server import Server


def read_settings(arm: Path, **changes: Any) -> DetectConfig:
    """Return the settings of an arm, for its own rows as they stand in dataset.parquet.

    Raises:
        ValueError: funnel.json cannot be read, or has no such settings.
    """
    settings = read_json(arm / "funnel.json").get("settings")
    with reading(arm / "funnel.json"):
        known = {item.name for item in fields(DetectConfig)}
        given = {name: value for name, value in (settings or {}).items() if name in known}
        # A preset's values are among the settings, and must not come back over a change.
        given |= {"preset": None, "output_dir": str(arm.parent.parent)}
        return DetectConfig(**{**given, **changes})


def models_of(arm: Path, config: DetectConfig, *, load: bool) -> dict[Role, LazyModel]:
    """Return the models of an arm's run; errors name options of `leaf sweep` and `leaf analyze`."""
    path = arm.parent.parent / "run.json"
    run = read_json(path)
    with reading(path):
        known = {role: (str(run[role]["name"]), str(run[role]["sha256"])) for role in ROLES}
    models: dict[Role, LazyModel] = {}
    for role, (name, fingerprint) in known.items():
        given = getattr(config, role)
        if not given:
            raise ValueError(
                f"{role}: must be given for a run whose {role} was in memory, got nothing; give "
                f"--{role}, where its tokenizer is"
            )
        models[role] = LazyModel(
            given,
            dtype=config.dtype,
            device=config.device,
            trust_remote_code=config.trust_remote_code,
            argument=role,
            quantization=config.teacher_quantization if role == "teacher" else None,
            fingerprint=None if load else fingerprint,
        )
        if models[role].fingerprint != fingerprint:
            raise ValueError(
                f"{role}: must have the content of the run's {role}, {name}, got {given} with "
                f"another one; give --{role}, where that model is, or leave out --curves (a model "
                "in memory and its files count as two)"
            )
    return models


class SilentServer(Server):
    """A server that is not asked: its answers are known from the cache, or not at all."""

    def answers(
        self, requests: Sequence[Request], *, proven: bool = False
    ) -> Generator[tuple[int, Answer], None, None]:
        """Raise NotLoaded where an answer is missing."""
        if requests:
            raise NotLoaded(f"{self.role}: its server is not asked")
        yield from ()


def silent_servers(arm: Path) -> dict[Role, SilentServer]:
    """Return servers that are not asked, for the roles whose answers came from one."""
    served = read_json(arm / "funnel.json").get("served") or {}
    return {
        role: SilentServer(role, "", str(served[role]), 1, 1.0) for role in ROLES if role in served
    }


def searched_places(arm: Path) -> set[tuple[int, int | None]]:
    """Return the rows (with None) and views whose saliency was measured."""
    stages: dict[tuple[int, int | None], str] = {}
    divided: set[int] = set()
    with reading(arm / "outcomes.parquet"):
        for line in pq.read_table(arm / "outcomes.parquet").to_pylist():
            if line["candidate_id"] < 0:  # a view stands behind its row
                stages.setdefault((line["row_id"], None), line["stage"])
                stages[line["row_id"], line["segment"]] = line["stage"]
                divided |= {line["row_id"]} if line["segment"] is None else set()
    return {
        place
        for place, stage in stages.items()
        if stage in (*AFTER_MARKING, "dataset") or (place[1] is None and place[0] in divided)
    }


def cut_characters(arm: Path) -> dict[Place, set[int]]:
    """Return the characters that the arm's candidates cut, of each of its views."""
    with reading(arm / "samples.parquet"):
        columns = ["row_id", "segment", "candidates"]
        samples = pq.read_table(arm / "samples.parquet", columns=columns).to_pylist()
        return {
            (one["row_id"], one["segment"]): characters_of(
                part for candidate in one["candidates"] for part in candidate["cut"]
            )
            for one in samples
        }
