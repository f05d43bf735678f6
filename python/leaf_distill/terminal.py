"""What commands print: lines that fit the terminal, progress bars that go, messages between them.

A file gets no bar, and lines of any length unless COLUMNS says how wide they may be.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TextIO

from tqdm import tqdm

from leaf_distill.wording import command_line, duration, wrapped

if TYPE_CHECKING:
    from rich.console import Console, Group
    from rich.table import Table

LOG_INTERVAL_S = 30.0
"""Between two lines about a progress in a file; a shorter one leaves no line at its end either."""

BAR_DELAY_S = 0.3
BAR = "{desc} {bar} {n_fmt}/{total_fmt} {unit}  {elapsed}, {remaining} left"
OURS = ("leaf_distill", "leaf_ext")


def width(stream: TextIO | None = None) -> int | None:
    """Return the columns of a stream (default: stdout); None for a file without COLUMNS."""
    columns = os.environ.get("COLUMNS", "")
    if columns.isdecimal() and int(columns):
        return int(columns)
    try:
        return os.get_terminal_size((stream or sys.stdout).fileno()).columns or None
    except (OSError, ValueError, AttributeError):  # a file, or an object without a number
        return None


def say(text: str, style: str = "") -> None:
    """Print text on stdout, in lines that end between words; a long path stays whole."""
    plain_console().print(wrapped(text, width()), style=style, soft_wrap=True)


def plain_console(*, stderr: bool = False) -> Console:
    """Return a console that prints text as it is, also a path with [red] or :100: in it."""
    from rich.console import Console

    return Console(stderr=stderr, markup=False, emoji=False, highlight=False)


def light_table() -> Table:
    """Return an empty table whose columns have two blanks between them, and no other lines."""
    from rich import box
    from rich.table import Table

    return Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))


def titled(title: str, table: Table, caption: str = "") -> Group:
    """Return a table below its title and above its caption, which may be wider than it is."""
    from rich.console import Group
    from rich.text import Text

    below = [Text(caption, style="dim")] if caption else []
    return Group(Text(title, style="bold"), table, *below)


def say_next(purpose: str, command: str, options: Mapping[str, object]) -> None:
    """Print a command of `leaf` to type next, after what it is for.

    It can be pasted, once its words in capitals (STUDENT, TEST.jsonl) are replaced.
    """
    say(f"{purpose}:")
    columns = width()
    room = None if columns is None else columns - len("  ")
    print(f"  {command_line(('leaf', command), options, room)}")


def complain(text: str) -> None:
    """Print an error on stderr, in lines that end between words."""
    print(wrapped(text, width(sys.stderr)), file=sys.stderr, flush=True)


class Progress:
    """A bar on a terminal, gone when it is done; elsewhere a line at most every half minute.

    What takes longer than that leaves a line with its time in both.
    """

    def __init__(
        self,
        total: int,
        description: str,
        *,
        initial: int = 0,
        shown: bool = True,
        unit: str = "rows",
    ) -> None:
        self.total, self.description, self.done, self.unit = total, description, initial, unit
        self._start = self._last = time.monotonic()
        self._bar: Any = None
        self._shown = shown
        if shown and sys.stderr.isatty():
            _adopt("transformers")
            self._bar = tqdm(
                total=total, initial=initial, desc=description, unit=unit, delay=BAR_DELAY_S, **LOOK
            )

    def update(self, count: int) -> None:
        """Count rows as done."""
        self.done += count
        if self._bar is not None:
            self._bar.update(count)
        elif self._shown and time.monotonic() - self._last >= LOG_INTERVAL_S:
            self._last = time.monotonic()
            self._say(f"{self.done} of {self.total}")

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.close()
        long = time.monotonic() - self._start >= LOG_INTERVAL_S
        if self._shown and long and self.done >= self.total:
            self._say(f"all {self.total}")

    def _say(self, number: str) -> None:
        passed = duration(time.monotonic() - self._start)
        complain(f"{self.description}: {number} {self.unit}, {passed}")


LOOK: Mapping[str, Any] = {"leave": False, "dynamic_ncols": True, "bar_format": BAR}


class _Lines(logging.Handler):
    """Prints messages above a bar, in lines that end between words."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            source = record.name.split(".")[0]
            kind = "note" if source in OURS else source
            text = wrapped(f"{kind}: {record.getMessage().strip()}", width(sys.stderr))
            if record.exc_info:
                text += f"\n{logging.Formatter().formatException(record.exc_info)}"
            with tqdm.external_write_mode(file=sys.stderr):
                plain_console(stderr=True).print(text, style="yellow", soft_wrap=True)
        except Exception:
            self.handleError(record)


class _NoRepeats(logging.Filter):
    """Stops repeats: the client of the hub tells each of its many attempts, with its number."""

    def __init__(self) -> None:
        super().__init__()
        self._said: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        _adopt("huggingface_hub")
        text = re.sub("[0-9.]+", "", record.getMessage())
        new = text not in self._said
        self._said.add(text)
        return new


_HUB = "huggingface_hub.utils._http"


def _log_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Log a warning in one line, without the code that it comes from."""
    text = " ".join(str(message).split())
    logging.getLogger("warning").warning("%s: %s", category.__name__, text)


@contextmanager
def readable_messages() -> Iterator[None]:
    """Print the warnings of all libraries as one line each, and none of those for developers.

    Python's -W and PYTHONWARNINGS choose others.
    """
    lines, once, root = _Lines(logging.WARNING), _NoRepeats(), logging.getLogger()
    if root.handlers:  # of an application, or of a test
        yield
        return
    root.addHandler(lines)
    logging.getLogger(_HUB).addFilter(once)
    with warnings.catch_warnings():
        warnings.showwarning = _log_warning
        if not sys.warnoptions:
            for category in (FutureWarning, DeprecationWarning, PendingDeprecationWarning):
                warnings.simplefilter("ignore", category)
        try:
            yield
        finally:
            logging.getLogger(_HUB).removeFilter(once)
            root.removeHandler(lines)


def _adopt(library: str) -> None:
    """Let the messages of a library that prints them itself take the way of all others."""
    logger = logging.getLogger(library)
    if any(isinstance(one, _Lines) for one in logging.getLogger().handlers):
        for handler in list(logger.handlers):
            logger.removeHandler(handler)
        logger.propagate = True
