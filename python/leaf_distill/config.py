"""Settings of the loop: one dataclass per command, every field a flat key of YAML and a flag."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal, get_args, get_origin, get_type_hints

Select = Literal["student_wrong", "all"]
CompletionSource = Literal["dataset", "teacher"]
GradeRule = Literal["math", "number", "exact"]
SpanRule = Literal["absolute", "quantile"]
Strategy = Literal["span", "collective", "random_tokens", "random_spans"]
Validate = Literal["both", "teacher", "none"]

PACKAGES = ("leaf-distill", "torch", "transformers", "datasets", "pyarrow")
"""Whose versions belong to a result."""


def about(description: str) -> dict[str, str]:
    """Return a field's metadata: what --help says of it."""
    return {"help": description}


@dataclass(frozen=True)
class DetectConfig:
    """Settings of stage 1, from rows to validated counterfactuals.

    Raises ValueError naming the first setting that is outside its range.
    """

    student: str = field(
        default="", metadata=about("the model to be distilled: directory, hub name or .gguf file")
    )
    teacher: str = field(
        default="", metadata=about("the model to learn from: directory, hub name or .gguf file")
    )
    dataset: str = field(
        default="",
        metadata=about("hub name, or a local .jsonl, .json, .parquet or dataset directory"),
    )
    output_dir: str = field(
        default="leaf-run", metadata=about("the run directory; the same command resumes in it")
    )
    dataset_split: str = field(default="train", metadata=about("split of the dataset"))
    columns: dict[str, str] | str | None = field(
        default=None,
        metadata=about(
            'names of other columns, as JSON: {"prompt": "question", "completion": "solution"}'
        ),
    )
    max_rows: int | None = field(
        default=None, metadata=about("take only so many rows from the start of the dataset")
    )
    dtype: str = field(
        default="auto", metadata=about("weights while scoring: auto, float32, bfloat16 or float16")
    )
    device: str = field(
        default="auto", metadata=about("where the models run: auto, cpu, cuda, cuda:1, ...")
    )
    chat_template: str = field(
        default="auto", metadata=about("auto: the tokenizer's, if it has one; none: plain text")
    )
    system_prompt: str | None = field(
        default=None, metadata=about("a system turn put before every row without one")
    )
    max_length: int = field(
        default=4096, metadata=about("tokens of prompt and completion; longer rows are set aside")
    )
    max_new_tokens: int = field(
        default=512, metadata=about("length limit of a predicted answer, in tokens")
    )
    max_batch_tokens: int = field(
        default=8192, metadata=about("padded tokens of one batch, the memory's measure")
    )
    select: Select = field(
        default="student_wrong",
        metadata=about("score rows that the student fails and the teacher solves, or all rows"),
    )
    completion_source: CompletionSource = field(
        default="dataset",
        metadata=about("whose completion is the label: the dataset's or the teacher's own answer"),
    )
    grade: GradeRule = field(
        default="math",
        metadata=about("math: math-verify; number: the last number; exact: the stripped string"),
    )
    grade_timeout: float = field(
        default=5.0, metadata=about("seconds after which grading one answer is given up")
    )
    threshold: float = field(
        default=0.10, metadata=about("score at or below which a token is a confounder (Eq. 5)")
    )
    rule: SpanRule = field(
        default="absolute", metadata=about("absolute: cut at threshold; quantile: at that rank")
    )
    cap: float = field(default=0.5, metadata=about("highest cut that the quantile rule may choose"))
    teacher_max: float | None = field(
        default=None,
        metadata=about("highest normalized teacher saliency that a confounder may have"),
    )
    join_gap: int = field(
        default=0, metadata=about("join spans that at most so many prompt tokens separate")
    )
    min_length: int = field(default=1, metadata=about("shortest span, in tokens"))
    strategy: Strategy = field(
        default="span",
        metadata=about(
            "span by span, all together (collective), or a control: random_tokens, random_spans"
        ),
    )
    validate: Validate = field(
        default="both",
        metadata=about(
            "who must answer the cut prompt correctly: both (the paper), teacher or none"
        ),
    )
    seed: int = field(default=0, metadata=about("seed of the random controls"))

    def __post_init__(self) -> None:
        object.__setattr__(self, "columns", parse_columns(self.columns))
        for name in ("student", "teacher", "dataset", "output_dir"):
            if not getattr(self, name):
                raise ValueError(f"{name}: is needed, came empty; give --{name}")
        check_choices(self)
        check_ranges(self)
        _check_range(self, "min_length", 1)
        _check_range(self, "join_gap", 0)
        for name in ("threshold", "cap"):
            _check_range(self, name, 0, 1)
        if self.teacher_max is not None:
            _check_range(self, "teacher_max", 0, 1)


@dataclass(frozen=True)
class EvaluateConfig:
    """Settings of `leaf evaluate`: a model's greedy answers, graded."""

    model: str = field(default="", metadata=about("directory, hub name or .gguf file"))
    dataset: str = field(
        default="",
        metadata=about("hub name, or a local .jsonl, .json, .parquet or dataset directory"),
    )
    output_dir: str = field(
        default="leaf-evaluation", metadata=about("where answers go; the same command resumes")
    )
    dataset_split: str = field(default="test", metadata=about("split of the dataset"))
    columns: dict[str, str] | str | None = field(
        default=None,
        metadata=about('names of other columns, as JSON: {"prompt": "question"}'),
    )
    max_rows: int | None = field(
        default=None, metadata=about("take only so many rows from the start of the dataset")
    )
    dtype: str = field(
        default="auto", metadata=about("the weights: auto, float32, bfloat16 or float16")
    )
    device: str = field(
        default="auto", metadata=about("where the model runs: auto, cpu, cuda, cuda:1, ...")
    )
    chat_template: str = field(
        default="auto", metadata=about("auto: the tokenizer's, if it has one; none: plain text")
    )
    system_prompt: str | None = field(
        default=None, metadata=about("a system turn put before every row without one")
    )
    max_length: int = field(
        default=4096, metadata=about("tokens of a prompt; longer ones count as not answered")
    )
    max_new_tokens: int = field(default=512, metadata=about("length limit of an answer, in tokens"))
    max_batch_tokens: int = field(
        default=8192, metadata=about("padded tokens of one batch, the memory's measure")
    )
    grade: GradeRule = field(
        default="math",
        metadata=about("math: math-verify; number: the last number; exact: the stripped string"),
    )
    grade_timeout: float = field(
        default=5.0, metadata=about("seconds after which grading one answer is given up")
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "columns", parse_columns(self.columns))
        for name in ("model", "dataset", "output_dir"):
            if not getattr(self, name):
                raise ValueError(f"{name}: is needed, came empty; give --{name}")
        check_choices(self)
        check_ranges(self)


def parse_columns(value: dict[str, str] | str | None) -> dict[str, str] | None:
    """Read a column mapping given as a dict or as JSON; ValueError unless it maps text to text."""
    if value is None or value == "":
        return None
    mapping: object = value
    if isinstance(value, str):
        try:
            mapping = json.loads(value)
        except json.JSONDecodeError as error:
            raise ValueError(f"columns: needs a JSON object, came {value!r} ({error})") from None
    if not isinstance(mapping, dict) or not all(
        isinstance(part, str) for pair in mapping.items() for part in pair
    ):
        raise ValueError(f'columns: needs text to text as {{"prompt": "question"}}, came {value!r}')
    return mapping


def check_choices(config: Any) -> None:
    """Raise ValueError for the first Literal field of a dataclass whose value is not a choice."""
    hints = get_type_hints(type(config))
    for item in fields(config):
        if get_origin(hints[item.name]) is not Literal:
            continue
        choices, value = get_args(hints[item.name]), getattr(config, item.name)
        if value not in choices:
            raise ValueError(f"{item.name}: needs one of {', '.join(choices)}, came {value!r}")


def check_ranges(config: Any) -> None:
    """Raise ValueError for a setting out of range, of those that all commands with answers have."""
    for name in ("max_length", "max_new_tokens", "max_batch_tokens"):
        _check_range(config, name, 1)
    if config.max_rows is not None:
        _check_range(config, "max_rows", 1)
    if not 0 < config.grade_timeout < math.inf:
        raise ValueError(f"grade_timeout: needs seconds above 0, came {config.grade_timeout}")


def _check_range(config: Any, name: str, low: float, high: float = math.inf) -> None:
    value = getattr(config, name)
    if not low <= value <= high:
        wanted = f"at least {low}" if high == math.inf else f"a value from {low} to {high}"
        raise ValueError(f"{name}: needs {wanted}, came {value}")


def package_versions(packages: Iterable[str] = PACKAGES) -> dict[str, str]:
    """Return the installed version of each package."""
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found
