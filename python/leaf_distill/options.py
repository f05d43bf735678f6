"""Command-line options from dataclasses, and from the flat keys of a YAML file.

An option, a key of `--config file.yaml` and a field of the configuration have one name, one type
and one default. (transformers' HfArgumentParser does the same and takes seconds to import.)
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import re
import shlex
import sys
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

from leaf_distill.terminal import width
from leaf_distill.wording import command_line, wrapped

LONGEST_SENTENCE = 2000
LONGEST_METAVAR = 40


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Print one sentence and exit with status 2."""
        sentence = shortened(message.removeprefix("argument "))
        for nothing in ("expected one argument", "expected at least one argument"):
            sentence = sentence.replace(nothing, "must have a value, got none")
        self.exit(2, f"{wrapped(f'{self.prog}: error: {sentence}', width(sys.stderr))}\n")


def shortened(message: str) -> str:
    """Return a message without its middle where a value in it would fill the screen."""
    if len(message) <= LONGEST_SENTENCE:
        return message
    half = LONGEST_SENTENCE // 2
    return f"{message[:half]} [...] {message[-half:]}"


def make_parser(
    prog: str,
    description: str,
    example: str,
    configs: Sequence[type],
    *,
    hidden: Iterable[str] = (),
) -> tuple[argparse.ArgumentParser, dict[str, argparse.Action]]:
    """Return the parser of a command, and its options by the names of their fields."""
    parser = _Parser(
        prog=prog,
        usage=f"{prog} [--config FILE.yaml] [--option value ...]" if configs else prog,
        description=wrapped(description, width() or 80),
        epilog=_example(example),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    if configs:
        parser.add_argument(
            "--config",
            metavar="FILE.yaml",
            help="flat keys, each one of these options; the command line wins",
        )
    known: dict[str, argparse.Action] = {}
    for config in configs:
        hints = get_type_hints(config)
        items = {item.name: item for item in dataclasses.fields(config)}
        for name in option_names(config):
            if name not in known:
                known[name] = _add(parser, items[name], hints[name], hide=name in hidden)
    return parser, known


def option_names(config: type) -> list[str]:
    """Return the fields of a dataclass that are options, in order."""
    return [item.name for item in dataclasses.fields(config) if item.init]


def choices_of(config: type, name: str) -> list[str]:
    """Return the values that an option takes, as they are typed; none where it takes any."""
    return [str(choice) for choice in _choices(_kinds(get_type_hints(config)[name]))]


def parse_options(
    prog: str,
    description: str,
    example: str,
    configs: Sequence[type],
    argv: Sequence[str],
    *,
    hidden: Iterable[str] = (),
) -> tuple[Any, ...]:
    """Return an instance of each dataclass from a command line, which wins over `--config`.

    Args:
        prog, description, example: what --help says.
        configs: dataclasses whose fields are the options; a name in two of them is one option.
        argv: the words after the command.
        hidden: options that --help leaves out.

    Raises:
        SystemExit: an option is unknown (status 2), a value is refused (2), or --help (0).
        ValueError: the file of --config cannot be used.
    """
    parser, known = make_parser(prog, description, example, configs, hidden=hidden)
    given, unknown = parser.parse_known_args(list(argv))
    if unknown:
        options = {
            option.removeprefix("--"): action
            for action in parser._actions
            for option in action.option_strings
            if option.startswith("--")
        }
        near = _did_you_mean(unknown[0].split("=")[0], options, "--")
        parser.error(f"{unknown[0]} is not an option of this command{near}")
    if getattr(given, "config", None) is not None:
        file = _words(Path(given.config), known)
        given = parser.parse_args([*file, *argv])
    values = vars(given)
    try:
        return tuple(
            config(**{name: values[name] for name in option_names(config) if name in values})
            for config in configs
        )
    except (ValueError, TypeError, ImportError, OSError) as error:
        parser.error(" ".join(str(error).split()) or type(error).__name__)


def _example(line: str) -> str:
    """Return a command in lines that fit, as a shell takes it."""
    words = shlex.split(line)
    first = next((at for at, word in enumerate(words) if word.startswith("--")), len(words))
    options: dict[str, list[str]] = {}
    for word in words[first:]:
        if word.startswith("--"):
            options[word.removeprefix("--")] = []
        else:
            options[next(reversed(options))].append(word)
    return f"example:\n  {command_line(words[:first], options, (width() or 80) - 2)}"


def _add(
    parser: _Parser, item: dataclasses.Field[Any], hint: Any, *, hide: bool
) -> argparse.Action:
    kinds = _kinds(hint)
    options: dict[str, Any] = {"default": argparse.SUPPRESS, "help": argparse.SUPPRESS}
    if not hide:
        text = str(item.metadata.get("help", "")).replace("%", "%%")
        shown = item.default not in (None, "", (), dataclasses.MISSING)
        options["help"] = f"{text} (default: {item.default})" if shown else text
    choices = _choices(kinds)
    names = {get_origin(kind) or kind for kind in kinds}
    if choices and len(names) == 1:
        options |= {"type": _choice(choices), "metavar": "|".join(map(str, choices))}
        if not hide and len(options["metavar"]) > LONGEST_METAVAR:
            options |= {"metavar": "NAME", "help": f"{options['help']}; {_listed(choices)}"}
    elif bool in names:
        options |= {"type": _boolean, "nargs": "?", "const": True, "metavar": "true|false"}
    elif names & {list, Sequence} and str not in names:
        options |= {"type": _text, "nargs": "+", "metavar": "VALUE"}
    elif float in names and str not in names:
        options |= {"type": _number(float, "a number"), "metavar": "NUMBER"}
    elif int in names and str not in names:
        options |= {"type": _number(int, "a whole number"), "metavar": "NUMBER"}
    else:
        options |= {"type": _text, "metavar": "VALUE"}
    return parser.add_argument(f"--{item.name}", **options)


def _listed(choices: Sequence[Any]) -> str:
    return f"one of {', '.join(map(str, choices))}"


def _kinds(hint: Any) -> list[Any]:
    """Return the members of a union, without None."""
    if get_origin(hint) in (Union, types.UnionType):
        return [kind for part in get_args(hint) for kind in _kinds(part)]
    return [] if hint is type(None) else [hint]


def _choices(kinds: Sequence[Any]) -> list[Any]:
    return [choice for kind in kinds if get_origin(kind) is Literal for choice in get_args(kind)]


def _choice(choices: Sequence[Any]) -> Callable[[str], Any]:
    def convert(text: str) -> Any:
        for choice in choices:
            if str(choice) == text:
                return choice
        listed = ", ".join(map(str, choices))
        raise argparse.ArgumentTypeError(f"must be one of {listed}, got {text!r}")

    return convert


def _text(text: str) -> str:
    """Refuse what can be no name, path or message: bytes that are no UTF-8, and null characters."""
    if not re.search("[\0\ud800-\udfff]", text):
        return text
    raise argparse.ArgumentTypeError(f"must be UTF-8 text without null characters, got {text!r}")


def _boolean(text: str) -> bool:
    if (word := text.lower()) in ("true", "yes", "1", "false", "no", "0"):
        return word in ("true", "yes", "1")
    raise argparse.ArgumentTypeError(f"must be true or false, got {text!r}")


def _number(kind: type, wanted: str) -> Callable[[str], Any]:
    def convert(text: str) -> Any:
        try:
            return kind(text)
        except ValueError:
            message = f"must be {wanted}, got {text[:80]!r}"
            raise argparse.ArgumentTypeError(message) from None

    return convert


def _did_you_mean(given: str, known: Mapping[str, argparse.Action], dashes: str = "") -> str:
    """Return a question with the options that an unknown one may stand for, or nothing."""
    bare = given.strip("-").replace("-", "_").lower()
    near = _near(bare, known) if bare else []
    return f"; did you mean {' or '.join(dashes + name for name in near)}?" if near else ""


def _near(given: str, known: Mapping[str, argparse.Action]) -> list[str]:
    """Return the options that an unknown one may stand for; of an abbreviation, the likeliest.

    In this order: the unknown one has the last initials of an option (lr, bs), or is the noun of
    its help text ("the model to be trained"), or its words and some of an option begin alike
    (batch_size, epochs), or the two are alike. Options that --help shows come before others.
    """
    shown = [name for name, action in known.items() if action.help != argparse.SUPPRESS]
    initials = {name: "".join(word[:1] for word in name.split("_")) for name in known}
    for names in (shown, known):
        if short := [name for name in names if len(given) > 1 and initials[name].endswith(given)]:
            return [max(short, key=len)]  # the longest one needs an abbreviation most
    if described := [name for name in shown if str(known[name].help).startswith(f"the {given} ")]:
        return described
    for names in (shown, known):
        if partial := [name for name in names if _begins_alike(given, name)]:
            return difflib.get_close_matches(given, partial, n=1, cutoff=0)
    return difflib.get_close_matches(given, known, n=1)


def _begins_alike(given: str, name: str) -> bool:
    """Whether each word begins as one of the option does, or the reverse, in the same order."""
    words = iter(name.split("_"))
    return all(
        any(word.startswith(part) or part.startswith(word) for word in words)
        for part in given.split("_")
    )


def _words(path: Path, known: Mapping[str, argparse.Action]) -> list[str]:
    """Return the flat keys of a YAML file as command-line words, so that one parser reads both."""
    import yaml

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"--config {path}: must be a readable YAML file, got: {reason}") from error
    if not isinstance(values, dict):
        raise ValueError(f"--config {path}: must hold flat `option: value` lines")
    words: list[str] = []
    for key, value in values.items():
        if key not in known:
            near = _did_you_mean(str(key), known)
            raise ValueError(f"--config {path}: {key!r} is not an option of this command{near}")
        if value is None:
            continue  # the option keeps its default
        if isinstance(value, list) and known[key].nargs != "+":
            raise ValueError(
                f"--config {path}: {key}: must be one value, got a list of {len(value)}"
            )
        parts = value if isinstance(value, list) else [value]
        if not parts:
            continue
        texts = [json.dumps(part) if isinstance(part, dict) else str(part) for part in parts]
        # One word, so that a value that begins with a dash is no option.
        words += [f"--{key}={texts[0]}"] if len(texts) == 1 else [f"--{key}", *texts]
    return words
