"""Inserted distractors: another row's sentence, at a border, and every other character stays."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from detect_run import ROWS, check_sums, run, table
from hypothesis import given, settings
from hypothesis import strategies as st
from text_friends import texts

from leaf_distill.data.dataset import load_examples
from leaf_distill.data.example import Example
from leaf_distill.data.sentences import sentences
from leaf_distill.detection.config import DetectConfig
from leaf_distill.detection.counterfactual import changed, propose
from leaf_distill.detection.distractors import Distractors
from leaf_distill.evaluation.analyze import analyze
from leaf_distill.evaluation.config import AnalyzeConfig
from leaf_distill.report import write_report

TOM = "Tom has 7 apples. He eats 2. How many are left?"
OTHERS = ["The rain is loud. Why?", "Is it late? It costs $3.50.\nGive the price.", "Add 1 and 2."]
POOL = Distractors(OTHERS)


def row(*contents: str, row_id: int = 0) -> Example:
    messages = tuple({"role": "user", "content": content} for content in contents)
    turns = tuple(range(len(contents))) if contents[1:] else ()
    return Example(row_id, messages, "5", turns=turns)


def inserted(example: Example, seed: int = 0, pool: Distractors = POOL) -> Example:
    example.candidates, example.outcome = [], None
    config = DetectConfig(strategy="distractors", seed=seed)
    propose(example, config, distractors=pool)
    (candidate,) = example.candidates
    return candidate


def test_sentences_that_ask_something_are_no_distractors() -> None:
    assert POOL.sentences == ["It costs $3.50.", "The rain is loud."]


def test_every_border_up_to_the_last_sentence_is_a_place() -> None:
    found = {inserted(row(TOM), seed).text for seed in range(60)}
    places = (
        "{} Tom has 7 apples. He eats 2. How",
        "apples. {} He eats",
        "2. {} How many are left?",
    )
    expected = set()
    for sentence in POOL.sentences:
        for place in places:
            text = place.format(sentence)
            start, stop = place.split("{}")
            expected.add(
                TOM.replace((start + stop.lstrip()), text) if start else text + " many are left?"
            )
    assert found == expected


def test_the_last_sentence_of_a_turn_stays_last() -> None:
    talk = row("One is here. So?", "Two\n\nThree")
    found = [inserted(talk, seed).messages for seed in range(60)]
    contents = {tuple(turn["content"] for turn in messages) for messages in found}
    rain = {pair for pair in contents if "rain" in str(pair)}
    assert rain == {
        ("The rain is loud. One is here. So?", "Two\n\nThree"),
        ("One is here. The rain is loud. So?", "Two\n\nThree"),
        ("One is here. So?", "The rain is loud. Two\n\nThree"),
        ("One is here. So?", "Two\n\nThe rain is loud. Three"),
    }


@settings(deadline=None)
@given(texts, st.integers(0, 100))
def test_no_character_of_the_row_changes(text: str, seed: int) -> None:
    example = row(text)
    found = POOL.insert(example, random.Random(seed))
    if found is None:
        assert not text.strip() or all(one in text for one in POOL.sentences)
        return
    (start, stop), new = found
    assert start == stop and new.strip() in POOL.sentences and new.strip() not in text
    assert start in {0} | {at for at, _ in sentences(text)}
    assert text[start:].strip()  # never behind the end
    assert changed(example, ((start, stop),), (new,)).text == text[:start] + new + text[start:]


def test_the_draw_depends_on_seed_and_row_only() -> None:
    first = [inserted(row(TOM, row_id=at)).text for at in range(8)]
    again = [inserted(row(TOM, row_id=at)).text for at in reversed(range(8))]
    assert again[::-1] == first and len(set(first)) > 1
    assert [inserted(row(TOM, row_id=at), 1).text for at in range(8)] != first


def test_a_row_that_no_sentence_is_left_for_leaves() -> None:
    example = row("The rain is loud. Why?")
    propose(
        example,
        DetectConfig(strategy="distractors"),
        distractors=Distractors(["The rain is loud. So?"]),
    )
    assert example.outcome is not None and example.outcome.reason == "no_distractor"


@pytest.mark.parametrize(
    "setting", [{"level": "both"}, {"edit": "substitute"}, {"cross_branch": True}]
)
def test_settings_that_do_not_go_with_an_insertion(setting: dict[str, object]) -> None:
    (name,) = setting
    with pytest.raises(ValueError, match=f"^{name}: must be .* with strategy distractors"):
        DetectConfig(strategy="distractors", **setting)  # type: ignore[arg-type]


def test_every_row_gets_one_and_everything_reads_it(pair: dict[str, str], tmp_path: Path) -> None:
    result = run(pair, tmp_path, strategy="distractors", select="all", validate="none")
    assert result.arm.name == "distractors-threshold-0.15-select-all-validate-none"
    check_sums(result, len(ROWS))
    lines = [line for line in table(result.dataset) if line["branch"] == "counterfactual"]
    assert [line["row_id"] for line in lines] == list(range(len(ROWS)))
    for line in lines:
        before, (one,), (new,) = ROWS[line["row_id"]], line["spans"], line["inserted"]
        text, at = before["prompt"], one["start"]
        assert one["stop"] == at and new.strip() not in text
        assert line["prompt"][0]["content"] == text[:at] + new + text[at:]
        assert any(new.strip() in other["prompt"] for other in ROWS)
        assert line["completion"][0]["content"] == line["answer"] == before["answer"]
        assert line["score"] is None and line["student_verdict"] is None
    made = {one.row_id: one for one in load_examples(result.dataset) if one.cut}
    (candidate,) = table(result.samples)[0]["candidates"]
    assert len(made) == len(lines) and candidate["cut"] == [list(made[0].cut[0])]
    page = write_report(result.arm).read_text()
    assert "A control: inserted distractors" in page and f"<ins>{made[0].inserted[0]}</ins>" in page
    assert "sentences of other prompts are inserted in the prompt" in page
    analyze(AnalyzeConfig(run_dir=str(result.arm)))
    assert json.loads((result.arm / "funnel.json").read_text())["notes"] == {}
