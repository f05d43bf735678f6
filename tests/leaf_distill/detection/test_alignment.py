"""Norms moved from one tokenization to another: nothing is lost, and nothing moves too far."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from leaf_distill.detection.alignment import pool

NORMS = st.just(0.0) | st.floats(2.0**-30, 1e4, width=32)  # whose parts are no subnormal numbers


def offsets(*tokens: tuple[int, int]) -> np.ndarray:
    return np.array(tokens, dtype=np.int32).reshape(-1, 2)


@st.composite
def tokenizations(draw: st.DrawFn, length: int) -> np.ndarray:
    """Cut a text of `length` characters into tokens; some characters become several tokens."""
    borders = draw(st.sets(st.integers(1, length - 1))) if length > 1 else set()
    edges = [0, *sorted(borders), length]
    tokens = []
    for start, stop in pairwise(edges):
        copies = draw(st.integers(1, 4)) if stop - start == 1 else 1
        tokens += [(start, stop)] * copies
    return offsets(*tokens)


@st.composite
def pairs(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    length = draw(st.integers(1, 30))
    teacher, student = draw(tokenizations(length)), draw(tokenizations(length))
    norms = draw(st.lists(NORMS, min_size=len(teacher), max_size=len(teacher)))
    return np.array(norms, np.float32), teacher, student


def by_character(norms: np.ndarray, teacher: np.ndarray, student: np.ndarray) -> list[float]:
    """The definition, in loops."""
    mass = [0.0] * int(teacher[:, 1].max())
    for norm, (start, stop) in zip(norms, teacher, strict=True):
        for at in range(start, stop):
            mass[at] += float(norm) / (stop - start)
    sharers = [sum(start <= at < stop for start, stop in student) for at in range(len(mass))]
    return [
        sum(mass[at] / sharers[at] for at in range(start, stop)) for start, stop in student.tolist()
    ]


@settings(deadline=None)
@given(pairs())
def test_equals_the_definition_and_loses_nothing(pair: tuple[np.ndarray, ...]) -> None:
    norms, teacher, student = pair
    pooled = pool(norms, teacher, student)
    assert pooled.dtype == np.float32 and pooled.shape == (len(student),)
    if not np.array_equal(teacher, student):
        np.testing.assert_allclose(pooled, by_character(*pair), rtol=1e-6)
    assert (pooled >= 0).all()
    np.testing.assert_allclose(pooled.sum(dtype=float), norms.sum(dtype=float), rtol=1e-6)


@settings(deadline=None)
@given(pairs())
def test_equal_offsets_change_no_bit(pair: tuple[np.ndarray, ...]) -> None:
    norms, teacher, _ = pair
    pooled = pool(norms, teacher, teacher.astype(np.int64))
    assert pooled.tobytes() == norms.tobytes()
    pooled[:] = -1
    assert (norms >= 0).all()


@settings(deadline=None)
@given(pairs())
def test_a_finer_tokenizer_splits_what_a_token_had(pair: tuple[np.ndarray, ...]) -> None:
    norms, teacher, _ = pair
    length = int(teacher[:, 1].max())
    fine = offsets(*((at, at + 1) for at in range(length)))
    finest = pool(norms, teacher, fine)
    for start, stop in {tuple(token) for token in teacher.tolist()}:
        whole = norms[(teacher == (start, stop)).all(1)].sum(dtype=float)
        np.testing.assert_allclose(finest[start:stop], whole / (stop - start), rtol=1e-6)


def test_what_a_user_expects() -> None:
    norms = np.array([6.0, 1.0, 2.0, 3.0], np.float32)
    word, emoji = (0, 3), (3, 4)  # "abc" and a character of three bytes
    teacher = offsets(word, emoji, emoji, emoji)
    assert pool(norms, teacher, offsets((0, 1), (1, 3), emoji)).tolist() == [2, 4, 6]
    assert pool(norms, teacher, offsets(word, emoji, emoji)).tolist() == [6, 3, 3]
    assert pool(norms, teacher, offsets((0, 4))).tolist() == [12]


def test_characters_of_the_teacher_alone_go_to_their_nearest_neighbour() -> None:
    norms = np.array([1.0, 2.0, 4.0, 8.0, 16.0], np.float32)
    teacher = offsets((0, 1), (1, 2), (2, 3), (3, 4), (4, 5))
    assert pool(norms, teacher, offsets((1, 2), (3, 4))).tolist() == [7, 24]
    assert pool(norms[:2], teacher[:2], offsets((1, 2), (5, 9))).tolist() == [3, 0]
    assert pool(norms, teacher, offsets()).tolist() == []
    assert pool(norms[:0], offsets(), offsets((0, 2))).tolist() == [0]


def test_values_of_every_size_keep_their_digits() -> None:
    norms = np.array([1e20, 3e-20, 1e20], np.float32)
    pooled = pool(norms, offsets((0, 1), (1, 3), (3, 4)), offsets((0, 1), (1, 2), (2, 3), (3, 4)))
    np.testing.assert_allclose(pooled, [1e20, 1.5e-20, 1.5e-20, 1e20], rtol=1e-6)


@pytest.mark.parametrize(
    ("norms", "teacher", "student", "message"),
    [
        ([1.0, 2.0], [[0, 1]], [[0, 1]], "norms: must be one number for each of the 1 tokens"),
        ([1.0], [[0, 0]], [[0, 1]], "offsets_t: must be .* with a token of no character"),
        ([1.0], [[0, 1]], [[-1, -1]], "offsets_s: must be .* give domain tokens only"),
        ([1.0], [[0, 1]], [0, 1], r"offsets_s: must be \[d, 2\] .*, got the shape \(2,\)"),
    ],
)
def test_what_does_not_fit_is_named(norms: list, teacher: list, student: list, message: str):
    with pytest.raises(ValueError, match=message):
        pool(np.array(norms, np.float32), np.array(teacher), np.array(student))
