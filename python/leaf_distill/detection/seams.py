"""Cuts whose seams read as text: no doubled blank, no blank before a comma, no joined words."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

from leaf_distill.data.example import Range
from leaf_distill.data.sentences import LINE_BREAKS, NO_BLANKS, is_grapheme_border, is_mark

_ENDS = ".!?\u2026\u3002\uff01\uff1f\u0964\u061f\u06d4"
_COMMAS = ",;\uff0c\uff1b\u3001\u060c\u061b"
_POINTS = _COMMAS + _ENDS + ":\uff1a"
_OPENERS = "([\uff08\u3010\u201c\u2018\xab\xbf\xa1"
_CLOSERS = ")]\uff09\u3011\u201d\xbb"
_PAIRS = ("()", "[]", "\uff08\uff09", "\u3010\u3011", "\u201c\u201d", "\u2018\u2019", "\xab\xbb")
_QUOTES = "\"'`$"
_UNSPACED = re.compile(f"[{NO_BLANKS}]")


def tidy(text: str, ranges: Iterable[Range]) -> tuple[Range, ...]:
    """Return ranges whose characters leave a text that reads as one when they are cut out.

    At a seam there is then no doubled blank; no blank at the start or end of a line, after an
    opening parenthesis, or before a closing one or a punctuation mark, where the text had none; no
    empty line, pair of parentheses or quotes, and no comma before another mark. A line goes whole
    or keeps its indentation and its line break; a sentence that loses its end keeps its full stop.

    A range takes blanks and punctuation for that, never a letter or a digit. It gives a blank (or
    mark) back where the cut would join two words or numbers, and it gives back or takes the rest of
    a character that it holds in part (accents, conjuncts, emoji).

    Args:
        text: the text that the ranges count characters of.
        ranges: non-empty and within the text, in any order.

    Returns:
        Sorted, disjoint ranges that do not touch; fewer where all of one was given back. The tidied
        ranges of tidied ranges are the same.
    """
    cut = _Cut(text, ranges)
    # Each rule takes what no later rule gives back, so that a few rounds are enough.
    for _ in range(len(text) + 8):
        if not cut.improve():
            break
    return cut.runs()


class _Cut:
    """The characters that are cut, and the rules that alter them, one seam after another."""

    def __init__(self, text: str, ranges: Iterable[Range]) -> None:
        self.text = text
        self.gone = bytearray(len(text))
        for start, stop in ranges:
            if not 0 <= start < stop <= len(text):
                raise ValueError(
                    f"ranges: must be non-empty and within {len(text)} characters, "
                    f"got {(start, stop)}"
                )
            self.gone[start:stop] = b"\x01" * (stop - start)
        self.rules: tuple[Callable[[int, int], bool], ...] = (
            self._keep_graphemes,
            self._keep_line_breaks,
            self._drop_empty_line,
            self._keep_indentation,
            self._drop_pair,
            self._keep_full_stop,
            self._drop_doubled_mark,
            self._drop_blank,
            self._keep_apart,
        )

    def runs(self) -> tuple[Range, ...]:
        found = []
        start = self.gone.find(1)
        while start >= 0:
            stop = self.gone.find(0, start)
            stop = len(self.gone) if stop < 0 else stop
            found.append((start, stop))
            start = self.gone.find(1, stop)
        return tuple(found)

    def improve(self) -> bool:
        """Apply at most one rule at each seam; False where none applies."""
        changed = False
        for start, stop in self.runs():
            # A rule at an earlier seam may have altered this one: the next round sees it anew.
            if all(self.gone[start:stop]) and self._is_run(start, stop):
                changed |= any(rule(start, stop) for rule in self.rules)
        return changed

    def _is_run(self, start: int, stop: int) -> bool:
        return not (start and self.gone[start - 1]) and not (
            stop < len(self.gone) and self.gone[stop]
        )

    def _take(self, start: int, stop: int) -> bool:
        """Cut more, with the marks that belong to it, unless a letter belongs to it too."""
        if not is_grapheme_border(self.text, stop):
            low, stop = stop, _grapheme(self.text, stop)[1]
            if any(char.isalnum() for char in self.text[low:stop]):
                return False
        self.gone[start:stop] = b"\x01" * (stop - start)
        return True

    def _give(self, start: int, stop: int) -> bool:
        self.gone[start:stop] = b"\x00" * (stop - start)
        return True

    def _left(self, at: int, skip: str = "") -> int:
        """Return the index of the last character before `at` that stays, -1 where there is none."""
        at -= 1
        while at >= 0 and (self.gone[at] or self.text[at] in skip):
            at -= 1
        return at

    def _right(self, at: int, skip: str = "") -> int:
        """Return the index of the first character from `at` on that stays, or the length."""
        while at < len(self.text) and (self.gone[at] or self.text[at] in skip):
            at += 1
        return at

    def _char(self, at: int) -> str:
        return self.text[at] if 0 <= at < len(self.text) else ""

    def _line(self, start: int, stop: int) -> tuple[bool, bool]:
        """Whether only blanks of the line stay before the seam, and after it."""
        before, after = (
            self._char(self._left(start, _BLANKS)),
            self._char(self._right(stop, _BLANKS)),
        )
        return before in LINE_BREAKS, after in LINE_BREAKS  # "" is in both

    def _keep_graphemes(self, start: int, stop: int) -> bool:
        text = self.text
        for at in (start, stop):
            if is_grapheme_border(text, at):
                continue
            low, high = _grapheme(text, at)
            stays = (text[one] for one in range(low, high) if not self.gone[one])
            if any(char.isalnum() for char in stays):
                return self._give(low, high)
            return self._take(low, high)
        return False

    def _keep_line_breaks(self, start: int, stop: int) -> bool:
        """Give back a line break at either end of a cut that begins and ends within lines."""
        held = self.text[start:stop]
        at_start, at_end = self._line(start, stop)
        head = len(held) - len(held.lstrip())
        tail = len(held.rstrip())
        if not at_start and any(mark in held[tail:] for mark in LINE_BREAKS):
            first = min(i for i in range(tail, len(held)) if held[i] in LINE_BREAKS)
            return self._give(start + first, stop)
        if not at_end and any(mark in held[:head] for mark in LINE_BREAKS) and not at_start:
            return self._give(start, start + head)
        return False

    def _drop_empty_line(self, start: int, stop: int) -> bool:
        text = self.text
        at_start, at_end = self._line(start, stop)
        if not (at_start and at_end):
            return False
        left, right = self._left(start, _BLANKS), self._right(stop, _BLANKS)
        own = text[start:stop].rstrip(_BLANKS)[-1:]
        if left + 1 < start and any(not self.gone[at] for at in range(left + 1, start)):
            return self._take(left + 1, start)  # the indentation of a line that goes
        if right == len(text):
            if any(not self.gone[at] for at in range(stop, right)):
                return self._take(stop, right)
            if left >= 0 and (not own or own not in LINE_BREAKS):
                return self._take(left, start)
            return False
        above = self._char(self._left(left, _BLANKS)) if left >= 0 else ""
        if not own or own not in LINE_BREAKS or above in LINE_BREAKS:
            return self._take(stop, right + 1)
        return False

    def _keep_indentation(self, start: int, stop: int) -> bool:
        """Give back the blanks that begin a line of which something stays."""
        text = self.text
        _, at_end = self._line(start, stop)
        held = text[start:stop]
        begun = max(held.rfind(mark) for mark in LINE_BREAKS) + 1
        if at_end:
            return False
        if begun and begun < len(held) and not held[begun:].strip(_BLANKS):
            return self._give(start + begun, stop)
        line = max(text.rfind(mark, 0, start) for mark in LINE_BREAKS) + 1
        if held[-1] in LINE_BREAKS or text[line:start].strip(_BLANKS):
            return False
        blanks = len(held) - len(held.lstrip(_BLANKS))
        return blanks > 0 and self._give(start, start + blanks)

    def _drop_pair(self, start: int, stop: int) -> bool:
        """Take an empty pair of parentheses or quotes."""
        text, left, right = self.text, self._left(start, _BLANKS), self._right(stop, _BLANKS)
        if self._char(left) + self._char(right) in _PAIRS:
            return self._take(left, right + 1)
        left, right = start - 1, stop
        mark = self._char(left)
        if not mark or mark not in _QUOTES or mark != self._char(right):
            return False
        line = max(text.rfind(one, 0, left) for one in LINE_BREAKS) + 1
        opens = text.count(mark, line, left) % 2 == 0
        held = text[start:stop]
        return opens and held == held.strip() and self._take(left, right + 1)

    def _keep_full_stop(self, start: int, stop: int) -> bool:
        """Give back the full stop of a sentence of which the beginning stays."""
        left, right = self._left(start, _BLANKS), self._char(stop)
        mark = self.text[stop - 1]
        if mark not in _ENDS or not (right in LINE_BREAKS + _BLANKS or mark not in ".!?\u2026"):
            return False
        before = self._char(left)
        if any(char in LINE_BREAKS for char in self.text[start:stop]):
            return False
        if not before or before in LINE_BREAKS + _ENDS + _OPENERS + ":\uff1a":
            return False
        return self._give(stop - 1, stop)

    def _is_point(self, at: int) -> bool:
        """Whether a punctuation mark stands there that belongs to the text before it."""
        mark, after = self._char(at), self._char(at + 1)
        if not mark or mark not in _POINTS:
            return False
        if mark == ".":
            return not (after.isalnum() or (after != "" and after in "._/"))
        return not (mark in "!:" and after in ("=", ":"))

    def _drop_doubled_mark(self, start: int, stop: int) -> bool:
        left, right = self._left(start, _BLANKS), self._right(stop, _BLANKS)
        before, after = self._char(left), self._char(right)
        if not self._is_point(right) or not any(char.isalnum() for char in self.text[start:stop]):
            return False
        if before and before in _COMMAS:
            return self._take(left, start)
        if not before or before in LINE_BREAKS + _OPENERS or (before in _ENDS):
            if before and before in _OPENERS + LINE_BREAKS and after in _ENDS and stop < right:
                return False
            return self._take(stop, right + 1)
        return False

    def _drop_blank(self, start: int, stop: int) -> bool:
        text = self.text
        before, after = self._char(start - 1), self._char(stop)
        at_start, at_end = self._line(start, stop)
        held = text[start:stop]
        if at_start:
            starts_line = held[-1] in LINE_BREAKS
            if starts_line and before and before in _BLANKS:
                return self._take(self._left(start, _BLANKS) + 1, start)
            if not starts_line and after and after in _BLANKS and not at_end:
                return self._take(stop, self._right(stop, _BLANKS))
            return False
        if at_end or (after and after in _BLANKS):
            if before in _BLANKS and at_end:
                return self._take(self._left(start, _BLANKS) + 1, start)
            if before in _BLANKS:
                return self._take(stop, self._right(stop, _BLANKS))
            opens = before in _OPENERS and held[0] not in _BLANKS
            return opens and not at_end and self._take(stop, self._right(stop, _BLANKS))
        closes = after in _CLOSERS or self._is_point(stop)
        if before in _BLANKS and closes and held[-1] not in _BLANKS:
            return self._take(self._left(start, _BLANKS) + 1, start)
        return False

    def _keep_apart(self, start: int, stop: int) -> bool:
        """Give a blank back where two words would become one."""
        before, after = self._char(start - 1), self._char(stop)
        if not before or not after or before.isspace() or after.isspace():
            return False
        held = self.text[start:stop]
        joined = _in_word(before) and _in_word(after)
        loose = before not in _OPENERS and after not in _CLOSERS and not self._is_point(stop)
        if joined or loose:
            if held[-1].isspace():
                return self._give(stop - 1, stop)
            if held[0].isspace():
                return self._give(start, start + 1)
        if not joined or (_UNSPACED.match(before) and _UNSPACED.match(after)):
            return False
        for test in (str.isspace, lambda char: not _in_word(char)):
            for at in range(stop - 1, start - 1, -1):
                if test(self.text[at]):
                    return self._give(*_grapheme(self.text, at))
        return False


_BLANKS = " \t\xa0\u3000\u202f"


def _grapheme(text: str, at: int) -> Range:
    """Return the range of the character, as a reader sees it, that holds the one at `at`."""
    low, high = at, at + 1
    while not is_grapheme_border(text, low):
        low -= 1
    while not is_grapheme_border(text, high):
        high += 1
    return low, high


def _in_word(char: str) -> bool:
    return char.isalnum() or char == "_" or is_mark(char)
