"""Cuts a prompt's text into the colored cells and excerpts that the page shows."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, pairwise
from types import MappingProxyType

from leaf_distill.data.example import Range

LEVELS = 20
"""Steps of a color scale, beside 0."""


@dataclass(frozen=True)
class Token:
    """One token of the user's text: its characters and numbers (NaN where there is none)."""

    start: int
    stop: int
    teacher: float
    student: float
    score: float
    confounder: bool


@dataclass(frozen=True)
class Cell:
    """A piece of text that has one color; levels are 0..LEVELS, and None is no color.

    `message` is the name of the message that begins with it, where there are several.
    """

    text: str
    title: str
    teacher: int | None
    student: int | None
    score: int | None
    message: str = ""


@dataclass(frozen=True)
class Stretch:
    """Neighboring cells that are all inside or all outside a detected span, and a cut."""

    span: bool
    cut: bool
    cells: tuple[Cell, ...]


def saliency_level(value: float) -> int | None:
    """Return the color step of a saliency in [0, 1], which is linear."""
    return None if math.isnan(value) else round(LEVELS * min(max(value, 0.0), 1.0))


def score_level(value: float) -> int | None:
    """Return the color step of a score in [0, 1]: (1 - score)^3, strongest at 0.

    The cube is needed because most scores lie in the middle of the scale: a linear ramp would tint
    the whole prompt and hide the few tokens near the threshold.
    """
    return None if math.isnan(value) else round(LEVELS * (1.0 - min(max(value, 0.0), 1.0)) ** 3)


def _clusters(tokens: Iterable[Token]) -> list[tuple[int, int, list[Token]]]:
    """Group tokens whose ranges overlap, since several byte tokens may share one character."""
    clusters: list[tuple[int, int, list[Token]]] = []
    for token in sorted(tokens, key=lambda t: (t.start, t.stop)):
        if clusters and token.start < clusters[-1][1]:
            start, stop, members = clusters[-1]
            clusters[-1] = (start, max(stop, token.stop), [*members, token])
        else:
            clusters.append((token.start, token.stop, [token]))
    return clusters


def _number(value: float, form: str = ".3f") -> str:
    return "none" if math.isnan(value) else f"{value:{form}}".replace("-", "\N{MINUS SIGN}")


def _describe(token: Token) -> str:
    parts = [
        f"teacher {_number(token.teacher)}",
        f"student {_number(token.student)}",
        f"gap {_number(token.teacher - token.student, '+.3f')}",
        f"score {_number(token.score)}",
    ]
    return " · ".join([*parts, "confounder"] if token.confounder else parts)


def _cell(text: str, tokens: Sequence[Token]) -> Cell:
    """Color a piece of text by the strongest of its tokens: highest saliency, lowest score."""

    def known(name: str) -> list[float]:
        return [x for token in tokens if not math.isnan(x := getattr(token, name))]

    return Cell(
        text=text,
        title="\n".join(_describe(token) for token in tokens),
        teacher=saliency_level(max(known("teacher"), default=math.nan)),
        student=saliency_level(max(known("student"), default=math.nan)),
        score=score_level(min(known("score"), default=math.nan)),
    )


def heat(
    text: str,
    tokens: Iterable[Token],
    spans: Sequence[Range],
    cuts: Sequence[Range],
    messages: Mapping[int, str] = MappingProxyType({}),
) -> tuple[Stretch, ...]:
    """Return the whole text, in order, as stretches of cells.

    Text that no token covers has no color; a border of a range inside a token splits the cell.
    `messages` names the messages that the text is joined of, at their first character.
    """
    clusters = _clusters(token for token in tokens if 0 <= token.start < token.stop <= len(text))
    edges = {0, len(text), *messages}
    for start, stop in [*((c[0], c[1]) for c in clusters), *spans, *cuts]:
        edges |= {min(max(start, 0), len(text)), min(max(stop, 0), len(text))}
    pieces: list[tuple[bool, bool, Cell]] = []
    at = 0
    for start, stop in pairwise(sorted(edges)):
        while at < len(clusters) and clusters[at][1] <= start:
            at += 1
        covered = at < len(clusters) and clusters[at][0] <= start
        cell = _cell(text[start:stop], clusters[at][2] if covered else ())
        cell = replace(cell, message=messages.get(start, ""))
        span, cut = (any(a <= start < b for a, b in ranges) for ranges in (spans, cuts))
        pieces.append((span, cut, cell))
    grouped = groupby(pieces, key=lambda piece: piece[:2])
    return tuple(
        Stretch(span, cut, tuple(cell for _, _, cell in group)) for (span, cut), group in grouped
    )


@dataclass(frozen=True)
class Piece:
    """A part of a changed prompt, of which one is given.

    Attributes:
        text: kept text, or with `cut` what was cut.
        cut: whether it was cut.
        hidden: the number of kept characters that are left out of the excerpt.
        inserted: the text that stands in place of the cut before it.
        message: the name of the message that begins here, where there are several.
    """

    text: str = ""
    cut: bool = False
    hidden: int = 0
    inserted: str = ""
    message: str = ""


def cut_excerpt(
    text: str,
    cut: Sequence[Range],
    inserted: Sequence[str] = (),
    messages: Mapping[int, str] = MappingProxyType({}),
    *,
    context: int = 32,
) -> tuple[Piece, ...]:
    """Return a prompt's cuts, each with about `context` characters of the text on either side.

    Args:
        text: the prompt.
        cut: the ranges that were cut.
        inserted: what stands in place of each; none: nothing.
        messages: the names of the messages that the text is joined of, at their first character.
        context: the number of characters.
    """
    pieces: list[Piece] = []

    def add(start: int, stop: int, *, cut: bool = False) -> None:
        edges = [start, *(one for one in sorted(messages) if start < one < stop), stop]
        for low, high in pairwise(edges) if start < stop else ():
            pieces.append(Piece(message=messages.get(low, "")))
            pieces.append(Piece(text[low:high], cut=cut))

    at, end = 0, len(text)
    edits = sorted(zip(cut, inserted or [""] * len(cut), strict=True))
    for (start, stop), new in [*edits, ((end, end), "")]:
        kept = text[at:start]
        head = _head(kept, context) if at else ""
        tail = _tail(kept, context) if start < end else ""
        low, high = at + len(head), start - len(tail)
        if high - low > context // 2:
            add(at, low)
            passed = [one for one in sorted(messages) if low <= one < high]
            pieces += [Piece(message=messages[one]) for one in passed[-1:]]
            pieces.append(Piece(hidden=high - low))
            add(high, start)
        else:
            add(at, start)
        add(start, stop, cut=True)
        pieces.append(Piece(inserted=new))
        at = max(at, stop)
    return tuple(piece for piece in pieces if piece != Piece())


def last_lines(text: str, *, length: int = 160) -> str:
    """Return the end of a long answer, where its result stands, from the start of a line or word.

    A line break is used where at least a third of the length follows it.
    """
    text = text.rstrip()
    lines = text[-length:].partition("\n")[2]
    return lines if len(lines) > length // 3 else _tail(text, length)


def _head(text: str, length: int) -> str:
    """Return about `length` characters of the start, up to a space where there is one."""
    if len(text) <= length:
        return text
    return text[:length].rpartition(" ")[0] or text[:length]


def _tail(text: str, length: int) -> str:
    """Return about `length` characters of the end, from a space where there is one."""
    if len(text) <= length:
        return text
    return text[-length:].partition(" ")[2] or text[-length:]
