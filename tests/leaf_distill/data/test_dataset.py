"""Rows of every layout and file kind, and clear words for what cannot be used."""

from __future__ import annotations

import gzip
import json
import re
import subprocess
import sys
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict, Features, Image, Value

from leaf_distill.data.dataset import load_examples
from leaf_distill.data.example import Example

USER = {"role": "user", "content": "What is 2 + 2?"}
REPLY = {"role": "assistant", "content": "4"}
SYSTEM = {"role": "system", "content": "Be brief."}
ROW = {"prompt": "What is 2 + 2?", "completion": "4"}
SHAREGPT = [{"from": "human", "value": "What is 2 + 2?"}, {"from": "gpt", "value": "4"}]
PARTS = [{"type": "text", "text": "What is "}, {"type": "text", "text": "2 + 2?", "image": None}]
IMAGE = {"role": "user", "content": [{"type": "image"}]}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


def write(tmp_path: Path, records: list[Any], name: str = "rows.jsonl") -> str:
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def facts(example: Example) -> tuple[Any, ...]:
    """Return the content of a row, or the reason why it left."""
    if example.outcome is not None:
        return example.row_id, example.outcome
    return example.row_id, example.messages, example.completion, example.answer


def one(record: Any, **options: Any) -> Example:
    (example,) = load_examples([record], **options)
    assert example.outcome is None, example.outcome
    return example


def reasons(records: list[Any], **options: Any) -> list[str | None]:
    examples = load_examples(records, **options)
    assert [example.row_id for example in examples] == list(range(len(records)))
    left = [example.outcome for example in examples]
    assert all(one is None or (one.stage == "rows" and one.detail) for one in left)
    return [one.reason if one else None for one in left]


@pytest.mark.parametrize(
    "record",
    [
        ROW,
        {"prompt": [USER], "completion": [REPLY]},
        {"messages": [USER, REPLY]},
        {"instruction": "What is 2 + 2?", "output": "4"},
        {"instruction": "What is 2 + 2?", "input": " ", "output": "4"},
        {"problem": "What is 2 + 2?", "solution": "4"},
        {"question": "What is 2 + 2?", "solution": "4"},
        {"question": "What is 2 + 2?", "solution": ["4"]},
        {"problem": "other", "solution": "other", "messages": [USER, REPLY]},
        {"messages": json.dumps([USER, REPLY])},
        {"prompt": json.dumps([USER]), "completion": json.dumps([REPLY])},
        {"messages": [{**USER, "name": None, "tool_calls": None}, REPLY]},
        {"conversations": SHAREGPT},
        {"conversations": [USER, REPLY]},
        {"prompt": [{"role": "user", "content": PARTS}], "completion": "4"},
    ],
)  # fmt: skip
def test_layouts(tmp_path: Path, record: Any) -> None:
    for source in (write(tmp_path, [record]), [record]):
        (example,) = load_examples(source)
        assert facts(example) == (0, (USER,), "4", None)
        assert (example.reply, example.template_kwargs, example.notes) == (None, {}, [])
        assert (example.branch, example.cut, example.strategy) == ("original", (), None)


def test_the_layout_is_read_per_row(tmp_path: Path) -> None:
    records = [ROW, {"messages": [USER, REPLY]}, {"title": "x", "body": "y"}, {"completion": "c"}]
    examples = load_examples(write(tmp_path, records))
    assert [facts(example)[1:3] for example in examples[:2]] == [((USER,), "4")] * 2
    assert examples[2].outcome == (
        "rows",
        "no_layout",
        "no known layout has the columns ['title', 'body']",
    )
    assert examples[3].outcome is not None and examples[3].outcome.reason == "no_layout"
    table = pa.Table.from_pylist([{**ROW, "messages": None}, {"messages": [USER, REPLY]}])
    pq.write_table(table, tmp_path / "rows.parquet")  # every row has all columns
    assert reasons(table.to_pylist()) == [None, None]
    assert [e.completion for e in load_examples(str(tmp_path / "rows.parquet"))] == ["4", "4"]


def test_instruction_with_input_system_and_history() -> None:
    record = {
        "instruction": "Add.",
        "input": "2 and 2",
        "output": "4",
        "answer": 4,
        "system": "Be brief.",
        "history": [["Hi", "Hello"]],
    }
    assert facts(one(record)) == (
        0,
        (
            SYSTEM,
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Hello"},
            {"role": "user", "content": "Add.\n\n2 and 2"},
        ),
        "4",
        "4",
    )
    assert one({**ROW, "history": "[]", "system": ""}).messages == (USER,)
    assert reasons([ROW, {**ROW, "history": [["Hi"]]}]) == [None, "bad_history"]


def test_a_system_turn_of_the_messages_wins_over_the_column() -> None:
    record = {"messages": [{**SYSTEM, "content": "Be long."}, USER, REPLY], "system": "Be brief."}
    example = one(record)
    assert example.messages[0]["content"] == "Be long." and len(example.messages) == 2
    assert example.notes == ["system_column_dropped"]
    assert one({**record, "system": "Be long."}).notes == []
    turns = one({**record, "history": [["a", "b"]]}).messages
    assert [turn["role"] for turn in turns] == ["system", "user", "assistant", "user"]


def test_question_and_answer_as_in_gsm8k() -> None:
    worked = {"question": "What is 2 + 2?", "answer": "It is <<2+2=4>>4.\n#### 4"}
    assert facts(one(worked)) == (0, (USER,), worked["answer"], "4")
    assert one(worked, need_completion=False).completion == worked["answer"]
    bare = {"question": "What is 2 + 2?", "answer": "4"}
    assert facts(one(bare, need_completion=False)) == (0, (USER,), "", "4")
    assert facts(one({**bare, "solution": "Count."})) == (0, (USER,), "Count.", "4")
    assert reasons([worked, bare]) == [None, "no_completion"]
    with pytest.raises(ValueError, match="map yours with --columns"):
        load_examples([bare])


def test_conversation_keeps_its_earlier_turns() -> None:
    turns = [SYSTEM, USER, REPLY, USER, {**REPLY, "content": "5"}]
    example = one({"messages": turns})
    assert example.messages == tuple(turns[:4]) and example.completion == "5"


def test_turns_after_the_last_assistant_are_noted() -> None:
    turns = [USER, REPLY, {"role": "user", "content": "Thanks."}]
    example = one({"messages": turns})
    assert (example.messages, example.completion) == ((USER,), "4")
    assert example.notes == ["later_turns_dropped"]
    asked = one({"messages": turns, "answer": "-"}, need_completion=False)
    assert (asked.messages, asked.completion, asked.notes) == (tuple(turns), "", [])


def test_keys_of_messages_are_kept() -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": None}}}
    turns = [
        {**USER, "name": "tom"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "4"},
        USER,
        {**REPLY, "reasoning_content": "easy", "thinking": None},
    ]
    example = one({"messages": turns, "tools": [TOOL], "chat_template_kwargs": {"fast": True}})
    assert example.messages[0]["name"] == "tom"
    call["function"]["arguments"].pop("b")  # type: ignore[attr-defined]
    assert example.messages[1] == {"role": "assistant", "content": "", "tool_calls": [call]}
    assert example.reply == {**REPLY, "reasoning_content": "easy"}
    assert example.template_kwargs == {"tools": [TOOL], "fast": True}
    text = one({**ROW, "tools": json.dumps([TOOL]), "chat_template_kwargs": '{"fast": false}'})
    assert text.template_kwargs == {"tools": [TOOL], "fast": False}
    assert one({**ROW, "tools": None, "chat_template_kwargs": ""}).template_kwargs == {}
    assert reasons([ROW, {**ROW, "tools": "add"}, {**ROW, "chat_template_kwargs": [1]}]) == [
        None,
        "bad_tools",
        "bad_chat_template_kwargs",
    ]


def test_sharegpt_roles() -> None:
    turns = [
        {"from": "system", "value": "Be brief."},
        {"from": "human", "value": "What is 2 + 2?"},
        {"from": "gpt", "value": "4", "weight": 1},
    ]
    example = one({"conversations": turns})
    assert (example.messages, example.completion) == ((SYSTEM, USER), "4")
    assert example.reply == {**REPLY, "weight": 1}
    odd = {"conversations": [{"from": "narrator", "value": "x"}]}
    assert reasons([ROW, odd]) == [None, "unknown_role"]


NAN = float("nan")


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("18", "18"), (18, "18"), (18.0, "18"), (0.5, "0.5"), (None, None), (" ", None),
        (" x ", "x"), (NAN, None), ("None", "None"), ("nan", "nan"), (["3/4"], "3/4"), ([], None),
        ([NAN], None), ([7.0], "7"), (True, "True"), (Decimal("18.0"), "18"), ("18.0", "18.0"),
        (Decimal("0.50"), "0.50"), (Decimal("NaN"), None),
    ],
)  # fmt: skip
def test_answers(answer: Any, expected: str | None) -> None:
    assert one({**ROW, "answer": answer}).answer == expected


def test_a_missing_number_in_a_column_of_numbers(tmp_path: Path) -> None:
    table = pa.table({"prompt": ["p", "q"], "completion": ["c", "c"], "answer": [18.0, NAN]})
    pq.write_table(table, tmp_path / "rows.parquet")
    examples = load_examples(tmp_path / "rows.parquet")
    assert [example.answer for example in examples] == ["18", None]
    assert [example.gold for example in examples] == ["18", "c"]


def test_column_mapping(tmp_path: Path) -> None:
    source = write(tmp_path, [{"question": "What is 2 + 2?", "answer": "It is 4. #### 4"}])
    columns = {"prompt": "question", "completion": "answer"}
    (example,) = load_examples(source, columns=columns)
    assert facts(example) == (0, (USER,), "It is 4. #### 4", None)  # a used column is no answer
    (example,) = load_examples(source, columns={**columns, "answer": "answer"})
    assert example.answer == "It is 4. #### 4"


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"prompt": "p", "completion": " \n"}, "empty_completion"),
        ({"prompt": "p", "completion": None}, "empty_completion"),
        ({"prompt": "p", "completion": NAN}, "empty_completion"),
        ({"prompt": "", "completion": "c"}, "empty_prompt"),
        ({"prompt": None, "completion": "c"}, "empty_prompt"),
        ({"prompt": [], "completion": "c"}, "no_user_turn"),
        ({"prompt": [REPLY], "completion": "c"}, "no_user_turn"),
        ({"prompt": 3, "completion": "c"}, "not_text"),
        ({"prompt": {"role": "user"}, "completion": "c"}, "not_text"),
        ({"prompt": [USER, None], "completion": "c"}, "not_text"),
        ({"prompt": [{"role": "user", "content": ["image"]}], "completion": "c"}, "not_text"),
        ({"prompt": [IMAGE], "completion": "c"}, "not_text"),
        ({"prompt": "p", "completion": "c", "system": 3}, "not_text"),
        ({"prompt": "p", "completion": [REPLY, REPLY]}, "bad_completion"),
        ({"prompt": "p", "completion": [USER]}, "bad_completion"),
        ({"prompt": "p", "completion": "c", "answer": [1, 2]}, "bad_answer"),
        ({"prompt": "p", "completion": "c", "answer": {}}, "bad_answer"),
        ({"prompt": "p", "completion": "c", "answer": float("inf")}, "bad_answer"),
        ({"prompt": "half \ud83d pair", "completion": "c"}, "bad_unicode"),
        ({"prompt": "p", "completion": "c", "tools": [{"half": "\ud83d"}]}, "bad_unicode"),
        ({"messages": [USER]}, "empty_completion"),
        ({"completion": "c"}, "no_layout"),
        ({}, "no_layout"),
    ],
)  # fmt: skip
def test_unusable_rows_stay_in_their_place(record: Any, reason: str) -> None:
    assert reasons([ROW, record, ROW]) == [None, reason, None]


def test_a_row_that_nests_too_deeply_leaves() -> None:
    value: Any = "x"
    for _ in range(2000):
        value = [value]
    assert reasons([ROW, {**ROW, "tools": value}]) == [None, "too_deep"]


@pytest.mark.parametrize("prompt", ["prompt", "problem", "instruction", "question"])
def test_an_answer_is_enough_where_no_completion_is_needed(tmp_path: Path, prompt: str) -> None:
    source = write(tmp_path, [{prompt: "1 + 1?", "answer": 2}, {prompt: "2 + 2?", "answer": None}])
    good, bad = load_examples(source, need_completion=False)
    assert (good.completion, good.answer) == ("", "2")
    assert bad.outcome is not None and bad.outcome.reason == "empty_completion"
    with pytest.raises(ValueError, match=r"must have columns of .* prompt/completion"):
        load_examples(source)
    with pytest.raises(ValueError, match=r"must have columns of .*an answer may stand"):
        load_examples([{prompt: "1 + 1?", "title": "x"}], need_completion=False)


@pytest.mark.parametrize(
    ("row", "proposed"),
    [
        ({"Q": "What is it?", "reply": "4"}, {"prompt": "Q", "completion": "reply"}),
        (
            {"id": "a-1", "n": 3, "task": "What is it?", "said": "4"},
            {"prompt": "task", "completion": "said"},
        ),
        ({"id": "a-1", "question": "What?", "reply": "4"}, {"prompt": "question"}),
        ({"answer": "4", "task": "What is it?"}, {"prompt": "task", "completion": "answer"}),
        ({"problem": ["a"], "note": "n"}, {"prompt": "problem", "completion": "note"}),
        ({"question": "What?", "answer": 7}, {"prompt": "question", "answer": "answer"}),
        (
            {"nr": "1", "exercise": "What is it?", "working": "2 + 2 = 4", "result": "4"},
            {"prompt": "exercise", "completion": "working", "answer": "result"},
        ),
        (
            {"task": "What is it?", "result": 4, "reply": "It is 4."},
            {"prompt": "task", "completion": "reply", "answer": "result"},
        ),
    ],
)
def test_a_mapping_is_proposed_with_the_columns_that_are_there(
    row: dict[str, Any], proposed: dict[str, str]
) -> None:
    with pytest.raises(ValueError, match="map yours with --columns") as caught:
        load_examples([row])
    found = json.loads(re.findall("'([{].*?})'", str(caught.value))[0])
    assert found.items() >= proposed.items() and set(found.values()) <= set(row)
    assert len(set(found.values())) == len(found)
    assert str(caught.value).index("map yours") < str(caught.value).index("instruction/output")


@pytest.mark.parametrize(
    ("row", "proposed"),
    [
        (
            {"nr": "1", "exercise": "What is it?", "working": "2 + 2 = 4", "result": "4"},
            {"prompt": "exercise", "completion": "working", "answer": "result"},
        ),
        (
            {"nr": "1", "exercise": "What is it?", "said": "4"},
            {"prompt": "exercise", "answer": "said"},
        ),
        ({"task": "What is it?", "worked": "It is 4."}, {"prompt": "task", "answer": "worked"}),
    ],
)
def test_a_mapping_without_a_completion_has_the_short_column_as_its_answer(
    row: dict[str, Any], proposed: dict[str, str]
) -> None:
    with pytest.raises(ValueError, match="map yours with --columns") as caught:
        load_examples([row], need_completion=False)
    found = json.loads(re.findall("'([{].*?})'", str(caught.value))[0])
    assert found == proposed
    assert load_examples([row], columns=found, need_completion=False)[0].outcome is None


def test_what_makes_an_answer_a_completion_is_said() -> None:
    worked, bare = (
        {"question": "1 + 1?", "answer": "It is 2.\n#### 2"},
        {"question": "?", "answer": "2"},
    )
    good, bad = load_examples([worked, bare])
    assert good.outcome is None and bad.outcome is not None
    assert bad.outcome.reason == "no_completion" and "ends in '#### 33'" in str(bad.outcome.detail)
    with pytest.raises(ValueError, match=r"question/answer \(an answer .* ends in '#### 33'\)"):
        load_examples([bare])


# -- sources ---------------------------------------------------------------------------------------


def test_all_sources_give_the_same_rows(tmp_path: Path) -> None:
    records = [{"prompt": f"p{i}", "completion": "c", "answer": i} for i in range(5)]
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (tmp_path / "list.json").write_text(json.dumps(records, indent=1))
    (tmp_path / "lines.json").write_text(lines)
    (tmp_path / "bom.jsonl").write_bytes(b"\xef\xbb\xbf" + lines.replace("\n", "\r\n").encode())
    (tmp_path / "list.jsonl").write_text(json.dumps(records))
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "rows.JSON.GZ").write_bytes(gzip.compress(json.dumps(records).encode()))
    cells = "".join(f"p{i},c,{i}\n" for i in range(5))
    (tmp_path / "rows.csv").write_bytes(f"\ufeffprompt,completion,answer\n{cells}".encode())
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "ROWS.PARQUET")
    for part in (0, 1):
        (tmp_path / "parts").mkdir(exist_ok=True)
        table = pa.Table.from_pylist([records[:2], records[2:]][part])
        pq.write_table(table, tmp_path / f"parts/{part:05d}.parquet")
    (tmp_path / "parts/README.md").write_text("two parts")
    (tmp_path / "parts/info.json").write_text("{}")
    dataset = Dataset.from_list(records)
    dataset.save_to_disk(tmp_path / "one")
    DatasetDict({"train": dataset}).save_to_disk(tmp_path / "splits")
    expected = [facts(example) for example in load_examples(write(tmp_path, records), max_rows=3)]
    assert [row[3] for row in expected] == ["0", "1", "2"]
    names = (
        "list.json lines.json bom.jsonl list.jsonl rows.jsonl.gz rows.JSON.GZ rows.csv ROWS.PARQUET"
        " parts parts/*.parquet one splits"
    )
    sources = [*(str(tmp_path / name) for name in names.split()), tmp_path / "rows.jsonl"]
    sources += [records, tuple(records), dataset, DatasetDict({"train": dataset})]
    sources += [dataset.with_format("torch"), dataset.to_iterable_dataset()]
    for source in sources:
        assert [facts(e) for e in load_examples(source, max_rows=3)] == expected, source
        assert len(load_examples(source)) == 5, source
    for source in (str(tmp_path / "splits"), DatasetDict({"train": dataset})):
        with pytest.raises(ValueError, match=r"the split 'test', got \['train'\]"):
            load_examples(source, split="test")


def test_a_column_that_nobody_reads_is_not_decoded() -> None:
    broken = {"bytes": b"no image", "path": None}
    features = Features(
        {"prompt": Value("string"), "completion": Value("string"), "image": Image()}
    )
    dataset = Dataset.from_list([{**ROW, "image": broken}], features=features)
    assert [facts(e)[1:] for e in load_examples(dataset)] == [((USER,), "4", None)]


def test_a_directory_of_splits_gives_the_one_asked_for(tmp_path: Path) -> None:
    write(tmp_path, [{**ROW, "answer": "of train"}], "set/train.jsonl")
    write(tmp_path, [{**ROW, "answer": "of test"}], "set/data/test-00000.jsonl")
    for split in ("train", "test"):
        assert [e.answer for e in load_examples(tmp_path / "set", split=split)] == [f"of {split}"]
    with pytest.raises(ValueError, match="must have files of the split 'validation', got"):
        load_examples(tmp_path / "set", split="validation")


def test_datasets_is_not_imported_for_local_files(tmp_path: Path) -> None:
    source = write(tmp_path, [ROW])
    code = (
        "import sys; from leaf_distill.data.dataset import load_examples; "
        f"assert len(load_examples({source!r})) == 1; print('datasets' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout == "False\n", run.stderr


def test_text_that_is_no_utf8_in_parquet(tmp_path: Path) -> None:
    offsets = pa.array([0, 3], pa.int32()).buffers()[1]
    text = pa.StringArray.from_buffers(1, offsets, pa.py_buffer(b"a\xffb"))
    pq.write_table(pa.table({"prompt": text, "completion": ["x"]}), tmp_path / "rows.parquet")
    with pytest.raises(ValueError, match=r"rows\.parquet: must be a Parquet file, got 'utf-8'"):
        load_examples(tmp_path / "rows.parquet")


def test_two_csv_columns_of_one_name(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("prompt,prompt,completion\na,b,c\n")
    with pytest.raises(ValueError, match=r"another name for each column, got \['prompt'\]"):
        load_examples(tmp_path / "rows.csv")


# -- bad input -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("rows.jsonl", b"", "rows.jsonl: must have at least one row, got none"),
        ("rows.json", b"[]", "must have at least one row"),
        ("rows.csv", b"prompt,completion\n", "must have at least one row"),
        ("rows.jsonl", b'{"prompt": "p"}\n{"prompt"\n', r"rows.jsonl, line 2: must be valid JSON"),
        ("rows.jsonl", b'{"prompt": "p"}\n\n3\n', "line 3: must be a JSON object, .* got 3"),
        ("rows.jsonl", b"[1]\n", "item 0: must be a JSON object"),
        ("rows.json", b'{\n "prompt": "p"}', "line 1: must be valid JSON"),
        ("rows.json", b"[", "rows.json: must be valid JSON"),
        ("rows.jsonl", b'{}\n\n{"a":\n', "JSON, got Expecting value at column 6;"),
        ("rows.json", b'\n[{},\n\n{"a": }]', "got Expecting value at line 4, column 7;"),
        ("rows.jsonl", b'{"prompt": "\xff"}', "line 1: must be UTF-8 text"),
        ("rows.json", b"\xff\xfe[\x00]\x00", "line 1: must be UTF-8 text"),
        ("rows.jsonl", b'{"a": ' + b"[" * 100_000, "line 1: must be valid JSON"),
        ("rows.jsonl", b'{"a": ' + b"9" * 5000 + b"}", "line 1: must be valid JSON"),
        ("rows.jsonl.gz", b"no gzip", "rows.jsonl.gz: must be a readable file"),
        ("rows.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 99, mtime=0)[:-9], "must be a readable"),
        ("rows.parquet", b"PAR1", "rows.parquet: must be a Parquet file"),
        ("rows.csv", b"prompt,completion\na,b,c\n", "line 2: must have 2 cells"),
        ("rows.csv", b"prompt;completion\na;b\n", "commas between cells, got ';' in its header"),
        ("rows.txt", b"a", "must end in .jsonl, .json, .csv, .parquet"),
        ("rows.jsonl", b'{"Q": "q", "reply": "r"}', r"got \['Q', 'reply'\]; map yours with"),
    ],
)  # fmt: skip
def test_unusable_files(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(ValueError, match=f"^dataset: .*{message}"):
        load_examples(str(path))


def test_damaged_parquet(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"prompt": ["p" * 999], "completion": ["c"]}), path)
    data = bytearray(path.read_bytes())
    data[4:40] = bytes(36)
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"rows.parquet: must be a Parquet file"):
        load_examples(path)


def test_bad_arguments(tmp_path: Path) -> None:
    source = write(tmp_path, [{"question": "q", "completion": "c"}])
    for columns, message in (
        ({"prompt": "quest"}, "got 'quest' for 'prompt'; did you mean 'question'?"),
        ({"promt": "question"}, "got the field 'promt'; did you mean 'prompt'? The fields are ["),
        ({"question": "prompt"}, """; did you mean {"prompt": "question"}? The columns are ["""),
        ({"q": "question"}, """got the field 'q'; map it as in {"prompt": "question"}. The f"""),
        ({"prompt": "zzz"}, "got 'zzz' for 'prompt'. The columns are ['question', 'completion']"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            load_examples(source, columns=columns)
    with pytest.raises(ValueError, match="max_rows: must be at least 1, got 0"):
        load_examples(source, max_rows=0)
    for missing in ("/nowhere/rows.jsonl", "rows.parquet", "./nowhere", "rows.JSONL.gz"):
        with pytest.raises(ValueError, match=f"{missing}: must be a file .* it does not exist"):
            load_examples(missing)
    with pytest.raises(ValueError, match="must be a name or a path, got an empty text"):
        load_examples("")
    with pytest.raises(ValueError, match="must be readable, got"):
        load_examples("/" + "x" * 5000)
    with pytest.raises(ValueError, match="must be readable, got"):
        load_examples("~nobody_of_this_name/rows.jsonl")


def test_bad_directories(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"must hold .* or a dataset saved by"):
        load_examples(tmp_path)
    with pytest.raises(ValueError, match=r"must hold .*, got none"):
        load_examples(str(tmp_path / "*.parquet"))
    write(tmp_path, [ROW], "a.jsonl")
    (tmp_path / "b.csv").write_text("prompt\np\n")
    with pytest.raises(ValueError, match=r"files of one kind, got \['.csv', '.jsonl'\]"):
        load_examples(tmp_path)
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved/state.json").write_text("[")
    with pytest.raises(ValueError, match=r"must be a dataset saved by datasets.save_to_disk, got"):
        load_examples(tmp_path / "saved")


@pytest.mark.parametrize("source", [3, None, object(), {"prompt": ["p"], "completion": ["c"]}])
def test_objects_that_are_no_rows(source: Any) -> None:
    with pytest.raises(ValueError, match="dataset: must be a name, a path, a Dataset or a list"):
        load_examples(source)
    with pytest.raises(ValueError, match="row 1: must be a dict of columns"):
        load_examples([ROW, source if not isinstance(source, dict) else [source]])


def test_unreachable_hub_dataset_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name in ("a/b/c", "two words", ":", "\N{SNOWMAN}", "{}"):
        with pytest.raises(ValueError, match=r"must be a file or directory, or a name on the hub"):
            load_examples(name)
    for name in ("nobody/nothing", "nobody/nothing:main"):
        with pytest.raises(ValueError, match=r"\(split 'train'\): must be a file or directory"):
            load_examples(name)


def test_arrays_of_numpy_are_lists() -> None:
    turns = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]
    (example,) = load_examples([{"messages": np.array(turns, dtype=object), "answer": np.int64(4)}])
    assert example.outcome is None
    assert (example.text, example.completion, example.answer) == ("2 + 2?", "4", "4")
