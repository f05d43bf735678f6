"""What `leaf distill` reads beside the models: rows, and the settings that detection had."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from leaf_distill.data.dataset import load_examples
from leaf_distill.data.example import Example
from leaf_distill.data.prompt import template_differences
from leaf_distill.io import read_json
from leaf_distill.training.config import DistillArguments, LeafConfig
from leaf_distill.training.pair import make_renderer

logger = logging.getLogger(__name__)


def find_dataset(source: str) -> str:
    """Return the dataset of a run of `leaf detect`, or of one of its arms; others as they are.

    Raises:
        ValueError: the run is not finished, or has several arms.
    """
    path = Path(source).expanduser()
    if (path / "dataset.parquet").is_file():
        return str(path / "dataset.parquet")
    arms = sorted(path.glob("arms/*/dataset.parquet"))
    if len(arms) == 1:
        return str(arms[0])
    if arms:
        names = ", ".join(str(arm.parent) for arm in arms)
        raise ValueError(f"dataset: must be one arm of the run {source}, got {len(arms)}: {names}")
    if (path / "run.json").is_file():
        raise ValueError(
            f"dataset: must be a finished run of `leaf detect`, got {source}, which has no dataset "
            "yet; run the same command again, it goes on where it stopped"
        )
    return source


def read_detected(source: str) -> dict[str, Any]:
    """The settings of the run of `leaf detect` that made a dataset, empty for any other."""
    dataset = Path(source).expanduser()
    path = dataset.with_name("funnel.json")
    made = dataset.stem == "dataset" and path.is_file()
    settings = read_json(path).get("settings") if made else None
    return settings if isinstance(settings, dict) else {}


def load_dataset(
    arguments: DistillArguments, source: str, split: str, max_rows: int | None
) -> list[Example]:
    """Every row of a dataset; those that cannot be used have an `outcome`."""
    columns = arguments.columns if isinstance(arguments.columns, dict) else None
    examples = load_examples(source, split=split, columns=columns, max_rows=max_rows)
    if all(one.branch == "original" for one in examples):
        logger.info("%s has no counterfactuals: the loss is that of plain distillation", source)
    return examples


def compare_templates(
    config: LeafConfig,
    student: PreTrainedTokenizerBase,
    teacher: PreTrainedTokenizerBase,
    detected: Mapping[str, Any],
) -> None:
    """Log how the two models' prompts differ, and both from those that detection scored."""
    for sentence in template_differences(
        make_renderer(teacher, config), make_renderer(student, config)
    ):
        logger.warning("%s", sentence)
    for name in ("chat_template", "chat_template_kwargs", "system_prompt"):
        value = getattr(config, name)
        if detected.get(name, value) != value:
            logger.warning(
                "%s is %r, but `leaf detect` scored with %r", name, value, detected[name]
            )
