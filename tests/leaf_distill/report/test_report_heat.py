"""Colors, cells and excerpts of the report page, as values."""

from __future__ import annotations

from leaf_distill.report.heat import LEVELS, Token, cut_excerpt, heat, last_lines, score_level


def test_low_score_is_the_strong_color() -> None:
    levels = [score_level(step / 100) for step in range(101)]
    assert levels[0] == LEVELS and levels[-1] == 0
    assert levels == sorted(levels, key=lambda level: -(level or 0))


def test_tokens_that_share_a_character_and_text_without_tokens() -> None:
    tokens = [
        Token(1, 2, 0.1, 0.2, 0.9, False),
        Token(1, 2, 0.7, 0.1, 0.3, False),
        Token(-1, -1, 1.0, 1.0, 0.0, True),
        Token(4, 5, float("nan"), float("nan"), float("nan"), False),
    ]
    cells = [cell for part in heat("a😀 bc d", tokens, [(3, 6)], []) for cell in part.cells]
    assert "".join(cell.text for cell in cells) == "a😀 bc d"
    emoji = next(cell for cell in cells if cell.text == "😀")
    assert (emoji.teacher, emoji.student, emoji.score) == (14, 4, score_level(0.3))
    assert emoji.title.count("\n") == 1
    assert all(cell.score is None for cell in cells if cell is not emoji)


def test_excerpt_keeps_the_text_around_each_cut() -> None:
    text = "".join(chr(0x4E00 + i) for i in range(5000))
    pieces = cut_excerpt(text, [(2000, 2010), (2100, 2105)], context=50)
    assert [(p.text, p.cut, p.hidden) for p in pieces] == [
        ("", False, 1950),
        (text[1950:2000], False, 0),
        (text[2000:2010], True, 0),
        (text[2010:2100], False, 0),
        (text[2100:2105], True, 0),
        (text[2105:2155], False, 0),
        ("", False, 2845),
    ]


def test_the_end_of_an_answer_starts_at_a_line_or_a_word() -> None:
    answer = (
        "first " * 40
        + "word\n"
        + "the sum is taken step by step, then halved.\n\nThe answer is 4.\n"
    )
    assert last_lines(answer, length=100) == (
        "the sum is taken step by step, then halved.\n\nThe answer is 4."
    )
    assert last_lines("one two three four", length=10) == "four"
    assert last_lines("x" * 30, length=10) == "x" * 10
    assert last_lines("one two", length=10) == "one two"


def test_excerpt_breaks_no_word_where_there_are_spaces() -> None:
    text = "zero one two three four five six seven eight nine ten"
    pieces = cut_excerpt(text, [(18, 23)], context=10)
    assert [(p.text, p.cut, p.hidden) for p in pieces] == [
        ("", False, 9),
        ("two three", False, 0),
        (" four", True, 0),
        (" five six", False, 0),
        ("", False, 21),
    ]


def test_excerpt_shows_what_stands_in_place_of_a_cut() -> None:
    pieces = cut_excerpt("one two three", [(4, 7), (8, 13)], ["six", ""])
    assert [(p.text, p.cut, p.inserted) for p in pieces] == [
        ("one ", False, ""),
        ("two", True, ""),
        ("", False, "six"),
        (" ", False, ""),
        ("three", True, ""),
    ]


def test_messages_are_named_where_they_begin() -> None:
    names = {0: "first", 8: "second"}
    text = "one two three four"
    cells = [cell for part in heat(text, [], [(4, 13)], [], names) for cell in part.cells]
    assert [(cell.text, cell.message) for cell in cells] == [
        ("one ", "first"),
        ("two ", ""),
        ("three", "second"),
        (" four", ""),
    ]
    pieces = cut_excerpt(text, [(8, 13)], messages=names)
    assert [(p.message, p.text) for p in pieces] == [
        ("first", ""),
        ("", "one two "),
        ("second", ""),
        ("", "three"),
        ("", " four"),
    ]
    far = cut_excerpt("x" * 50 + "y" * 60 + "cut", [(110, 113)], messages={0: "a", 50: "b"})
    assert [p.message or p.hidden or p.text for p in far] == ["b", 78, "y" * 32, "cut"]
