"""Characters of the analyzed text and of the messages are the same characters."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from leaf_distill.data.example import Example
from leaf_distill.data.ranges import in_messages, in_text

TALK = (
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Tom has 7 apples."},
    {"role": "assistant", "content": "Yes."},
    {"role": "user", "content": ""},
    {"role": "user", "content": "How many?"},
)
LAST = Example(0, TALK, "Seven.")
TURNS = Example(0, TALK, "Seven.", turns=(1, 3, 4))
RESPONSE = Example(0, TALK, " It is 7.", segment=1, prefix="Tom counts.")


def test_the_analyzed_text_and_its_parts() -> None:
    assert (LAST.text, LAST.parts, LAST.places) == ("How many?", ((0, 9),), (4,))
    assert TURNS.text == "Tom has 7 apples.How many?"
    assert (TURNS.parts, TURNS.places) == (((0, 17), (17, 17), (17, 26)), (1, 3, 4))
    assert (RESPONSE.text, RESPONSE.parts) == ("Tom counts.", ((0, 11),))
    assert RESPONSE.places == (len(TALK),)


@pytest.mark.parametrize("example", [LAST, TURNS, RESPONSE])
@settings(deadline=None)
@given(borders=st.sets(st.integers(0, 26)))
def test_ranges_in_messages_are_the_same_characters(example: Example, borders: set[int]) -> None:
    inside = sorted(at for at in borders if at <= len(example.text))
    ranges = list(zip(inside[::2], inside[1::2], strict=False))
    spans = in_messages(example, ranges)
    contents = [*(turn["content"] for turn in TALK), example.prefix + example.completion]
    found = [contents[span["message"]][span["start"] : span["stop"]] for span in spans]
    assert "".join(found) == "".join(example.text[start:stop] for start, stop in ranges)
    back = in_text(example, spans[::-1])
    assert in_messages(example, back) == spans
    assert {at for one in back for at in range(*one)} == {
        at for one in ranges for at in range(*one)
    }


def test_a_range_over_a_border_becomes_a_span_in_each_message() -> None:
    assert in_messages(TURNS, [(12, 20)]) == [
        {"message": 1, "start": 12, "stop": 17},
        {"message": 4, "start": 0, "stop": 3},
    ]


@pytest.mark.parametrize(
    ("message", "start", "stop"), [(0, 0, 1), (4, 3, 2), (4, -1, 2), (4, 8, 10), (5, 0, 1)]
)
def test_a_span_outside_its_message_is_refused(message: int, start: int, stop: int) -> None:
    with pytest.raises(ValueError, match=r"^spans: must be characters within the messages \[4\]"):
        in_text(LAST, [{"message": message, "start": start, "stop": stop}])


@pytest.mark.parametrize("at", [0, 16, 17, 25])
def test_the_place_of_an_insertion_is_before_a_character(at: int) -> None:
    message, start = (1, at) if at < 17 else (4, at - 17)
    assert in_messages(TURNS, [(at, at)]) == [{"message": message, "start": start, "stop": start}]
    assert in_text(TURNS, in_messages(TURNS, [(at, at)])) == ((at, at),)
