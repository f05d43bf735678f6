"""Rows of any layout become Examples: prompt messages, a completion and a known answer."""

from __future__ import annotations

import contextlib
import difflib
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal
from numbers import Number
from typing import Any, get_args

from leaf_distill.data.example import Branch, Example, Message, Range, UnusableRow
from leaf_distill.data.messages import add_context, decoded, read_messages
from leaf_distill.data.source import named, read_records

LAYOUTS = (
    ("prompt", "completion"),
    ("messages",),
    ("conversations",),
    ("instruction", "output"),
    ("problem", "solution"),
    ("question", "completion"),
    ("question", "solution"),
    ("question", "output"),
    ("question", "answer"),
)
WORKED = ("question", "answer")
"""GSM8K's layout: the answer is a worked solution that ends in `#### 33`."""

EXTRAS = ("input", "answer", "system", "history", "tools", "chat_template_kwargs")
FIELDS = {name for layout in LAYOUTS for name in layout} | set(EXTRAS)
UNREAD = ("no_layout", "no_completion")
"""Reasons that, given to every row, mean that the columns were not understood."""


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

    The dataset of `leaf detect`, and any with a column `branch` of "original" and "counterfactual",
    keeps its row_id, candidate_id, cut and strategy.

    Args:
        source: A hub name (`owner/name` or `owner/name:config`); a .jsonl, .json, .csv or .parquet
            file, the text ones also as .gz; a directory or a glob of such files; a directory saved
            by `datasets`; a `datasets.Dataset`; or rows as dicts.
        split: The split to read, where the source has several.
        columns: The dataset's own names of fields, as in `{"prompt": "query"}`. One column may
            serve two fields.
        max_rows: Read so many originals, with their counterfactuals.
        need_completion: Whether a row must have a completion; else an answer is enough.

    Returns:
        One Example a row. A row that cannot be used has its `outcome` set (stage "rows"), and
        perhaps no messages. Alterations stand in `notes`: "later_turns_dropped" (turns after the
        last assistant's) and "system_column_dropped" (the messages bring a system turn).

    Raises:
        ValueError: The source cannot be read or has no rows, a mapped column or split is missing,
            no row has a known layout, or the columns beside `branch` are malformed.
    """
    if max_rows is not None and max_rows < 1:
        raise ValueError(f"max_rows: must be at least 1, got {max_rows}.")
    records = read_records(source, split=split, max_rows=max_rows)
    for position, record in enumerate(records):
        if not isinstance(record, Mapping):
            raise ValueError(
                f"dataset: row {position}: must be a dict of columns, got {record!r:.60}."
            )
    names = [str(name) for name in dict.fromkeys(name for record in records for name in record)]
    mapping = _mapping(names, columns or {})
    examples = [
        _read(position, record, mapping, need_completion) for position, record in enumerate(records)
    ]
    if all(one.outcome is not None and one.outcome.reason in UNREAD for one in examples):
        raise ValueError(_no_layout(named(source), names, need_completion))
    if _has_branches(records):
        _read_branches(examples, records)
    if max_rows is None:
        return examples
    originals = [example.row_id for example in examples if example.branch == "original"]
    kept = set(originals[:max_rows])
    return [example for example in examples if example.row_id in kept]


def _mapping(names: Sequence[str], columns: Mapping[str, str]) -> dict[str, str]:
    """Return field -> column: the given mapping, then the columns that carry a field's own name."""
    for field, column in columns.items():
        if field not in FIELDS:
            raise ValueError(
                f"columns: must map the fields {sorted(FIELDS)}, got {field!r}"
                f"{_meant(field, FIELDS)}."
            )
        if column not in names:
            raise ValueError(
                f"columns: must name columns of the dataset, {list(names)}, got {column!r} for "
                f"{field!r}{_meant(column, names)}."
            )
    taken = set(columns.values())
    own = {name: name for name in names if name in FIELDS and name not in taken}
    return {**own, **columns}


def _meant(word: str, words: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(words), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _no_layout(source: str, names: Sequence[str], need_completion: bool) -> str:
    layouts = ", ".join("/".join(layout) for layout in LAYOUTS)
    second = "completion" if need_completion else "answer"
    also = "" if need_completion else " (an answer may stand for the second)"
    return (
        f"dataset: {source}: must have the columns {layouts}{also}, got {list(names)}; map yours "
        f'with --columns \'{{"prompt": "question", "{second}": "answer"}}\'.'
    )


def _read(
    position: int, record: Mapping[str, Any], mapping: Mapping[str, str], need_completion: bool
) -> Example:
    example = Example(row_id=position, messages=(), completion="")
    fields = {
        field: _given(record[column]) for field, column in mapping.items() if column in record
    }
    try:
        _fill(example, fields, record, need_completion)
    except UnusableRow as problem:
        example.leave("rows", problem.reason, problem.detail)
    except RecursionError:
        example.leave("rows", "too_deep", "The row nests values too deeply.")
    return example


def _given(value: Any) -> Any:
    """Return a value, None where it is a missing one: None or a float NaN."""
    missing = isinstance(value, Number) and value != value  # Decimal and numpy have their own NaN
    return None if missing else value


def _fill(
    example: Example, fields: dict[str, Any], record: Mapping[str, Any], need_completion: bool
) -> None:
    layout = _layout(fields)
    if layout is None:
        raise UnusableRow("no_layout", f"No known layout has the columns {list(record)}.")
    if len(layout) == 1:
        turns = read_messages(layout[0], fields[layout[0]])
        turns, reply = _split(turns, need_completion, example.notes)
    else:
        if layout[1] not in fields and (need_completion or "answer" not in fields):
            raise UnusableRow(
                "no_completion", f"The row has {layout[0]} but no {layout[1]}: {list(record)}."
            )
        turns, reply = _pair(layout, fields)
    turns = add_context(turns, fields, example.notes)
    if not turns or turns[-1]["role"] != "user":
        raise UnusableRow("no_user_turn", "The turn before the completion is not the user's.")
    if not turns[-1]["content"].strip():
        raise UnusableRow("empty_prompt", "The user's turn is empty.")
    example.messages, example.completion = tuple(turns), reply["content"]
    example.reply = reply if len(reply) > 2 else None
    example.template_kwargs = _template_kwargs(fields)
    answer = fields.get("answer")
    example.answer = _answer(str(answer).rpartition("####")[2] if layout == WORKED else answer)
    enough = example.reply is not None or (example.answer is not None and not need_completion)
    if not reply["content"].strip() and not enough:
        also = "" if need_completion else ", and there is no answer to grade against"
        raise UnusableRow("empty_completion", f"The completion is empty{also}.")
    _check_unicode([turns, reply, example.answer, example.template_kwargs])


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
    for names in (present, set(fields)):
        for layout in LAYOUTS:
            if layout[0] in names:
                return layout
    return None


def _pair(layout: tuple[str, ...], fields: Mapping[str, Any]) -> tuple[list[Message], Message]:
    """Read the prompt and the completion from columns of their own."""
    prompt, extra = fields[layout[0]], fields.get("input")
    if layout[0] == "instruction" and isinstance(prompt, str) and isinstance(extra, str):
        prompt = f"{prompt}\n\n{extra}" if extra.strip() else prompt
    turns = read_messages(layout[0], prompt, role="user")
    reply = fields.get(layout[1])
    if isinstance(reply, list) and len(reply) == 1 and isinstance(reply[0], str):
        reply = reply[0]
    replies = read_messages(layout[1], reply, role="assistant")
    if len(replies) != 1 or replies[0]["role"] != "assistant":
        raise UnusableRow("bad_completion", f"{layout[1]} must be text or one assistant message.")
    return turns, replies[0]


def _split(
    turns: list[Message], need_completion: bool, notes: list[str]
) -> tuple[list[Message], Message]:
    """Split a conversation at its last assistant turn; without need, a last question is enough."""
    last = max((i for i, turn in enumerate(turns) if turn["role"] == "assistant"), default=-1)
    if last < 0 or not (need_completion or turns[-1]["role"] == "assistant"):
        return turns, {"role": "assistant", "content": ""}
    if last < len(turns) - 1:
        notes.append("later_turns_dropped")
    return turns[:last], turns[last]


def _template_kwargs(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the template's variables: those of `chat_template_kwargs`, and the tools."""
    kwargs = decoded("chat_template_kwargs", fields.get("chat_template_kwargs"), dict) or {}
    tools = decoded("tools", fields.get("tools"), list)
    return {**({"tools": tools} if tools else {}), **kwargs}


def _answer(value: Any) -> str | None:
    value = _given(value.tolist() if hasattr(value, "tolist") else value)  # numpy's to Python's
    if isinstance(value, list | tuple) and len(value) <= 1:
        return _answer(value[0]) if value else None
    if isinstance(value, float | Decimal) and math.isfinite(value) and value == int(value):
        value = int(value)  # a column of integers with a missing one is read as floats
    if value is None:
        return None
    infinite = isinstance(value, float | Decimal) and math.isinf(value)
    if infinite or not isinstance(value, str | Number):
        raise UnusableRow("bad_answer", f"answer must be text or a number, got {value!r:.60}.")
    return str(value).strip() or None


def _check_unicode(values: Any) -> None:
    """Half of a surrogate pair (a broken JSON escape) can neither be tokenized nor stored."""
    try:
        json.dumps(values, ensure_ascii=False, default=str, skipkeys=True).encode()
    except UnicodeEncodeError as error:
        raise UnusableRow("bad_unicode", f"The text is not valid Unicode: {error}.") from error


def _has_branches(records: Sequence[Mapping[str, Any]]) -> bool:
    """Whether `branch` says what it says in the dataset of `leaf detect`, and nothing else."""
    values = [record.get("branch") for record in records]
    return any(values) and all(value in (None, *get_args(Branch)) for value in values)


def _read_branches(examples: Sequence[Example], records: Sequence[Mapping[str, Any]]) -> None:
    """Fill in which original each row belongs to, and the cut that made a counterfactual."""
    seen: Counter[int] = Counter()
    for position, (example, record) in enumerate(zip(examples, records, strict=True)):
        example.row_id = _integer(record, "row_id", position, position)
        if record.get("branch") != "counterfactual":
            continue
        given = _integer(record, "candidate_id", position, -1)
        example.candidate_id = given if given >= 0 else seen[example.row_id]
        seen[example.row_id] += 1
        example.strategy = record.get("strategy")
        example.cut = _cut(record.get("cut"), position)


def _integer(record: Mapping[str, Any], name: str, position: int, missing: int) -> int:
    value = _given(record.get(name))
    if value is None:
        return missing
    with contextlib.suppress(TypeError, ValueError, OverflowError):
        if int(value) == value:
            return int(value)
    raise ValueError(
        f"dataset: row {position}: {name}: must be a whole number, got {value!r:.60}; rename the "
        "column `branch` if it is not that of `leaf detect`."
    )


def _cut(value: Any, position: int) -> tuple[Range, ...]:
    try:
        return tuple((int(start), int(stop)) for start, stop in value or ())
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"dataset: row {position}: cut: must be pairs of characters, got {value!r:.60}."
        ) from error
