"""The dataset of `leaf detect` reads back as the rows, cuts and prompts that it was made of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from detected_rows import BRIEFER, FIRST, LAST, PROMPT, REPLY, SHORTER, detected, line, span, write

from leaf_distill.data.dataset import load_examples
from leaf_distill.data.example import Example
from leaf_distill.data.ranges import in_messages

ROW = {"prompt": "What is 2 + 2?", "completion": "4"}


def texts(example: Example) -> tuple[str, str, str]:
    return example.text, example.prefix, example.completion


@pytest.mark.parametrize("name", ["dataset.parquet", "dataset.jsonl", "run", "pandas"])
def test_our_own_dataset_reads_back(tmp_path: Path, name: str) -> None:
    lines = detected()
    (tmp_path / "run").mkdir()  # holds both, the same rows twice
    for folder in (tmp_path, tmp_path / "run"):
        write(folder, lines)
    table = pd.read_parquet(tmp_path / "dataset.parquet")
    source = table.to_dict("records") if name == "pandas" else tmp_path / name
    original, early, both, cross, response = examples = load_examples(source)
    assert [(e.row_id, e.candidate_id) for e in examples] == [(3, i) for i in range(-1, 4)]
    assert [e.branch for e in examples] == [one["branch"] for one in lines]
    assert [e.strategy for e in examples] == [None, *["span"] * 4]
    assert all(e.outcome is None and e.answer == "7" and not e.notes for e in examples)
    whole = FIRST["content"] + LAST["content"]
    assert original.text == cross.text == whole and original.cut == ()
    assert early.cut == cross.cut == ((17, 28),) and both.cut == ((17, 28), (36, 49))
    assert early.text == "Tom has 7 apples.How many, by the way, has Tom?"
    assert both.text == "Tom has 7 apples.How many has Tom?"
    assert cross.messages == tuple(PROMPT) and cross.teacher_messages == tuple(SHORTER)
    assert {e.teacher_messages for e in examples if e is not cross} == {None}
    assert texts(response) == ("Let me think.", "Let me think.", " Tom has 7.")
    assert response.cut == ((13, 24),) and response.segment == 1
    assert in_messages(original, both.cut) == lines[2]["spans"]


def test_a_cut_in_the_last_turn_alone_leaves_the_rest_out_of_the_text() -> None:
    briefer = line("counterfactual", 0, prompt=BRIEFER, spans=[span(3, 8, 21)])
    original, cut = load_examples([line(), briefer])
    assert original.turns == cut.turns == () and original.text == LAST["content"]
    assert cut.cut == ((8, 21),) and cut.text == "How many has Tom?"


def test_what_was_inserted_reads_back() -> None:
    replaced = [*PROMPT[:3], {**LAST, "content": "How many, by her way, has Tom?"}]
    columns = {"spans": [span(3, 13, 16)], "inserted": ["her"]}
    _, cut = load_examples([line(), line("counterfactual", 0, prompt=replaced, **columns)])
    assert (cut.cut, cut.inserted) == (((13, 16),), ("her",))


def test_an_insertion_reads_back() -> None:
    longer = [*PROMPT[:3], {**LAST, "content": "It rains. How many, by the way, has Tom?"}]
    columns = {"spans": [span(3, 0, 0)], "inserted": ["It rains. "]}
    _, cut = load_examples([line(), line("counterfactual", 0, prompt=longer, **columns)])
    assert (cut.cut, cut.inserted) == (((0, 0),), ("It rains. ",))


def test_the_dataset_says_which_rows_the_student_fails() -> None:
    verdicts = ["right", "wrong", "cut_off", None, np.nan]
    rows = [{**ROW, "branch": "original", "student_verdict": one} for one in verdicts]
    examples = load_examples(rows)
    assert [one.verdict for one in examples] == ["right", "wrong", "cut_off", None, None]
    assert [one.failed for one in examples] == [False, True, True, False, False]


def test_each_model_reads_its_own_prompt() -> None:
    _, early, _, cross, _ = load_examples(detected())
    assert early.as_read_by("teacher") is early and cross.as_read_by("student") is cross
    read = cross.as_read_by("teacher")
    assert read.messages == tuple(SHORTER) and read.completion == cross.completion
    assert read.notes is cross.notes


def test_candidates_that_were_not_accepted_are_left_out() -> None:
    lines = detected()
    lines[1] |= {"accepted": False, "reason": "student_wrong"}
    lines[2] |= {"accepted": np.bool_(False), "prompt": [{"role": "user", "content": " "}]}
    original, *candidates = load_examples(lines)
    left = [one.outcome for one in candidates]
    assert original.outcome is None and left[2:] == [None, None]
    assert [one and one.reason for one in left[:2]] == ["not_accepted"] * 2
    assert left[0] == ("rows", "not_accepted", "`leaf detect` says 'student_wrong'")


def test_further_keys_of_a_divided_completion_are_dropped_with_a_note() -> None:
    lines = detected()
    for one in lines:
        one["completion"][0]["reasoning_content"] = "Hm."
    examples = load_examples(lines)
    assert [one.reply is None for one in examples] == [False] * 4 + [True]
    assert [one.notes for one in examples] == [[]] * 4 + [["message_key_ignored"]]


def test_a_cut_whose_original_is_not_there_reads_as_a_row() -> None:
    (cut,) = load_examples([line("counterfactual", 0, prompt=SHORTER, spans=[span(1, 17, 28)])])
    assert (cut.row_id, cut.branch, cut.cut, cut.outcome) == (3, "counterfactual", (), None)


def test_max_rows_counts_originals() -> None:
    later = [{**one, "row_id": 5, "parent_id": one["parent_id"] and 5} for one in detected()]
    examples = load_examples([*detected(), *later], max_rows=1)
    assert [example.row_id for example in examples] == [3] * 5


def test_branches_as_people_hand_them_over() -> None:
    rows = [
        {"row_id": 7, "branch": "original", **ROW},
        {"row_id": 7, "branch": "counterfactual", **ROW},
        {"row_id": 9.0, "parent_id": 7.0, "branch": "counterfactual", **ROW},
        {"row_id": 8, "branch": None, **ROW},
        {"row_id": 8, "branch": "counterfactual", **ROW},
        {"row_id": 8, "branch": "cross", "teacher_prompt": "What 2 + 2?", **ROW},
    ]
    examples = load_examples(rows)
    numbers = [(e.row_id, e.candidate_id) for e in examples]
    assert numbers == [(7, -1), (7, 0), (7, 1), (8, -1), (8, 0), (8, 1)]
    assert examples[-1].teacher_messages == ({"role": "user", "content": "What 2 + 2?"},)
    assert len(load_examples(rows, max_rows=1)) == 3


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"row_id": "x"}, "row_id: must be a whole number of 64 bits, got 'x'"),
        ({"row_id": 2**70}, "row_id: must be a whole number of 64 bits"),
        ({"parent_id": 1.5}, "parent_id: must be a whole number of 64 bits, got 1.5"),
        ({"candidate_id": -(2**70)}, "candidate_id: must be a whole number of 64 bits"),
        ({"strategy": 5}, "strategy: must be the name of one, got 5"),
        ({"strategy": "\ud800"}, "strategy: must be the name of one"),
        ({"student_verdict": True}, "student_verdict: must be the name of one, got True"),
        ({"spans": [[5, 1]]}, "spans: must be a list of message, start and stop"),
        ({"spans": 4}, "spans: must be a list of message, start and stop"),
        ({"spans": [span(0, 0, 2**70)]}, r"spans: must be characters within the messages \[0\]"),
        ({"spans": [span(0, 6, 5)]}, "spans: must be characters within the messages"),
        ({"spans": [span(1, 0, 1)]}, "spans: must be characters within the messages"),
        ({"spans": [span(-1, 0, 1)]}, "spans: must be characters within the messages"),
        ({"inserted": "one"}, "inserted: must be a list of texts, got 'one'"),
        ({"inserted": [1]}, "inserted: must be a list of texts"),
        ({"context": 1}, "context: must be from 0 to below the 1 characters of the completion"),
        ({"context": -1}, "context: must be from 0 to below the 1 characters"),
        ({"context": "x"}, "context: must be a whole number"),
        ({"segment": -1}, "segment: must be at least 0, got -1"),
        ({"accepted": "no"}, "accepted: must be true or false, got 'no'"),
        ({"teacher_prompt": "Hi"}, "teacher_prompt: must be messages on rows of the branch cross"),
        ({"branch": "cross"}, "teacher_prompt: must be messages on rows of the branch cross"),
        ({"branch": "cross", "teacher_prompt": 5}, "teacher_prompt: must be text or messages"),
        ({"branch": "cross", "teacher_prompt": [REPLY]}, "teacher_prompt: must end with a user"),
        ({"branch": "cross", "teacher_prompt": "\ud800"}, "the text is not valid Unicode"),
    ],
)
def test_malformed_columns_beside_branch(wrong: dict[str, Any], sentence: str) -> None:
    rows = [{**ROW, "branch": "original"}, {**ROW, "branch": "counterfactual", "row_id": 0}]
    with pytest.raises(ValueError, match=f"^dataset: row 1: {sentence}"):
        load_examples([rows[0], {**rows[1], **wrong}])


def test_a_column_of_ones_own_called_branch() -> None:
    rows = [{**ROW, "branch": branch, "row_id": "a"} for branch in ("original", "main", 3, [1])]
    examples = load_examples(rows)
    assert [e.row_id for e in examples] == [0, 1, 2, 3]
    assert {e.branch for e in examples} == {"original"}
    assert len(load_examples(rows, max_rows=2)) == 2
