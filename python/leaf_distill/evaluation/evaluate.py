"""`leaf evaluate`: graded answers of one model to a dataset, or of several to benchmarks."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from leaf_distill.config import need
from leaf_distill.detection.answers import open_cache, prompted_model
from leaf_distill.evaluation.benchmarks import Benchmark, Group, find_benchmarks
from leaf_distill.evaluation.config import EvaluateConfig
from leaf_distill.evaluation.measure import (
    EvaluateResult,
    Measured,
    check_askable,
    check_directory,
    check_inputs,
    measure,
)
from leaf_distill.evaluation.problems import file_name, load_problems, of_dataset, settled
from leaf_distill.evaluation.results import BenchmarkResult, write_results
from leaf_distill.evaluation.tables import check_table, printed_table
from leaf_distill.io import locked, user_directory
from leaf_distill.models.loading import LazyModel
from leaf_distill.terminal import plain_console, say

if TYPE_CHECKING:  # seconds to import
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def evaluate(
    config: EvaluateConfig,
    *,
    dataset: Any = None,
    model: PreTrainedModel | None = None,
    processing_class: PreTrainedTokenizerBase | None = None,
) -> EvaluateResult:
    """Let one model answer a dataset, grade, and write `answers.parquet` and `metrics.json`.

    A row without `answer` is graded against its completion, one with tests by them. Every row that
    could be read is in the denominator, also those that were cut off or not answered. Known answers
    come from the row cache, so that the same command goes on where a killed one stopped.

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
    if config.benchmark or len(config.model) > 1:
        raise ValueError(
            "model: must be one, with a dataset, got several or a benchmark; evaluate_benchmarks() "
            "takes these"
        )
    root = user_directory(config.output_dir)
    check_directory(root)
    files = [root / "metrics.json", root / "answers.parquet"]
    check_inputs([root], files, config.model, [config.dataset])
    benchmark = settled(of_dataset(config), config)
    lazy = _lazy(model if model is not None else config.model[0], config, processing_class)
    asked = prompted_model("student", lazy, config)
    problems = load_problems(benchmark, config, dataset)
    with locked(root), open_cache(config) as cache:
        done = measure(asked, problems, config, cache, root)
    _show(f"{lazy.name} on {config.dataset or 'rows in memory'}", done)
    return done.result


def evaluate_benchmarks(config: EvaluateConfig) -> BenchmarkResult:
    """Let models answer benchmarks or a dataset, and write one table of their accuracies.

    Writes `BENCHMARK/MODEL/` with the files of `evaluate`, and `results.json` and `results.md`, in
    config.output_dir. All problems are read before any model is loaded. The same command goes on
    where a killed one stopped.

    Args:
        config: the settings.

    Returns:
        The tables, and where the results are.

    Raises:
        ValueError: a model or a benchmark cannot be read, or the directory holds other files.
        StoreError: a file cannot be written, or another process holds the directory.
    """
    need(config, "model", *(() if config.benchmark else ("dataset",)))
    groups = find_benchmarks(config.benchmark, config.benchmark_file)
    if not config.benchmark:
        groups = [Group(None, (of_dataset(config),))]
    groups = [
        Group(suite, tuple(settled(one, config) for one in several)) for suite, several in groups
    ]
    benchmarks = [benchmark for group in groups for benchmark in group.benchmarks]
    names = short_names(config.model)
    root = user_directory(config.output_dir)
    places = _places(root, names, benchmarks, config)
    problems = [load_problems(benchmark, config) for benchmark in benchmarks]
    models = [prompted_model("student", _lazy(model, config), config) for model in config.model]
    for asked in models:
        for one in problems:
            check_askable(asked, one, config)
    done: dict[tuple[str, str], Measured] = {}
    with locked(root), open_cache(config) as cache:
        for name, asked in zip(names, models, strict=True):
            for one in problems:
                pair = (name, one.benchmark.name)
                print(f"{name} on {one.benchmark.name} ...", file=sys.stderr, flush=True)
                done[pair] = measure(asked, one, config, cache, places[pair])
            asked.model.release()
        result = write_results(root, groups, names, done, config)
    console = plain_console()
    for table in result.printed():
        console.print(table, "")
    say(f"The table is in {result.table}, its numbers are in {root / 'results.json'}")
    return result


def _places(
    root: Path, names: Sequence[str], benchmarks: Sequence[Benchmark], config: EvaluateConfig
) -> dict[tuple[str, str], Path]:
    """Return the directory of each model on each benchmark; nothing in it is somebody else's."""
    places = {
        (name, benchmark.name): root / benchmark.name / name
        for name in names
        for benchmark in benchmarks
    }
    check_table(root, "results", "evaluate")
    files = [root / "results.json", root / "results.md"]
    for place in places.values():
        check_directory(user_directory(place))
        files += [place / "metrics.json", place / "answers.parquet"]
    datasets = [benchmark.dataset for benchmark in benchmarks]
    check_inputs([root, *places.values()], files, config.model, datasets)
    return places


def run(config: EvaluateConfig) -> None:
    """Run `leaf evaluate`: the files of one model on a dataset, or a table."""
    if config.benchmark or len(config.model) > 1:
        evaluate_benchmarks(config)
    elif config.model and not config.dataset:
        raise ValueError("dataset: must be given, got nothing; give --dataset or --benchmark")
    else:
        evaluate(config)


def _lazy(
    model: str | PreTrainedModel,
    config: EvaluateConfig,
    processing_class: PreTrainedTokenizerBase | None = None,
) -> LazyModel:
    return LazyModel(
        model,
        processing_class=processing_class,
        dtype=config.dtype,
        device=config.device,
        trust_remote_code=config.trust_remote_code,
    )


def short_names(models: Sequence[str]) -> list[str]:
    """Return a directory's name for each model: as few of the last parts as tell them apart.

    Raises:
        ValueError: two are the same.
    """
    paths = [os.path.expanduser(model) for model in models]
    parts = [Path(os.path.abspath(path) if os.path.exists(path) else path).parts for path in paths]
    names: list[str] = []
    for model, mine in zip(models, parts, strict=True):
        if parts.count(mine) > 1:
            raise ValueError(f"model: must be different, got {model} twice; name it once")
        alone = (
            count
            for count in range(1, len(mine))
            if sum(other[-count:] == mine[-count:] for other in parts) == 1
        )
        name = file_name("-".join(mine[-next(alone, len(mine)) :])) or "model"
        names.append(f"{name}-{len(names) + 1}" if name in names else name)
    return names


def _show(title: str, done: Measured) -> None:
    result, rows = done.result, done.metrics["rows"]
    total = sum(result.counts.values())
    counts = [(name, str(n), f"{n / total:.1%}") for name, n in result.counts.items()]
    unit = "rows" if total == rows else "answers"
    plain_console().print(printed_table(title, [("verdict", unit, "share"), *counts]))
    if done.metrics["unreadable_rows"]:
        say(f"{done.metrics['unreadable_rows']} rows could not be used and are not counted")
    low, high = result.interval
    what = "Accuracy" if total == rows else result.metric
    say(
        f"{what} {result.accuracy:.1%} (95 % interval {low:.1%} to {high:.1%}, {rows} rows); "
        f"the answers are in {result.answers}"
    )
