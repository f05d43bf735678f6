"""The strategy "search" on the tiny pair: which phrases it cuts, and in which order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import detect_pair
import numpy as np
import pytest
import torch
from detect_run import ROWS, check_sums, reasons, run, settings, table
from transformers import AutoModelForCausalLM, PreTrainedModel

from leaf_distill.data.dataset import load_examples
from leaf_distill.detection import scores, search
from leaf_distill.detection.config import DetectConfig
from leaf_distill.detection.counterfactual import changed, tidied
from leaf_distill.detection.pipeline import detect
from leaf_distill.detection.sweep import sweep_arm
from leaf_distill.detection.swept_arm import read_settings
from leaf_distill.detection.units import phrases

MISLED = [row for row in ROWS if detect_pair.misled(row)]
TOKENIZER = detect_pair.make_tokenizer()
TWICE = [
    {**row, "prompt": f"{row['prompt']} the sticker says {name} ."}
    for row, name in zip(ROWS, 3 * detect_pair.NAMES, strict=False)
]
"""Problems with two misleading sentences, or with one."""


def models(pair: dict[str, str]) -> dict[str, PreTrainedModel]:
    return {role: AutoModelForCausalLM.from_pretrained(path).eval() for role, path in pair.items()}


def ids_of(prompt: str) -> torch.Tensor:
    ids: torch.Tensor = TOKENIZER(f"<user> {prompt} <assistant>", return_tensors="pt")["input_ids"]
    return ids


def loss(model: PreTrainedModel, prompt: str, label: str) -> float:
    begun = ids_of(prompt)
    labels = TOKENIZER(f"{label} <eos>", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        logits = model(input_ids=torch.cat([begun, labels], dim=1)).logits[0]
    behind = logits[begun.shape[1] - 1 : -1].double()
    return float(torch.nn.functional.cross_entropy(behind, labels[0]))


def is_right(model: PreTrainedModel, prompt: str, label: str) -> bool:
    begun = ids_of(prompt)
    with torch.no_grad():
        ids = model.generate(begun, max_new_tokens=4, do_sample=False)
    answer = TOKENIZER.decode(ids[0, begun.shape[1] :], skip_special_tokens=True)
    return bool(answer.strip() == label)


def expected(
    loaded: dict[str, PreTrainedModel], row: dict[str, str], max_cuts: int
) -> tuple[list[str], float]:
    """The prompts that the definition cuts, one after another, and the closest decision."""
    (example,) = load_examples([row])
    text, label = row["prompt"], row["answer"]
    left, cut, found, closest = list(phrases(text, example.parts)), [], [], np.inf
    now = loss(loaded["student"], text, label)
    for _ in range(max_cuts):
        trials = []
        for one in left:
            shorter = changed(example, tidied(example, sorted([*cut, one]))).text
            if shorter.strip():
                trials.append((loss(loaded["student"], shorter, label), one, shorter))
        losses = sorted([now, *(value for value, *_ in trials)])
        closest = min(closest, *np.diff(losses).tolist())
        better = [
            trial
            for trial in sorted(trials)
            if trial[0] < now and is_right(loaded["teacher"], trial[2], label)
        ]
        if not better:
            break
        now, one, shorter = better[0]
        cut.append(one)
        left.remove(one)
        found.append(shorter)
        if is_right(loaded["student"], shorter, label):
            break
    return found, closest


@pytest.mark.parametrize("max_cuts", [1, 3])
def test_cuts_are_those_of_the_definition(
    pair: dict[str, str], tmp_path: Path, max_cuts: int
) -> None:
    result = run(pair, tmp_path, TWICE, strategy="search", max_cuts=max_cuts)
    check_sums(result, len(TWICE))
    samples = table(result.samples)
    loaded, lengths, clear = models(pair), [], 0
    for sample in samples:
        row = TWICE[sample["row_id"]]
        prompts, closest = expected(loaded, row, max_cuts)
        if closest < 1e-5:  # rounding may decide
            continue
        clear += 1
        found = [cut_text(sample["text"], one["cut"]) for one in sample["candidates"]]
        assert found == prompts
        lengths.append(len(found))
        kept = [one["kept"] for one in sample["candidates"]]
        assert not any(kept[:-1])
    assert clear >= 0.8 * len(samples) and max(lengths) == min(max_cuts, 2)


def cut_text(text: str, cut: list[list[int]]) -> str:
    for start, stop in reversed(cut):
        text = text[:start] + text[stop:]
    return text


def test_the_misleading_sentence_is_cut(pair: dict[str, str], tmp_path: Path) -> None:
    result = run(pair, tmp_path, MISLED, strategy="search")
    kept = [line for line in table(result.dataset) if line["branch"] == "counterfactual"]
    assert len(kept) >= 0.8 * len(MISLED)
    for line in kept:
        assert not set(line["prompt"][0]["content"].split()) & set(detect_pair.NAMES)
        assert line["strategy"] == "search" and line["score"] is not None


def test_a_second_run_asks_no_model(
    pair: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run(pair, tmp_path, TWICE, strategy="search")
    content = first.dataset.read_bytes(), first.outcomes.read_bytes()

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("a model was asked")

    monkeypatch.setitem(scores.MEASURES, "nll", ("trial", refuse))
    again = run(pair, tmp_path, TWICE, strategy="search")
    assert (again.dataset.read_bytes(), again.outcomes.read_bytes()) == content
    assert again.funnel["search"] == first.funnel["search"]


def test_fewer_phrases_are_tried_with_a_shortlist(pair: dict[str, str], tmp_path: Path) -> None:
    tried: list[int] = []
    name, compute = scores.MEASURES["nll"]

    def count(model: Any, rendering: Any, prompts: Any, **options: Any) -> Any:
        tried.append(len(prompts))
        return compute(model, rendering, prompts, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(scores.MEASURES, "nll", (name, count))
        result = run(pair, tmp_path, MISLED, strategy="search", shortlist=1, max_cuts=1)
    marked = len(table(result.samples))
    assert tried == [2] * marked and marked  # the whole prompt beside the cut one
    asked = result.funnel["search"]
    cut = sum(bool(one["candidates"]) for one in table(result.samples))
    assert asked["student_losses"] == sum(tried) and asked["student_answers"] == cut
    assert cut <= asked["teacher_answers"] <= marked


def test_a_sweep_repeats_the_search_from_the_cache(pair: dict[str, str], tmp_path: Path) -> None:
    result = run(pair, tmp_path, MISLED, strategy="search")
    grid = {"score": ["gap"], "rule": ["absolute"], "strategy": ["search"], "widen": ["word"]}
    own = read_settings(result.arm)
    swept = sweep_arm(result.arm, own, [0.1, 0.3], grid)
    (cell,) = swept.cells  # thresholds do not matter
    assert not swept.missing
    assert cell.overlap == 1 and cell.complete and cell.kept == cell.hit > 0


def test_a_sweep_goes_on_where_a_strategy_does_not_fit_the_arm(
    pair: dict[str, str], tmp_path: Path
) -> None:
    result = run(pair, tmp_path, MISLED, validate="none")
    grid = {"score": ["gap"], "rule": ["absolute"], "widen": ["word"]}
    strategies = {"strategy": ["span", "search"]}
    swept = sweep_arm(result.arm, read_settings(result.arm), [0.3], {**grid, **strategies})
    assert [cell.setting.strategy for cell in swept.cells] == ["span", "span"]
    (sentence,) = swept.missing
    assert sentence.startswith("search was not tried: validate: must be both or teacher")


def test_rows_without_a_helpful_cut_say_so(pair: dict[str, str], tmp_path: Path) -> None:
    changes = {"strategy": "search", "select": "all", "validate": "teacher"}
    result = detect(DetectConfig(**settings(pair, tmp_path, ROWS, **changes)))
    plain = sum(not detect_pair.misled(row) for row in ROWS)
    left = reasons(result)
    assert 0 < left["no_helpful_cut"] <= plain + 2


def test_rows_that_the_teacher_never_solves_say_so(pair: dict[str, str], tmp_path: Path) -> None:
    rows = [{**row, "answer": "none"} for row in MISLED]
    changes = {"strategy": "search", "select": "all", "validate": "teacher"}
    result = detect(DetectConfig(**settings(pair, tmp_path, rows, **changes)))
    left, asked = reasons(result), result.funnel["search"]
    assert left["teacher_wrong"] >= 0.8 * len(rows) and "no_valid_cut" not in left
    assert asked["teacher_answers"] >= left["teacher_wrong"] and asked["student_answers"] == 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_in_16_bits_a_cut_must_help_by_more_than_rounding(
    pair: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    monkeypatch.setattr(search, "ROUNDING", 1.0)  # then no loss is low enough
    result = run(pair, tmp_path, MISLED, strategy="search", dtype=dtype)
    marked = len(table(result.samples))
    helpless = reasons(result).get("no_helpful_cut", 0)
    assert marked and helpless == (marked if dtype == "bfloat16" else 0)
