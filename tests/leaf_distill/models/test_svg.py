"""Figures: every character in its place, whatever the text holds, and nothing but SVG."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from xml.etree import ElementTree

import pytest

from leaf_distill.models.svg import (
    BLUE,
    MOST_LINES,
    ORANGE,
    WIDTHS,
    Cell,
    Note,
    Row,
    Scale,
    heat_map,
    tint,
)

ROWS = [Row("teacher", BLUE), Row("score", ORANGE, marked=True)]
SCALES = [Scale("saliency", ("0", "1"), BLUE, (0.0, 0.5, 1.0))]
SVG = "{http://www.w3.org/2000/svg}"


def draw(cells: Sequence[Cell], columns: int = 2, **words: str) -> ElementTree.Element:
    content = heat_map(ROWS, cells, SCALES, title="Row 3", columns=columns, **words)  # type: ignore[arg-type]
    return ElementTree.fromstring(content)


def words(figure: ElementTree.Element, size: float | None = None) -> list[tuple[float, float, str]]:
    """Height, place and text of each word of the letters' own size."""
    size = size or WIDTHS[2][1]
    return [
        (float(one.attrib["y"]), float(one.attrib["x"]), one.text or "")
        for one in figure.iter(f"{SVG}text")
        if float(one.attrib["font-size"]) == size
    ]


def text_of(figure: ElementTree.Element) -> list[str]:
    """The words of the first row of each line, in reading order."""
    by_line: dict[float, list[tuple[float, str]]] = {}
    for y, x, text in words(figure):
        by_line.setdefault(y, []).append((x, text))
    lines = [[text for _, text in sorted(by_line[y])] for y in sorted(by_line)]
    assert lines[0::2] == lines[1::2]  # both rows have the same text
    return [text for line in lines[0::2] for text in line]


def cells_of(text: str, **marks: bool) -> list[Cell]:
    tokens = re.findall(r"\s*\S+|\s+", text)
    return [Cell(one, (0.25, 0.75), **marks) for one in tokens]


@pytest.mark.parametrize("columns", [1, 2])
def test_the_whole_text_is_there_within_the_width(columns: int) -> None:
    text = " ".join(f"word{at}" for at in range(70)) + " " + "x" * 200
    figure = draw(cells_of(text), columns)
    width, letter = WIDTHS[columns]
    assert figure.attrib["width"] == f"{width:g}pt"
    found = words(figure, letter)
    seen = [(y, x, x + len(text) * letter * 0.6) for y, x, text in found]
    assert all(x > 0 and stop <= width for _, x, stop in seen)
    for (y, _, stop), (below, x, _) in pairwise(seen):
        assert below > y or x >= stop - 0.01  # no word lies on another
    whole = "".join(one for _, _, one in found if one.startswith("x"))
    assert whole == "x" * 400  # in both rows
    assert [one for _, _, one in found if one == "word69"] == ["word69"] * 2


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("one  two\nthree\r\n\tfour", ["one", "two", "\u21b5", "three", "\u21b5", "four"]),
        ("</text><script>1</script>&amp; \"'", ["</text><script>1</script>&amp;", "\"'"]),
        ("a\x00b\x1b \x7f \ud800 \ufffe", ["a\u2400b\u241b", "\u2421", "\ufffd", "\ufffd"]),
        ("e\u0301 漢字 👩‍👩‍👧 z", ["e\u0301", "漢字", "👩‍👩‍👧", "z"]),
    ],
)
def test_any_text_is_well_formed_xml(text: str, shown: list[str]) -> None:
    figure = draw([Cell(text, (0.5, 0.5))])
    assert text_of(figure) == shown
    assert {one.tag.removeprefix(SVG) for one in figure.iter()} <= {
        *("svg", "title", "desc", "rect", "text", "path"),
    }
    for one in figure.iter():
        assert not {"href", "style", "class", "id"} & set(one.attrib)


def test_wide_characters_take_two_columns_and_marks_none() -> None:
    figure = draw([Cell("漢字 e\u0301e\u0301 z", (0.5, 0.5))])
    (_, first, _), (_, second, _), (_, third, _) = words(figure)[:3]
    advance = WIDTHS[2][1] * 0.6
    assert second - first == pytest.approx(5 * advance, abs=0.02)
    assert third - second == pytest.approx(3 * advance, abs=0.02)


def test_a_script_from_right_to_left_begins_at_the_right() -> None:
    (_, first, one), (_, second, two) = words(draw([Cell("כמה תפוחים", (0.5, 0.5))]))[:2]
    assert (one, two) == ("כמה", "תפוחים") and second < first


def test_tints_are_opaque_and_darker_with_the_value() -> None:
    assert tint(BLUE, 0) == "#ffffff" and tint(BLUE, 1) == "#468fd8"
    for color in (BLUE, ORANGE):
        grey = [
            sum(
                share * int(tint(color, step / 10)[at : at + 2], 16)
                for share, at in ((0.299, 1), (0.587, 3), (0.114, 5))
            )
            for step in range(11)
        ]
        assert all(one - two > 5 for one, two in pairwise(grey))


def test_spans_and_cuts_are_marked_by_lines_too() -> None:
    def marks(*cells: Cell) -> tuple[int, int]:
        figure = draw(cells)
        frames = [one for one in figure.iter(f"{SVG}rect") if one.get("rx")]
        return len(list(figure.iter(f"{SVG}path"))), len(frames)

    plain = Cell("plain", (0.0, 0.0))
    assert marks(plain) == (1, 0)  # the line above the legend
    assert marks(plain, Cell(" span", (0.0, 0.0), span=True)) == (3, 0)
    assert marks(plain, Cell(" cut", (0.0, 0.0), cut=True)) == (2, 2)


def test_of_a_long_text_the_lines_with_spans_are_shown() -> None:
    cells = cells_of(" ".join(f"word{at}" for at in range(3000)))
    cells[1500] = Cell(" word1500", (1.0, 1.0), span=True, cut=True)
    found = [text for _, _, text in words(draw(cells))]
    assert {"word0", "word1499", "word1500", "word1501"} <= set(found)
    assert "word1200" not in found and found.count("[\u2026]") == 2
    assert len({y for y, _, _ in words(draw(cells))}) <= 2 * MOST_LINES + 2


def test_notes_fit_and_another_width_is_refused() -> None:
    long = [Note("n" * 400, "first ", " last"), Note("short", "(", ")"), Note("", "b" * 400)]
    figure = draw(cells_of("one"), notes=long)  # type: ignore[arg-type]
    found = [one.text or "" for one in figure.iter(f"{SVG}text")]
    (note,) = [one for one in found if one.startswith("first \u2026nnn")]
    assert note.endswith("n last") and len(note) == 106 and "(short)" in found
    with pytest.raises(ValueError, match=r"columns: must be 1 or 2, got 3"):
        draw(cells_of("one"), 3)
