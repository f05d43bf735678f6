"""Tables for the terminal, and the files that hold them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from rich.console import Group

from leaf_distill.io import is_of
from leaf_distill.terminal import light_table, titled


def printed_table(title: str, lines: Iterable[Sequence[str]], *, caption: str = "") -> Group:
    """Return a table whose first line is the head; columns after the first are numbers."""
    head, *rows = lines
    table = light_table()
    for index, column in enumerate(head):
        table.add_column(column, justify="right" if index else "left")
    for row in rows:
        table.add_row(*row)
    return titled(title, table, caption)


def check_table(root: Path, stem: str, command: str, *, argument: str = "output_dir") -> None:
    """Raise ValueError where STEM.json and STEM.md of a command would replace other files.

    Args:
        root: the directory of both.
        stem: their name.
        command: of `leaf`, which writes them.
        argument: the option that names the directory; another than output_dir names an input.
    """
    names = f"{stem}.json", f"{stem}.md"
    written = any(os.path.lexists(root / name) for name in names)
    if written and not is_of(root / names[0], command):
        must, cure = f"be new or of an earlier `leaf {command}`", ", or give another output_dir"
        if argument != "output_dir":
            must, cure = f"have files of an earlier `leaf {command}` or none", ""
        raise ValueError(
            f"{argument}: must {must}, got {root}, whose {names[0]} or {names[1]} is damaged or of "
            f"something else; delete them{cure}"
        )
