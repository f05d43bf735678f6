"""Token heat maps as SVG, for papers: vector text whose layout needs no font metrics.

All text is monospaced, and each word stands at a place of its own, so that the figure is the same
in any program. Tints are opaque and darken evenly, so that it can be read in grey print too.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Final, TypeVar
from xml.sax.saxutils import escape, quoteattr

T = TypeVar("T")
Color = tuple[int, int, int]

GENERATOR: Final = "LeaF heat map"
"""Words in the description of each figure, by which an earlier one is recognized."""
BLUE: Final[Color] = (70, 143, 216)
ORANGE: Final[Color] = (240, 136, 43)
WIDTHS: Final = {1: (240.0, 7.0), 2: (504.0, 9.0)}
"""Points of a figure of one or two columns of a paper, and of its letters."""
MOST_LINES: Final = 14
"""Lines of a text with spans in a figure; a longer one is cut to those and their neighbors."""

_ADVANCE = 0.6  # the width of a letter by its size, in nearly all monospaced fonts
_FONTS = "'DejaVu Sans Mono','Liberation Mono',Menlo,Consolas,'Courier New',monospace"
_INK, _QUIET, _RULE, _SPAN = "#1d1d1b", "#55554f", "#b9b8b0", "#a8410b"
_MARGIN = 8.0
_PICTURES = {code: chr(0x2400 + code) for code in range(32)} | {0x7F: "\u2421"}
_PICTURES |= dict.fromkeys([*range(0x80, 0xA0), *range(0xD800, 0xE000), 0xFFFE, 0xFFFF], "\ufffd")


@dataclass(frozen=True)
class Row:
    """One reading of the text.

    Attributes:
        label: its name, which stands in front of each line.
        color: of the strongest tint.
        marked: whether spans are underlined and cuts struck through in it.
    """

    label: str
    color: Color
    marked: bool = False


@dataclass(frozen=True)
class Cell:
    """A piece of the text: a tint in [0, 1] for each row, and whether it is in a span or cut."""

    text: str
    tints: tuple[float, ...]
    span: bool = False
    cut: bool = False


@dataclass(frozen=True)
class Scale:
    """A ramp of the legend, whose tints go from its left end to its right end."""

    label: str
    ends: tuple[str, str]
    color: Color
    tints: tuple[float, ...]


@dataclass(frozen=True)
class Note:
    """A line below the text, of three parts; of a text that is too long the end is shown."""

    text: str
    before: str = ""
    after: str = ""


@dataclass(frozen=True)
class _Glyph:
    character: str
    cell: int
    at: int
    width: int


@dataclass(frozen=True)
class _Size:
    """Measures of a figure in points; `columns` of text stand right of the labels."""

    width: float
    letter: float
    gutter: float

    @property
    def advance(self) -> float:
        return self.letter * _ADVANCE

    @property
    def row(self) -> float:
        return self.letter * 1.6

    @property
    def columns(self) -> int:
        return int((self.width - self.gutter - _MARGIN) / self.advance)


def heat_map(
    rows: Sequence[Row],
    cells: Sequence[Cell],
    scales: Sequence[Scale],
    *,
    title: str,
    notes: Sequence[Note] = (),
    columns: int = 2,
) -> str:
    """Return a figure: for each line of the text its rows below each other, then a legend.

    Args:
        rows: the readings of the text.
        cells: the text in order.
        scales: the ramps of the legend.
        title: the name of the figure for screen readers.
        notes: lines below it, each as wide as the figure at most.
        columns: the width, in columns of a paper with two: 1 (240 points) or 2 (504).

    Raises:
        ValueError: `columns` is another number.
    """
    if columns not in WIDTHS:
        raise ValueError(f"columns: must be 1 or 2, got {columns!r}")
    width, letter = WIDTHS[columns]
    labels = max(len(row.label) for row in rows)
    size = _Size(width, letter, _MARGIN + (labels * 0.85 + 1.5) * letter * _ADVANCE)
    drawn: list[str] = []
    y = _MARGIN
    for line in _shortened(_lines(cells, size.columns), cells):
        if line is None:
            drawn.append(_text(size, size.gutter, y + size.letter, "[\u2026]", _QUIET))
            y += size.row * 1.2
            continue
        drawn += _group(size, rows, cells, line, y)
        y += size.row * len(rows) + size.letter * 0.9
    small = _Size(width, letter * 0.85, size.gutter)
    for note in notes:
        y += small.row
        room = int((width - 2 * _MARGIN) / small.advance)
        drawn.append(_text(small, _MARGIN, y, _fitted(note, room), _INK))
    legend, y = _legend(small, scales, cells, y + small.row * (1.4 if notes else 0.9))
    height = y + _MARGIN
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:g}pt" height="{height:.1f}pt" '
        f'viewBox="0 0 {width:g} {height:.1f}" role="img" font-family={quoteattr(_FONTS)}>'
    )
    background = f'<rect width="{width:g}" height="{height:.1f}" fill="#fff"/>'
    named = f"<title>{escape(_clean(title))}</title><desc>{GENERATOR}</desc>"
    return "\n".join([head, named, background, *drawn, *legend, "</svg>", ""])


def tint(color: Color, level: float) -> str:
    """Return a color on white, opaque: a PDF made of the figure needs no transparency."""
    return "#" + "".join(f"{round(255 - level * (255 - part)):02x}" for part in color)


def _clean(text: str) -> str:
    """Replace the characters that XML cannot hold or nobody can see."""
    return text.replace("\t", "    ").translate(_PICTURES)


def _fitted(note: Note, room: int) -> str:
    """Return a note that takes so many columns at most, with the end of its text."""
    before, text, after = (_clean(part) for part in (note.before, note.text, note.after))
    room -= _width(before + after)
    if _width(text) > room:
        while text and _width(text) >= room:
            text = text[1:]
        text = f"\u2026{text}"
    return before + text + after


def _columns(character: str) -> int:
    """Return how many columns a character takes: none for marks, two for wide ones."""
    if unicodedata.category(character) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def _width(text: str) -> int:
    return sum(map(_columns, text))


def _lines(cells: Sequence[Cell], columns: int) -> list[list[_Glyph]]:
    """Wrap the text; white space at a break is left out, and a line break is shown as an arrow."""
    lines: list[list[_Glyph]] = [[]]
    wrapped = False
    characters = [
        (shown, at)
        for at, cell in enumerate(cells)
        for one in cell.text.replace("\r\n", "\n")
        for shown in (one if one == "\n" else _clean(one))
    ]
    for character, cell in characters:
        line = lines[-1]
        end = line[-1].at + line[-1].width if line else 0
        if character == "\n":
            line.append(_Glyph("\u21b5", cell, end, 1))
            lines.append([])
            wrapped = False
            continue
        width = _columns(character)
        if end + width > columns:
            wrapped = True
            if character.isspace():
                lines.append([])
                continue
            blank = max((n for n, one in enumerate(line) if one.character.isspace()), default=-1)
            moved = line[blank + 1 :] if blank > 0 else []
            lines[-1] = line[:blank] if blank > 0 else line
            first = moved[0].at if moved else end
            line = [_Glyph(one.character, one.cell, one.at - first, one.width) for one in moved]
            lines.append(line)
            end -= first
        elif wrapped and not line and character == " ":
            continue
        line.append(_Glyph(character, cell, end, width))
    return [_mirrored(line, columns) for line in lines if line]


def _mirrored(line: list[_Glyph], columns: int) -> list[_Glyph]:
    """Return a line that begins with a letter of a script from right to left, from the right."""
    kinds = (unicodedata.bidirectional(one.character) for one in line)
    if next((kind for kind in kinds if kind in ("L", "R", "AL")), "L") == "L":
        return line
    return [
        _Glyph(one.character, one.cell, columns - one.at - one.width, one.width) for one in line
    ]


def _shortened(lines: list[list[_Glyph]], cells: Sequence[Cell]) -> Iterator[list[_Glyph] | None]:
    """Yield the lines that are shown, and None for each run of others."""
    wanted = set(range(len(lines)))
    marked = [
        n
        for n, line in enumerate(lines)
        if any(cells[one.cell].span or cells[one.cell].cut for one in line)
    ]
    if len(lines) > MOST_LINES and marked:
        near = sorted({0, *(m for n in marked for m in (n - 1, n, n + 1))} & wanted)
        wanted = set(near[:MOST_LINES])
    for is_shown, group in groupby(enumerate(lines), key=lambda one: one[0] in wanted):
        if is_shown:
            yield from (line for _, line in group)
        else:
            yield None


def _group(
    size: _Size, rows: Sequence[Row], cells: Sequence[Cell], line: list[_Glyph], top: float
) -> Iterator[str]:
    """Yield one line of the text in all its rows, with its cuts in a frame around them."""
    small = _Size(size.width, size.letter * 0.85, size.gutter)
    for number, row in enumerate(rows):
        y = top + number * size.row
        yield _text(small, _MARGIN, y + size.row * 0.68, row.label, _QUIET)
        for x, width, cell in _runs(size, line, [cells[one.cell] for one in line]):
            if level := cell.tints[number]:
                yield (
                    f'<rect x="{x:.2f}" y="{y:.2f}" width="{width:.2f}" height="{size.row - 1:.2f}"'
                    f' fill="{tint(row.color, level)}"/>'
                )
        yield from _words(size, line, y + size.row * 0.68)
        if row.marked:
            for x, width, span in _runs(size, line, [cells[one.cell].span for one in line]):
                if span:
                    yield _stroke(x, y + size.row * 0.86, width, _SPAN, 1.4)
            for x, width, cut in _runs(size, line, [cells[one.cell].cut for one in line]):
                if cut:
                    yield _stroke(x, y + size.row * 0.46, width, _INK, 1.1)
    for x, width, cut in _runs(size, line, [cells[one.cell].cut for one in line]):
        if cut:
            height = size.row * len(rows) + 1
            yield (
                f'<rect x="{x - 1:.2f}" y="{top - 1.5:.2f}" width="{width + 2:.2f}" '
                f'height="{height:.2f}" rx="2" fill="none" stroke="{_INK}" stroke-width="0.9"/>'
            )


def _runs(size: _Size, line: list[_Glyph], values: Sequence[T]) -> Iterator[tuple[float, float, T]]:
    """Yield start and width of each run of glyphs that have one value, in points."""
    for value, group in groupby(zip(line, values, strict=True), key=lambda pair: pair[1]):
        glyphs = [glyph for glyph, _ in group]
        start = min(one.at for one in glyphs)
        stop = max(one.at + one.width for one in glyphs)
        yield size.gutter + start * size.advance, (stop - start) * size.advance, value


def _words(size: _Size, line: list[_Glyph], y: float) -> Iterator[str]:
    def kind(one: _Glyph) -> str:
        return (
            "" if one.character.isspace() else one.character if one.character == "\u21b5" else "w"
        )

    for name, group in groupby(line, key=kind):
        glyphs = list(group)
        if not name:
            continue
        start = min(one.at for one in glyphs)
        width = max(one.at + one.width for one in glyphs) - start
        text = "".join(one.character for one in glyphs)
        ink = _QUIET if text == "\u21b5" else _INK
        yield _text(size, size.gutter + start * size.advance, y, text, ink, width)


def _text(size: _Size, x: float, y: float, text: str, ink: str, columns: int | None = None) -> str:
    # Fonts of another advance are fitted by browsers; other programs leave a gap.
    fitted = (
        ""
        if columns is None or columns < 2
        else (f' textLength="{columns * size.advance:.2f}" lengthAdjust="spacingAndGlyphs"')
    )
    return (
        f'<text x="{x:.2f}" y="{y:.2f}" font-size="{size.letter:g}" fill="{ink}"{fitted} '
        f'xml:space="preserve">{escape(_clean(text))}</text>'
    )


def _stroke(x: float, y: float, width: float, ink: str, thickness: float) -> str:
    return (
        f'<path d="M{x:.2f} {y:.2f}h{width:.2f}" stroke="{ink}" stroke-width="{thickness:g}" '
        'fill="none"/>'
    )


def _legend(
    size: _Size, scales: Sequence[Scale], cells: Sequence[Cell], top: float
) -> tuple[list[str], float]:
    """Return the legend and where it ends: ramps, and the marks that the text has."""
    drawn = [_stroke(_MARGIN, top - size.row * 0.4, size.width - 2 * _MARGIN, _RULE, 0.5)]
    x, y = _MARGIN, top + size.row * 0.8

    def place(width: float) -> None:
        """Begin a new line where so much does not fit into this one."""
        nonlocal x, y
        if x > _MARGIN and x + width > size.width - _MARGIN:
            x, y = _MARGIN, y + size.row * 1.1

    for scale in scales:
        left, right = f"{scale.label} {scale.ends[0]}", scale.ends[1]
        ramp, high = size.letter * 6, size.letter * 0.9
        place((len(left) + len(right) + 4) * size.advance + ramp)
        drawn.append(_text(size, x, y, left, _INK))
        x += (len(left) + 1) * size.advance
        step = ramp / len(scale.tints)
        for number, level in enumerate(scale.tints):
            drawn.append(
                f'<rect x="{x + number * step:.2f}" y="{y - high * 0.85:.2f}" '
                f'width="{step + 0.05:.2f}" height="{high:.2f}" fill="{tint(scale.color, level)}"/>'
            )
        drawn.append(
            f'<rect x="{x:.2f}" y="{y - high * 0.85:.2f}" width="{ramp:.2f}" height="{high:.2f}" '
            f'fill="none" stroke="{_RULE}" stroke-width="0.5"/>'
        )
        x += ramp + size.advance
        drawn.append(_text(size, x, y, right, _INK))
        x += (len(right) + 3) * size.advance
    for words, shown, framed in (
        ("detected span", any(cell.span for cell in cells), False),
        ("cut", any(cell.cut for cell in cells), True),
    ):
        if not shown:
            continue
        long = len(words) * size.advance
        place(long + 3 * size.advance)
        drawn.append(_text(size, x, y, words, _INK))
        if framed:
            drawn.append(
                f'<rect x="{x - 2:.2f}" y="{y - size.letter * 0.9:.2f}" width="{long + 4:.2f}" '
                f'height="{size.letter * 1.25:.2f}" rx="2" fill="none" stroke="{_INK}" '
                'stroke-width="0.8"/>'
            )
        else:
            drawn.append(_stroke(x, y + size.letter * 0.28, long, _SPAN, 1.2))
        x += long + 3 * size.advance
    return drawn, y
