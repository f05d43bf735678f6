"""Segments of a response: their borders, and the places where there must be none."""

from __future__ import annotations

import json
import time
from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from real_data import data_file
from text_friends import TEXTS, texts

from leaf_distill.data.segments import split_response
from leaf_distill.data.sentences import (
    border_after,
    is_grapheme_border,
    partition,
    protected,
    sentence_borders,
    sentences,
)


def parts(text: str, n: int) -> list[str]:
    edges = [0, *split_response(text, n), len(text)]
    return [text[a:b] for a, b in pairwise(edges)]


def pieces(text: str) -> list[str]:
    return [text[start:stop] for start, stop in sentences(text)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("One. Two! Three? Four", ["One.", " Two!", " Three?", " Four"]),
        ("One.\n\n  Two\nThree", ["One.\n\n", "  Two\n", "Three"]),
        ("He paid 3.14 of 1,000.50. Then left.", ["He paid 3.14 of 1,000.50.", " Then left."]),
        (
            "Ask Dr. Lee, e.g. by mail, i.e. now. Go.",
            ["Ask Dr. Lee, e.g. by mail, i.e. now.", " Go."],
        ),
        (
            "It was 5 p.m. on Monday. At 6 p.m. He left.",
            ["It was 5 p.m. on Monday.", " At 6 p.m.", " He left."],
        ),
        ("See no. 5 now. He said no. Then", ["See no. 5 now.", " He said no.", " Then"]),
        (
            "George W. Bush met J. K. Rowling. At point P. He",
            ["George W. Bush met J. K. Rowling.", " At point P.", " He"],
        ),
        ('"Why?" she asked. "Go." He went...', ['"Why?" she asked.', ' "Go."', " He went..."]),
        ("Well... yes. 1. No", ["Well... yes.", " 1.", " No"]),
        ("1. First one.\n2. Second one.", ["1. First one.\n", "2. Second one."]),
        ("tom has 7 . the label says 8 .", ["tom has 7 .", " the label says 8 ."]),
        (
            "See https://a.org/x.y. Mail a.b@c.org. End",
            ["See https://a.org/x.y.", " Mail a.b@c.org.", " End"],
        ),
        ("She has $5. He has $6. They pay.", ["She has $5.", " He has $6.", " They pay."]),
        (
            "Let $x. Y$ be. Then $$a. B$$ so \\(c. D\\) ok. Z",
            ["Let $x. Y$ be.", " Then $$a. B$$ so \\(c. D\\) ok.", " Z"],
        ),
        (
            "A\n\\begin{align}\nx. Y\n\\end{align}\nB",
            ["A\n", "\\begin{align}\nx. Y\n\\end{align}\n", "B"],
        ),
        ("Where \\[x = 1.\\]Find x.", ["Where \\[x = 1.\\]", "Find x."]),
        ("Do:\n```\na. B\n\nc\n```\nEnd. Ok", ["Do:\n", "```\na. B\n\nc\n```\n", "End.", " Ok"]),
        ("Do:\n```\na. B\n\nc", ["Do:\n", "```\na. B\n\nc"]),
        ("Do:\n\n    a. B\n    c\n\nEnd", ["Do:\n\n", "    a. B\n    c\n\n", "End"]),
        (
            "他吃。还\uff1f好\uff01对",
            ["他吃。", "还\uff1f", "好\uff01", "对"],
        ),
        ("\u201c好。\u201d他", ["\u201c好。\u201d", "他"]),
        (
            "सेब हैं। दो",
            ["सेब हैं।", " दो"],
        ),
        ("هل\u061f نعم", ["هل\u061f", " نعم"]),
        (
            "กิน ไป\nดี",
            ["กิน ไป\n", "ดี"],
        ),
        ("It is 5.<<Question>> So", ["It is 5.", "<<Question>> So"]),
        ("   \nOne.", ["   \nOne."]),
        ("", []),
    ],
)
def test_sentences_end_at_full_stops_and_lines(text: str, expected: list[str]) -> None:
    assert pieces(text) == expected


def test_a_worked_solution_is_split_into_equal_parts_at_its_lines() -> None:
    lines = [f"Step {at}: he has {at} * 2 = {at * 2} apples.\n" for at in range(6)]
    assert parts("".join(lines), 3) == ["".join(lines[at : at + 2]) for at in (0, 2, 4)]
    assert parts("".join(lines), 2) == ["".join(lines[:3]), "".join(lines[3:])]
    assert parts("".join(lines), 9) == lines


def test_the_borders_are_those_nearest_to_equal_parts() -> None:
    assert parts("A. " + "b" * 40 + ". C. " + "d" * 40 + ".", 2) == [
        "A. " + "b" * 40 + ".",
        " C. " + "d" * 40 + ".",
    ]


def test_blanks_go_with_the_later_part_and_line_breaks_with_the_earlier() -> None:
    assert parts("One here.  Two there.", 2) == ["One here.", "  Two there."]
    assert parts("One here.\n\n  Two there.", 2) == ["One here.\n\n", "  Two there."]
    assert parts("One here. \r\nTwo there.", 2) == ["One here. \r\n", "Two there."]


def test_what_cannot_be_split_gives_fewer_borders() -> None:
    assert split_response("one sentence only", 4) == []
    assert split_response("One. Two.", 4) == [4]
    assert split_response("One. Two.", 1) == []
    assert split_response(" \n \n", 3) == []
    assert split_response("\n\nOne.\n\n", 3) == []


def test_fewer_than_one_part_is_refused() -> None:
    with pytest.raises(ValueError, match="n: must be at least 1, got 0"):
        split_response("One. Two.", 0)


def test_a_fence_is_never_split() -> None:
    code = "```python\n" + "x = 1\n\n" * 20 + "```\n"
    assert parts("Here.\n" + code + "Done.", 3) == ["Here.\n", code, "Done."]


CODE = "import os\n\n\ndef f(x):\n    y = 1\n    return y\n\n\ndef g(x):\n    z = 1\n    return z\n"


def test_code_is_split_at_blank_lines() -> None:
    first, second = CODE.split("def g", 1)
    assert parts(CODE, 2) == [first, "def g" + second]


def test_code_without_blank_lines_is_split_at_its_top_level() -> None:
    text = CODE.replace("\n\n\n", "\n")
    first, second = text.split("def g", 1)
    assert parts(text, 2) == [first, "def g" + second]


def test_a_body_alone_is_split_at_its_own_lines() -> None:
    body = "    for a in b:\n        c += a\n    d = 12345\n    e = [\n        1,\n    ]\n    f\n"
    assert parts(body, 2) == [body[: body.index("    e")], body[body.index("    e") :]]


def test_a_text_in_quotes_and_a_closing_bracket_are_not_split_off() -> None:
    text = 'def f():\n    x = """\n\nA. B.\n\n    """\n    y = (\n        1\n    )\n'
    assert all(not part.startswith(("\nA", "A", "    )")) for part in parts(text, 5))


@settings(deadline=None)
@given(texts, st.integers(1, 6))
@example(TEXTS[1], 4)
def test_every_split_keeps_its_promises(text: str, n: int) -> None:
    borders = split_response(text, n)
    assert borders == sorted(set(borders)) and len(borders) <= n - 1
    assert all(0 < at < len(text) for at in borders)
    if text.strip():
        assert all(part.strip() for part in parts(text, n))
    for at in borders:
        assert is_grapheme_border(text, at)
        # Spaces before a border follow a line break or a mark, and no line break follows it.
        assert border_after(text, at) == at
        assert not text[at - 1].isalnum() or not text[at].isalnum() or not text[at].isascii()


@settings(deadline=None)
@given(texts)
def test_no_border_cuts_what_is_protected(text: str) -> None:
    guarded = protected(text)
    assert all(a[1] <= b[0] for a, b in pairwise(guarded))
    for at in sentence_borders(text):
        assert not any(start < at < stop for start, stop in guarded)


@settings(deadline=None)
@given(texts)
def test_sentences_cover_the_text(text: str) -> None:
    assert "".join(pieces(text)) == text
    if text.strip():
        assert all(piece.strip() for piece in pieces(text))
    assert partition(text, []) == ([(0, len(text))] if text else [])


def test_worked_solutions_are_split_in_equal_parts() -> None:
    rows = data_file("gsm8k/test.jsonl").read_text().splitlines()
    shares = []
    for row in rows:
        text = json.loads(row)["answer"]
        if text.count("\n") >= 5:
            longest = max(len(part) for part in parts(text, 3))
            shares.append(longest / len(text))
            assert len(parts(text, 3)) == 3
    assert len(shares) > 100 and sum(shares) / len(shares) < 0.45


@pytest.mark.parametrize("text", TEXTS)
def test_a_long_text_is_split_in_milliseconds(text: str) -> None:
    long = ((text + "\n") * 4000)[:4000]
    split_response(long, 4)
    assert min(_seconds(long) for _ in range(5)) < 0.02  # 2 ms on a free core


def _seconds(text: str) -> float:
    start = time.process_time()
    split_response(text, 4)
    return time.process_time() - start
