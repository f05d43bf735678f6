"""The documentation names what exists: commands, options, values, functions and their arguments.

A command in a block is checked as far as it goes where it has `...`; any other one must be accepted
whole. A name in capitals stands for a value. Python is compiled, and its names and arguments are
looked up; that it runs is tested where the models and rows for it are.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from pages import GUIDES, PAGES, ROOT, Block, blocks, code_in_lines, name
from shell_lines import commands, of_leaf, words

from leaf_distill.cli import COMMANDS, configs_of, parse
from leaf_distill.options import choices_of, make_parser, option_names

OPEN = {"...", "[...]", "…"}  # what a command leaves out
OTHERS = {"--chat-template", "--num_processes"}  # of servers and of accelerate
PACKAGES = ("leaf_ext", "leaf_distill")
BLOCKS = [block for page in GUIDES for block in blocks(page)]
SHELL = [block for block in BLOCKS if block.language in ("", "sh", "bash", "console")]
PYTHON = [block for block in BLOCKS if block.language == "python"]
DATA = [block for block in BLOCKS if block.language in ("json", "jsonl", "yaml")]


@cache
def options(command: str) -> tuple[Any, dict[str, Any]]:
    summary, example = COMMANDS[command].summary, COMMANDS[command].example
    return make_parser(f"leaf {command}", summary, example, configs_of(command))


def filled(given: list[str], command: str, *, whole: bool) -> list[str]:
    """Return words with a value for each name in capitals, and, unless whole, where one lacks."""
    full: list[str] = []
    for word, after in zip(given, [*given, "--"][1:], strict=True):
        named = full and re.fullmatch("[A-Z]+", word)
        full.append(example(full[-1], command) if named else word)
        if not whole and word.startswith("--") and after.startswith("--") and "=" not in word:
            full += [value for value in [example(word, command)] if value]
    return full


def example(option: str, command: str) -> str:
    """Return a value that an option takes, empty for a switch."""
    action = options(command)[1].get(option.removeprefix("--"))
    if action is None or action.nargs == "?":
        return ""
    (config, *_) = (one for one in configs_of(command) if action.dest in option_names(one))
    (first, *_) = [*choices_of(config, action.dest), "1"]
    return first


def check(given: list[str], *, whole: bool) -> None:
    """Fail unless `leaf` takes these words."""
    command, *rest = given
    if command.startswith("--") or command == "COMMAND" or command.endswith(":"):
        return  # an option of `leaf` itself, any command, or a message of one
    assert command in COMMANDS, f"{command} is not a command of leaf"
    if rest == ["--help"]:
        return
    full = filled([word for word in rest if word not in OPEN], command, whole=whole)
    _, unknown = options(command)[0].parse_known_args(full)
    assert not unknown, f"{' '.join(unknown)}: not an option of leaf {command}"
    if whole and not OPEN & set(rest):
        parse(command, full)


@pytest.mark.parametrize("block", SHELL, ids=str)
def test_leaf_takes_the_commands_of_blocks(
    block: Block,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    for command in commands(block.text):
        if given := of_leaf(command):
            try:
                check(given, whole=True)
            except SystemExit:
                pytest.fail(f"leaf {' '.join(given)}\n{capsys.readouterr().err}")


@pytest.mark.parametrize("page", GUIDES, ids=name)
def test_leaf_takes_the_options_named_in_lines(
    page: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for code in code_in_lines(page):
        given = words(code)
        try:
            if given[:1] == ["leaf"] and len(given) > 1:
                check(given[1:], whole=False)
            elif re.match(r"--\w", code) and given[0] not in OTHERS:
                assert taken_somewhere(given), f"{code}: not an option of leaf"
        except SystemExit:
            pytest.fail(f"{code}\n{capsys.readouterr().err}")


def taken_somewhere(given: list[str]) -> bool:
    """Whether a command has the option, and takes the value where there is one.

    One with a dash in its name is another program's, unless a command has it with an underscore.
    """
    option = given[0].split("=")[0].removeprefix("--")
    having = [name for name in COMMANDS if option.replace("-", "_") in options(name)[1]]
    if option in ("help", "version", "config") or ("-" in option and not having):
        return True
    if not having:
        return False
    full = filled(given, having[0], whole=False)
    return not options(having[0])[0].parse_known_args(full)[1]


@pytest.mark.parametrize("page", GUIDES, ids=name)
def test_make_has_the_targets(page: Path) -> None:
    makefile = (ROOT / "Makefile").read_text().replace("$(VENV)", ".venv")
    rules = re.findall(r"^([\w./ -]+):(?!=)", makefile, re.MULTILINE)
    known = {target for several in rules for target in several.split()}
    in_blocks = [block.text for block in blocks(page) if block in SHELL]
    for text in (*in_blocks, *code_in_lines(page)):
        for command in commands(text):
            asked = [word for word in command[1:] if "=" not in word]
            if (
                command[0] == "make"
            ):  # behind the first target of a block there may be a description
                missing = set(asked[:1] if text in in_blocks else asked) - known
                assert not missing, f"{' '.join(command)}: no such target"


@pytest.mark.parametrize("block", PYTHON, ids=str)
def test_python_names_what_exists(block: Block) -> None:
    tree = ast.parse(block.text)
    ours: dict[str, Any] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for one in node.names:
                if one.name.split(".")[0] in PACKAGES:
                    module = importlib.import_module(one.name)
                    ours[one.asname or one.name] = module
        elif isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] in PACKAGES:
            module = importlib.import_module(str(node.module))
            for one in node.names:
                assert hasattr(module, one.name), f"{node.module} has no {one.name}"
                ours[one.asname or one.name] = getattr(module, one.name)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            check_call(node, ours)


def check_call(node: ast.Call, ours: dict[str, Any]) -> None:
    """Fail where a call of ours names an argument that does not exist, or gives too many."""
    called, *path = ast.unparse(node.func).split(".")
    if called not in ours or not all(part.isidentifier() for part in path):
        return
    function = ours[called]
    for part in path:
        assert hasattr(function, part), f"{ast.unparse(node.func)} does not exist"
        function = getattr(function, part)
    given = [None for one in node.args if not isinstance(one, ast.Starred)]
    inspect.signature(function).bind_partial(
        *given, **{one.arg: None for one in node.keywords if one.arg}
    )


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_names_in_lines_exist(page: Path) -> None:
    """`leaf_ext.dual_kl` and the like, also with a call behind it."""
    for code in code_in_lines(page):
        found = re.match(r"(leaf_ext|leaf_distill)((?:\.\w+)+)(?!\w*/)", code)
        if found:
            value: Any = importlib.import_module(found[1])
            for part in found[2].split(".")[1:]:
                try:
                    value = getattr(value, part)
                except AttributeError:
                    value = importlib.import_module(f"{value.__name__}.{part}")


@pytest.mark.parametrize("block", DATA, ids=str)
def test_data_can_be_read(block: Block) -> None:
    if block.language == "yaml":
        yaml.safe_load(block.text)
    for text in [block.text] if block.language == "json" else block.text.splitlines():
        if block.language != "yaml" and text:
            json.loads(text)


@pytest.mark.parametrize("package", PACKAGES)
def test_the_reference_has_every_public_name(package: str) -> None:
    page = (ROOT / f"docs/reference/{package}.md").read_text()
    named = re.findall(rf"^\.\. auto\w+:: {package}\.(\w+)", page, re.MULTILINE)
    assert sorted(named) == sorted(importlib.import_module(package).__all__)


def test_there_is_something_to_check() -> None:
    given = [of_leaf(command) for block in SHELL for command in commands(block.text)]
    assert len([one for one in given if one]) > 20
    assert len(PYTHON) > 5 and len(DATA) > 1
