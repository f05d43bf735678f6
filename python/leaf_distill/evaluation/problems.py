"""The problems of a benchmark or a dataset, with the settings of the command."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from leaf_distill.config import AnswerOptions, GradingOptions
from leaf_distill.data.dataset import load_examples
from leaf_distill.data.example import Example, remaining
from leaf_distill.detection.answers import Decoding, leave_without_gold, open_cache
from leaf_distill.evaluation.benchmarks import Benchmark
from leaf_distill.evaluation.config import EvaluateConfig

logger = logging.getLogger(__name__)

OVERRIDES = ("max_new_tokens", "grade", "samples", "temperature", "top_p", "k")
"""The settings of the command that replace a benchmark's own."""


@dataclass(frozen=True)
class Problems:
    """The usable rows of a benchmark, and how many were not."""

    benchmark: Benchmark
    rows: Sequence[Example]
    unreadable: int


def settled(benchmark: Benchmark, config: EvaluateConfig) -> Benchmark:
    """Return a benchmark with the settings that the command replaces.

    Raises:
        ValueError: they do not fit together, or programs may not run.
    """
    given = {name: getattr(config, name) for name in OVERRIDES}
    chosen = replace(
        benchmark, **{name: value for name, value in given.items() if value is not None}
    )
    if chosen.grade == "code" and not config.allow_code_execution:
        raise ValueError(
            "allow_code_execution: must be true to run the programs in answers, got false; give "
            "--allow_code_execution, which confines them"
        )
    return chosen


def answer_options(benchmark: Benchmark, config: EvaluateConfig) -> AnswerOptions:
    """Return the settings of the answers to a benchmark."""
    shared = {name: getattr(config, name) for name in GradingOptions.__dataclass_fields__}
    return AnswerOptions(**shared, max_new_tokens=benchmark.max_new_tokens, grade=benchmark.grade)


def decoding(benchmark: Benchmark, config: EvaluateConfig) -> Decoding:
    """Return how the answers to a benchmark come from logits."""
    temperature, top_p = float(benchmark.temperature), float(benchmark.top_p)
    return Decoding(benchmark.stop, temperature, top_p, config.seed)


def of_dataset(config: EvaluateConfig) -> Benchmark:
    """Return `--dataset` as a benchmark that is named after it."""
    columns = config.columns if isinstance(config.columns, dict) else None
    return Benchmark(
        name=file_name(Path(config.dataset).name.split(".")[0]) or "rows",
        dataset=config.dataset or "rows in memory",
        dataset_split=config.dataset_split,
        columns=columns,
    )


def file_name(text: str) -> str:
    """Return a text without what a file's name should not have."""
    kept = "".join(char if char.isalnum() or char in "_.+-" else "-" for char in text)
    return kept.strip("-.+")


def load_problems(benchmark: Benchmark, config: EvaluateConfig, source: Any = None) -> Problems:
    """Read the rows of a benchmark, and ask them as its template says.

    Args:
        benchmark: with the settings of the command.
        config: the command's; a number of problems other than the benchmark's is logged.
        source: rows in memory in place of the benchmark's dataset.

    Raises:
        ValueError: the rows cannot be read, or none is usable.
    """
    try:
        examples = load_examples(
            benchmark.dataset if source is None else source,
            split=benchmark.dataset_split,
            columns=benchmark.columns,
            max_rows=config.max_rows,
            need_completion=False,
        )
        with open_cache(config) as cache:
            leave_without_gold(examples, answer_options(benchmark, config), cache)
        rows = list(remaining(examples))
        if not rows:
            first = examples[0].outcome if examples else None
            raise ValueError(
                f"dataset: must have a usable row, got none of {benchmark.dataset} "
                f"({first.detail if first else 'it is empty'}); name other columns or rows"
            )
    except ValueError as error:
        if not config.benchmark:
            raise
        is_local = any(file.endswith(benchmark.dataset) for file in config.benchmark_file)
        advice = "" if is_local else f"; --benchmark_file {benchmark.name}=PATH takes local rows"
        raise ValueError(f"benchmark {benchmark.name}: {error}{advice}") from error
    if config.max_rows is None and benchmark.problems not in (None, len(examples)):
        logger.warning(
            "%s has %d problems, and %s has %d",
            *(benchmark.name, benchmark.problems, benchmark.dataset, len(examples)),
        )
    if unread := [one for one in examples if one.outcome is not None]:
        logger.warning(
            "%s: %d of %d problems cannot be used and are not counted, as row %d: %s",
            *(benchmark.name, len(unread), len(examples), unread[0].row_id),
            unread[0].outcome.detail if unread[0].outcome else "",
        )
    for example in rows:
        example.given = {}  # answers of other models than the one that is evaluated
        *before, last = example.messages
        example.messages = (*before, {**last, "content": benchmark.asked(last["content"])})
    return Problems(benchmark, rows, len(examples) - len(rows))
