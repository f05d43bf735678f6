"""Writes reference/commands.md, the options of every command, from the parser of `leaf`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

from leaf_distill.cli import COMMANDS, configs_of, hidden_options
from leaf_distill.options import choices_of, make_parser, option_names

HEAD = """# Commands and options

An option of the command line, a key of `--config FILE.yaml` and a field of the
[configuration in Python](leaf_distill.md) have one name, one type and one default. The command line
wins over the file. This page is made from the same dataclasses as `leaf COMMAND --help`.
"""

FOLDED = """<details>
<summary>Options of transformers' TrainingArguments, with the defaults that hold here</summary>

[transformers' pages](https://huggingface.co/docs/transformers/main_classes/trainer#transformers.TrainingArguments)
describe them. LeafConfig refuses those that would do nothing here.
"""


def page() -> str:
    return "\n".join([HEAD, *(line for name in COMMANDS for line in section(name))])


def section(name: str) -> Iterator[str]:
    """Yield the parts of a command's section, with its options in groups, as in its dataclasses."""
    command, configs = COMMANDS[name], configs_of(name)
    hidden = hidden_options(configs)
    _, options = make_parser(
        f"leaf {name}", command.summary, command.example, configs, hidden=hidden
    )
    fields = {
        item.name: item for config in reversed(configs) for item in dataclasses.fields(config)
    }
    yield f"## leaf {name}\n\n{sentence(command.summary)}\n"
    yield f"    {command.example}\n"
    yield f"```{{program}} leaf {name}\n```\n"
    before = None
    for option in (option for option in options if option not in hidden):
        if (title := group(option, configs)) != before:
            yield f"### {title}\n"
            before = title
        choices = choices_of(config_of(option, configs), option)
        kind = "|".join(choices) or str(options[option].metavar)
        yield entry(fields[option], kind + (" ..." if options[option].nargs == "+" else ""))
    if hidden:
        defaults = {option: default(fields[option]) for option in options if option in hidden}
        named = (
            f"`{option}`" + (f" ({value})" if value else "") for option, value in defaults.items()
        )
        yield f"{FOLDED}\n{', '.join(named)}\n\n</details>\n"


def config_of(option: str, configs: Sequence[type]) -> type:
    return next(config for config in configs if option in option_names(config))


def group(option: str, configs: Sequence[type]) -> str:
    """Return the first line of the docstring of the dataclass that brings an option in."""
    config = config_of(option, configs)
    owners = [one for one in config.__mro__ if option in vars(one).get("__annotations__", {})]
    owner = owners[-1] if owners[-1].__module__.startswith("leaf_distill") else config
    return str(owner.__doc__).strip().splitlines()[0].rstrip(".")


def entry(item: dataclasses.Field[Any], kind: str) -> str:
    """Return an option with its kind, help text and default."""
    text, value = str(item.metadata.get("help", "")), default(item)
    named = "default:" in text or not value
    return (
        f"`````{{option}} --{item.name} {kind}\n"
        f"{escaped(sentence(text))}{'' if named else f' Default: `{value}`.'}\n`````\n"
    )


def escaped(text: str) -> str:
    """Return plain text as Markdown, but for what stands in backticks."""
    parts = text.split("`")
    for index in range(0, len(parts), 2):
        for mark in "\\*_<[$":
            parts[index] = parts[index].replace(mark, f"\\{mark}")
    return "`".join(parts)


def sentence(text: str) -> str:
    return text and f"{text[0].upper()}{text[1:]}" + ("" if text.endswith((".", "?")) else ".")


def default(item: dataclasses.Field[Any]) -> str:
    """Return a field's default as it is typed, empty where there is none."""
    value = item.default
    if item.default_factory is not dataclasses.MISSING:
        value = item.default_factory()
    if value is None or value is dataclasses.MISSING or value in ("", (), [], {}):
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    return " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def write(app: Sphinx) -> None:
    file = Path(app.srcdir) / "reference/commands.md"
    text = page()
    if not file.exists() or file.read_text() != text:  # else Sphinx reads an unchanged page anew
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("builder-inited", write)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
