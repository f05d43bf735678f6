"""The intervention score on the tiny pair, whose student is misled by one known word."""

from __future__ import annotations

import math
from contextlib import nullcontext
from pathlib import Path

import detect_pair
import detect_run
import numpy as np
import pytest
import torch
from aligned_rows import MISLED, aligned, config_of, named_tokens
from transformers import PreTrainedModel

from leaf_distill.data.example import ROLES, Example
from leaf_distill.detection.answers import PromptedModel
from leaf_distill.detection.cache import RowCache
from leaf_distill.detection.cells import AXES
from leaf_distill.detection.counterfactual import changed
from leaf_distill.detection.intervention import (
    intervention_score,
    interventions,
    shortlist,
    suspicion_of,
    word_units,
)
from leaf_distill.detection.judge import Judge
from leaf_distill.detection.scores import score_changes, score_perplexity
from leaf_distill.detection.substitution import Vocabulary
from leaf_distill.detection.suspicion import set_suspicion
from leaf_distill.detection.sweep import sweep_arm
from leaf_distill.detection.swept_arm import read_settings
from leaf_distill.models.loading import LazyModel


def probabilities(model: PreTrainedModel, prompt: list[int], labels: list[int]) -> torch.Tensor:
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + labels])).logits[0]
    return logits[len(prompt) - 1 : -1].double().log_softmax(-1)


def test_the_score_is_the_log_ratio_with_its_floors() -> None:
    found = intervention_score(np.array([0.0, 1.0, 4.0]), np.array([0.0, 1.0, 0.0]))
    assert found.dtype == np.float32
    expected = [math.log(0.01 / 0.1), math.log(1.01 / 1.1), math.log(4.01 / 0.1)]
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_a_value_is_the_divergence_of_the_answers(pair: dict[str, str], tmp_path: Path) -> None:
    with aligned(pair, tmp_path) as (models, examples, cache):
        example = examples[0]
        proposals = [changed(example, [(0, 3)], ["ann"]), changed(example, [(0, 8)])]
        (found,) = score_changes(
            "kl", models["student"], [example], config_of(), cache, [proposals]
        )
        original = example.renderings["student"]
        labels = original.input_ids[original.loss_mask].tolist()
        model = models["student"].model.load()
        before = probabilities(model, original.input_ids[~original.loss_mask].tolist(), labels)
        for value, proposal in zip(found, proposals, strict=True):
            prompt = models["student"].prompt(proposal).input_ids.tolist()
            after = probabilities(model, prompt, labels)
            expected = float((before.exp() * (before - after)).sum(-1).mean())
            assert value == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_the_misleading_word_has_the_highest_score(pair: dict[str, str], tmp_path: Path) -> None:
    with aligned(pair, tmp_path) as (models, examples, cache):
        config = config_of(score="intervention", draws=3, shortlist=40)
        judge = Judge(models, config, cache, lambda stage: nullcontext())
        set_suspicion(judge, examples, config, Vocabulary(one.text for one in examples))
        hits = 0
        for example in examples:
            assert example.suspicion is not None and example.suspicion.dtype == np.float32
            hits += int(example.suspicion.argmax()) in named_tokens(example)
        assert hits >= 0.8 * len(examples)


def test_a_row_whose_values_are_not_finite_leaves(pair: dict[str, str], tmp_path: Path) -> None:
    with aligned(pair, tmp_path) as (models, examples, cache):
        model = models["student"].model.load()
        config = config_of(score="lens")
        broken, whole = examples[0], examples[1]
        # One prompt has a token whose embedding overflows behind it.
        other = set(whole.renderings["student"].input_ids.tolist())
        token = next(one for one in broken.renderings["student"].input_ids if one not in other)
        with torch.no_grad():
            model.get_input_embeddings().weight[int(token)] = torch.inf
        judge = Judge(models, config, cache, lambda stage: nullcontext())
        judge.use = lambda role: models[role]  # type: ignore[method-assign,index]  # stays loaded
        set_suspicion(judge, [broken, whole], config)
        assert broken.outcome is not None and broken.outcome.reason == "student_not_finite"
        assert whole.outcome is None and np.isfinite(whole.suspicion).all()


def test_values_come_from_the_cache_without_a_model(
    pair: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with aligned(pair, tmp_path) as (models, examples, cache):
        vocabulary = Vocabulary(one.text for one in examples)
        config = config_of()

        def proposals() -> list[list[Example]]:
            units = [shortlist(one, 3) for one in examples]
            return [
                [row for _, row in interventions(one, chosen, config, vocabulary)]
                for one, chosen in zip(examples, units, strict=True)
            ]

        first = score_changes("kl", models["student"], examples, config, cache, proposals())
        monkeypatch.setattr(LazyModel, "load", lambda self: pytest.fail("a model is loaded"))
        again = score_changes("kl", models["student"], examples, config, cache, proposals())
        for one, other in zip(first, again, strict=True):
            np.testing.assert_array_equal(one, other)
        # Part of the proposals in another order, and of one row alone.
        part = score_changes(
            "kl", models["student"], examples[:1], config, cache, [proposals()[0][::-1]]
        )
        np.testing.assert_array_equal(part[0], first[0][::-1])


def test_both_models_have_likelihoods_and_the_cache_keeps_them(
    pair: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with aligned(pair, tmp_path) as (models, examples, cache):

        def values(models: dict[str, PromptedModel], cache: RowCache) -> list[np.ndarray]:
            return [
                one
                for role in ROLES
                for one in score_perplexity(models[role], examples, config_of(), cache)
            ]

        first = values(models, cache)  # type: ignore[arg-type]
        assert [len(one) for one in first] == 2 * [len(one.offsets) for one in examples]
        assert not np.allclose(first[0], first[len(examples)])
        monkeypatch.setattr(LazyModel, "load", lambda self: pytest.fail("a model is loaded"))
        for one, other in zip(first, values(models, cache), strict=True):  # type: ignore[arg-type]
            np.testing.assert_array_equal(one, other)


def test_a_prompt_that_is_too_long_is_not_measured(pair: dict[str, str], tmp_path: Path) -> None:
    with aligned(pair, tmp_path) as (models, examples, cache):
        proposals = [[changed(examples[0], [(0, 3)], ["ann " * 50]), examples[0]]]
        (found,) = score_changes(
            "kl", models["student"], examples[:1], config_of(), cache, proposals
        )
        assert np.isnan(found[0]) and found[1] == 0


def test_without_draws_each_unit_is_left_out_once(pair: dict[str, str], tmp_path: Path) -> None:
    with aligned(pair, tmp_path) as (_, examples, _):
        example = examples[0]
        units = shortlist(example, 4)
        assert len(units) == 4 and units == sorted(units)
        changes = interventions(example, units, config_of(draws=0), None)
        assert [index for index, _ in changes] == [0, 1, 2, 3]
        for (start, stop), (_, row) in zip(units, changes, strict=True):
            characters = example.offsets[start:stop]
            word = example.text[characters.min() : characters.max()].strip()
            assert len(row.text) < len(example.text)
            assert row.text.split().count(word) == example.text.split().count(word) - 1


def test_draws_depend_on_the_seed_and_the_row_alone(pair: dict[str, str], tmp_path: Path) -> None:
    with aligned(pair, tmp_path) as (_, examples, _):
        vocabulary = Vocabulary(one.text for one in examples)

        def texts(seed: int) -> list[str]:
            config = config_of(seed=seed)
            found = interventions(examples[1], shortlist(examples[1], 5), config, vocabulary)
            return [row.text for _, row in found]

        assert texts(0) == texts(0)
        assert any(texts(0) != texts(seed) for seed in range(1, 9))


def test_the_shortlist_has_the_lowest_gaps(pair: dict[str, str], tmp_path: Path) -> None:
    with aligned(pair, tmp_path) as (_, examples, _):
        example = examples[0]
        example.norms["teacher"] = np.ones(len(example.offsets), np.float32)
        student = np.zeros(len(example.offsets), np.float32)
        student[[2, 5, 6]] = 1.0, 0.5, 0.9
        example.norms["student"] = student
        assert [start for start, _ in shortlist(example, 2)] == [2, 6]
        assert len(shortlist(example, 99)) == len(word_units(example))


def test_tokens_outside_the_shortlist_have_the_lowest_score(
    pair: dict[str, str], tmp_path: Path
) -> None:
    with aligned(pair, tmp_path) as (_, examples, _):
        example = examples[0]
        changes = [(0, example), (0, example), (1, example), (2, example)]
        student = np.array([1.0, 3.0, 0.5, np.nan], np.float32)
        teacher = np.array([0.0, 0.2, 0.5, 1.0], np.float32)
        values = {"student": student, "teacher": teacher}
        found = suspicion_of(example, [(1, 2), (3, 5), (6, 7)], changes, values)
        low, high = math.log(0.51 / 0.6), math.log(2.01 / 0.2)
        assert found[1] == pytest.approx(high)
        others = np.delete(found, 1)
        np.testing.assert_allclose(others, low, rtol=1e-6)
        nothing = {role: np.full(4, np.nan, np.float32) for role in ROLES}
        assert not suspicion_of(example, [(1, 2), (3, 5), (6, 7)], changes, nothing).any()


def test_stage_1_runs_with_the_score(pair: dict[str, str], tmp_path: Path) -> None:
    result = detect_run.run(pair, tmp_path, MISLED, score="intervention", validate="teacher")
    lines = [one for one in detect_run.table(result.dataset) if one["branch"] == "counterfactual"]
    cut: dict[int, list[str]] = {}
    for line in lines:
        for one in line["spans"]:
            text = MISLED[line["row_id"]]["prompt"][one["start"] : one["stop"]].strip()
            cut.setdefault(line["row_id"], []).append(text)
    named = [any(text in detect_pair.NAMES for text in texts) for texts in cut.values()]
    assert len(named) >= len(MISLED) // 2 and sum(named) >= 0.9 * len(named)
    assert sum(map(len, cut.values())) < 2 * len(cut)


def test_a_sweep_draws_the_replacements_of_its_arm(pair: dict[str, str], tmp_path: Path) -> None:
    # The last row is too long, and so not in the dataset that is swept.
    long = {**MISLED[0], "prompt": "ann has 9 pears . " * 60}
    rows = [*MISLED, long]
    for name, changes in {"a": {"score": "intervention"}, "b": {"edit": "substitute"}}.items():
        arm = detect_run.run(pair, tmp_path / name, rows, validate="teacher", **changes).arm
        assert len({line["row_id"] for line in detect_run.table(arm / "dataset.parquet")}) < len(
            rows
        )
        config = read_settings(arm)
        grid = {one: [getattr(config, one)] for one in AXES}
        (own,) = sweep_arm(arm, config, [], grid).cells
        assert own.current and own.complete and own.known > 0 and own.overlap == 1.0
