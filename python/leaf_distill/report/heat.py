"""Cuts a prompt's text into coloured cells: what the page shows for each token, as plain values."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

LEVELS = 20
Range = tuple[int, int]


@dataclass(frozen=True)
class Token:
    """One token of the user's text: character range and its numbers (NaN where there is none)."""

    start: int
    stop: int
    teacher: float
    student: float
    score: float
    confounder: bool


@dataclass(frozen=True)
class Cell:
    """A piece of text that is coloured as one; levels are 0..LEVELS, None is uncoloured."""

    text: str
    title: str
    teacher: int | None
    student: int | None
    score: int | None


@dataclass(frozen=True)
class Stretch:
    """Neighbouring cells that share their place in the detected spans and in the cuts."""

    span: bool
    cut: bool
    cells: tuple[Cell, ...]


def saliency_level(value: float) -> int | None:
    """Color step of a saliency in [0, 1]: linear, 0 is the paper itself."""
    return None if math.isnan(value) else round(LEVELS * min(max(value, 0.0), 1.0))


def score_level(value: float) -> int | None:
    """Color step of a score in [0, 1]: (1 - score)^3, strongest at 0, where confounders are.

    Cubed, because after the second min-max most tokens crowd in the middle of the scale: a linear
    ramp would tint the whole prompt and hide the few tokens near the threshold.
    """
    return None if math.isnan(value) else round(LEVELS * (1.0 - min(max(value, 0.0), 1.0)) ** 3)


def _clusters(tokens: Iterable[Token]) -> list[tuple[int, int, list[Token]]]:
    """Tokens grouped where their ranges overlap: several byte tokens may share one character."""
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


def _extreme(values: Iterable[float], *, low: bool = False) -> float:
    finite = [value for value in values if not math.isnan(value)]
    return math.nan if not finite else (min(finite) if low else max(finite))


def _cell(text: str, tokens: Sequence[Token]) -> Cell:
    return Cell(
        text=text,
        title="\n".join(_describe(token) for token in tokens),
        teacher=saliency_level(_extreme(token.teacher for token in tokens)),
        student=saliency_level(_extreme(token.student for token in tokens)),
        score=score_level(_extreme((token.score for token in tokens), low=True)),
    )


def _inside(start: int, ranges: Sequence[Range]) -> bool:
    return any(low <= start < high for low, high in ranges)


def heat(
    text: str, tokens: Iterable[Token], spans: Sequence[Range], cuts: Sequence[Range]
) -> tuple[Stretch, ...]:
    """The whole text, in order and without holes, as stretches of cells.

    Text that no token covers is kept, uncoloured; a range border inside a token splits the cell.
    """
    clusters = _clusters(token for token in tokens if 0 <= token.start < token.stop <= len(text))
    edges = {0, len(text)}
    for start, stop in [*((c[0], c[1]) for c in clusters), *spans, *cuts]:
        edges |= {min(max(start, 0), len(text)), min(max(stop, 0), len(text))}
    pieces: list[tuple[bool, bool, Cell]] = []
    at = 0
    for start, stop in pairwise(sorted(edges)):
        while at < len(clusters) and clusters[at][1] <= start:
            at += 1
        covered = at < len(clusters) and clusters[at][0] <= start
        cell = _cell(text[start:stop], clusters[at][2] if covered else ())
        pieces.append((_inside(start, spans), _inside(start, cuts), cell))
    grouped = groupby(pieces, key=lambda piece: piece[:2])
    return tuple(
        Stretch(span, cut, tuple(cell for _, _, cell in group)) for (span, cut), group in grouped
    )


@dataclass(frozen=True)
class Piece:
    """A stretch of a counterfactual's prompt: kept text, cut text, or `hidden` characters of it."""

    text: str
    cut: bool = False
    hidden: int = 0


def cut_excerpt(text: str, cut: Sequence[Range], *, context: int = 160) -> tuple[Piece, ...]:
    """The text with its cut, kept text farther than `context` from a cut left out and counted."""
    pieces: list[Piece] = []
    at = 0
    for start, stop in [*sorted(cut), (len(text), len(text))]:
        kept = text[at:start]
        head = 0 if at == 0 else context
        tail = 0 if start == len(text) and start == stop else context
        hidden = len(kept) - head - tail
        if hidden > 2 * context:
            before, after = kept[:head], kept[len(kept) - tail :]
            pieces += [Piece(before), Piece("", hidden=hidden), Piece(after)]
        else:
            pieces.append(Piece(kept))
        pieces.append(Piece(text[start:stop], cut=True))
        at = max(at, stop)
    return tuple(piece for piece in pieces if piece.text or piece.hidden)


def tail(text: str, *, length: int = 160) -> str:
    """The end of a long answer, where its result stands, from the start of a line or word."""
    end = text.rstrip()[-length:]
    lines = end.partition("\n")[2]
    if len(lines) > length // 3:
        return lines
    return end.partition(" ")[2] or end
