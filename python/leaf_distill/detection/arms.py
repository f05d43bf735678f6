"""A run directory: arms side by side, one for each strategy and setting, over the same two models.

RUN/run.json              the two models, by content
RUN/arms/NAME/            dataset and candidates (.parquet and .jsonl), samples.parquet,
                          outcomes.parquet, funnel.json, and report.html where it was asked for
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from leaf_distill.data.example import ROLES, Role
from leaf_distill.detection.config import DetectConfig
from leaf_distill.io import digest, read_json

if TYPE_CHECKING:
    from leaf_distill.models.loading import LazyModel

NAMING: Final = (
    *("level", "segments", "target", "turns", "score", "shortlist", "draws"),
    *("threshold", "response_threshold", "rule", "cap", "teacher_max", "join_gap", "min_length"),
    *("widen", "max_cuts", "edit", "relabel", "guard", "agreement", "cross_branch"),
    *("select", "completion_source", "validate", "teacher_quantization"),
)
"""Settings that, beside the strategy, make an arm of their own; where it draws, also the seed."""

LONGEST_NAME: Final = 200
"""Characters of an arm's name; a file system takes 255 bytes."""

INCIDENTAL: Final = (
    *("student", "teacher", "output_dir"),
    *("cache_dir", "device", "max_batch_tokens", "preset", "dry_run"),
    *("server_concurrency", "server_timeout"),
)
"""Settings that change no result beyond rounding; the two models are known by their content."""


def arm_name(config: DetectConfig) -> str:
    """Return the strategy and every setting of NAMING that is not the default.

    For example `span`, or `random_spans-threshold-0.05-seed-1`. A name that would be too long for a
    directory ends with a digest of what it lacks.
    """
    defaults = {item.name: item.default for item in fields(config)}
    names = (*NAMING, "seed") if _draws(config) else NAMING
    parts: list[str] = [config.strategy]
    for name in names:
        value = getattr(config, name)
        if value is True:
            parts.append(name)
        elif value != defaults[name]:
            parts.append(f"{name}-{str(value).removesuffix('.0').replace(',', '+')}")
    whole = "-".join(parts)
    return whole if len(whole) <= LONGEST_NAME else f"{whole[:180]}-{digest([whole])[:16]}"


def _draws(config: DetectConfig) -> bool:
    """Whether the seed changes a result."""
    return (
        config.strategy in ("random_tokens", "random_spans", "distractors")
        or config.edit == "substitute"
        or (config.score == "intervention" and config.draws > 0)
        or config.score == "random"
        or config.guard == "agreement"
    )


def check_run(root: Path, config: DetectConfig) -> None:
    """Check that the run directory can be used, before anything is read or written.

    Raises:
        ValueError: it is a file, an input, or holds files of somebody else where results go.
    """
    if (root / "arms").exists() and not (root / "run.json").exists():
        raise ValueError(
            f"output_dir: must be new, or of an earlier `leaf detect`, got {root}, with arms but "
            "no run.json; give another one"
        )
    arm = (root / "arms" / arm_name(config)).resolve()
    for name in ("student", "teacher", "dataset"):
        try:
            given = Path(getattr(config, name) or "/dev/null").expanduser()
            path = given.resolve()
        except (OSError, RuntimeError):
            continue  # not a path at all; the loader says what is wrong with it
        if path in (root.resolve(), arm) or arm in path.parents:
            raise ValueError(
                f"output_dir: must not be an input, but the {name} is {given}; give another one"
            )


def check_models(root: Path, models: Mapping[Role, LazyModel]) -> dict[str, Any]:
    """Check that a run directory is of these two models, and return the content of run.json.

    Raises:
        ValueError: it is of other models; one line for each difference.
    """
    new: dict[str, Any] = {
        role: {"name": one.name + " in memory" * one.in_memory, "sha256": one.fingerprint}
        for role, one in ((role, models[role]) for role in ROLES)
    }
    path = root / "run.json"
    if not path.exists():
        return new
    try:
        old = read_json(path)
    except ValueError:
        old = {}
    differences = []
    for role in ROLES:
        known, name = old.get(role), new[role]["name"]
        if not isinstance(known, dict) or "sha256" not in known:
            raise ValueError(
                f"output_dir: must be new, or of an earlier `leaf detect`, got {root}, whose "
                "run.json is damaged or of something else; give another one (known answers and "
                "saliencies are used there too)"
            )
        if known["sha256"] == new[role]["sha256"]:
            continue
        if known.get("name") == name:
            differences.append(f"the content of the {role} {name} has changed")
        else:
            differences.append(f"the {role} was {known.get('name')} and is {name}")
    if differences:
        listed = "\n  ".join(differences)
        raise ValueError(
            f"output_dir: must be of the same models, got {root}:\n  {listed}\n"
            "give another output_dir; known answers and saliencies are used there too (a model in "
            "memory and its files count as two)"
        )
    return old


def is_unchanged(arm: Path, summary: Mapping[str, Any]) -> bool:
    """Whether funnel.json says the same already, apart from the seconds and halved batches."""
    try:
        old = read_json(arm / "funnel.json")
    except ValueError:
        return False
    new = json.loads(json.dumps(summary))
    passes = {"seconds": None, "halved_batches": None}
    return {**old, **passes} == {**new, **passes}


def explain_replacement(arm: Path, summary: Mapping[str, Any]) -> list[str]:
    """Return sentences about earlier results of the arm that other settings or rows replace."""
    path = arm / "funnel.json"
    if not path.is_file():
        return []
    try:
        old = read_json(path)
    except ValueError:
        return [f"{path} could not be read and is replaced."]
    sentences = []
    settings, new = old.get("settings"), json.loads(json.dumps(summary["settings"]))
    if isinstance(settings, dict):
        others = [
            f"{name} {settings[name]!r}"
            for name in new
            if name in settings and settings[name] != new[name] and name not in INCIDENTAL
        ]
        if others:
            sentences.append(
                f"Earlier results of this arm, which had {', '.join(others)}, are replaced."
            )
    stale = old.get("dataset_sha256") != summary["dataset_sha256"]
    if stale and (arm / "report.html").exists():
        sentences.append("report.html shows the earlier results: run `leaf report` again.")
    return sentences
