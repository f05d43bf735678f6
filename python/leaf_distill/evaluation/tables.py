"""Tables for the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.table import Table
from rich.text import Text


def printed_table(title: str, lines: Iterable[Sequence[str]], *, caption: str = "") -> Table:
    """Return a table whose first line is the head; columns after the first are numbers."""
    head, *rows = lines
    table = Table(
        title=Text(title),
        title_justify="left",
        caption=Text(caption) if caption else None,
        caption_justify="left",
    )
    for index, column in enumerate(head):
        table.add_column(column, justify="right" if index else "left")
    for row in rows:
        table.add_row(*row)
    return table
