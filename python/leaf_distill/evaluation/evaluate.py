"""`leaf evaluate`: a model's greedy answers on a dataset, graded, with a confidence interval."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
from rich.console import Console
from rich.table import Table
from rich.text import Text

from leaf_distill.config import EvaluateConfig, json_object, need, package_versions
from leaf_distill.data.dataset import load_examples
from leaf_distill.data.example import Answer, Example, UnusableRow
from leaf_distill.detection.answers import (
    PromptedModel,
    answer,
    gold_warning,
    open_cache,
    prompted_model,
)
from leaf_distill.io import locked, read_json, write_json, write_table
from leaf_distill.models.loading import LazyModel

if TYPE_CHECKING:  # seconds to import
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

VERDICTS = (
    *("right", "wrong", "no_answer", "timeout"),
    *("cut_off", "not_finite", "too_long", "not_renderable"),
)
"""The grader's verdicts; cut_off by the length limit; logits not_finite; a prompt too_long, or
not_renderable: refused by the chat template."""


@dataclass(frozen=True)
class EvaluateResult:
    """Accuracy over all rows, its 95 % interval, the count of each verdict, and the answers."""

    accuracy: float
    interval: tuple[float, float]
    counts: dict[str, int]
    answers: Path


def evaluate(
    config: EvaluateConfig,
    *,
    dataset: Any = None,
    model: PreTrainedModel | None = None,
    processing_class: PreTrainedTokenizerBase | None = None,
) -> EvaluateResult:
    """Answer greedily, grade, and write `answers.parquet` and `metrics.json`.

    A row without `answer` is graded against its completion. Every row that could be read is in the
    denominator, also those that were cut off or not answered. Known answers come from the row
    cache, so that the same command goes on where a killed one stopped.

    Args:
        config: the settings.
        dataset: rows in memory in place of config.dataset, a `datasets.Dataset` or dicts.
        model, processing_class: a model and its tokenizer in memory in place of config.model.

    Raises:
        ValueError: the model or the rows cannot be read, or the directory holds other files.
        StoreError: a file cannot be written, or another process holds the directory.
    """
    need(
        config,
        *([] if model is not None else ["model"]),
        *([] if dataset is not None else ["dataset"]),
    )
    root = Path(config.output_dir).expanduser()
    _check_directory(root, config)
    lazy = LazyModel(
        model if model is not None else config.model,
        processing_class=processing_class,
        dtype=config.dtype,
        device=config.device,
        trust_remote_code=config.trust_remote_code,
    )
    asked = prompted_model("student", lazy, config)
    examples = load_examples(
        config.dataset if dataset is None else dataset,
        split=config.dataset_split,
        columns=json_object(config.columns, "columns"),
        max_rows=config.max_rows,
        need_completion=False,
    )
    rows = [example for example in examples if example.outcome is None]
    if not rows:
        detail = examples[0].outcome.detail if examples and examples[0].outcome else "it is empty"
        raise ValueError(
            f"dataset: must have a usable row, got none of {config.dataset} ({detail})"
        )
    with locked(root), open_cache(config) as cache:
        fitting = _render(asked, rows, config)
        answer(asked, fitting, [example.gold for example in fitting], config, cache)
        table = _table(rows)
        write_table(root / "answers.parquet", table)
        result = _result(root, table)
        metrics = {
            "command": "evaluate",
            **asdict(result),
            "answers": str(result.answers),
            "rows": len(rows),
            "unreadable_rows": len(examples) - len(rows),
            "settings": asdict(config),
            "model": {"name": lazy.name, "sha256": lazy.fingerprint},
            "versions": package_versions(),
        }
        write_json(root / "metrics.json", metrics)
    for sentence in gold_warning([example.gold for example in rows], config):
        logger.warning("%s", sentence)
    _show(f"{lazy.name} on {config.dataset or 'rows in memory'}", result, metrics)
    return result


def _check_directory(root: Path, config: EvaluateConfig) -> None:
    """Refuse a directory in which results would replace an input or somebody else's files."""
    if root.exists() and not root.is_dir():
        raise ValueError(f"output_dir: must be a directory, got the file {root}")
    path = root / "metrics.json"
    if path.exists() and read_json(path).get("command") != "evaluate":
        raise ValueError(
            f"output_dir: must be new or of an earlier `leaf evaluate`, got {root}, whose "
            "metrics.json is of another command; give another one"
        )
    if not path.exists() and (root / "answers.parquet").exists():
        raise ValueError(
            f"output_dir: must be new or of an earlier `leaf evaluate`, got {root}, which holds an "
            "answers.parquet of something else; give another one"
        )


def _render(asked: PromptedModel, rows: Sequence[Example], config: EvaluateConfig) -> list[Example]:
    """Render prompts and return the rows that fit; the others get their verdict."""
    positions = asked.model.max_positions
    limit = min(config.max_length, positions - 1) if positions else config.max_length
    fitting: list[Example] = []
    refused: list[str] = []
    for example in rows:
        try:
            rendering = asked.renderer.prompt(example)
        except UnusableRow as problem:
            refused.append(f"row {example.row_id}: {problem.detail}")
            example.answers["student"] = Answer("", 0, "not_renderable")
            continue
        example.renderings["student"] = rendering
        if len(rendering) <= limit:
            fitting.append(example)
        else:
            example.answers["student"] = Answer("", 0, "too_long")
    if refused:
        logger.warning("%d rows cannot be rendered, as %s", len(refused), refused[0])
    return fitting


def _table(rows: Sequence[Example]) -> pa.Table:
    answers = [example.answers["student"] for example in rows]
    texts = [None if one.verdict in ("too_long", "not_renderable") else one.text for one in answers]
    return pa.table(
        {
            "row_id": pa.array([example.row_id for example in rows], pa.int64()),
            "prompt": [example.user_text for example in rows],
            "gold": [example.gold for example in rows],
            "answer": pa.array(texts, pa.string()),
            "verdict": [one.verdict for one in answers],
            "n_tokens": pa.array([one.n_tokens for one in answers], pa.int32()),
        }
    )


def _result(root: Path, table: pa.Table) -> EvaluateResult:
    counts = Counter(table["verdict"].to_pylist())
    return EvaluateResult(
        accuracy=counts["right"] / table.num_rows,
        interval=wilson_interval(counts["right"], table.num_rows),
        counts={name: counts[name] for name in VERDICTS if counts[name]},
        answers=root / "answers.parquet",
    )


def wilson_interval(right: int, total: int, *, z: float = 1.959964) -> tuple[float, float]:
    """Return Wilson's score interval of a proportion; z = 1.96 is 95 %.

        (p + z^2/2n +- z sqrt(p (1 - p) / n + z^2/4n^2)) / (1 + z^2/n)

    Unlike p +- z sqrt(p (1 - p) / n), it stays in [0, 1] and has a width at 0 and 1.
    """
    if not 0 <= right <= total or total < 1:
        raise ValueError(f"right: must be from 0 to total, and total >= 1, got {right}, {total}")
    share = right / total
    center = share + z * z / (2 * total)
    half = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    scale = 1 + z * z / total
    return max(0.0, (center - half) / scale), min(1.0, (center + half) / scale)


def _show(title: str, result: EvaluateResult, metrics: dict[str, Any]) -> None:
    total = metrics["rows"]
    table = Table(title=Text(title))
    table.add_column("verdict")
    table.add_column("rows", justify="right")
    table.add_column("share", justify="right")
    for verdict, count in result.counts.items():
        table.add_row(verdict, str(count), f"{count / total:.1%}")
    console = Console()
    console.print(table)
    if metrics["unreadable_rows"]:
        console.print(f"{metrics['unreadable_rows']} rows could not be used and are not counted")
    low, high = result.interval
    print(
        f"Accuracy {result.accuracy:.1%} (95 % interval {low:.1%} to {high:.1%}, {total} rows); "
        f"the answers are in {result.answers}"
    )
