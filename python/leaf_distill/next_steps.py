"""The command to type after each one, with the user's own paths, as the last thing it prints."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from leaf_distill.terminal import say_next

if TYPE_CHECKING:  # seconds to import
    from leaf_distill.detection.cells import Setting

RENDERING = ("chat_template", "chat_template_kwargs", "system_prompt", "trust_remote_code")
"""Settings with which a training has to read prompts as the detection did."""

SWEPT = 10
"""With so many scored rows, other thresholds are worth a look where nothing was kept."""


def changed(settings: Mapping[str, Any], config: type) -> dict[str, Any]:
    """Return the settings that are not the defaults of a dataclass, as options of a command."""
    defaults = {
        item.name: item.default_factory()
        if item.default_factory is not dataclasses.MISSING
        else item.default
        for item in dataclasses.fields(config)
    }
    return {
        name: json.dumps(value) if isinstance(value, dict) else value
        for name, value in settings.items()
        if name in defaults and value != defaults[name]
    }


def after_detect(
    arm: Path, settings: Mapping[str, Any], *, scored: int, kept: int, trains: bool = True
) -> None:
    """Name the report, and the training where it has something new to learn from.

    Where nothing was scored there is nothing to see, and the detection has said what to change.

    Args:
        arm: the directory of the arm.
        settings: those of DetectConfig.
        scored: the rows that a report shows and a sweep reads.
        kept: the counterfactuals.
        trains: whether a training can read both models.
    """
    if not scored:
        return
    say_next(f"Next, see what was {'cut' if kept else 'tried'}", "report", {"run_dir": arm})
    if not kept and scored >= SWEPT:
        say_next("Nothing was kept; other thresholds", "sweep", {"run_dir": arm})
    elif kept and trains:
        to_distill(arm, settings)


def to_distill(arm: Path, settings: Mapping[str, Any], purpose: str = "Train on it") -> None:
    """Name the training on an arm's rows."""
    from leaf_distill.detection.config import DetectConfig

    names = (*RENDERING, "max_length", "teacher_quantization")
    shared = {name: settings[name] for name in names if name in settings}
    options = {
        "student": settings["student"] or "STUDENT",
        "teacher": settings["teacher"] or "TEACHER",
        "dataset": arm,
        "output_dir": Path(settings["output_dir"]) / "student",
        **changed(shared, DetectConfig),
    }
    say_next(purpose, "distill", options)


def after_cache(config: Any) -> None:
    """Name the training that reads the cache in the teacher's place."""
    from leaf_distill.training.config import CacheConfig

    known = {} if config.student else detected_settings(config.dataset)
    shared = {name: getattr(config, name) for name in (*RENDERING, "max_length", "train_on")}
    split = {"dataset_split": config.dataset_split, "columns": config.columns}
    options = {
        "student": config.student or known.get("student") or "STUDENT",
        "teacher_cache": config.output_dir,
        "dataset": config.dataset,
        "output_dir": f"{Path(config.output_dir)}-student",
        **changed(shared | split, CacheConfig),
    }
    say_next("Next, train without the teacher", "distill", options)


def detected_settings(dataset: str) -> dict[str, Any]:
    """Return the settings of the `leaf detect` that made a dataset; nothing if none did."""
    from leaf_distill.io import read_json  # imports pyarrow

    path = Path(dataset).expanduser()
    directories = [path.parent if path.is_file() else path]
    directories += sorted(one.parent for one in path.glob("arms/*/funnel.json"))
    for directory in directories:
        if (directory / "funnel.json").is_file():
            found = read_json(directory / "funnel.json").get("settings")
            return found if isinstance(found, dict) else {}
    return {}


def after_distill(arguments: Any, config: Any) -> None:
    """Name the evaluation of the student before and after, on the rows of the evaluation."""
    from leaf_distill.detection.config import DetectConfig
    from leaf_distill.evaluation.config import EvaluateConfig

    detected = detected_settings(arguments.dataset)
    rows, purpose = arguments.eval_dataset, "Next, let both answer them"
    split, columns = arguments.eval_split, arguments.columns
    if rows is None or (Path(rows).expanduser() / "run.json").is_file():
        rows, split = "TEST.jsonl", "test"
        columns = detected.get("columns") or columns  # the detection read rows like these
        purpose = "Next, let both answer rows that were not trained on, in place of TEST.jsonl"
    graded = {"grade": config.grade} | {
        name: detected[name] for name in ("grade", "max_new_tokens") if name in detected
    }
    shared = {name: getattr(config, name, None) for name in RENDERING if hasattr(config, name)}
    shared |= {"trust_remote_code": arguments.trust_remote_code, "dataset_split": split}
    shared["columns"] = columns
    options = {
        "model": [arguments.student, config.output_dir],
        "dataset": rows,
        "output_dir": f"{Path(config.output_dir)}-evaluated",
        **changed(graded, DetectConfig),
        **changed(shared, EvaluateConfig),
    }
    say_next(purpose, "evaluate", options)


def after_compare(root: Path) -> None:
    """Name the studies of the arms, where one has cuts."""
    if any((root / "arms").glob("*/funnel.json")):
        say_next("Next, what cutting does without training", "analyze", {"run_dir": root})


def after_analyze(root: Path, arms: Mapping[str, int], *, curves: bool) -> None:
    """Name the report of the arm that kept most, and the curves where they are missing."""
    if not curves:
        options = {"run_dir": root, "curves": "true"}
        say_next("Next, deletion and insertion curves", "analyze", options)
    if arms:
        best = max(arms, key=lambda name: arms[name])
        say_next("See what was cut", "report", {"run_dir": root / "arms" / best})


def after_sweep(arm: Path, proposals: Sequence[Setting]) -> None:
    """Name the detection with the proposed settings, or the training if they are the arm's.

    Levels with different proposals have a detection each: no one measured a mixture of them.

    Args:
        arm: the directory of the arm.
        proposals: the setting of each level that has one.
    """
    from leaf_distill.detection.cells import AXES
    from leaf_distill.detection.config import DetectConfig

    settings = detected_settings(str(arm))
    if not settings or not proposals:
        return
    names = {"instruction": "threshold", "response": "response_threshold"}
    each = [
        {name: getattr(one, name) for name in (*AXES, "level")} | {names[one.level]: one.threshold}
        for one in proposals
    ]
    axes = {tuple(one[name] for name in AXES) for one in each}
    if settings["level"] == "both" and len(each) == 2 and len(axes) == 1:
        each = [{**each[0], **each[1], "level": "both"}]
    for options in each:
        if all(settings.get(name) == value for name, value in options.items()):
            to_distill(arm, settings, "Next, train on the arm")
            continue
        level = f" at the {options['level']} level" if each[1:] else ""
        purpose = f"Next, cut with the proposed setting{level}"
        # A preset's values are among the settings, and would come back over the proposed ones.
        say_next(purpose, "detect", changed({**settings, **options, "preset": None}, DetectConfig))
