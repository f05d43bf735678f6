"""The table of models on benchmarks: for the terminal, as Markdown, and as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import RenderableType

from leaf_distill.config import package_versions
from leaf_distill.evaluation.benchmarks import Benchmark, Group
from leaf_distill.evaluation.config import EvaluateConfig
from leaf_distill.evaluation.measure import Measured
from leaf_distill.evaluation.tables import printed_table
from leaf_distill.io import write_bytes, write_json
from leaf_distill.statistics import bootstrap
from leaf_distill.training.model_card import markdown_table

AVERAGE = "Avg."
NOTE = (
    "Percent of the problems, with 95 % intervals: Wilson's where each problem has one answer, "
    "else of a bootstrap over the problems; for an average, over those of each benchmark. "
    "Differences in points, on the same problems, with the interval of a paired bootstrap. Where "
    "all problems agree, a bootstrap's interval has no width, and says nothing. Chance in training "
    "is in no interval."
)


@dataclass(frozen=True)
class Score:
    """A model's number in one column of a table, as a share.

    interval: its 95 % interval. difference: to the first model, with its interval; None for it.
    """

    value: float
    interval: tuple[float, float]
    difference: tuple[float, float, float] | None


@dataclass(frozen=True)
class ResultTable:
    """The models' numbers on some benchmarks, or on a suite with its average.

    suite: its name, or None. columns: the benchmarks, each with its metric where that is not
    pass@1. scores: one for each column, by model.
    """

    suite: str | None
    columns: tuple[str, ...]
    scores: dict[str, tuple[Score, ...]]

    def lines(self, form: str = "{} ({} to {})") -> list[tuple[str, ...]]:
        """Return the cells of the numbers: the value and the ends of its interval in a form."""
        lines = [("model", *self.columns)]
        for model, scores in self.scores.items():
            numbers = [(one.value, *one.interval) for one in scores]
            cells = [form.format(*(f"{100 * part:.1f}" for part in three)) for three in numbers]
            lines.append((model, *cells))
        return lines

    def differences(self, form: str = "{} ({} to {})") -> list[tuple[str, ...]]:
        """Return the cells of the differences to the first model; none with a single model."""
        _, *others = self.scores
        lines = [("model", *self.columns)] if others else []
        for model in others:
            numbers = [one.difference or () for one in self.scores[model]]
            cells = [form.format(*(f"{100 * part:+.1f}" for part in three)) for three in numbers]
            lines.append((model, *cells))
        return lines


@dataclass(frozen=True)
class BenchmarkResult:
    """The tables of `evaluate_benchmarks`, and the Markdown file that holds them."""

    tables: tuple[ResultTable, ...]
    table: Path

    def printed(self) -> list[RenderableType]:
        """Return the tables for a terminal, a number above its interval; the last has the note."""
        tables, form = [], "{}\n{} to {}"
        for one in self.tables:
            of = f" on {one.suite}" if one.suite else ""
            tables.append((f"Accuracy{of}, %", one.lines(form)))
            if differences := one.differences(form):
                title = f"Differences to {next(iter(one.scores))}{of}, points"
                tables.append((title, differences))
        *others, last = tables
        return [*(printed_table(*one) for one in others), printed_table(*last, caption=NOTE)]


def write_results(
    root: Path,
    groups: Sequence[Group],
    models: Sequence[str],
    done: Mapping[tuple[str, str], Measured],
    config: EvaluateConfig,
) -> BenchmarkResult:
    """Write `results.json` and `results.md`.

    Args:
        root: the directory.
        groups: the benchmarks of each table.
        models: the models' short names; differences are to the first.
        done: what each model reached on each benchmark.
        config: the command's settings.
    """
    tables = tuple(_table(group, models, done) for group in groups)
    result = BenchmarkResult(tables, root / "results.md")
    measured: dict[str, Any] = {}
    for (model, benchmark), one in done.items():
        measured.setdefault(benchmark, {})[model] = {
            name: value
            for name, value in one.metrics.items()
            if name not in ("command", "settings")
        }
    write_json(
        root / "results.json",
        {
            "command": "evaluate",
            "models": dict(zip(models, config.model, strict=True)),
            "reference": models[0],
            "tables": [asdict(table) for table in tables],
            "measured": measured,
            "settings": asdict(config),
            "versions": package_versions(),
        },
    )
    parts = ["# Accuracy, %"]
    for table in tables:
        parts += [f"## {table.suite}"] if table.suite else []
        parts.append(markdown_table(table.lines()))
        if differences := table.differences():
            parts += [f"Differences to {models[0]}, points:", markdown_table(differences)]
    asked = [one for group in groups for one in group.benchmarks]
    rows = {name: next(iter(of.values()))["rows"] for name, of in measured.items()}
    parts += ["\n".join(f"- {_described(one, rows[one.name])}" for one in asked), NOTE, ""]
    write_bytes(result.table, "\n\n".join(parts).encode())
    return result


def _table(
    group: Group, models: Sequence[str], done: Mapping[tuple[str, str], Measured]
) -> ResultTable:
    names = [benchmark.name for benchmark in group.benchmarks]
    rows: dict[str, tuple[Score, ...]] = {}
    for model in models:
        mine = [done[model, name] for name in names]
        reference = [done[models[0], name].scores for name in names]
        changes = [one.scores - other for one, other in zip(mine, reference, strict=True)]
        is_first = model == models[0]
        scores = [
            Score(
                one.result.accuracy, one.result.interval, None if is_first else bootstrap([change])
            )
            for one, change in zip(mine, changes, strict=True)
        ]
        if group.suite is not None:
            value, low, high = bootstrap([one.scores for one in mine])
            scores.append(Score(value, (low, high), None if is_first else bootstrap(changes)))
        rows[model] = tuple(scores)
    columns = [_label(benchmark) for benchmark in group.benchmarks]
    return ResultTable(
        group.suite, (*columns, *([AVERAGE] if group.suite is not None else [])), rows
    )


def _described(benchmark: Benchmark, rows: int) -> str:
    """Return in one line how a benchmark was asked."""
    whole = benchmark.problems
    of = f" of {whole}" if whole is not None and whole != rows else ""
    drawn = f", {benchmark.samples} answers at temperature {benchmark.temperature:g} each"
    return (
        f"{benchmark.name}: {rows}{of} problems, answers of at most {benchmark.max_new_tokens} "
        f"tokens{drawn if benchmark.samples > 1 else ''}, graded by {benchmark.grade}"
    )


def _label(benchmark: Benchmark) -> str:
    own = "" if benchmark.metric == "pass@1" else f" {benchmark.metric}"
    return f"{benchmark.name}{own}"
