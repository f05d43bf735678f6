"""A run directory: arms side by side, one for each strategy and setting, over the same two models.

RUN/run.json              the two models, by content
RUN/arms/NAME/            dataset.parquet, dataset.jsonl, samples.parquet, outcomes.parquet,
                          funnel.json, and report.html where it was asked for
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from leaf_distill.config import DetectConfig
from leaf_distill.data.example import ROLES, Role
from leaf_distill.io import read_json

if TYPE_CHECKING:
    from leaf_distill.models.loading import LazyModel

NAMING: Final = (
    *("threshold", "rule", "cap", "teacher_max", "join_gap", "min_length"),
    *("select", "completion_source", "validate"),
)
"""Settings that, beside the strategy, make an arm of their own; for a random one also the seed."""

INCIDENTAL: Final = ("output_dir", "cache_dir", "device", "max_batch_tokens")
"""Settings that change no result beyond rounding."""


def arm_name(config: DetectConfig) -> str:
    """Return the strategy and every setting of NAMING that is not the default.

    For example `span`, or `random_spans-threshold-0.05-seed-1`.
    """
    defaults = {item.name: item.default for item in fields(config)}
    names = (*NAMING, "seed") if config.strategy.startswith("random") else NAMING
    parts: list[str] = [config.strategy]
    for name in names:
        value = getattr(config, name)
        if value != defaults[name]:
            parts.append(f"{name}-{value:g}" if isinstance(value, float) else f"{name}-{value}")
    return "-".join(parts)


def check_run(root: Path, config: DetectConfig) -> None:
    """Check that the run directory can be used, before anything is read or written.

    Raises:
        ValueError: it is a file, an input, or holds files of somebody else where results go.
    """
    if root.exists() and not root.is_dir():
        raise ValueError(f"output_dir: must be a directory, got the file {root}")
    if (root / "arms").exists() and not (root / "run.json").exists():
        raise ValueError(
            f"output_dir: must be new, or of an earlier `leaf detect`, got {root}, with arms but "
            "no run.json; give another one"
        )
    arm = (root / "arms" / arm_name(config)).resolve()
    for name in ("student", "teacher", "dataset"):
        given = Path(getattr(config, name) or "/dev/null").expanduser()
        try:
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
        role: {"name": models[role].name, "sha256": models[role].fingerprint} for role in ROLES
    }
    path = root / "run.json"
    if not path.exists():
        return new
    old = read_json(path)
    differences = []
    for role in ROLES:
        known, name = old.get(role), new[role]["name"]
        if not isinstance(known, dict) or "sha256" not in known:
            raise ValueError(
                f"{path}: must name a student and a teacher, got {sorted(old)}; give another "
                "output_dir"
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
            "give another output_dir; known answers and saliencies are used there too"
        )
    return old


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
            sentences.append(f"This replaces the arm's results with {', '.join(others)}.")
    stale = old.get("dataset_sha256") != summary["dataset_sha256"]
    if stale and (arm / "report.html").exists():
        sentences.append("report.html shows the earlier results: run `leaf report` again.")
    return sentences


def find_arm(directory: Path) -> Path:
    """Return the arm that a run directory, or an arm itself, stands for.

    Raises:
        ValueError: there is none, or there are several; names them.
    """
    if (directory / "funnel.json").is_file() and directory.parent.name == "arms":
        return directory
    found = sorted(path.parent for path in (directory / "arms").glob("*/funnel.json"))
    if len(found) == 1:
        return found[0]
    if not found:
        raise ValueError(
            f"{directory}: must be the run directory of a finished `leaf detect`, got one without "
            "an arm; run `leaf detect` again, it goes on where it stopped"
        )
    names = ", ".join(path.name for path in found)
    raise ValueError(
        f"{directory}: must have one arm, got {len(found)} ({names}); name one, as {found[0]}"
    )
