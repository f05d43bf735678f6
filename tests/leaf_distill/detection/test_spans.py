"""Detection on stored saliencies: alignment by characters, neighborhood, and the equations."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from leaf_distill.data.example import Example, Rendering, remaining
from leaf_distill.detection.config import DetectConfig
from leaf_distill.detection.spans import align, characters, find_spans, normalize

LOW, HIGH = 0.01, 5.0


@dataclass
class Side:
    """One model's view of a row."""

    norms: list[float]
    row_id: int = 0
    position: list[int] | None = None  # side by side from position 4 unless told otherwise
    prunable: list[bool] | None = None
    width: int = 3  # characters of each token
    nll: float = 1.0

    def rendering(self) -> Rendering:
        count = len(self.norms)
        position = self.position or list(range(4, 4 + count))
        length = max(position, default=4) + 3
        offsets = np.full((length, 2), -1, dtype=np.int32)
        prunable = np.zeros(length, dtype=np.bool_)
        starts = np.arange(count) * self.width
        offsets[position] = np.stack([starts, starts + self.width], axis=1)
        prunable[position] = self.prunable or [True] * count
        return Rendering(np.zeros(length, np.int32), np.zeros(length, np.bool_), offsets, prunable)


side = Side


def found_in(teacher: list[Side], student: list[Side], **settings: object) -> list[Example]:
    rows = []
    for one, other in zip(teacher, student, strict=True):
        text = "abc" * 60
        row = Example(one.row_id, ({"role": "user", "content": text},), "c")
        for role, view in (("teacher", one), ("student", other)):
            row.renderings[role] = view.rendering()  # type: ignore[index]
            row.norms[role] = np.array(view.norms, dtype=np.float32)  # type: ignore[index]
            row.nll[role] = view.nll  # type: ignore[index]
        rows.append(row)
    align(rows)
    find_spans(list(remaining(rows)), DetectConfig(**settings))  # type: ignore[arg-type]
    return rows


def definition(teacher: np.ndarray, student: np.ndarray) -> np.ndarray:
    """Equations 3 to 5 in float64."""

    def scale(values: np.ndarray) -> np.ndarray:
        return (values - values.min()) / (values.max() - values.min())

    return scale(scale(teacher.astype(np.float64)) - scale(student.astype(np.float64)))


def test_scores_are_equations_3_to_5_row_by_row() -> None:
    draw = np.random.default_rng(0)
    lengths = [5, 17, 3, 40] * 100  # more rows than go into one call
    teacher = [side(draw.random(n).tolist(), row_id=i) for i, n in enumerate(lengths)]
    student = [side((draw.random(n) * 9).tolist(), row_id=i) for i, n in enumerate(lengths)]
    found = found_in(teacher, student, threshold=0.3)
    assert not any(item.outcome for item in found)
    for one, other, item in zip(teacher, student, found, strict=True):
        assert item.score is not None and item.confounder is not None
        norms = (np.array(view.norms, dtype=np.float32) for view in (one, other))
        np.testing.assert_allclose(item.score, definition(*norms), atol=2e-6)
        assert set(np.flatnonzero(item.confounder)) == {
            index for start, stop in item.spans for index in range(start, stop)
        }
        np.testing.assert_array_equal(item.confounder, item.score <= np.float32(0.3))
        np.testing.assert_allclose(item.saliency["student"].max(), 1.0)
        assert item.saliency["teacher"].min() == 0.0


def test_spans_as_tokens_and_characters() -> None:
    teacher = side([HIGH, HIGH, LOW, LOW, HIGH, LOW])
    student = side([LOW, LOW, HIGH, HIGH, LOW, HIGH])
    (item,) = found_in([teacher], [student])
    assert item.spans == ((2, 4), (5, 6))
    assert [characters(item, span) for span in item.spans] == [(6, 12), (15, 18)]


@pytest.mark.parametrize("holey", ["teacher", "student", "both"])
def test_a_hole_in_either_sequence_parts_a_span(holey: str) -> None:
    whole, parted = [4, 5, 6, 7], [4, 5, 9, 10]
    teacher = side([HIGH, LOW, LOW, HIGH], position=whole if holey == "student" else parted)
    student = side([LOW, HIGH, HIGH, LOW], position=whole if holey == "teacher" else parted)
    (item,) = found_in([teacher], [student])
    assert item.spans == ((1, 2), (2, 3))
    (item,) = found_in([teacher], [student], join_gap=5)
    assert item.spans == ((1, 2), (2, 3))


def test_templates_of_different_length_do_not_matter() -> None:
    student = side([LOW, HIGH, HIGH, LOW], position=[30, 31, 32, 33])
    teacher = side([HIGH, LOW, LOW, HIGH], position=[2, 3, 4, 5])
    (item,) = found_in([teacher], [student])
    assert item.spans == ((1, 3),) and item.outcome is None


def test_settings_reach_the_op() -> None:
    teacher = side([HIGH, LOW, HIGH, LOW, HIGH, 2.0])
    student = side([LOW, HIGH, LOW, HIGH, LOW, HIGH])

    def spans(**settings: object) -> tuple[tuple[int, int], ...]:
        (item,) = found_in([teacher], [student], **settings)
        return item.spans

    assert spans() == ((1, 2), (3, 4))
    assert spans(threshold=0.5) == ((1, 2), (3, 4), (5, 6))
    assert spans(threshold=0.5, teacher_max=0.1) == ((1, 2), (3, 4))
    assert spans(join_gap=1) == ((1, 4),)
    assert spans(min_length=2) == ()
    assert spans(rule="quantile", threshold=0.4) == ((1, 2), (3, 4), (5, 6))
    assert spans(rule="quantile", threshold=0.4, cap=0.1) == ((1, 2), (3, 4))


def test_whitespace_counts_but_is_not_cut() -> None:
    prunable = [True, False, True, True]
    teacher = side([HIGH, LOW, LOW, HIGH], prunable=prunable)
    student = side([LOW, HIGH, HIGH, LOW], prunable=prunable)
    (item,) = found_in([teacher], [student])
    assert item.spans == ((2, 3),) and item.saliency["student"][1] == 1.0


def test_rows_without_evidence_have_no_span() -> None:
    same = side([1.0, 2.0, 3.0])
    (item,) = found_in([same], [same])
    assert item.spans == () and item.outcome is None


def test_who_leaves_and_why() -> None:
    good = [1.0, 2.0, 3.0]
    teacher = [
        side(good, row_id=0, nll=float("nan")),
        side(good, row_id=1),
        side(good, row_id=2),
        side(good, row_id=3),
        side([], row_id=4),
        side(good, row_id=5),
        side(good, row_id=6),
    ]
    student = [
        side(good, row_id=0),
        side([1.0, np.nan, 2.0], row_id=1),
        side([1.0, 2.0], row_id=2),
        side(good, row_id=3, width=4),
        side([], row_id=4),
        side(good, row_id=5, prunable=[True, False, True]),
        side(good[::-1], row_id=6),
    ]
    found = found_in(teacher, student)
    assert [item.row_id for item in found if item.outcome is None] == [5, 6]
    assert {item.row_id: item.outcome.reason for item in found if item.outcome} == {
        0: "teacher_not_finite",
        1: "student_not_finite",
        2: "different_renderings",
        3: "different_renderings",
        4: "empty_domain",
    }
    assert all(item.outcome.stage == "detect" for item in found if item.outcome)


def test_normalize_constant_is_zero() -> None:
    np.testing.assert_array_equal(normalize(np.full(3, 7, dtype=np.float32)), np.zeros(3))


def test_a_teacher_with_other_tokens_is_pooled_over_the_students() -> None:
    teacher = side([2.0, 8.0, 2.0], width=4)
    student = side([1.0, 2.0, 3.0, 4.0], width=3)
    (item,) = found_in([teacher], [student])
    assert item.notes == ["tokens_pooled"] and item.outcome is None
    np.testing.assert_allclose(item.norms["teacher"], [1.5, 4.5, 4.5, 1.5])
    np.testing.assert_allclose(item.norms["student"], [1, 2, 3, 4])


def test_the_response_has_a_threshold_of_its_own() -> None:
    spans = []
    for segment in (0, 1):
        row = found_in([side([HIGH, LOW, HIGH, 2.0])], [side([LOW, HIGH, LOW, HIGH])])[0]
        row.segment, row.prefix = segment, "abc" * 60
        find_spans([row], DetectConfig(threshold=0.1, response_threshold=0.5))
        spans.append(row.spans)
    assert spans == [((1, 2),), ((1, 2), (3, 4))]


def test_no_span_crosses_from_one_message_into_the_next() -> None:
    teacher, student = side([HIGH, LOW, LOW, HIGH]), side([LOW, HIGH, HIGH, LOW])
    row = found_in([teacher], [student])[0]
    assert row.spans == ((1, 3),)
    turns = [{"role": "user", "content": "abcabc"}, {"role": "user", "content": "abc" * 60}]
    row.messages, row.turns = tuple(turns), (0, 1)
    align([row])
    find_spans([row], DetectConfig())
    assert row.spans == ((1, 2), (2, 3))


def test_a_suspicion_takes_the_place_of_the_gap() -> None:
    row = found_in([side([1.0, 2.0, 3.0])], [side([1.0, 2.0, 3.0])])[0]
    row.suspicion = np.array([-1.0, 3.0, 0.0], dtype=np.float32)
    find_spans([row], DetectConfig())
    assert row.spans == ((1, 2),)
    np.testing.assert_allclose(row.score, [1.0, 0.0, 0.75])


def test_the_teacher_bounds_another_score_too() -> None:
    row = found_in([side([3.0, 2.0, 1.0])], [side([1.0, 2.0, 3.0])])[0]
    row.suspicion = np.array([1.0, 1.0, 0.0], dtype=np.float32)
    find_spans([row], DetectConfig())
    assert row.spans == ((0, 2),)
    find_spans([row], DetectConfig(teacher_max=0.5))
    assert row.spans == ((1, 2),)
