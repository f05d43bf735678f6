"""Cuts: exactly the characters asked for, the strategies' sizes, and the seed."""

from __future__ import annotations

import random
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from text_friends import cut

from leaf_distill.data.example import Example
from leaf_distill.detection.config import DetectConfig
from leaf_distill.detection.counterfactual import (
    changed,
    merge,
    propose,
    ranked_units,
    replacement,
)
from leaf_distill.detection.substitution import Vocabulary

TEXT = "tom has 7 apples and the sticker says 8 so how many apples does tom have now"
WORDS = TEXT.split()


def detection(
    spans: list[tuple[int, int]],
    *,
    row_id: int = 0,
    words: list[str] = WORDS,
    slot: list[int] | None = None,
    unprunable: tuple[int, ...] = (),
    student: list[float] | None = None,
) -> Example:
    """A row of one token a word, each with the space before it."""
    stops = np.cumsum([len(word) + 1 for word in words]) - 1
    starts = np.concatenate(([0], stops[:-1]))
    prunable = np.ones(len(words), dtype=np.bool_)
    prunable[list(unprunable)] = False
    return Example(
        row_id=row_id,
        messages=({"role": "user", "content": " ".join(words)},),
        completion="7",
        offsets=np.stack([starts, stops], axis=1),
        slot=np.array(slot or range(len(words))),
        prunable=prunable,
        norms={
            "student": np.array(student or [0.0] * len(words), dtype=np.float32),
            "teacher": -np.array(student or [0.0] * len(words), dtype=np.float32),
        },
        score=np.zeros(len(words), dtype=np.float32),
        spans=tuple(spans),
    )


def candidates(
    found: Example, *, perplexity: list[float] | None = None, **settings: Any
) -> tuple[list[Example], list[Example]]:
    """The candidates that stay, and those that came to nothing."""
    found.candidates, found.outcome = [], None
    values = None if perplexity is None else np.array(perplexity, dtype=np.float32)
    propose(found, DetectConfig(**{"widen": "token", **settings}), perplexity=values)
    kept = [one for one in found.candidates if one.outcome is None]
    return kept, [one for one in found.candidates if one.outcome is not None]


def taken(item: Example, found: Example) -> set[int]:
    """The tokens whose words a candidate cuts."""
    assert found.offsets is not None
    gone = {at for first, last in item.cut for at in range(first, last)}
    text = found.text
    return {
        index
        for index, (start, stop) in enumerate(found.offsets.tolist())
        if all(at in gone or text[at].isspace() for at in range(start, stop))
    }


def test_span_cuts_one_at_a_time() -> None:
    found, left = candidates(detection([(5, 10), (12, 14)]), strategy="span")
    assert [item.text for item in found] == [
        "tom has 7 apples and how many apples does tom have now",
        "tom has 7 apples and the sticker says 8 so how many tom have now",
    ]
    assert [item.candidate_id for item in found] == [0, 1] and left == []


def test_collective_cuts_all_together() -> None:
    (item,), _ = candidates(detection([(5, 10), (12, 14)]), strategy="collective")
    assert item.text == "tom has 7 apples and how many tom have now"
    assert len(item.cut) == 2


def scored(text: str, score: list[float], unprunable: tuple[int, ...] = ()) -> Example:
    """A row without a span whose words have these scores."""
    found = detection([], words=text.split(), unprunable=unprunable)
    found.score = np.array(score, dtype=np.float32)
    return found


DRAWN = "tom has 7 apples, a sticker says 8, ann weighs 5 kg, how many now ?"


def test_cumulative_cuts_take_the_most_suspect_phrases_together() -> None:
    #            tom has 7  apples,  a   sticker says 8   ann weighs 5   kg  how many now ?
    values = [0.9, 0.9, 0.9, 0.9, 0.5, 0.5, 0.5, 0.1, 0.2, 0.2, 0.2, 0.2, 0.8, 0.8, 0.8, 0.0]
    found = scored(DRAWN, values, unprunable=(15,))
    items, gone = candidates(found, strategy="cumulative", max_cuts=2)
    assert not gone
    assert [item.text for item in items] == [
        "tom has 7 apples, a sticker says 8, how many now ?",
        "tom has 7 apples, how many now ?",
    ]
    assert [item.cut_score for item in items] == pytest.approx([0.2, (0.8 + 1.6) / 8], abs=1e-6)
    assert [item.strategy for item in items] == ["cumulative"] * 2
    items, gone = candidates(found, strategy="cumulative", max_cuts=9)
    assert len(items) == 3 and [one.outcome[1] for one in gone if one.outcome] == [
        "empty_after_cut"
    ]
    # A token widened to nothing more than itself would be no phrase.
    assert candidates(found, strategy="cumulative", widen="word")[0][0].cut == items[0].cut
    (whole,) = candidates(found, strategy="cumulative", widen="sentence")[1]
    assert whole.outcome and whole.outcome.reason == "empty_after_cut"


def test_phrases_are_ranked_by_the_mean_of_their_prunable_tokens() -> None:
    values = [0.9, 0.9, 0.9, 0.9, 0.5, 0.5, 0.5, 0.1, 0.2, 0.2, 0.2, 0.2, 0.8, 0.8, 0.8, 0.0]
    found = scored(DRAWN, values, unprunable=(4, 5, 6, 15))
    units = ranked_units(found, DetectConfig(widen="clause"))
    assert [DRAWN[slice(*one.range)] for one in units] == [
        " a sticker says 8,",
        " ann weighs 5 kg,",
        " how many now ?",
        "tom has 7 apples,",
    ]
    assert [one.tokens for one in units] == [(7,), (8, 9, 10, 11), (12, 13, 14), (0, 1, 2, 3)]
    found = scored(DRAWN, [0.5] * 16)
    assert ranked_units(found, DetectConfig(widen="clause")) == []
    assert candidates(found, strategy="cumulative") == ([], [])
    assert found.outcome and found.outcome.reason == "no_span"


def test_random_phrases_are_drawn_whatever_their_length() -> None:
    firsts = []
    for row_id in range(200):
        found = scored(DRAWN, [0.5] * 15 + [0.4])
        found.row_id = row_id
        units = ranked_units(found, DetectConfig(score="random"))
        assert len(units) == 4
        firsts.append(DRAWN[slice(*units[0].range)])
    assert all(35 <= firsts.count(one) <= 65 for one in set(firsts)) and len(set(firsts)) == 4


def test_random_tokens_are_as_many_together() -> None:
    found = detection([(5, 10), (12, 14)], unprunable=(0, 1, 2))
    seen = set()
    for seed in range(30):
        (item,), _ = candidates(found, strategy="random_tokens", seed=seed)
        tokens = taken(item, found)
        assert len(tokens) == 7 and not tokens & {0, 1, 2}
        seen |= tokens
    assert seen == set(range(3, len(WORDS)))


def test_random_tokens_stop_at_what_may_be_cut() -> None:
    found = detection([(0, 3)], unprunable=tuple(range(2, len(WORDS))))
    (item,), _ = candidates(found, strategy="random_tokens")
    assert taken(item, found) == {0, 1}


def test_random_spans_are_as_many_as_long_and_apart() -> None:
    found = detection([(0, 2), (5, 10), (12, 13)], unprunable=(4,))
    starts = set()
    for seed in range(40):
        items, left = candidates(found, strategy="random_spans", seed=seed)
        groups = [taken(item, found) for item in items]
        assert sorted(map(len, groups)) == [1, 2, 5] and left == []
        assert len(set().union(*groups)) == 8 and 4 not in set().union(*groups)
        assert all(max(group) - min(group) == len(group) - 1 for group in groups)
        starts |= {min(group) for group in groups}
    assert len(starts) > 10


def test_random_spans_stay_on_one_side_of_a_hole() -> None:
    slot = [index + (index > 3) for index in range(len(WORDS))]
    found = detection([(5, 9)], slot=slot)
    for seed in range(40):
        (item,), _ = candidates(found, strategy="random_spans", seed=seed)
        tokens = taken(item, found)
        assert max(tokens) <= 3 or min(tokens) > 3


def test_random_spans_without_room_repeat_and_are_left_out() -> None:
    words = ["aa", "bb", "cc"]
    found = detection([(0, 2), (1, 3)], words=words, unprunable=(2,))
    items, left = candidates(found, strategy="random_spans")
    assert [item.text for item in items] == ["cc"]
    assert [gone.outcome.reason for gone in left if gone.outcome] == ["duplicate"]


@pytest.mark.parametrize("strategy", ["random_tokens", "random_spans"])
def test_the_draw_depends_on_seed_and_row_only(strategy: str) -> None:
    def draw(row_id: int, seed: int) -> list[object]:
        found = detection([(5, 10)], row_id=row_id)
        items, _ = candidates(found, strategy=strategy, seed=seed)
        return [item.cut for item in items]

    first = [draw(row_id, 0) for row_id in range(8)]
    assert [draw(row_id, 0) for row_id in reversed(range(8))][::-1] == first
    assert [draw(row_id, 1) for row_id in range(8)] != first
    assert len({str(cuts) for cuts in first}) > 1


def test_the_views_of_a_row_draw_on_their_own() -> None:
    def draw(row_id: int, segment: int) -> tuple[Any, ...]:
        found = detection([(3, 5), (9, 10)], row_id=row_id)
        found.segment, found.prefix = segment, TEXT
        items, _ = candidates(found, strategy="random_tokens")
        return items[0].cut

    assert [draw(row_id, 1) for row_id in range(8)] == [draw(row_id, 1) for row_id in range(8)]
    assert [draw(row_id, 1) for row_id in range(8)] != [draw(row_id, 2) for row_id in range(8)]
    assert [draw(row_id, 0) for row_id in range(8)] != [draw(row_id, 1) for row_id in range(8)]


@pytest.mark.parametrize(
    ("words", "spans", "reason"),
    [
        (["only"], [(0, 1)], "empty_after_cut"),
        (["a", "a", "b"], [(0, 1), (1, 2)], "duplicate"),
        (["a", "c", "b"], [(0, 1), (1, 2)], None),
        (["x", "a", "a", "b"], [(1, 2), (2, 3)], "duplicate"),
    ],
)
def test_what_is_never_emitted(
    words: list[str], spans: list[tuple[int, int]], reason: str | None
) -> None:
    text = " ".join(words)
    items, left = candidates(detection(spans, words=words), strategy="span")
    assert [gone.outcome.reason for gone in left if gone.outcome] == ([reason] if reason else [])
    assert all(gone.outcome and gone.outcome.stage == "prune" for gone in left)
    texts = [item.text for item in items]
    assert len(set(texts)) == len(texts) and text not in texts and "" not in texts


def test_a_row_without_spans_leaves_as_a_row() -> None:
    found = detection([], row_id=9)
    assert candidates(found, strategy="collective") == ([], [])
    assert found.outcome is not None and found.outcome.reason == "no_span"


def test_saliency_and_perplexity_take_the_highest_tokens_in_runs() -> None:
    values = [0.0] * len(WORDS)
    for at, value in ((2, 0.9), (3, 0.8), (8, 0.7), (11, 1.0), (12, 0.1)):
        values[at] = value
    found = detection([(5, 8), (14, 15)], student=values, unprunable=(11,))  # four tokens to cut
    for strategy in ("student_saliency", "teacher_saliency", "perplexity"):
        items, left = candidates(found, strategy=strategy, perplexity=values)
        assert [taken(item, found) for item in items] == [{2, 3}, {8}, {12}] and left == []
        assert {item.strategy for item in items} == {strategy}
    split = detection([(5, 7)], student=values, slot=[i + (i > 2) for i in range(len(WORDS))])
    assert [taken(item, split) for item in candidates(split, strategy="student_saliency")[0]] == [
        {2},
        {11},
    ]


def test_a_cut_inside_a_number_is_noted() -> None:
    found = detection([(0, 1), (1, 2)], words=["72", "apples"])
    found.offsets = np.array([[0, 1], [1, 2]])
    found.messages = ({"role": "user", "content": "72 apples"},)
    assert [one.notes for one in candidates(found)[0]] == [["cut_inside_word"]] * 2
    whole = detection([(5, 10)])
    assert [one.notes for one in candidates(whole)[0]] == [[]]


def test_a_candidate_is_its_original_but_for_the_cut() -> None:
    found = detection([(5, 10)], row_id=4)
    found.messages = ({"role": "system", "content": "be brief"}, *found.messages)
    found.answer = "7"
    ((one,), _) = candidates(found)
    assert (one.row_id, one.candidate_id, one.branch) == (4, 0, "counterfactual")
    assert one.messages[0] == found.messages[0] and one.gold == "7" == one.completion
    assert found.branch == "original" and cut(found.text, one.cut) == one.text


@settings(deadline=None)
@given(st.text(max_size=40), st.data())
def test_exactly_these_characters_are_cut(text: str, data: st.DataObject) -> None:
    gone = data.draw(st.sets(st.integers(0, max(len(text) - 1, 0)), max_size=len(text)))
    gone = {index for index in gone if index < len(text)}
    ranges = merge((index, index + 1) for index in gone)
    row = Example(0, ({"role": "user", "content": text},), "7")
    assert changed(row, ranges).text == "".join(c for i, c in enumerate(text) if i not in gone)
    assert all(one[1] < other[0] for one, other in pairwise(ranges))


def test_a_word_is_replaced_at_the_border_of_its_message() -> None:
    turns = ({"role": "user", "content": "pay 11"}, {"role": "user", "content": "22 coins"})
    found = Example(0, turns, "7", turns=(0, 1))
    assert found.text == "pay 1122 coins"
    vocabulary = Vocabulary(["he has 33", "she has 44"])
    draw = random.Random(0)
    assert replacement(found, (4, 6), vocabulary, draw) in ("33", "44")
    assert replacement(found, (6, 8), vocabulary, draw) in ("33", "44")


def test_a_cut_that_leaves_all_but_a_blank_is_no_candidate() -> None:
    # The sentence keeps its full stop, so that nothing but the blank before it would go.
    found = detection([(2, 3)], words=["Tom", "left", ".", "Ann", "stays"])
    kept, left = candidates(found)
    assert kept == [] and [one.outcome and one.outcome.reason for one in left] == ["unchanged"]
