"""Detection on stored saliencies: alignment by characters, neighborhood, and the equations."""

from __future__ import annotations

import numpy as np
import pytest

from leaf_distill.detection.spans import PromptSaliency, SpanSettings, detect_rows, normalize

LOW, HIGH = 0.01, 5.0


def side(
    norms: list[float],
    *,
    row_id: int = 0,
    position: list[int] | None = None,
    prunable: list[bool] | None = None,
    width: int = 3,
    invalid: bool = False,
) -> PromptSaliency:
    """Tokens of `width` characters each, side by side from position 4 unless told otherwise."""
    count = len(norms)
    starts = np.arange(count) * width
    return PromptSaliency(
        row_id=row_id,
        norms=np.array(norms, dtype=np.float32),
        position=np.array(position or range(4, 4 + count), dtype=np.int64),
        offsets=np.stack([starts, starts + width], axis=1),
        prunable=np.array(prunable or [True] * count),
        invalid=invalid,
    )


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
    found, left = detect_rows(teacher, student, SpanSettings(threshold=0.3))
    assert left == [] and [item.row_id for item in found] == list(range(400))
    for one, other, item in zip(teacher, student, found, strict=True):
        np.testing.assert_allclose(item.score, definition(one.norms, other.norms), atol=2e-6)
        assert set(np.flatnonzero(item.confounder)) == {
            index for start, stop in item.spans for index in range(start, stop)
        }
        np.testing.assert_array_equal(item.confounder, item.score <= np.float32(0.3))
        np.testing.assert_allclose(item.student.max(), 1.0)
        assert item.teacher.min() == 0.0


def test_spans_as_tokens_and_characters() -> None:
    teacher = side([HIGH, HIGH, LOW, LOW, HIGH, LOW])
    student = side([LOW, LOW, HIGH, HIGH, LOW, HIGH])
    ((item,), _) = detect_rows([teacher], [student], SpanSettings())
    assert item.spans == ((2, 4), (5, 6))
    assert item.characters == ((6, 12), (15, 18))


@pytest.mark.parametrize("holey", ["teacher", "student", "both"])
def test_a_hole_in_either_sequence_parts_a_span(holey: str) -> None:
    whole, parted = [4, 5, 6, 7], [4, 5, 9, 10]
    teacher = side([HIGH, LOW, LOW, HIGH], position=whole if holey == "student" else parted)
    student = side([LOW, HIGH, HIGH, LOW], position=whole if holey == "teacher" else parted)
    ((item,), _) = detect_rows([teacher], [student], SpanSettings())
    assert item.spans == ((1, 2), (2, 3))
    ((item,), _) = detect_rows([teacher], [student], SpanSettings(join_gap=5))
    assert item.spans == ((1, 2), (2, 3))


def test_templates_of_different_length_do_not_matter() -> None:
    student = side([LOW, HIGH, HIGH, LOW], position=[30, 31, 32, 33])
    teacher = side([HIGH, LOW, LOW, HIGH], position=[2, 3, 4, 5])
    ((item,), left) = detect_rows([teacher], [student], SpanSettings())
    assert item.spans == ((1, 3),) and left == []


def test_settings_reach_the_op() -> None:
    teacher = side([HIGH, LOW, HIGH, LOW, HIGH, 2.0])
    student = side([LOW, HIGH, LOW, HIGH, LOW, HIGH])

    def spans(**settings: object) -> tuple[tuple[int, int], ...]:
        ((item,), _) = detect_rows([teacher], [student], SpanSettings(**settings))  # type: ignore[arg-type]
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
    ((item,), _) = detect_rows([teacher], [student], SpanSettings())
    assert item.spans == ((2, 3),) and item.student[1] == 1.0


def test_rows_without_evidence_have_no_span() -> None:
    same = side([1.0, 2.0, 3.0])
    ((item,), left) = detect_rows([same], [same], SpanSettings())
    assert item.spans == () and left == []


def test_who_leaves_and_why() -> None:
    good = [1.0, 2.0, 3.0]
    teacher = [
        side(good, row_id=0, invalid=True),
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
    found, left = detect_rows(teacher, student, SpanSettings())
    assert [item.row_id for item in found] == [6]
    assert {item.row_id: item.reason for item in left} == {
        0: "teacher_not_finite",
        1: "student_not_finite",
        2: "different_renderings",
        3: "different_renderings",
        4: "empty_domain",
        5: "different_renderings",
    }
    assert all(item.stage == "detect" and item.candidate_id == -1 for item in left)


def test_rows_that_do_not_correspond_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"needs row 0 .* came 1"):
        detect_rows([side([1.0, 2.0])], [side([1.0, 2.0], row_id=1)], SpanSettings())


def test_normalize_constant_is_zero() -> None:
    np.testing.assert_array_equal(normalize(np.full(3, 7, dtype=np.float32)), np.zeros(3))
