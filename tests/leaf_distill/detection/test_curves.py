"""Deletion and insertion curves on the tiny pair, whose student is misled by one known word."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from aligned_rows import MISLED, aligned, config_of, named_tokens
from text_friends import cut

from leaf_distill.data.example import Example
from leaf_distill.detection.curves import SHARES, Curve, deletion_curves, summarize_curves
from leaf_distill.models.loading import LazyModel
from leaf_distill.models.saliency import completion_nll


def rankings(examples: list[Example]) -> dict[str, list[np.ndarray]]:
    """The truth, its opposite, and chance."""
    draw, truth, chance = np.random.default_rng(0), [], []
    for example in examples:
        values = np.zeros(len(example.offsets), np.float32)
        values[named_tokens(example)] = 1
        truth.append(values)
        chance.append(draw.random(len(values)).astype(np.float32))
    return {"truth": truth, "chance": chance, "opposite": [-one for one in truth]}


def test_the_truth_is_best_and_its_opposite_is_worst(pair: dict[str, str], tmp_path: Path) -> None:
    with aligned(pair, tmp_path) as (models, examples, cache):
        curves = deletion_curves(
            models["student"], examples, rankings(examples), config_of(), cache
        )
        lines = summarize_curves(curves, reference="chance")
    area = {(line["kind"], line["score"]): line["area"] for line in lines}
    assert {line["rows"] for line in lines} == {len(examples)}
    deletion, insertion = (
        [area[kind, name] for name in ("truth", "chance", "opposite")]
        for kind in ("deletion", "insertion")
    )
    assert deletion == sorted(deletion) and deletion[0] < deletion[1] - 0.2
    assert insertion == sorted(insertion, reverse=True)
    for line in lines:
        assert line["interval"][0] <= line["area"] <= line["interval"][1]
        if line["score"] == "chance":
            assert line["difference"] is None
        else:
            expected = line["area"] - area[line["kind"], "chance"]
            assert line["difference"] == pytest.approx(expected)
            low, high = line["difference_interval"]
            assert low <= expected <= high


def test_shuffled_values_cannot_be_told_from_chance(pair: dict[str, str], tmp_path: Path) -> None:
    with aligned(pair, tmp_path) as (models, examples, cache):
        ranked, draw = rankings(examples), np.random.default_rng(1)
        # Equal values would go to the earlier token, and a position is no chance.
        noise = [0.01 * draw.random(len(values)) for values in ranked["truth"]]
        ranked["shuffled"] = [
            draw.permutation(values + more).astype(np.float32)
            for values, more in zip(ranked["truth"], noise, strict=True)
        ]
        curves = deletion_curves(models["student"], examples, ranked, config_of(), cache)
        lines = summarize_curves(curves, reference="chance")
    found = {(line["score"], line["kind"]): line["difference_interval"] for line in lines}
    for kind in ("deletion", "insertion"):
        low, high = found["shuffled", kind]
        assert low < 0 < high
    assert found["truth", "deletion"][1] < 0 < found["truth", "insertion"][0]


def test_a_row_with_several_views_counts_once() -> None:
    def curve(row_id: int, score: str, height: float) -> Curve:
        return Curve(row_id, score, "student", "deletion", (0.0, 0.5), (height, height))

    curves = [curve(0, "a", 1.0), curve(0, "a", 3.0), curve(1, "a", 5.0)]
    curves += [curve(row, "b", 0.0) for row in (0, 0, 1)]
    first, _ = summarize_curves(curves, reference="b")
    assert first["rows"] == 2
    assert (first["area"], first["nll"]) == (3.5, [3.5, 3.5])
    assert (first["difference"], first["difference_interval"]) == (3.5, [2.0, 5.0])


def test_values_equal_the_loss_on_each_cut_text(pair: dict[str, str], tmp_path: Path) -> None:
    with aligned(pair, tmp_path, MISLED[:3]) as (models, examples, cache):
        student, ranked = models["student"], rankings(examples)
        curves = deletion_curves(student, examples, ranked, config_of(), cache)
        model = student.model.load()
        for curve in (one for one in curves if one.kind == "deletion"):
            (at,) = (i for i, one in enumerate(examples) if one.row_id == curve.row_id)
            example, values = examples[at], ranked[curve.score][at]
            order = sorted(range(len(values)), key=lambda token: (-values[token], token))
            for share, nll in zip(SHARES, curve.nll, strict=True):
                gone = sorted(order[: int(np.ceil(share * len(order) - 0.5))])
                text = cut(example.text, [tuple(example.offsets[token]) for token in gone])
                messages = ({**example.messages[-1], "content": text},)
                other = student.renderer.render(example.derived(messages=messages))
                assert nll == pytest.approx(completion_nll(model, [other])[0], rel=1e-5, abs=1e-6)
            assert curve.nll[0] == pytest.approx(example.nll["student"], rel=1e-5, abs=1e-6)


def test_all_scores_delete_as_many_tokens(pair: dict[str, str], tmp_path: Path) -> None:
    with aligned(pair, tmp_path, MISLED[:4]) as (models, examples, cache):
        lengths: dict[str, list[int]] = {}
        student = models["student"]
        prompt = type(student).prompt
        for name, values in rankings(examples).items():
            seen = lengths.setdefault(name, [])
            object.__setattr__(
                student,
                "prompt",
                lambda row, seen=seen: seen.append(len(row.text.split())) or prompt(student, row),
            )
            deletion_curves(student, examples, {name: values}, config_of(), cache)
        assert lengths["truth"] == lengths["chance"] == lengths["opposite"]


def test_losses_come_from_the_cache_without_a_model(
    pair: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with aligned(pair, tmp_path, MISLED[:4]) as (models, examples, cache):
        arguments = (models["teacher"], examples, rankings(examples), config_of(), cache)
        first = deletion_curves(*arguments)
        monkeypatch.setattr(LazyModel, "load", lambda self: pytest.fail("a model is loaded"))
        assert deletion_curves(*arguments) == first
        assert {one.role for one in first} == {"teacher"}


def test_an_area_is_the_mean_height() -> None:
    flat = Curve(0, "x", "student", "deletion", (0.0, 0.1, 0.5), (2.0, 2.0, 2.0))
    assert flat.area == pytest.approx(2.0)
    falling = Curve(0, "x", "student", "deletion", (0.0, 0.1, 0.5), (1.0, 0.0, 0.0))
    assert falling.area == pytest.approx(0.1)


@pytest.mark.parametrize("shares", [(0.0,), (0.1, 0.1), (0.5, 0.1), (0.0, 1.5), (-0.1, 0.5)])
def test_shares_that_are_none_are_refused(
    shares: tuple[float, ...], pair: dict[str, str], tmp_path: Path
) -> None:
    with (
        aligned(pair, tmp_path, MISLED[:1]) as (models, examples, cache),
        pytest.raises(ValueError, match="shares: must increase from 0"),
    ):
        deletion_curves(
            models["student"], examples, rankings(examples), config_of(), cache, shares=shares
        )


def test_a_score_of_another_length_is_refused(pair: dict[str, str], tmp_path: Path) -> None:
    with aligned(pair, tmp_path, MISLED[:1]) as (models, examples, cache):
        bad = {"bad": [np.zeros(2, np.float32)]}
        with pytest.raises(
            ValueError, match=r"suspicion\['bad'\]: must have one value for each of"
        ):
            deletion_curves(models["student"], examples, bad, config_of(), cache)
