"""Settings of `leaf evaluate`, `leaf compare`, `leaf analyze` and `leaf sweep`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import get_args

from leaf_distill.config import (
    GRADES,
    MODEL,
    ROWS,
    GradeRule,
    GradingOptions,
    RowOptions,
    about,
    check_answer_options,
    check_drawing,
    check_rows,
    documented,
    need,
)
from leaf_distill.detection.config import Score, SpanRule, Strategy, Unit
from leaf_distill.evaluation.benchmarks import BENCHMARKS, SUITES
from leaf_distill.evaluation.compared import ARMS


@documented
@dataclass(frozen=True)
class EvaluateConfig(GradingOptions, RowOptions):
    """Settings of `leaf evaluate`: graded answers of models, to a dataset or to benchmarks.

    A setting that is None is the benchmark's own. From Python, a single model, benchmark or file
    may be a text.

    Raises:
        ValueError: a setting is outside its range; names the first.
    """

    model: Sequence[str] = field(
        default=(), metadata=about(f"the model, or several to be compared with the first: {MODEL}")
    )
    benchmark: Sequence[str] = field(
        default=(),
        metadata=about(
            f"in place of --dataset: benchmarks by name ({', '.join(BENCHMARKS)}), suites "
            f"({', '.join(SUITES)}), or YAML files of your own"
        ),
    )
    benchmark_file: Sequence[str] = field(
        default=(),
        metadata=about("local rows of a benchmark: PATH for a single one, else NAME=PATH"),
    )
    output_dir: str = field(
        default="leaf-evaluation", metadata=about("directory of the answers, metrics and tables")
    )
    dataset_split: str = field(default="test", metadata=about("split of the dataset"))
    max_new_tokens: int | None = field(
        default=None,
        metadata=about("most tokens of an answer; default: the benchmark's, or 512 for --dataset"),
    )
    grade: GradeRule | None = field(
        default=None,
        metadata=about(f"{GRADES}; default: the benchmark's, or math for --dataset"),
    )
    samples: int | None = field(
        default=None,
        metadata=about("answers to each problem; default: the benchmark's, or 1 for --dataset"),
    )
    temperature: float | None = field(
        default=None,
        metadata=about("of drawn answers; 0: greedy; default: the benchmark's, or 0 for --dataset"),
    )
    top_p: float | None = field(
        default=None,
        metadata=about(
            "draw from the likeliest tokens that together have this probability; default: the "
            "benchmark's, or 1 for --dataset"
        ),
    )
    k: int | None = field(
        default=None,
        metadata=about(
            "of pass@k, the chance that one of k answers is right, estimated from all samples; "
            "default: the benchmark's, or 1 for --dataset"
        ),
    )
    seed: int = field(default=0, metadata=about("seed of drawn answers"))

    def __post_init__(self) -> None:
        for name in ("model", "benchmark", "benchmark_file"):
            given = getattr(self, name)
            several = (given,) if isinstance(given, str | os.PathLike) else tuple(given)
            object.__setattr__(self, name, tuple(os.fspath(one) for one in several if one))
        check_answer_options(self)
        check_rows(self)
        check_drawing(self)
        _check_benchmarks(self)


def _check_benchmarks(config: EvaluateConfig) -> None:
    """Refuse what belongs to a dataset beside benchmarks, and the reverse."""
    if config.dataset and config.benchmark:
        raise ValueError(
            f"dataset: must not be given together with --benchmark, got {config.dataset!r} and "
            f"{' '.join(config.benchmark)!r}; give one of them"
        )
    if config.benchmark_file and not config.benchmark:
        raise ValueError(
            f"benchmark_file: must be of a benchmark, got {config.benchmark_file[0]!r}; name it "
            "with --benchmark, or give the file as --dataset"
        )
    if config.benchmark and (config.columns or config.dataset_split != "test"):
        name = "columns" if config.columns else "dataset_split"
        raise ValueError(
            f"{name}: must not be given with --benchmark, got {getattr(config, name)!r}; a "
            "benchmark has its own, and a YAML file as --benchmark may have others"
        )


@documented
@dataclass(frozen=True)
class CompareConfig:
    """Settings of `leaf compare`, beside those of `leaf detect` and `leaf distill`."""

    arms: list[str] = field(
        default_factory=lambda: ["kd", "span", "random_spans"],
        metadata=about(
            "the arms (default: kd span random_spans): "
            + "; ".join(f"{name}: {arm.says}" for name, arm in ARMS.items())
        ),
    )
    eval_dataset: str = field(
        default="", metadata=about(f"problems on which every student is evaluated: {ROWS}")
    )
    eval_split: str = field(default="test", metadata=about("split of the evaluation dataset"))

    def __post_init__(self) -> None:
        for arm in self.arms:
            if arm not in ARMS:
                raise ValueError(f"arms: must be of {', '.join(ARMS)}, got {arm!r}")
        if len(set(self.arms)) != len(self.arms) or not self.arms:
            raise ValueError(f"arms: must be different names, got {' '.join(self.arms)!r}")


@dataclass(frozen=True)
class RunOptions:
    """A run of `leaf detect`, and where its parts are."""

    run_dir: str = field(
        default="", metadata=about("output directory of `leaf detect`, or one of its arms")
    )
    student: str | None = field(
        default=None, metadata=about("where the student or its tokenizer is, if it was moved")
    )
    teacher: str | None = field(
        default=None, metadata=about("where the teacher or its tokenizer is, if it was moved")
    )
    cache_dir: str | None = field(
        default=None, metadata=about("the row cache of the run; default: as `leaf detect` used it")
    )

    @property
    def moved(self) -> dict[str, str]:
        """Return the parts that are given, as changes of the settings of an arm."""
        given = {"student": self.student, "teacher": self.teacher, "cache_dir": self.cache_dir}
        return {name: value for name, value in given.items() if value is not None}


@documented
@dataclass(frozen=True)
class AnalyzeConfig(RunOptions):
    """Settings of `leaf analyze`.

    Raises:
        ValueError: a setting is outside its range; names the first.
    """

    arms: list[str] | None = field(
        default=None, metadata=about("names of the arms in the tables; default: all of the run")
    )
    output_dir: str | None = field(
        default=None,
        metadata=about("directory of the tables and plots; default: analysis in the run directory"),
    )
    curves: bool = field(
        default=False,
        metadata=about(
            "load the models for deletion and insertion curves of the scores, at equal size; "
            "without it they are shown where all their losses are in the cache"
        ),
    )
    scores: list[str] = field(
        default_factory=lambda: [one for one in get_args(Score) if one != "intervention"],
        metadata=about(
            f"scores that have curves, beside random: {', '.join(get_args(Score))}; default: all "
            "but intervention, which takes many passes"
        ),
    )

    def __post_init__(self) -> None:
        need(self, "run_dir")
        _check_names(self, "scores", Score)


@documented
@dataclass(frozen=True)
class SweepConfig(RunOptions):
    """Settings of `leaf sweep`.

    Raises:
        ValueError: a setting is outside its range; names the first.
    """

    run_dir: str = field(
        default="", metadata=about("an arm of `leaf detect`, or a run directory with a single one")
    )
    thresholds: list[float] = field(
        default_factory=lambda: [0.02, 0.05, 0.1, 0.15, 0.2, 0.3],
        metadata=about("thresholds beside that of the arm (default: 0.02 0.05 0.1 0.15 0.2 0.3)"),
    )
    strategies: list[str] = field(
        default_factory=lambda: ["span", "collective", "random_spans"],
        metadata=about("strategies (default: span collective random_spans)"),
    )
    rules: list[str] | None = field(
        default=None, metadata=about("absolute, quantile; default: that of the arm")
    )
    scores: list[str] | None = field(
        default=None, metadata=about(f"{', '.join(get_args(Score))}; default: that of the arm")
    )
    widenings: list[str] | None = field(
        default=None, metadata=about(f"{', '.join(get_args(Unit))}; default: that of the arm")
    )

    def __post_init__(self) -> None:
        need(self, "run_dir")
        object.__setattr__(self, "thresholds", [_share(one) for one in self.thresholds])
        choices = (("strategies", Strategy), ("rules", SpanRule), ("scores", Score))
        for name, kind in (*choices, ("widenings", Unit)):
            _check_names(self, name, kind)


def _check_names(config: AnalyzeConfig | SweepConfig, name: str, kind: object) -> None:
    known = get_args(kind)
    for value in getattr(config, name) or ():
        if value not in known:
            raise ValueError(f"{name}: must be of {', '.join(known)}, got {value!r}")


def _share(value: float | str) -> float:
    try:
        if 0 <= float(value) <= 1:
            return float(value)
    except ValueError:
        pass
    raise ValueError(f"thresholds: must be numbers from 0 to 1, got {value!r}")
