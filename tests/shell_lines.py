"""The commands in a block of shell code, as words."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator

ENDS = {";", "&&", "||", "|", "&", ">", ">>", "2>&1", ")", "<"}
ASSIGNED = re.compile(r"\w+=.*")


def words(line: str) -> list[str]:
    """Return the words of a line without its comment; none where its quotes are not a shell's."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=";&|<>")
    lexer.whitespace_split = True
    try:
        return list(lexer)
    except ValueError:
        return []


def commands(text: str) -> Iterator[list[str]]:
    """Yield the commands of a text, each without the variables in front of it."""
    for line in re.sub(r"\\\n\s*", " ", text).splitlines():
        command: list[str] = []
        for word in [*words(line), ";"]:
            if word in ENDS:
                if command:
                    yield command
                command = []
            elif command or not (ASSIGNED.fullmatch(word) or word in ("$", "time")):
                command.append(word)


def of_leaf(command: list[str]) -> list[str]:
    """Return the words behind `leaf` or `-m leaf_distill`; none of another command."""
    if command[0] == "leaf":
        return command[1:]
    if "leaf_distill" in command and command[command.index("leaf_distill") - 1] == "-m":
        return command[command.index("leaf_distill") + 1 :]
    return []
