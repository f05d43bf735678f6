"""Known distractors: what was put into a problem, and the tokens that it covers."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from real_data import data_file
from text_friends import marked

from leaf_distill.detection.truth import distractors, tokens_inside


@pytest.mark.parametrize(
    ("plain", "adversarial", "lost"),
    [
        ("Tom has 7 pens. How many?", "Tom has 7 pens.<< It is 20 degrees.>> How many?", 0),
        ("Tom has 7 pens.", "Tom,<< who weighs 50 kg,>> has 7 pens<< in 2 bags>>.", 0),
        ("tom has 7 pens , all red", "Tom has 7 pens,<< which cost $5,>> all red.", 0),
        ("Jack had 1 cat.", "When<<>> Jack had 1 cat<< and was 9>>.", 0),
        ("Tom has 7 pens.", "Tom has<< 8>> pens.", 1),
        ("Tom has 7 pens.", "Tom has 7 pens.", 0),
        ("", "<<Tom has 7 pens.>>", 0),
    ],
)
def test_what_was_put_in_is_found(plain: str, adversarial: str, lost: int) -> None:
    text, ranges = marked(adversarial)
    found = distractors(plain, text)
    if text.startswith("When"):
        ranges = [(0, 4), *(one for one in ranges if one[0] < one[1])]
    assert list(found.ranges) == ranges
    assert found.lost == lost


@settings(deadline=None)
@given(
    st.lists(st.sampled_from(["a has 1.", "b is so,", "c (d) 2", "e!"]), max_size=5),
    st.lists(st.sampled_from(["x", "y 9", "z,"]), max_size=3),
    st.integers(0, 5),
)
def test_an_insertion_loses_no_word(old: list[str], new: list[str], at: int) -> None:
    plain, longer = " ".join(old), " ".join([*old[:at], *new, *old[at:]])
    found = distractors(plain, longer)
    assert found.lost == 0
    held = "".join(longer[start:stop] for start, stop in found.ranges)
    words = [char for char in held if char.isalnum()]
    assert [char for char in words if char in "xyz9"] == [
        char for char in "".join(new) if char.isalnum()
    ]


def test_a_token_is_inside_with_half_of_its_characters() -> None:
    offsets = np.array([[0, 2], [2, 6], [6, 10], [10, 13], [13, 13]])
    inside = tokens_inside(offsets, [(1, 3), (7, 11)])
    assert inside.tolist() == [True, False, True, False, False]
    assert not tokens_inside(offsets, []).any()
    assert tokens_inside(offsets[:0], [(0, 1)]).shape == (0,)


def test_most_pairs_of_problemathic_are_pure_insertions() -> None:
    def rows(name: str) -> dict[str, str]:
        lines = data_file(f"problemathic/{name}").read_text().splitlines()
        return {row["id"]: row["prompt"] for row in map(json.loads, lines)}

    plain = rows("simple_non_adversarial_train.json")
    longer = rows("simple_adversarial_train.json")
    found = {one: distractors(plain[one], longer[one]) for one in longer}
    pure = [one for one in found if not found[one].lost]
    assert len(pure) > 0.8 * len(found)
    texts = ["".join(longer[one][start:stop] for start, stop in found[one].ranges) for one in pure]
    with_number = sum(any(char.isdigit() for char in text) for text in texts)
    assert with_number > 0.9 * len(pure)
