"""`leaf evaluate`: a model's greedy answers on a dataset, graded, with a confidence interval."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console

from leaf_distill.config import EvaluateConfig, json_object, need, package_versions
from leaf_distill.data.dataset import load_examples
from leaf_distill.data.example import Answer, Example, UnusableRow, remaining
from leaf_distill.detection.answers import (
    ANSWER_SHOWN,
    PromptedModel,
    answer,
    gold_warning,
    leave_without_gold,
    open_cache,
    prompted_model,
)
from leaf_distill.evaluation.tables import printed_table
from leaf_distill.io import is_of, locked, user_directory, write_json, write_table
from leaf_distill.models.loading import LazyModel
from leaf_distill.statistics import wilson_interval as wilson_interval

if TYPE_CHECKING:  # seconds to import
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

VERDICTS = (
    *("right", "wrong", "no_answer", "timeout"),
    *("cut_off", "not_finite", "too_long", "not_renderable"),
)
"""The grader's verdicts; an answer cut_off by the length limit; logits that are not_finite; a
prompt that is too_long, or not_renderable by the chat template."""


ANSWERS = pa.schema(
    [
        ("row_id", pa.int64()),
        *((name, pa.string()) for name in ("prompt", "gold", "answer", "verdict")),
        ("n_tokens", pa.int32()),
    ]
)
"""The columns of answers.parquet."""


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

    Returns:
        The accuracy, and where the answers are.

    Raises:
        ValueError: the model or the rows cannot be read, or the directory holds other files.
        StoreError: a file cannot be written, or another process holds the directory.
    """
    given = {"model": model, "dataset": dataset}
    need(config, *(name for name, value in given.items() if value is None))
    root = user_directory(config.output_dir)
    check_directory(root)
    _check_inputs(root, config)
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
    with open_cache(config) as cache:
        leave_without_gold(examples, config, cache)
    rows = list(remaining(examples))
    if not rows:
        detail = examples[0].outcome.detail if examples and examples[0].outcome else "it is empty"
        raise ValueError(
            f"dataset: must have a usable row, got none of {config.dataset} ({detail}); name other "
            "columns or rows"
        )
    golds = [example.gold for example in rows]
    with locked(root), open_cache(config) as cache:
        fitting = _render(asked, rows, config)
        answer(asked, fitting, config, cache)
        result = _write_answers(root / "answers.parquet", rows)
        metrics = {
            "command": "evaluate",
            **asdict(result),
            "rows": len(rows),
            "unreadable_rows": len(examples) - len(rows),
            "settings": asdict(config),
            "model": {"name": lazy.name, "sha256": lazy.fingerprint},
            "versions": package_versions(),
        }
        write_json(root / "metrics.json", metrics)
    if fitting and "right" not in result.counts:
        first = fitting[0]
        logger.warning(
            "no answer is right; the first ends %r, and its gold ends %r: see --grade (now %s), "
            "--max_new_tokens and --chat_template",
            first.answers["student"].text[-ANSWER_SHOWN:],
            first.gold[-ANSWER_SHOWN:],
            config.grade,
        )
    for sentence in gold_warning(golds, config):
        logger.warning("%s", sentence)
    _show(f"{lazy.name} on {config.dataset or 'rows in memory'}", result, metrics)
    return result


def _check_inputs(root: Path, config: EvaluateConfig) -> None:
    """Refuse a directory in which results would replace an input, or stand in a model's."""
    written = [(root / name).resolve() for name in ("", "metrics.json", "answers.parquet")]
    for name in ("model", "dataset"):
        try:
            given = Path(getattr(config, name) or os.devnull).expanduser()
            taken = given.resolve() in written[0 if name == "model" else 1 :]
        except (OSError, RuntimeError):
            continue  # no path; the loader says what is wrong with it
        if taken:
            raise ValueError(
                f"output_dir: must not be an input, but the {name} is {given}; give another one"
            )


def check_directory(root: Path) -> None:
    """Raise ValueError where an evaluation would replace somebody else's files."""
    metrics, answers = root / "metrics.json", root / "answers.parquet"
    for path, ours in ((metrics, is_of(metrics, "evaluate")), (answers, _is_answers(answers))):
        if os.path.lexists(path) and not ours:
            raise ValueError(
                f"output_dir: must be new or of an earlier `leaf evaluate`, got {root}, whose "
                f"{path.name} is damaged or of something else; delete it, or give another "
                "output_dir"
            )


def _is_answers(path: Path) -> bool:
    try:
        return bool(pq.read_schema(path).names == ANSWERS.names)
    except (pa.ArrowException, OSError):
        return False


def _render(asked: PromptedModel, rows: Sequence[Example], config: EvaluateConfig) -> list[Example]:
    """Render prompts and return the rows that fit; the others get their verdict."""
    positions = asked.model.max_positions
    limit = min(config.max_length, positions - 1) if positions else config.max_length
    fitting: list[Example] = []
    refused: list[str] = []
    for example in rows:
        try:
            rendering = asked.prompt(example)
        except UnusableRow as problem:
            refused.append(f"row {example.row_id}: {problem.detail}")
            example.answers["student"] = Answer("", 0, "not_renderable")
            continue
        example.renderings["student"] = rendering
        if len(rendering) <= limit:
            fitting.append(example)
        else:
            example.answers["student"] = Answer("", 0, "too_long")
    if not fitting:
        first = refused[0] if refused else f"all prompts have more than {limit} tokens"
        raise ValueError(
            f"dataset: must have a row that the model can be asked, got {len(rows)} that are not "
            f"({first})"
        )
    if refused:
        logger.warning("%d rows cannot be rendered, as %s", len(refused), refused[0])
    return fitting


def _write_answers(path: Path, rows: Sequence[Example]) -> EvaluateResult:
    answers = [example.answers["student"] for example in rows]
    texts = [None if one.verdict in ("too_long", "not_renderable") else one.text for one in answers]
    table = pa.table(
        {
            "row_id": [example.row_id for example in rows],
            "prompt": [example.user_text for example in rows],
            "gold": [example.gold for example in rows],
            "answer": texts,
            "verdict": [one.verdict for one in answers],
            "n_tokens": [one.n_tokens for one in answers],
        },
        schema=ANSWERS,
    )
    write_table(path, table)
    counts = Counter(one.verdict for one in answers)
    return EvaluateResult(
        accuracy=counts["right"] / len(rows),
        interval=wilson_interval(counts["right"], len(rows)),
        counts={name: counts[name] for name in VERDICTS if counts[name]},
        answers=path,
    )


def _show(title: str, result: EvaluateResult, metrics: dict[str, Any]) -> None:
    total = metrics["rows"]
    counts = [(name, str(n), f"{n / total:.1%}") for name, n in result.counts.items()]
    console = Console()
    console.print(printed_table(title, [("verdict", "rows", "share"), *counts]))
    if metrics["unreadable_rows"]:
        console.print(f"{metrics['unreadable_rows']} rows could not be used and are not counted")
    low, high = result.interval
    print(
        f"Accuracy {result.accuracy:.1%} (95 % interval {low:.1%} to {high:.1%}, {total} rows); "
        f"the answers are in {result.answers}"
    )
