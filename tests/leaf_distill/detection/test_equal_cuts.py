"""Controls take as much as the method does; other scores; turns; values that are not finite."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import detect_pair
import numpy as np
import pytest
import torch
from detect_run import ROWS, check_sums, counts, reasons, run, table
from transformers import AutoModelForCausalLM

from leaf_distill.detection.config import DetectConfig
from leaf_distill.detection.pipeline import DetectResult, detect

CONTROLS = (
    *("random_tokens", "random_spans", "student_saliency", "teacher_saliency", "perplexity"),
)
BARE = [{**row, "prompt": row["prompt"].replace(" .", "")} for row in ROWS]
"""Rows without punctuation, of which a cut gives some back."""

LOOSE = {"threshold": 0.5, "widen": "token", "select": "all", "validate": "none"}
"""Settings with several spans of several tokens a row; a word is a token to the tiny pair."""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of the runs, which share the answers."""
    return tmp_path_factory.mktemp("controls")


def words_in(text: str, ranges: list[list[int]]) -> list[int]:
    """Return the indices of the words that are cut."""
    starts = [at for at in range(len(text)) if text[at] != " " and (not at or text[at - 1] == " ")]
    return [n for n, at in enumerate(starts) if any(start <= at < stop for start, stop in ranges)]


def cut_words(sample: dict[str, Any]) -> list[list[int]]:
    return [words_in(sample["text"], one["cut"]) for one in sample["candidates"]]


@pytest.mark.parametrize("strategy", CONTROLS)
def test_a_control_takes_as_many_tokens(pair: dict[str, str], root: Path, strategy: str) -> None:
    spans = table(run(pair, root, BARE, **LOOSE).samples)
    result = run(pair, root, BARE, strategy=strategy, **LOOSE)
    check_sums(result, len(ROWS))
    assert result.arm.name.startswith(strategy)
    different = several = 0
    for ours, theirs in zip(spans, table(result.samples), strict=True):
        assert ours["spans"] == theirs["spans"] and ours["row_id"] == theirs["row_id"]
        found, control = cut_words(ours), cut_words(theirs)
        taken = [word for one in control for word in one]
        assert len(taken) == len(set(taken)) == sum(map(len, found))
        if strategy == "random_tokens":
            assert len(control) == 1
        if strategy == "random_spans":
            assert sorted(map(len, control)) == sorted(map(len, found))
            assert all(one == list(range(one[0], one[0] + len(one))) for one in control)
        several += len(found) > 1
        different += set(taken) != {word for one in found for word in one}
        if strategy.endswith("_saliency"):
            sign = -1 if strategy == "student_saliency" else 1
            values = sign * np.array(theirs[strategy])
            rest = sorted(set(range(len(values))) - set(taken))
            assert values[taken].max() <= values[rest].min()
    assert different and several


def test_a_control_is_named_and_scored_in_the_dataset(pair: dict[str, str], root: Path) -> None:
    result = run(pair, root, BARE, strategy="student_saliency", **LOOSE)
    samples = {one["row_id"]: one for one in table(result.samples)}
    for line in table(result.arm / "candidates.parquet"):
        sample = samples[line["row_id"]]
        words = words_in(sample["text"], [[s["start"], s["stop"]] for s in line["spans"]])
        assert line["strategy"] == "student_saliency"
        assert line["score"] == pytest.approx(np.mean(np.array(sample["score"])[words]), abs=1e-6)


def test_a_cut_of_white_space_alone_is_no_change(pair: dict[str, str], root: Path) -> None:
    """A full stop that is drawn alone is given back, and the blank before it is nothing."""
    options = {"strategy": "perplexity", "widen": "token", "select": "all", "validate": "none"}
    result = run(pair, root, **options)
    check_sums(result, len(ROWS))
    assert reasons(result, "candidates")["unchanged"] > 0
    for line in table(result.dataset):
        if line["branch"] != "original":
            before, after = ROWS[line["row_id"]]["prompt"], line["prompt"][0]["content"]
            assert before.replace(" ", "") != after.replace(" ", "")


def token_losses(path: str, texts: list[str]) -> list[np.ndarray]:
    """The negative log-likelihood of each word of a prompt, from the model's own logits."""
    tokenizer, found = detect_pair.make_tokenizer(), []
    model = AutoModelForCausalLM.from_pretrained(path)
    for text in texts:
        ids = tokenizer(f"<user> {text} <assistant>", return_tensors="pt")["input_ids"]
        with torch.no_grad():
            logits = model(input_ids=ids).logits.double().log_softmax(-1)
        chosen = logits[0, :-1].gather(1, ids[0, 1:, None])[:, 0]
        found.append(-chosen.numpy()[:-1])
    return found


def test_lens_is_the_difference_of_log_probabilities(pair: dict[str, str], root: Path) -> None:
    result = run(pair, root, score="lens")
    check_sums(result, len(ROWS))
    samples = table(result.samples)
    texts = [one["text"] for one in samples]
    both = (token_losses(pair[role], texts) for role in ("student", "teacher"))
    for sample, ours, theirs in zip(samples, *both, strict=True):
        suspect = np.abs(ours - theirs)
        wanted = 1 - (suspect - suspect.min()) / (suspect.max() - suspect.min())
        np.testing.assert_allclose(sample["score"], wanted, atol=1e-4)
    assert sum(len(one["candidates"]) for one in samples) >= len(samples)


def never_says(path: str, word: str) -> Any:
    """A model that gives a word no chance, in an output bias."""
    model = AutoModelForCausalLM.from_pretrained(path)
    head = torch.nn.Linear(*reversed(model.lm_head.weight.shape))
    with torch.no_grad():
        head.weight.copy_(model.lm_head.weight)
        head.bias.zero_()
        head.bias[detect_pair.WORDS.index(word)] = -torch.inf
    model.lm_head = head
    return model.eval()


@pytest.mark.parametrize("role", ["student", "teacher"])
@pytest.mark.parametrize("changes", [{"score": "lens"}, {"strategy": "perplexity"}])
def test_a_token_without_a_finite_log_probability_takes_its_row(
    pair: dict[str, str], tmp_path: Path, role: str, changes: dict[str, str]
) -> None:
    models: dict[str, Any] = {
        name: AutoModelForCausalLM.from_pretrained(path) for name, path in pair.items()
    }
    models[role] = never_says(pair[role], "loud")
    options = {"select": "all", "validate": "none", "grade": "exact", "max_batch_tokens": 150}
    config = DetectConfig(
        output_dir=str(tmp_path / "run"),
        cache_dir=str(tmp_path / "cache"),
        **{**options, **changes},  # type: ignore[arg-type]
    )
    tokenizer = detect_pair.make_tokenizer()
    result = detect(config, dataset=ROWS, **models, processing_class=tokenizer)
    check_sums(result, len(ROWS))
    loud = sum("loud" in row["prompt"] for row in ROWS)
    # The control "perplexity" asks the student alone.
    asked = role == "student" or "score" in changes
    assert reasons(result).get(f"{role}_not_finite", 0) == (loud if asked else 0)
    assert 0 < loud < len(ROWS) and counts(result)[1] == len(ROWS)
    left = {line["row_id"] for line in table(result.outcomes) if line["reason"].endswith("finite")}
    assert all("loud" in ROWS[at]["prompt"] for at in left)


def turns(*contents: str) -> list[dict[str, str]]:
    roles = ["user", "assistant"] * len(contents)
    return [{"role": role, "content": text} for role, text in zip(roles, contents, strict=False)]


TALKS = [
    {"prompt": turns(f"tom has {digit} apples .", "7", f"the sticker says {word} .", "8", last)}
    | {"completion": digit, "answer": digit}
    for digit, word, last in zip(
        detect_pair.DIGITS[:6],
        detect_pair.NAMES[3:9],
        ["rain is loud .", "tom is loud .", "ann has apples ."] * 2,
        strict=True,
    )
]
SHORT = {**ROWS[0], "prompt": [{"role": "user", "content": ROWS[0]["prompt"]}]}


@pytest.fixture(scope="module")
def talked(pair: dict[str, str], root: Path) -> dict[str, DetectResult]:
    options = {"select": "all", "validate": "none", "threshold": 0.5}
    return {
        chosen: run(pair, root / "talks", [*TALKS, SHORT], turns=chosen, **options)
        for chosen in ("all", "last", "1,3", "-1", "2")
    }


@pytest.mark.parametrize(
    ("chosen", "places"),
    [("all", [0, 2, 4]), ("last", [4]), ("1,3", [0, 4]), ("-1", [4]), ("2", [2])],
)
def test_the_chosen_turns_are_analyzed(
    talked: dict[str, DetectResult], chosen: str, places: list[int]
) -> None:
    result = talked[chosen]
    check_sums(result, len(TALKS) + 1)
    hit: Counter[int] = Counter()
    for line in table(result.arm / "candidates.parquet"):
        if line["row_id"] == len(TALKS):
            continue
        before, after = TALKS[line["row_id"]]["prompt"], line["prompt"]
        by_turn: dict[int, list[dict[str, int]]] = {}
        for span in line["spans"]:
            by_turn.setdefault(span["message"], []).append(span)
        for place, (old, new) in enumerate(zip(before, after, strict=True)):
            text = str(old["content"])
            for span in reversed(by_turn.get(place, [])):
                text = text[: span["start"]] + text[span["stop"] :]
            assert text == new["content"] and old["role"] == new["role"]
        hit.update(by_turn.keys())
    assert hit and set(hit) <= set(places)
    assert chosen != "all" or len(hit) > 1
    for sample in table(result.samples)[: len(TALKS)]:
        prompt = TALKS[sample["row_id"]]["prompt"]
        assert sample["text"] == "".join(prompt[place]["content"] for place in places)


def test_minus_one_is_the_last_turn(talked: dict[str, DetectResult]) -> None:
    last, minus = (table(talked[name].dataset) for name in ("last", "-1"))
    assert [{**line, "provenance": None} for line in last] == [
        {**line, "provenance": None} for line in minus
    ]


def test_a_row_without_the_turn_leaves(
    pair: dict[str, str], root: Path, talked: dict[str, DetectResult]
) -> None:
    assert reasons(talked["2"]) == {"no_such_turn": 1}
    assert "no_such_turn" not in reasons(talked["1,3"])  # of which it has the first
    blank = {**TALKS[0], "prompt": turns("tom has 0 apples .", "7", " ", "8", "rain is loud .")}
    options = {"select": "all", "validate": "none", "turns": "2"}
    result = run(pair, root / "blank", [*TALKS, blank], **options)
    check_sums(result, len(TALKS) + 1)
    assert reasons(result)["no_such_turn"] == 1
