"""The command `leaf`: one subcommand per stage, each a thin layer over a function of the library.

Options are the fields of the same dataclasses that the library takes, so that a flag, a key of
`--config file.yaml` and a field of the configuration never differ in name, type or default.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import sys
import tempfile
import textwrap
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import leaf_distill
from leaf_distill import next_steps
from leaf_distill.config import nearest
from leaf_distill.options import parse_options, shortened
from leaf_distill.ranks import is_first, reports
from leaf_distill.terminal import complain, readable_messages, width
from leaf_distill.wording import wrapped

PURPOSE = (
    "LeaF finds the tokens of a prompt that mislead a small language model, by comparing how "
    "strongly a teacher's and a student's loss react to each; cuts them out; and distils the "
    "teacher into the student on the original and the cut prompts together."
)

SAY_S = 5.0  # a launcher ends all processes with one: until then the first has said its sentence


@dataclass(frozen=True)
class Command:
    """One subcommand.

    Attributes:
        summary: its purpose, in one line.
        example: a command line that works.
        configs: the dataclasses whose fields are its options, as "module:name" in leaf_distill, so
            that --help and a usage error import no more than they need.
        run: the function that takes them, in the same form.
        interrupted: what Ctrl-C leaves behind.
    """

    summary: str
    example: str
    configs: tuple[str, ...]
    run: str | Callable[..., object]
    interrupted: str = "nothing is kept"


def _named(name: str) -> Any:
    module, _, attribute = name.partition(":")
    return getattr(import_module(f"leaf_distill.{module}"), attribute)


def configs_of(name: str) -> tuple[type, ...]:
    """Return the dataclasses whose fields are the options of a subcommand."""
    return tuple(_named(config) for config in COMMANDS[name].configs)


def hidden_options(configs: Sequence[type]) -> frozenset[str]:
    """Return the fields of TrainingArguments that LeafConfig does not define itself."""
    for config in configs:
        if config.__name__ == "LeafConfig":
            shown = {*config.__annotations__, "output_dir", "seed", "max_steps", "report_to"}
            return frozenset({item.name for item in dataclasses.fields(config)} - shown)
    return frozenset()


def _run_detect(config: Any) -> None:
    from leaf_distill.detection.funnel import KEPT, ROW_STAGES
    from leaf_distill.detection.pipeline import detect

    result = detect(config)
    if not config.dry_run and is_first():
        stages = {one["stage"]: one["rows"] for one in result.funnel["stages"]}
        next_steps.after_detect(
            result.arm,
            vars(config),
            scored=stages[str(ROW_STAGES["detect"])],
            kept=stages[KEPT],
            trains=not (config.teacher_server_url or result.different_tokenizers),
        )


def _run_cache(config: Any) -> None:
    from leaf_distill.training.cache import cache_teacher

    cache_teacher(config)
    next_steps.after_cache(config)


def _run_distill(arguments: Any, config: Any) -> None:
    from leaf_distill.training.distill import distill

    distill(arguments, config)
    if not arguments.show and is_first():
        next_steps.after_distill(arguments, config)


def _run_compare(config: Any, detection: Any, training: Any) -> None:
    from leaf_distill.evaluation.compare import compare

    next_steps.after_compare(compare(config, detection, training).table.parent)


def _run_analyze(config: Any) -> None:
    from leaf_distill.evaluation.analyze import analyze

    result = analyze(config)
    kept = {str(line["arm"]): int(str(line["kept"])) for line in result.sheets["arms"].lines}
    next_steps.after_analyze(Path(config.run_dir), kept, curves=result.curves is not None)


def _run_sweep(config: Any) -> None:
    from leaf_distill.evaluation.sweep import sweep

    result = sweep(config)
    settings = [one.cell.setting for one in result.proposals if one.cell is not None]
    next_steps.after_sweep(result.arm, settings)


def _run_report(config: Any) -> None:
    from leaf_distill.report import write_figure, write_report

    if config.figure is not None:
        columns = config.figure_columns
        path = write_figure(config.run_dir, config.figure, row_id=config.row, columns=columns)
        print(f"The figure is {path}")
        return
    rows = None if config.row is None else [config.row]
    page = write_report(config.run_dir, output=config.output, samples=config.samples, row_ids=rows)
    print(f"The page is {page}\nNext, open it in a browser:\n  {page.absolute().as_uri()}")


def _run_demo(config: Any) -> None:
    from leaf_distill.demo.run import run_demo
    from leaf_distill.io import user_directory

    run_demo(user_directory(config.output_dir))


KEPT = "whole batches that were done are kept, and the same command goes on from them"

COMMANDS = {
    "detect": Command(
        "find the confounding tokens of a dataset, cut them out, keep the cuts that hold",
        "leaf detect --student ./student --teacher ./teacher --dataset train.jsonl "
        "--output_dir runs/math",
        ("detection.config:DetectConfig",),
        _run_detect,
        KEPT,
    ),
    "cache": Command(
        "store what the teacher says about a dataset, for trainings without the teacher",
        "leaf cache --teacher ./teacher --dataset runs/math --output_dir runs/math/teacher",
        ("training.config:CacheConfig",),
        _run_cache,
        "batches that were done are kept, and the same command goes on from them",
    ),
    "distill": Command(
        "distil the teacher into the student on originals and counterfactuals",
        "leaf distill --student ./student --teacher ./teacher --dataset runs/math "
        "--output_dir student-leaf",
        ("training.config:DistillArguments", "training.config:LeafConfig"),
        _run_distill,
        "the same command goes on from the newest checkpoint, where there is one",
    ),
    "evaluate": Command(
        "grade the answers of models to a dataset or to benchmarks, and make one table of them",
        "leaf evaluate --model student student-leaf --benchmark gsm8k math500 "
        "--output_dir runs/eval",
        ("evaluation.config:EvaluateConfig",),
        "evaluation.evaluate:run",
        KEPT,
    ),
    "compare": Command(
        "run LeaF, plain distillation and controls at equal compute, and make one table of them",
        "leaf compare --student ./student --teacher ./teacher --dataset train.jsonl "
        "--eval_dataset test.jsonl --arms kd span random_spans --output_dir runs/compared",
        (
            "evaluation.config:CompareConfig",
            "detection.config:DetectConfig",
            "training.config:LeafConfig",
        ),
        _run_compare,
        KEPT,
    ),
    "analyze": Command(
        "make the paper's studies of a run of `leaf detect`, without a model, and score curves",
        "leaf analyze --run_dir runs/math",
        ("evaluation.config:AnalyzeConfig",),
        _run_analyze,
    ),
    "sweep": Command(
        "try thresholds, strategies and widenings on the rows of an arm, without a model",
        "leaf sweep --run_dir runs/math/arms/span --thresholds 0.05 0.1 0.2",
        ("evaluation.config:SweepConfig",),
        _run_sweep,
    ),
    "report": Command(
        "write one self-contained HTML page about a run of `leaf detect`",
        "leaf report --run_dir runs/math",
        ("config:ReportConfig",),
        _run_report,
    ),
    "demo": Command(
        "run the whole method on an embedded example",
        "leaf demo --output_dir outputs/demo",
        ("config:DemoConfig",),
        _run_demo,
    ),
    "env": Command(
        "print versions, devices and kernels, for bug reports",
        "leaf env",
        (),
        "environment:show_environment",
    ),
}


def parse(name: str, argv: Sequence[str]) -> tuple[Any, ...]:
    """Return the dataclasses of a subcommand, from its options and `--config`."""
    command, configs = COMMANDS[name], configs_of(name)
    hidden = hidden_options(configs)
    more = "; every field of transformers.TrainingArguments is an option too" if hidden else ""
    return parse_options(
        f"leaf {name}",
        f"{command.summary}{more}",
        command.example,
        configs,
        argv,
        hidden=hidden,
    )


def _parse_once(name: str, argv: Sequence[str]) -> tuple[Any, ...]:
    """Parse; of the processes of a launcher, the first alone prints."""
    if is_first():
        return parse(name, argv)
    with (
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        try:
            return parse(name, argv)
        except SystemExit:
            time.sleep(SAY_S)
            raise


def _raised_by_us(error: BaseException) -> bool:
    """Whether our own code raised it, so that its message is a sentence for the user."""
    import leaf_ext

    raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
    ours = (Path(__file__).parent, Path(leaf_ext.__file__).parent)
    return any(package in raised_in.parents for package in ours)


def _report(name: str, error: Exception) -> None:
    """Print one line for an error; the traceback of one that is not ours goes to a file."""
    message = str(error).strip()
    if isinstance(error, (ValueError, RuntimeError, OSError)) and _raised_by_us(error):
        complain(f"leaf {name}: error: {shortened(message)}")
        return
    first = message.splitlines()[0] if message else "no message"
    with tempfile.NamedTemporaryFile(
        "w", prefix=f"leaf-{name}-", suffix=".log", delete=False, encoding="utf-8"
    ) as file:
        traceback.print_exception(error, file=file)
    complain(
        f"leaf {name}: error: {type(error).__name__}: {first[:500]}\n"
        "This was not expected. If it looks like a fault of LeaF, please report it with the lines "
        f"of `leaf env` and the traceback in {file.name}"
    )


def _overview() -> str:
    columns = width() or 80
    lines = ["usage: leaf COMMAND [options]      (leaf COMMAND --help says more)", ""]
    for name, command in COMMANDS.items():
        line, indent = f"  {name:<9} {command.summary}", " " * 12
        lines += textwrap.wrap(line, columns, subsequent_indent=indent, break_on_hyphens=False)
    return "\n".join([*lines, "", wrapped(PURPOSE, columns)])


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; returns the exit status (0, 1 error, 2 usage, 130 interrupted)."""
    # Waiting threads of torch else take the cores from others; it is read when torch is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print(_overview())
        return 0 if words else 2
    name = words[0]
    if name == "--version":
        print(leaf_distill.__version__)
        return 0
    if name not in COMMANDS:
        complain(
            f"leaf: {name!r} is not a command{nearest(name, COMMANDS) or '; `leaf` lists them'}"
        )
        return 2
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # a file has its lines in order, and at once
    try:
        configs, run = _parse_once(name, words[1:]), COMMANDS[name].run
        with readable_messages():
            (_named(run) if isinstance(run, str) else run)(*configs)
    except KeyboardInterrupt:
        if reports():
            complain(f"\nleaf {name}: interrupted; {COMMANDS[name].interrupted}")
        return 130
    except Exception as error:
        if reports():
            _report(name, error)
        return 1
    return 0
