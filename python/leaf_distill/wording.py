"""Words for numbers and times, and text in lines that a terminal can show."""

from __future__ import annotations

import shlex
import textwrap
from collections.abc import Iterable, Mapping

TIED = "\N{NO-BREAK SPACE}"
"""Printed as a space at which no line ends."""

CONTINUED = " \\\n    "
"""Between two lines of one command."""


def counted(number: float, noun: str, plural: str | None = None) -> str:
    """Return a number with its noun: "1 pass", "2,000 passes".

    Args:
        number: how many.
        noun: of one.
        plural: of another number; the noun with an s if not given.
    """
    shown = f"{number:,}".removesuffix(".0")
    return f"{shown} {noun if number == 1 else plural or f'{noun}s'}"


def duration(seconds: float) -> str:
    """Return a time in seconds, minutes or hours, whichever can be read."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def wrapped(text: str, width: int | None) -> str:
    """Return text in lines that end between words; a long path stays whole.

    Args:
        text: with line breaks that stay.
        width: the most characters of a line; None: lines stay as they are.
    """
    if width is None:
        return text.replace(TIED, " ")
    return "\n".join(
        textwrap.fill(line, width, break_long_words=False, break_on_hyphens=False).replace(
            TIED, " "
        )
        for line in text.splitlines()
    )


def command_line(
    words: Iterable[object], options: Mapping[str, object], width: int | None = None
) -> str:
    """Return a command that a shell takes as it is, in several lines where one is too long.

    Args:
        words: the command.
        options: its options without dashes, each with its value or a list of values; an option
            whose value is None or an empty list is left out.
        width: the most characters of a line; None: the command is one line.
    """
    parts = [shlex.join(map(str, words))]
    for name, value in options.items():
        values = list(value) if isinstance(value, (list, tuple)) else [value]
        if len(values) == 1 and str(values[0]).startswith("-"):  # else it would be an option
            parts.append(shlex.join([f"--{name}={values[0]}"]))
        elif values and values != [None]:
            parts.append(shlex.join([f"--{name}", *map(str, values)]))
    if width is None:
        return " ".join(parts)
    lines = [parts[0]]
    for part in parts[1:]:
        indent = len(CONTINUED) - len(" \\\n") if lines[1:] else 0
        if indent + len(lines[-1]) + len(part) + len("  \\") <= width:
            lines[-1] += f" {part}"
        else:
            lines.append(part)
    return CONTINUED.join(lines)
