"""Settings that commands share, and the checks of all; each field is an option and a key of YAML.

A command has one dataclass, in its own room where it has one.
"""

from __future__ import annotations

import ast
import difflib
import json
import math
import shlex
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from importlib.metadata import PackageNotFoundError, version
from inspect import cleandoc
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

T = TypeVar("T")

GradeRule = Literal["math", "number", "exact", "code"]

PACKAGES = ("leaf-distill", "torch", "transformers", "datasets", "pyarrow")
"""The packages whose versions are written beside results."""

LARGEST = 2**31 - 1
"""The largest count that is accepted: larger ones overflow in some library."""

MODEL = "a directory (also of a LoRA adapter), a hub name or a .gguf file"
ROWS = (
    "hub name (owner/name or owner/name:config), file (.jsonl, .json, .csv, .parquet, .gz), "
    "directory or glob"
)


def about(description: str) -> dict[str, str]:
    """Return a field's metadata: the text that --help shows for it."""
    return {"help": description}


def documented(config: type[T]) -> type[T]:
    """Add every field with its help text to the docstring of a dataclass, for `help()`."""
    described = {item.name: item.metadata.get("help") for item in fields(config)}  # type: ignore[arg-type]
    lines = [f"    {name}: {text}" for name, text in described.items() if text]
    config.__doc__ = "\n".join([cleandoc(config.__doc__ or ""), "", "Attributes:", *lines])
    return config


@dataclass(frozen=True)
class PairOptions:
    """The two models."""

    student: str = field(default="", metadata=about(f"the model to be trained: {MODEL}"))
    teacher: str = field(default="", metadata=about(f"the model to learn from: {MODEL}"))


@dataclass(frozen=True)
class RowOptions:
    """The rows that a command reads."""

    dataset: str = field(default="", metadata=about(f"the rows: {ROWS}"))
    dataset_split: str = field(default="train", metadata=about("split of the dataset"))
    columns: dict[str, str] | str | None = field(
        default=None,
        metadata=about(
            'names of other columns, as JSON: {"prompt": "question", "completion": "solution"}'
        ),
    )
    max_rows: int | None = field(
        default=None, metadata=about("take at most so many rows, from the start of the dataset")
    )


@dataclass(frozen=True)
class ModelOptions:
    """Loading of models, and rendering of rows for them."""

    dtype: str = field(
        default="auto",
        metadata=about(
            "dtype of the weights: float32, bfloat16, float16, or auto: the checkpoint's, but "
            "float32 on a CPU without instructions for it"
        ),
    )
    device: str = field(
        default="auto",
        metadata=about(
            "device of the models: auto, cpu, cuda, cuda:1, ..., or balanced: a model that is too "
            "large for one GPU is spread over all, and the rest over the CPU's memory and the disk "
            "(several GPUs are untested)"
        ),
    )
    trust_remote_code: bool = field(
        default=False, metadata=about("run Python code that a model brings along")
    )
    chat_template: str = field(
        default="auto", metadata=about("auto: the tokenizer's, if it has one; none: plain text")
    )
    chat_template_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata=about('variables for the chat template, as JSON: {"enable_thinking": false}'),
    )
    system_prompt: str | None = field(
        default=None, metadata=about("system message for every row that has none")
    )
    max_length: int = field(
        default=4096, metadata=about("most tokens of prompt and completion; longer rows leave")
    )
    max_batch_tokens: int | None = field(
        default=None,
        metadata=about("most tokens of a batch, padding included; default: by device and memory"),
    )


@dataclass(frozen=True)
class GradingOptions(ModelOptions):
    """How answers are graded, and where they and their verdicts are kept."""

    grade_timeout: float = field(
        default=5.0,
        metadata=about(
            "processor seconds after which grading an answer is given up; a program gets four "
            "times the time of the row's reference solution in addition"
        ),
    )
    allow_code_execution: bool = field(
        default=False,
        metadata=about("run the programs in answers, confined by the kernel (for --grade code)"),
    )
    cache_dir: str | None = field(
        default=None,
        metadata=about(
            "directory of the row cache, which runs share; default: LEAF_CACHE_DIR, else "
            "~/.cache/leaf-distill"
        ),
    )


GRADES = (
    "math: math-verify; number: the last number; exact: the stripped string; code: the row's "
    "tests, on the program in the answer"
)


@dataclass(frozen=True)
class AnswerOptions(GradingOptions):
    """Answers of models and their grading."""

    max_new_tokens: int = field(default=512, metadata=about("most tokens of an answer"))
    grade: GradeRule = field(default="math", metadata=about(GRADES))


SERVER = "as http://127.0.0.1:8000/v1; an API key is read from LEAF_API_KEY in the environment"


@dataclass(frozen=True)
class TeacherServerOptions:
    """The server that the teacher runs in."""

    teacher_server_url: str | None = field(
        default=None,
        metadata=about(f"ask a server that speaks the OpenAI protocol for the teacher, {SERVER}"),
    )
    teacher_server_model: str | None = field(
        default=None, metadata=about("the model's name there; default: the first that it lists")
    )
    server_concurrency: int = field(
        default=16, metadata=about("the most requests in flight at a server")
    )
    server_timeout: float = field(
        default=600.0,
        metadata=about("seconds to wait for one answer, and for a server that gives none"),
    )


@dataclass(frozen=True)
class ServerOptions(TeacherServerOptions):
    """Servers that give the answers of the two models."""

    student_server_url: str | None = field(
        default=None, metadata=about("the same for the student's answers")
    )
    student_server_model: str | None = field(
        default=None, metadata=about("the model's name there; default: the first that it lists")
    )


@documented
@dataclass(frozen=True)
class ReportConfig:
    """Settings of `leaf report`."""

    run_dir: str = field(
        default="", metadata=about("output directory of `leaf detect`, or one of its arms")
    )
    output: str | None = field(
        default=None, metadata=about("where to write the page; default: report.html in the arm")
    )
    samples: int = field(default=20, metadata=about("how many samples the page shows"))
    row: int | None = field(
        default=None,
        metadata=about("show this row alone, by its row_id; default of a figure: the page's first"),
    )
    figure: str | None = field(
        default=None,
        metadata=about("write no page but the heat map of one row, for a paper: a file .svg"),
    )
    figure_columns: int = field(
        default=2,
        metadata=about("width of the figure in columns of a paper: 1 (240 points) or 2 (504)"),
    )

    def __post_init__(self) -> None:
        need(self, "run_dir")
        check_range(self, "samples", 0, LARGEST)
        check_range(self, "row", 0, LARGEST)
        check_range(self, "figure_columns", 1, 2)
        if self.figure is not None and self.output is not None:
            raise ValueError(
                f"figure: must be left out with output, got {self.figure!r}; a command writes one "
                "of the two"
            )


@documented
@dataclass(frozen=True)
class DemoConfig:
    """Settings of `leaf demo`."""

    output_dir: str = field(
        default="outputs/demo", metadata=about("directory of everything that it writes")
    )

    def __post_init__(self) -> None:
        need(self, "output_dir")


def check_rows(config: Any) -> None:
    """Check RowOptions; read `columns` where it is JSON."""
    columns = json_object(config.columns, "columns")
    if columns and not all(isinstance(value, str) for value in columns.values()):
        raise ValueError(
            f'columns: must map text to text as {{"prompt": "question"}}, got {columns!r}'
        )
    object.__setattr__(config, "columns", columns)
    check_range(config, "max_rows", 1, LARGEST)


def check_servers(config: Any) -> None:
    """Check the options of servers; the URLs are checked where the servers are first asked."""
    for role in ("student", "teacher"):
        name, url = (getattr(config, f"{role}_server_{part}", None) for part in ("model", "url"))
        if name and not url:
            raise ValueError(
                f"{role}_server_model: must be given with a server, got {name!r} alone; give "
                f"--{role}_server_url"
            )
    check_range(config, "server_concurrency", 1, 1024)
    if not 0 < config.server_timeout < math.inf:
        raise ValueError(f"server_timeout: must be seconds above 0, got {config.server_timeout}")


def check_answer_options(config: Any) -> None:
    """Check AnswerOptions and every field with fixed choices; read `chat_template_kwargs`."""
    kwargs = json_object(config.chat_template_kwargs, "chat_template_kwargs")
    object.__setattr__(config, "chat_template_kwargs", kwargs)
    check_choices(config)
    for name in ("max_length", "max_new_tokens", "max_batch_tokens"):
        check_range(config, name, 1, LARGEST)
    if not 0 < config.grade_timeout < math.inf:
        raise ValueError(f"grade_timeout: must be seconds above 0, got {config.grade_timeout}")
    if config.grade == "code" and not config.allow_code_execution:
        raise ValueError(
            "allow_code_execution: must be true to run the programs in answers, got false; give "
            "--allow_code_execution, which confines them"
        )
    if not config.output_dir:
        raise ValueError("output_dir: must be a directory, got an empty name; give --output_dir")


def check_drawing(config: Any) -> None:
    """Check the settings of drawn answers; those that are None are not known yet."""
    for name in ("samples", "k"):
        check_range(config, name, 1, LARGEST)
    check_range(config, "temperature", 0, 100)
    check_range(config, "top_p", 0, 1)
    if config.top_p == 0:
        raise ValueError("top_p: must be above 0, got 0; --temperature 0 gives the likeliest token")


def json_object(value: dict[str, Any] | str | None, name: str) -> dict[str, Any] | None:
    """Return a setting that is a mapping or a mapping as JSON; None where it is empty."""
    if value is None or value == "":
        return None
    mapping: object = value
    if isinstance(value, str):
        try:
            mapping = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"{name}: must be a JSON object, got {value!r} ({error}){_as_json(value, name)}"
            ) from None
    if not isinstance(mapping, dict) or not all(isinstance(key, str) for key in mapping):
        raise ValueError(f"{name}: must be a JSON object, got {value!r}")
    try:
        json.dumps(mapping, ensure_ascii=False, default=str).encode()
    except (ValueError, RecursionError) as error:  # half of a surrogate pair, or a circle
        raise ValueError(f"{name}: must be a JSON object, got {value!r} ({error})") from None
    return mapping


def _as_json(value: str, name: str) -> str:
    """Return a hint how a Python dict, or a text such as `key=value`, is written as JSON."""
    words = {"true": True, "false": False}
    try:
        mapping: object = ast.literal_eval(value)
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        pairs = [map(str.strip, one.split("=")) for one in value.split(",") if one.count("=") == 1]
        mapping = {key: words.get(text.lower(), text) for key, text in pairs}
    try:
        text = json.dumps(mapping, ensure_ascii=False) if isinstance(mapping, dict) else ""
    except (ValueError, TypeError, RecursionError):
        return ""
    hint = f"; put double quotes inside single ones: --{name} {shlex.quote(text)}"
    return hint if mapping and text else ""


def need(config: Any, *names: str) -> None:
    """Raise ValueError for the first of the named settings that is empty."""
    for name in names:
        if not getattr(config, name):
            raise ValueError(f"{name}: must be given, got nothing; give --{name}")


def check_choices(config: Any) -> None:
    """Raise ValueError for the first Literal field of a dataclass whose value is not a choice."""
    hints = get_type_hints(type(config))
    for item in fields(config):
        hint, value = hints[item.name], getattr(config, item.name)
        if type(None) in get_args(hint):  # Literal[...] | None
            hint = get_args(hint)[0] if value is not None else None
        if get_origin(hint) is not Literal:
            continue
        if value not in (choices := get_args(hint)):
            raise ValueError(f"{item.name}: must be one of {', '.join(choices)}, got {value!r}")


def check_range(config: Any, name: str, low: float, high: float = math.inf) -> None:
    """Raise ValueError unless the setting is a number from low to high, or None."""
    value = getattr(config, name)
    if value is None:
        return
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (number and low <= value <= high):
        low_enough = high >= LARGEST and not (number and value > high)
        wanted = f"at least {low}" if low_enough else f"from {low} to {high}"
        raise ValueError(f"{name}: must be {wanted}, got {value!r}")


def nearest(word: str, known: Iterable[str]) -> str:
    """Return a question with the known word that is most like an unknown one, or nothing."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {near[0]}?" if near else ""


def package_versions(packages: Iterable[str] = PACKAGES) -> dict[str, str]:
    """Return the installed version of each package."""
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found
