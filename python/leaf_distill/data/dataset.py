"""Rows of any layout become Examples: prompt messages, a completion and a known answer."""

from __future__ import annotations

import difflib
import json
import math
import shlex
from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal
from numbers import Number
from typing import Any

from leaf_distill.data.branches import plain, read_branches
from leaf_distill.data.code_rows import CODE_FIELDS, as_conversation
from leaf_distill.data.example import ROLES, Example, Message, Role, UnusableRow
from leaf_distill.data.messages import add_context, check_unicode, decoded, read_messages
from leaf_distill.data.source import Record, named, read_records
from leaf_distill.data.test_layouts import TEST_FIELDS, read_tests

WORKED = ("question", "answer")
"""GSM8K's layout: the answer is a worked solution that ends in `#### 33`."""
ENDS = "an answer is a completion if it ends in '#### 33'"

LAYOUTS = (
    *(("prompt", "completion"), ("messages",), ("conversations",)),
    *(("instruction", "output"), ("problem", "solution"), ("question", "completion")),
    *(("question", "solution"), ("question", "output"), WORKED),
)

EXTRAS = ("input", "answer", "system", "history", "tools", "chat_template_kwargs")
SOURCES = ("source", "data_source")
DIFFICULTIES = ("difficulty", "level")
GIVEN: dict[Role, str] = {role: f"{role}_answer" for role in ROLES}
"""The columns of answers that the models gave elsewhere."""
FIELDS = {name for layout in LAYOUTS for name in layout}
FIELDS |= {*EXTRAS, *SOURCES, *DIFFICULTIES, *GIVEN.values(), *CODE_FIELDS, *TEST_FIELDS}
ANSWERS = ("answer", "final_answer", "gold", "label", "result", "solution_number", "target")
"""Names of columns, in lower case, that hold a short answer; a proposed mapping looks for them."""
SHORT = 20
"""Characters of a short one."""
MADE = "; where there is an answer, `leaf detect --completion_source teacher` makes the completion"
UNREAD = ("no_layout", "no_completion")
"""Reasons which mean, if every row has one of them, that the columns were not understood."""


def load_examples(
    source: object,
    *,
    split: str = "train",
    columns: Mapping[str, str] | None = None,
    max_rows: int | None = None,
    need_completion: bool = True,
) -> list[Example]:
    """Read every row of a dataset, once and in order.

    Layouts, chosen for each row by the columns that hold a value: `prompt`/`completion` (text or
    messages), `messages` or `conversations` (the last assistant turn is the completion; ShareGPT's
    `from`/`value` too), `instruction`/`input`/`output`, `problem`/`solution`, and `question` with
    `completion`, `solution`, `output` or GSM8K's `answer`. Each may have an `answer` and the
    columns `system`, `history` (pairs of user and assistant text), `tools` and
    `chat_template_kwargs`. Messages, tools and the like may be given as JSON text.

    A row may have the tests of a program, in the layouts of `read_tests`; then the prompt may also
    be LeetCodeDataset's `query` or LiveCodeBench's `question_content`, and the completion a
    `canonical_solution` or `code`. `source` or `data_source` names where the row is from,
    `difficulty` or `level` how hard it is. Texts in `student_answer` and `teacher_answer` are what
    the models have answered elsewhere.

    The dataset of `leaf detect`, and any with a column `branch` of "original", "counterfactual" and
    "cross", keeps the columns that `read_branches` reads. Its rows that were not accepted leave.

    Args:
        source: A hub name (`owner/name` or `owner/name:config`); a .jsonl, .json, .csv or .parquet
            file, the text ones also as .gz; a directory or a glob of such files; a directory saved
            by `datasets`; a `datasets.Dataset`; or rows as dicts.
        split: The split to read, if the source has several.
        columns: The column of each field, as in `{"prompt": "query"}`. One column may serve two
            fields.
        max_rows: Read so many originals, with their counterfactuals.
        need_completion: Whether a row must have a completion. Otherwise an answer or tests are
            enough.

    Returns:
        One Example a row. A row that cannot be used has its `outcome` set (stage "rows"), and
        perhaps no messages. Alterations stand in `notes`: "later_turns_dropped" (turns after the
        last assistant's) and "system_column_dropped" (the messages bring a system turn).

    Raises:
        ValueError: The source cannot be read or has no rows, a mapped column or split is missing,
            no row has a known layout, or the columns beside `branch` are malformed.
    """
    if max_rows is not None and max_rows < 1:
        raise ValueError(f"max_rows: must be at least 1, got {max_rows}")
    records = read_records(source, split=split, max_rows=max_rows)
    names = [str(name) for name in dict.fromkeys(name for record in records for name in record)]
    mapping = _mapping(names, columns or {})
    examples = [
        _read(position, record, mapping, need_completion) for position, record in enumerate(records)
    ]
    if all(one.outcome is not None and one.outcome.reason in UNREAD for one in examples):
        layouts = f"{', '.join('/'.join(layout) for layout in LAYOUTS)} ({ENDS})"
        also = MADE if need_completion else " (an answer may stand for the second)"
        proposed = _proposed(records[0], names, need_completion)
        raise ValueError(
            f"dataset: {named(source)}: must have columns of a known layout, got {names}; map "
            f"yours with --columns, as in {shlex.quote(proposed)}. The "
            f"layouts are {layouts}{also}"
        )
    read_branches(examples, records)
    if max_rows is None:
        return examples
    originals = [example.row_id for example in examples if example.branch == "original"]
    kept = set(originals[:max_rows])
    return [example for example in examples if example.row_id in kept]


def _mapping(names: Sequence[str], columns: Mapping[str, str]) -> dict[str, str]:
    """Return the column of each field: the given one, or the column with the field's name."""
    for field, column in columns.items():
        if field in FIELDS and column in names:
            continue
        known = field in FIELDS
        got = f"{column!r} for {field!r}" if known else f"the field {field!r}"
        listed = f"The columns are {list(names)}" if known else f"The fields are {sorted(FIELDS)}"
        raise ValueError(
            f"columns: must map fields to columns of the dataset, got {got}"
            f"{_hint(field, column, names)} {listed}"
        )
    taken = set(columns.values())
    same_name = {name: name for name in names if name in FIELDS and name not in taken}
    return {**same_name, **columns}


def _hint(field: str, column: str, names: Sequence[str]) -> str:
    """Return the end of a sentence: what was meant by a mapping that cannot be, or a full stop."""
    if field in names and column in FIELDS:
        return f"; did you mean {_json({column: field})}?"
    word, words = (column, names) if field in FIELDS else (field, sorted(FIELDS))
    if close := difflib.get_close_matches(word, words, n=1):
        return f"; did you mean {close[0]!r}?"
    return f"; map it as in {_json({'prompt': column})}." if column in names else "."


def _proposed(record: Record, names: Sequence[str], need_completion: bool) -> str:
    """Return a mapping of columns of text as JSON: a guess that shows how one is written."""
    names = names or ["question", "answer"]
    texts = [name for name in names if isinstance(record.get(name), str)] or names
    begins = {layout[0] for layout in LAYOUTS}
    sentences = [name for name in texts if " " in str(record.get(name)).strip()]
    prompt = next((name for name in names if name in begins), (*sentences, texts[0])[0])
    at = names.index(prompt)
    rest = (*names[at + 1 :], *names[:at])
    others = [name for name in rest if name in texts]
    short = [name for name in rest if 0 < len(str(record.get(name)).strip()) <= SHORT]
    answers = [name for name in short if name.lower() in ANSWERS]
    if not need_completion:
        answers += [*(name for name in others if name in short), *others]
    answer = next(iter(answers), None)
    completions = [name for name in others if name in sentences and name != answer]
    if need_completion:  # a short answer is a completion too
        completions += [name for name in others if name == answer] + others
    completion = next(iter(completions), None)
    fields = {"prompt": prompt, "completion": completion, "answer": answer}
    if completion == answer:
        del fields["answer"]
    return _json({field: column for field, column in fields.items() if column is not None})


def _json(mapping: Mapping[str, str]) -> str:
    return json.dumps(mapping, ensure_ascii=False)


def _read(
    position: int, record: Record, mapping: Mapping[str, str], need_completion: bool
) -> Example:
    example = Example(row_id=position, messages=(), completion="")
    fields = {field: plain(record[column]) for field, column in mapping.items() if column in record}
    try:
        _fill(example, fields, list(record), need_completion)
    except UnusableRow as problem:
        example.leave("rows", problem.reason, problem.detail)
    except RecursionError:
        example.leave("rows", "too_deep", "the row nests values too deeply")
    return example


def _fill(
    example: Example, fields: dict[str, Any], columns: list[str], need_completion: bool
) -> None:
    example.tests = tests = read_tests(fields)
    example.source = _label(fields, SOURCES)
    example.difficulty = _label(fields, DIFFICULTIES)
    if tests is not None:
        fields = as_conversation(fields, tests)
    layout = _layout(fields)
    if layout is None:
        raise UnusableRow("no_layout", f"no known layout has the columns {columns}")
    if len(layout) == 1:
        turns = read_messages(layout[0], fields[layout[0]])
        turns, reply = _split(turns, need_completion, example.notes)
    else:
        graded = "answer" in fields or tests is not None
        if layout[1] not in fields and (need_completion or not graded):
            detail = f"{layout[1]}: must be given beside {layout[0]}, got {columns}"
            detail += f" ({ENDS})" if layout[0] == WORKED[0] and "answer" in fields else ""
            detail += MADE if need_completion else ""
            raise UnusableRow("no_completion", detail)
        turns, reply = _pair(layout, fields)
    turns = add_context(turns, fields, example.notes)
    if not turns or turns[-1]["role"] != "user":
        raise UnusableRow("no_user_turn", "the turn before the completion is not the user's")
    if not turns[-1]["content"].strip():
        raise UnusableRow("empty_prompt", "the user's turn is empty")
    example.messages, example.completion = tuple(turns), reply["content"]
    example.reply = reply if len(reply) > 2 else None
    example.template_kwargs = _template_kwargs(fields)
    example.given = _given(fields)
    answer = fields.get("answer")
    example.answer = _answer(str(answer).rpartition("####")[2] if layout == WORKED else answer)
    gradable = example.answer is not None or tests is not None
    enough = example.reply is not None or (gradable and not need_completion)
    if not reply["content"].strip() and not enough:
        also = MADE if need_completion else ", and there is no answer to grade against"
        raise UnusableRow("empty_completion", f"the completion is empty{also}")
    texts = [example.answer, example.source, example.difficulty, *example.given.values()]
    checked = [turns, reply, texts, example.template_kwargs]
    check_unicode([*checked, vars(tests) if tests else None])


def _given(fields: Mapping[str, Any]) -> dict[Role, str]:
    """Return the answers that a row brings along; an empty one counts as none."""
    given: dict[Role, str] = {}
    for role, column in GIVEN.items():
        value = fields.get(column)
        if value is not None and not isinstance(value, str):
            raise UnusableRow(f"bad_{column}", f"{column}: must be text, got {value!r:.60}")
        if value and value.strip():
            given[role] = value
    return given


def _label(fields: Mapping[str, Any], names: Iterable[str]) -> str | None:
    """Return the first of some columns that holds a text or a whole number, as text."""
    found = (fields.get(name) for name in names)
    texts = (str(one) for one in found if isinstance(one, str) or type(one) is int)
    return next((text for text in texts if text.strip()), None)


def _layout(fields: Mapping[str, Any]) -> tuple[str, ...] | None:
    """Return the first layout whose fields all hold a value, else one whose first field does."""
    blank: tuple[Any, ...] = (None, "", [])
    present = {
        name
        for name, value in fields.items()
        if (value.strip() if isinstance(value, str) else value) not in blank
    }
    for layout in LAYOUTS:
        if present.issuperset(layout) and (layout != WORKED or "####" in str(fields["answer"])):
            return layout
    begun = (one for names in (present, fields) for one in LAYOUTS if one[0] in names)
    return next(begun, None)


def _pair(layout: tuple[str, ...], fields: Mapping[str, Any]) -> tuple[list[Message], Message]:
    """Read the prompt and the completion from two columns."""
    prompt, extra = fields[layout[0]], fields.get("input")
    if layout[0] == "instruction" and isinstance(prompt, str) and isinstance(extra, str):
        prompt = f"{prompt}\n\n{extra}" if extra.strip() else prompt
    turns = read_messages(layout[0], prompt, role="user")
    reply = fields.get(layout[1])
    if isinstance(reply, list) and len(reply) == 1 and isinstance(reply[0], str):
        reply = reply[0]
    replies = read_messages(layout[1], reply, role="assistant")
    if len(replies) != 1 or replies[0]["role"] != "assistant":
        raise UnusableRow("bad_completion", f"{layout[1]}: must be text or one assistant message")
    return turns, replies[0]


def _split(
    turns: list[Message], need_completion: bool, notes: list[str]
) -> tuple[list[Message], Message]:
    """Split a conversation at its last assistant turn; a last question may have no reply."""
    last = max((i for i, turn in enumerate(turns) if turn["role"] == "assistant"), default=-1)
    if last < 0 or not (need_completion or turns[-1]["role"] == "assistant"):
        return turns, {"role": "assistant", "content": ""}
    if last < len(turns) - 1:
        notes.append("later_turns_dropped")
    return turns[:last], turns[last]


def _template_kwargs(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the template's variables: those of `chat_template_kwargs`, and the tools."""
    kwargs = decoded("chat_template_kwargs", fields, dict) or {}
    tools = decoded("tools", fields, list)
    return {**({"tools": tools} if tools else {}), **kwargs}


def _answer(value: Any) -> str | None:
    value = plain(value)
    if isinstance(value, list | tuple) and len(value) <= 1:
        return _answer(value[0]) if value else None
    if isinstance(value, float | Decimal) and math.isfinite(value) and value == int(value):
        value = int(value)  # a column of integers with a missing one is read as floats
    if value is None:
        return None
    infinite = isinstance(value, float | Decimal) and math.isinf(value)
    if infinite or not isinstance(value, str | Number):
        raise UnusableRow("bad_answer", f"answer: must be text or a number, got {value!r:.60}")
    return str(value).strip() or None
