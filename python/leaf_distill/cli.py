"""The command `leaf`: one subcommand per stage, each a thin layer over a function of the library.

Options are the fields of the same dataclasses that the library takes, so that a flag, a key of
`--config file.yaml` and a field of the configuration never differ in name, type or default.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

PACKAGES = (
    "leaf-distill",
    "torch",
    "triton",
    "transformers",
    "accelerate",
    "datasets",
    "pyarrow",
    "math-verify",
    "peft",
    "reasoning-gym",
    "gguf",
)


@dataclass
class ReportArguments:
    """Options of `leaf report`."""

    run_dir: str = field(metadata={"help": "The output directory of `leaf detect`."})
    output: str | None = field(
        default=None, metadata={"help": "Where to write the page (default: RUN_DIR/report.html)."}
    )
    samples: int = field(default=20, metadata={"help": "How many samples the page shows."})


@dataclass
class DemoArguments:
    """Options of `leaf demo`."""

    pair: str = field(
        default="tiny",
        metadata={
            "help": "tiny: the embedded pair with planted distractors (a minute on 2 cores). "
            "smollm2: the real SmolLM2-135M-Instruct and a student cut from it (some minutes).",
            "choices": ["tiny", "smollm2"],
        },
    )
    output_dir: str = field(
        default="outputs/demo", metadata={"help": "Where everything is written."}
    )


@dataclass(frozen=True)
class Command:
    """One subcommand: what it is for, the dataclasses that it takes, and what it runs."""

    summary: str
    example: str
    arguments: Callable[[], tuple[Any, ...]]
    run: Callable[..., None]
    hidden: Callable[[], frozenset[str]] = frozenset  # options that --help leaves out
    interrupted: str = "nothing is kept"  # what Ctrl-C leaves behind


def _detect_arguments() -> tuple[Any, ...]:
    from leaf_distill.config import DetectConfig

    return (DetectConfig,)


def _run_detect(config: Any) -> None:
    from leaf_distill.detection.pipeline import detect

    detect(config)


def _distill_arguments() -> tuple[Any, ...]:
    from leaf_distill.training.config import DistillArguments, LeafConfig

    return (DistillArguments, LeafConfig)


def _hidden_training_arguments() -> frozenset[str]:
    """The fields of transformers.TrainingArguments that LeafConfig does not set otherwise."""
    from transformers import TrainingArguments

    from leaf_distill.training.config import LeafConfig

    shown = {*LeafConfig.__annotations__, "output_dir", "seed", "max_steps", "report_to"}
    return frozenset({f.name for f in dataclasses.fields(TrainingArguments)} - shown)


def _run_distill(arguments: Any, config: Any) -> None:
    from leaf_distill.training.distill import distill

    distill(arguments, config)


def _evaluate_arguments() -> tuple[Any, ...]:
    from leaf_distill.config import EvaluateConfig

    return (EvaluateConfig,)


def _run_evaluate(config: Any) -> None:
    from leaf_distill.evaluation.evaluate import evaluate

    evaluate(config)


def _run_report(arguments: ReportArguments) -> None:
    from leaf_distill.report import write_report

    output = None if arguments.output is None else Path(arguments.output)
    page = write_report(Path(arguments.run_dir), output=output, samples=arguments.samples)
    print(f"The page is {page}")


def _run_demo(arguments: DemoArguments) -> None:
    from leaf_distill.demo.run import run_demo

    run_demo(arguments.pair, Path(arguments.output_dir))


def _run_env() -> None:
    """Print what a bug report needs: versions, devices, and which kernels would run."""
    import platform

    import torch

    import leaf_ext
    from leaf_distill.config import package_versions

    print(f"python          {platform.python_version()} on {platform.platform()}")
    for package, number in package_versions(PACKAGES).items():
        print(f"{package:<15} {number}")
    print(f"cpu             {os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads")
    for index in range(torch.cuda.device_count()):
        print(f"gpu {index}           {torch.cuda.get_device_name(index)}")
    try:
        for key, value in leaf_ext.build_info().items():
            print(f"leaf_ext        {key}: {value}")
    except RuntimeError as error:  # a pure-Python installation is a sound one
        print(f"leaf_ext        reference only: {error}")


KEPT = "what is done is kept, and the same command goes on from it"

COMMANDS = {
    "detect": Command(
        "find the confounding tokens of a dataset, cut them out, keep the cuts that hold",
        "leaf detect --student ./student --teacher ./teacher --dataset train.jsonl "
        "--output_dir runs/math",
        _detect_arguments,
        _run_detect,
        interrupted=KEPT,
    ),
    "distill": Command(
        "distil the teacher into the student on originals and counterfactuals",
        "leaf distill --student ./student --teacher ./teacher --dataset runs/math "
        "--output_dir student-leaf",
        _distill_arguments,
        _run_distill,
        _hidden_training_arguments,
        interrupted="the same command goes on from the newest checkpoint, where there is one",
    ),
    "evaluate": Command(
        "grade a model's greedy answers on a dataset",
        "leaf evaluate --model student-leaf --dataset test.jsonl --output_dir runs/eval",
        _evaluate_arguments,
        _run_evaluate,
        interrupted=KEPT,
    ),
    "report": Command(
        "write one self-contained HTML page about a run of `leaf detect`",
        "leaf report --run_dir runs/math",
        lambda: (ReportArguments,),
        _run_report,
    ),
    "demo": Command(
        "run the whole method on an embedded example",
        "leaf demo --output_dir outputs/demo",
        lambda: (DemoArguments,),
        _run_demo,
    ),
    "env": Command("print versions and devices, for bug reports", "leaf env", lambda: (), _run_env),
}


def config_to_argv(path: Path, known: frozenset[str]) -> list[str]:
    """The flat keys of a YAML file as command-line words, so that both go through one parser.

    Raises:
        ValueError: the file is not a flat mapping, or a key is not an option of the command.
    """
    import yaml

    try:
        values = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"--config {path}: cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"--config {path}: needs flat `option: value` lines")
    argv: list[str] = []
    for key, value in values.items():
        if key not in known:
            raise ValueError(f"--config {path}: {key!r} is not an option of this command")
        if value is None:
            continue  # the option keeps its default
        words = value if isinstance(value, list) else [value]
        text = [json.dumps(word) if isinstance(word, dict) else str(word) for word in words]
        argv += [f"--{key}", *text]
    return argv


def _nearest(word: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {near[0]}?" if near else ""


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults, but not an empty one, which says nothing."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, "") else super()._get_help_string(action)


def parse(name: str, argv: Sequence[str]) -> tuple[Any, ...]:
    """Parse a subcommand's options, the command line over `--config`, into its dataclasses."""
    command = COMMANDS[name]
    usage: dict[str, Any] = {
        "prog": f"leaf {name}",
        "usage": f"leaf {name} [--config FILE.yaml] [--option value ...]",
        "epilog": f"example: {command.example}",
    }
    if not (types := command.arguments()):
        usage["usage"] = f"leaf {name}"
        argparse.ArgumentParser(description=command.summary, **usage).parse_args(argv)
        return ()
    from transformers import HfArgumentParser

    parser = HfArgumentParser(
        types,
        description=command.summary,
        allow_abbrev=False,
        formatter_class=_HelpFormatter,
        **usage,
    )
    parser.add_argument(
        "--config", metavar="FILE.yaml", help="Flat keys, any of these options; flags win."
    )
    hidden = command.hidden()
    for action in parser._actions:
        if action.dest in hidden:
            action.help = argparse.SUPPRESS
    if hidden:
        more = "every field of transformers.TrainingArguments is an option too"
        parser.description = f"{command.summary}; {more}"
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--config")
    config, rest = finder.parse_known_args(list(argv))
    words = rest
    if config.config is not None:
        known = frozenset(action.dest for action in parser._actions) - {"help", "config"}
        words = config_to_argv(Path(config.config), known) + rest
    try:
        *parsed, unknown = parser.parse_args_into_dataclasses(
            args=words, return_remaining_strings=True, look_for_args_file=False
        )
    except Exception as error:  # whatever refuses the settings: they are the user's to mend
        parser.error(str(error).strip() or type(error).__name__)
    if unknown:
        nearest = _nearest(unknown[0], parser._option_string_actions)
        parser.error(f"{unknown[0]} is not an option of this command{nearest}")
    return tuple(parsed[: len(types)])  # after them: a namespace with `config`


def _raised_by_us(error: BaseException) -> bool:
    """Whether our own code raised it: a sentence for the user. From deeper down it is a bug."""
    import leaf_ext

    raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
    ours = (Path(__file__).parent, Path(leaf_ext.__file__).parent)
    return any(package in raised_in.parents for package in ours)


def _overview() -> str:
    lines = ["usage: leaf COMMAND [options]      (leaf COMMAND --help says more)", ""]
    lines += [f"  {name:<9} {command.summary}" for name, command in COMMANDS.items()]
    lines += [
        "",
        "LeaF finds the tokens of a prompt that mislead a small language model, by comparing",
    ]
    lines += [
        "how strongly a teacher's and a student's loss react to each; cuts them out; and distils"
    ]
    lines += ["the teacher into the student on the original and the cut prompts together."]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; returns the exit status (0, 1 error, 2 usage, 130 interrupted)."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print(_overview())
        return 0 if words else 2
    name = words[0]
    if name == "--version":
        print(version("leaf-distill"))
        return 0
    if name not in COMMANDS:
        print(f"leaf: {name!r} is not a command{_nearest(name, COMMANDS)}", file=sys.stderr)
        return 2
    try:
        COMMANDS[name].run(*parse(name, words[1:]))
    except KeyboardInterrupt:
        print(f"\nleaf {name}: interrupted; {COMMANDS[name].interrupted}", file=sys.stderr)
        return 130
    except (ValueError, RuntimeError, OSError) as error:
        if not _raised_by_us(error):
            raise
        print(f"leaf {name}: error: {error}", file=sys.stderr)
        return 1
    return 0
