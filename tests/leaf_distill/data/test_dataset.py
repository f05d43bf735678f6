"""Rows from every layout and file kind, and clear words for what cannot be used."""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict

from leaf_distill.data.dataset import Row, load_rows

USER = {"role": "user", "content": "What is 2 + 2?"}
REPLY = {"role": "assistant", "content": "4"}
EXPECTED = Row(0, (USER,), "4", None)


def write(tmp_path, records):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "What is 2 + 2?", "completion": "4"},
        {"prompt": [USER], "completion": [REPLY]},
        {"messages": [USER, REPLY]},
        {"instruction": "What is 2 + 2?", "output": "4"},
        {"instruction": "What is 2 + 2?", "input": " ", "output": "4"},
        {"problem": "What is 2 + 2?", "solution": "4"},
        {"problem": "other", "solution": "other", "messages": [USER, REPLY]},
    ],
)
def test_layouts(tmp_path, record):
    assert load_rows(write(tmp_path, [record])) == ([EXPECTED], [])


def test_instruction_with_input(tmp_path):
    record = {"instruction": "Add.", "input": "2 and 2", "output": "4", "answer": 4}
    rows, _ = load_rows(write(tmp_path, [record]))
    assert rows == [Row(0, ({"role": "user", "content": "Add.\n\n2 and 2"},), "4", "4")]


def test_conversation_keeps_its_earlier_turns(tmp_path):
    turns = [
        {"role": "system", "content": "Be brief."},
        USER,
        REPLY,
        USER,
        {**REPLY, "content": "5"},
    ]
    rows, _ = load_rows(write(tmp_path, [{"messages": turns}]))
    assert rows[0].messages == tuple(turns[:4]) and rows[0].completion == "5"


@pytest.mark.parametrize(
    ("answer", "expected"),
    [("18", "18"), (18, "18"), (18.0, "18"), (0.5, "0.5"), (None, None), (" ", None), (" x ", "x")],
)
def test_answers(tmp_path, answer, expected):
    rows, _ = load_rows(write(tmp_path, [{"prompt": "p", "completion": "c", "answer": answer}]))
    assert rows[0].answer == expected


def test_column_mapping(tmp_path):
    source = write(tmp_path, [{"question": "What is 2 + 2?", "answer": "It is 4. #### 4"}])
    rows, _ = load_rows(source, columns={"prompt": "question", "completion": "answer"})
    assert rows == [Row(0, (USER,), "It is 4. #### 4", None)]  # a column that is used is no answer
    both = {"prompt": "question", "completion": "answer", "answer": "answer"}
    assert load_rows(source, columns=both)[0][0].answer == "It is 4. #### 4"


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"prompt": "p", "completion": " \n"}, "empty_completion"),
        ({"prompt": "p", "completion": None}, "empty_completion"),
        ({"prompt": "", "completion": "c"}, "empty_prompt"),
        ({"prompt": [], "completion": "c"}, "no_user_turn"),
        ({"prompt": [REPLY], "completion": "c"}, "no_user_turn"),
        ({"prompt": 3, "completion": "c"}, "not_text"),
        ({"prompt": [{"role": "user", "content": ["image"]}], "completion": "c"}, "not_text"),
        ({"prompt": "p", "completion": [REPLY, REPLY]}, "bad_completion"),
        ({"prompt": "p", "completion": [USER]}, "bad_completion"),
        ({"prompt": "p", "completion": "c", "answer": [1]}, "bad_answer"),
        ({"prompt": "half \ud83d pair", "completion": "c"}, "bad_unicode"),
        ({"completion": "c"}, "empty_prompt"),
    ],
)
def test_unusable_rows_are_rejections_with_their_number(tmp_path, record, reason):
    good = {"prompt": "p", "completion": "c"}
    rows, rejections = load_rows(write(tmp_path, [good, record, good]))
    assert [row.row_id for row in rows] == [0, 2]
    (left,) = rejections
    assert (left.row_id, left.candidate_id, left.stage, left.reason) == (1, -1, "rows", reason)
    assert left.detail


def test_no_assistant_turn_is_an_empty_completion(tmp_path):
    rows, rejections = load_rows(
        write(tmp_path, [{"messages": [USER]}, {"messages": [USER, REPLY]}])
    )
    assert len(rows) == 1 and rejections[0].reason == "empty_completion"


@pytest.mark.parametrize("prompt", ["prompt", "problem", "instruction"])
def test_an_answer_is_enough_where_no_completion_is_needed(tmp_path, prompt):
    source = write(tmp_path, [{prompt: "1 + 1?", "answer": 2}, {prompt: "2 + 2?", "answer": None}])
    rows, rejections = load_rows(source, need_completion=False)
    assert [(row.completion, row.answer) for row in rows] == [("", "2")]
    assert (rejections[0].row_id, rejections[0].reason) == (1, "empty_completion")
    with pytest.raises(ValueError, match="but LeaF needs prompt/completion"):
        load_rows(source)


def test_files_and_saved_datasets_agree(tmp_path):
    records = [{"prompt": f"p{i}", "completion": "c", "answer": i} for i in range(5)]
    (tmp_path / "rows.json").write_text(json.dumps(records))
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "rows.parquet")
    Dataset.from_list(records).save_to_disk(tmp_path / "one")
    DatasetDict({"test": Dataset.from_list(records)}).save_to_disk(tmp_path / "splits")
    expected = load_rows(write(tmp_path, records), max_rows=3)
    assert [row.messages[0]["content"] for row in expected[0]] == ["p0", "p1", "p2"]
    for name in ("rows.json", "rows.parquet", "one"):
        assert load_rows(str(tmp_path / name), max_rows=3) == expected
    assert load_rows(str(tmp_path / "splits"), split="test", max_rows=3) == expected
    with pytest.raises(ValueError, match=r"has no split 'train'; it has \['test'\]"):
        load_rows(str(tmp_path / "splits"))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("rows.jsonl", "", "has no rows"),
        ("rows.json", "[]", "has no rows"),
        ("rows.jsonl", '{"prompt": "p"}\n{"prompt"\n', "rows.jsonl, line 2 is not valid JSON"),
        ("rows.jsonl", "[1]\n", "line 1 must be a JSON object"),
        ("rows.json", '{"a": 1}', "must hold a JSON list of objects"),
        ("rows.json", "[", "rows.json is not valid JSON"),
        ("rows.parquet", "PAR1", "is not a readable Parquet file"),
        ("rows.csv", "a,b", "must end in .jsonl, .json, .parquet"),
        ("rows.jsonl", '{"question": "q", "reply": "r"}', r"columns \['question', 'reply'\], but"),
    ],
)
def test_unusable_files(tmp_path, name, text, message):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_rows(str(path))


def test_bad_arguments(tmp_path):
    source = write(tmp_path, [{"question": "q", "completion": "c"}])
    with pytest.raises(ValueError, match=r"'quest', given for 'prompt', is not a column of"):
        load_rows(source, columns={"prompt": "quest"})
    with pytest.raises(ValueError, match="'promt' is not a field; use one of"):
        load_rows(source, columns={"promt": "question"})
    with pytest.raises(ValueError, match="max_rows must be at least 1"):
        load_rows(source, max_rows=0)
    for missing in ("/nowhere/rows.jsonl", "rows.parquet", "./nowhere"):
        with pytest.raises(ValueError, match=f"'{missing}' does not exist"):
            load_rows(missing)
    with pytest.raises(ValueError, match="holds no dataset saved by"):
        load_rows(str(tmp_path))


def test_unreachable_hub_dataset_is_one_sentence(monkeypatch):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"'nobody/nothing' \(split 'train'\) is neither a file"):
        load_rows("nobody/nothing")
