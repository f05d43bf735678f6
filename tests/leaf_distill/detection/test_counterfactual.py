"""Cuts: exactly the characters asked for, the strategies' sizes, and the seed."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from leaf_distill.detection.counterfactual import candidates, cut, merge
from leaf_distill.detection.spans import Detection

TEXT = "tom has 7 apples . the sticker says 8 . how many apples does tom have ?"
WORDS = TEXT.split()


def detection(
    spans: list[tuple[int, int]],
    *,
    row_id: int = 0,
    words: list[str] = WORDS,
    slot: list[int] | None = None,
    unprunable: tuple[int, ...] = (),
) -> Detection:
    """A row of one token a word, each with the space before it."""
    stops = np.cumsum([len(word) + 1 for word in words]) - 1
    starts = np.concatenate(([0], stops[:-1]))
    count = len(words)
    zeros = np.zeros(count, dtype=np.float32)
    prunable = np.ones(count, dtype=np.bool_)
    prunable[list(unprunable)] = False
    return Detection(
        row_id=row_id,
        offsets=np.stack([starts, stops], axis=1),
        slot=np.array(slot or range(count)),
        prunable=prunable,
        teacher=zeros,
        student=zeros,
        score=zeros,
        confounder=np.zeros(count, dtype=np.bool_),
        spans=tuple(spans),
    )


def taken(item: object, found: Detection) -> set[int]:
    """The tokens that a candidate cuts."""
    ranges = item.cut  # type: ignore[attr-defined]
    return {
        index
        for index, (start, stop) in enumerate(found.offsets.tolist())
        if any(first <= start and stop <= last for first, last in ranges)
    }


def test_span_cuts_one_at_a_time() -> None:
    found, left = candidates(TEXT, detection([(5, 10), (12, 14)]), strategy="span")
    assert [item.text for item in found] == [
        "tom has 7 apples . how many apples does tom have ?",
        "tom has 7 apples . the sticker says 8 . how many tom have ?",
    ]
    assert [item.candidate_id for item in found] == [0, 1] and left == []


def test_collective_cuts_all_together() -> None:
    (item,), _ = candidates(TEXT, detection([(5, 10), (12, 14)]), strategy="collective")
    assert item.text == "tom has 7 apples . how many tom have ?"
    assert len(item.cut) == 2


def test_random_tokens_are_as_many_together() -> None:
    found = detection([(5, 10), (12, 14)], unprunable=(0, 1, 2))
    seen = set()
    for seed in range(30):
        (item,), _ = candidates(TEXT, found, strategy="random_tokens", seed=seed)
        tokens = taken(item, found)
        assert len(tokens) == 7 and not tokens & {0, 1, 2}
        seen |= tokens
    assert seen == set(range(3, len(WORDS)))


def test_random_tokens_stop_at_what_may_be_cut() -> None:
    found = detection([(0, 3)], unprunable=tuple(range(2, len(WORDS))))
    (item,), _ = candidates(TEXT, found, strategy="random_tokens")
    assert taken(item, found) == {0, 1}


def test_random_spans_are_as_many_as_long_and_apart() -> None:
    found = detection([(0, 2), (5, 10), (12, 13)], unprunable=(4,))
    starts = set()
    for seed in range(40):
        items, left = candidates(TEXT, found, strategy="random_spans", seed=seed)
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
        (item,), _ = candidates(TEXT, found, strategy="random_spans", seed=seed)
        tokens = taken(item, found)
        assert max(tokens) <= 3 or min(tokens) > 3


def test_random_spans_without_room_repeat_and_are_left_out() -> None:
    words = ["aa", "bb", "cc"]
    found = detection([(0, 2), (1, 3)], words=words, unprunable=(2,))
    items, left = candidates("aa bb cc", found, strategy="random_spans")
    assert [item.text for item in items] == [" cc"]
    assert [gone.reason for gone in left] == ["duplicate"]


@pytest.mark.parametrize("strategy", ["random_tokens", "random_spans"])
def test_the_draw_depends_on_seed_and_row_only(strategy: str) -> None:
    def draw(row_id: int, seed: int) -> list[object]:
        found = detection([(5, 10)], row_id=row_id)
        items, _ = candidates(TEXT, found, strategy=strategy, seed=seed)  # type: ignore[arg-type]
        return [item.cut for item in items]

    first = [draw(row_id, 0) for row_id in range(8)]
    assert [draw(row_id, 0) for row_id in reversed(range(8))][::-1] == first
    assert [draw(row_id, 1) for row_id in range(8)] != first
    assert len({str(cuts) for cuts in first}) > 1


@pytest.mark.parametrize(
    ("words", "spans", "reason"),
    [
        (["only"], [(0, 1)], "empty_after_cut"),
        (["a", "a", "b"], [(0, 1), (1, 2)], None),
        (["x", "a", "a", "b"], [(1, 2), (2, 3)], "duplicate"),
    ],
)
def test_what_is_never_emitted(
    words: list[str], spans: list[tuple[int, int]], reason: str | None
) -> None:
    text = " ".join(words)
    items, left = candidates(text, detection(spans, words=words), strategy="span")
    assert [gone.reason for gone in left] == ([reason] if reason else [])
    assert all(gone.stage == "prune" and gone.candidate_id >= 0 for gone in left)
    texts = [item.text for item in items]
    assert len(set(texts)) == len(texts) and text not in texts and "" not in texts


def test_a_row_without_spans_leaves_as_a_row() -> None:
    items, (gone,) = candidates(TEXT, detection([], row_id=9), strategy="collective")
    assert items == [] and (gone.row_id, gone.candidate_id, gone.reason) == (9, -1, "no_span")


@given(st.text(max_size=40), st.data())
def test_cut_removes_exactly_these_characters(text: str, data: st.DataObject) -> None:
    gone = data.draw(st.sets(st.integers(0, max(len(text) - 1, 0)), max_size=len(text)))
    gone = {index for index in gone if index < len(text)}
    ranges = merge((index, index + 1) for index in gone)
    assert cut(text, ranges) == "".join(c for i, c in enumerate(text) if i not in gone)
    assert all(one[1] < other[0] for one, other in pairwise(ranges))


@pytest.mark.parametrize("ranges", [[(3, 2)], [(0, 2), (1, 3)], [(4, 5), (0, 1)], [(0, 99)]])
def test_ranges_that_cannot_be_cut_are_an_error(ranges: list[tuple[int, int]]) -> None:
    with pytest.raises(ValueError, match="ranges: needs sorted"):
        cut("a sentence", ranges)
