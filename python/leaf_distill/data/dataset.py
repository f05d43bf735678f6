"""Rows in: a hub dataset or a local file becomes prompt messages, a completion and an answer."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

FILE_SUFFIXES = (".jsonl", ".json", ".parquet")
LAYOUTS = (
    ("prompt", "completion"),
    ("messages",),
    ("instruction", "output"),
    ("problem", "solution"),
)
FIELDS = {name for layout in LAYOUTS for name in layout} | {"input", "answer"}


class Message(TypedDict):
    """One turn of a conversation."""

    role: str
    content: str


@dataclass(frozen=True)
class Row:
    """One problem: the conversation up to the user's turn, its completion and known answer."""

    row_id: int  # position in the input
    messages: tuple[Message, ...]  # the last one is the user's turn
    completion: str
    answer: str | None


@dataclass(frozen=True)
class Rejection:
    """Why a row, or one candidate of a row (-1: the row itself), left the funnel."""

    row_id: int
    candidate_id: int
    stage: str
    reason: str  # short code
    detail: str


class UnusableRow(Exception):
    """A row that cannot be used: its reason code and a sentence."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail


def load_rows(
    source: str,
    *,
    split: str = "train",
    columns: dict[str, str] | None = None,
    max_rows: int | None = None,
    need_completion: bool = True,
) -> tuple[list[Row], list[Rejection]]:
    """Read rows from a hub dataset (``owner/name`` or ``owner/name:config``) or a local file.

    Local: ``.jsonl``, ``.json`` (a list of objects), ``.parquet``, or a directory saved by
    ``datasets``. Layouts: ``prompt``/``completion`` (text or messages), ``messages`` (the last
    assistant turn is the completion), ``instruction``/``input``/``output``,
    ``problem``/``solution``; each with an optional ``answer``. ``columns`` maps these names to the
    dataset's own, as in ``{"prompt": "question"}``; one column may serve two names. With
    ``need_completion`` False an answer is enough: a row without completion has an empty one.

    Raises ValueError for a missing file, split or column, an unknown layout, an empty dataset;
    a row that cannot be used is not an error but a Rejection of stage "rows".
    """
    if max_rows is not None and max_rows < 1:
        raise ValueError(f"max_rows must be at least 1, not {max_rows}.")
    records, names = _read(source, split, max_rows)
    if not records:
        raise ValueError(f"The dataset {source!r} has no rows: give one with at least one row.")
    mapping = _mapping(source, names, columns or {})
    layout = _layout(source, names, mapping, need_completion)
    rows: list[Row] = []
    rejections: list[Rejection] = []
    for row_id, record in enumerate(records):
        fields = {field: record.get(column) for field, column in mapping.items()}
        try:
            answer = _answer(fields.get("answer"))
            messages, completion = read_layout(layout, fields)
            _check_completion(completion, answer, need_completion)
            check_text([*(m["content"] for m in messages), completion, answer or ""])
        except UnusableRow as problem:
            rejections.append(Rejection(row_id, -1, "rows", problem.reason, problem.detail))
        else:
            rows.append(Row(row_id, messages, completion, answer))
    return rows, rejections


def _read(source: str, split: str, max_rows: int | None) -> tuple[list[dict[str, Any]], list[str]]:
    """Return the first rows of a source as dicts, and the names of its columns."""
    path = Path(source).expanduser()
    if path.suffix in FILE_SUFFIXES or path.is_file():
        return _read_file(path, max_rows)
    if path.is_dir():
        return _read_saved(path, split, max_rows)
    if source.startswith((".", "/", "~")):
        raise ValueError(f"The dataset {source!r} does not exist: no such file or directory.")
    return _read_hub(source, split, max_rows)


def _read_file(path: Path, max_rows: int | None) -> tuple[list[dict[str, Any]], list[str]]:
    if not path.is_file():
        raise ValueError(f"The dataset file {str(path)!r} does not exist: check the path.")
    if path.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            table = pq.read_table(path).slice(0, max_rows)
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{path} is not a readable Parquet file: {error}") from error
        return table.to_pylist(), list(table.column_names)
    if path.suffix not in FILE_SUFFIXES:
        raise ValueError(f"{path}: a dataset file must end in {', '.join(FILE_SUFFIXES)}.")
    records = _read_json(path) if path.suffix == ".json" else _read_jsonl(path, max_rows)
    records = records[:max_rows]
    return records, list(dict.fromkeys(name for record in records for name in record))


def _read_json(path: Path) -> list[dict[str, Any]]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(data, list) or not all(isinstance(record, dict) for record in data):
        raise ValueError(f"{path} must hold a JSON list of objects, one a row (or use .jsonl).")
    return data


def _read_jsonl(path: Path, max_rows: int | None) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = []
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if len(records) == max_rows:
                break
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path}, line {number} is not valid JSON: {error}") from error
            if not isinstance(record, dict):
                raise ValueError(f"{path}, line {number} must be a JSON object.")
            records.append(record)
    return records


def _read_saved(
    path: Path, split: str, max_rows: int | None
) -> tuple[list[dict[str, Any]], list[str]]:
    from datasets import DatasetDict, load_from_disk

    try:
        dataset = load_from_disk(str(path))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"The directory {str(path)!r} holds no dataset saved by datasets.save_to_disk; "
            f"name a {', '.join(FILE_SUFFIXES)} file instead. ({error})"
        ) from error
    if isinstance(dataset, DatasetDict):
        if split not in dataset:
            raise ValueError(f"{str(path)!r} has no split {split!r}; it has {sorted(dataset)}.")
        dataset = dataset[split]
    return _head(dataset, max_rows)


def _read_hub(
    source: str, split: str, max_rows: int | None
) -> tuple[list[dict[str, Any]], list[str]]:
    from datasets import load_dataset

    name, _, config = source.partition(":")
    try:
        dataset = load_dataset(name, config or None, split=split)
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"The dataset {source!r} (split {split!r}) is neither a file or directory here nor "
            f"can the hub give it: {str(error).strip().splitlines()[0]}"
        ) from error
    return _head(dataset, max_rows)


def _head(dataset: Any, max_rows: int | None) -> tuple[list[dict[str, Any]], list[str]]:
    count = len(dataset) if max_rows is None else min(max_rows, len(dataset))
    return dataset.select(range(count)).to_list(), list(dataset.column_names)


def _mapping(source: str, names: Sequence[str], columns: Mapping[str, str]) -> dict[str, str]:
    """Return field -> column: the given mapping, then the columns that carry a field's own name."""
    for field, column in columns.items():
        if field not in FIELDS:
            raise ValueError(f"columns: {field!r} is not a field; use one of {sorted(FIELDS)}.")
        if column not in names:
            raise ValueError(
                f"columns: {column!r}, given for {field!r}, is not a column of {source!r}, "
                f"which has {list(names)}."
            )
    taken = set(columns.values())
    own = {name: name for name in names if name in FIELDS and name not in taken}
    return {**own, **columns}


def _layout(
    source: str, names: Sequence[str], mapping: Mapping[str, str], need_completion: bool
) -> tuple[str, ...]:
    for layout in LAYOUTS:
        if all(field in mapping for field in layout):
            return layout
    for layout in () if need_completion or "answer" not in mapping else LAYOUTS:
        if layout[0] in mapping:
            return layout
    wanted = ", or ".join("/".join(layout) for layout in LAYOUTS)
    second = "completion" if need_completion else "answer"
    also = "" if need_completion else " (`answer` may stand for the second)"
    raise ValueError(
        f"The dataset {source!r} has the columns {list(names)}, but LeaF needs {wanted}{also}; map "
        f'yours with --columns \'{{"prompt": "question", "{second}": "solution"}}\'.'
    )


def read_layout(
    layout: tuple[str, ...], fields: Mapping[str, Any]
) -> tuple[tuple[Message, ...], str]:
    if layout == ("messages",):
        turns = _messages("messages", fields["messages"])
        last = max((i for i, turn in enumerate(turns) if turn["role"] == "assistant"), default=-1)
        if last < 0:
            return _checked(turns), ""
        return _checked(turns[:last]), turns[last]["content"]
    prompt, completion = fields[layout[0]], fields.get(layout[1])
    if layout[0] == "instruction":
        extra = fields.get("input")
        if isinstance(prompt, str) and isinstance(extra, str) and extra.strip():
            prompt = f"{prompt}\n\n{extra}"
    turns = _messages(layout[0], prompt, role="user")
    replies = _messages(layout[1], completion, role="assistant")
    if len(replies) != 1 or replies[0]["role"] != "assistant":
        raise UnusableRow("bad_completion", f"{layout[1]} must be text or one assistant message.")
    return _checked(turns), replies[0]["content"]


def _messages(column: str, value: object, *, role: str | None = None) -> list[Message]:
    """Read a column as messages; text is one message of the given role."""
    if value is None:
        value = "" if role else []
    if isinstance(value, str) and role:
        return [{"role": role, "content": value}]
    if not isinstance(value, list):
        raise UnusableRow("not_text", f"{column} is {type(value).__name__}, not text or messages.")
    messages: list[Message] = []
    for turn in value:
        turn = turn if isinstance(turn, dict) else {}
        kind, content = turn.get("role"), turn.get("content")
        if not isinstance(kind, str) or not isinstance(content, str):
            detail = f"{column} holds a message without a text role or content."
            raise UnusableRow("not_text", detail)
        messages.append({"role": kind, "content": content})
    return messages


def _checked(messages: Sequence[Message]) -> tuple[Message, ...]:
    if not messages or messages[-1]["role"] != "user":
        raise UnusableRow("no_user_turn", "the turn before the completion is not the user's.")
    if not messages[-1]["content"].strip():
        raise UnusableRow("empty_prompt", "the user's turn is empty.")
    return tuple(messages)


def _check_completion(completion: str, answer: str | None, needed: bool) -> None:
    if completion.strip() or (answer is not None and not needed):
        return
    also = "" if needed else ", and there is no answer to grade against"
    raise UnusableRow("empty_completion", f"the completion is empty{also}.")


def _answer(value: object) -> str | None:
    if value is None:
        return None
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # a column of integers with a missing one is read as floats
    if not isinstance(value, (str, int, float)):
        raise UnusableRow("bad_answer", f"answer is {type(value).__name__}, not text or a number.")
    return str(value).strip() or None


def check_text(texts: Iterable[str]) -> None:
    """Half of a surrogate pair (a broken JSON escape) can neither be tokenized nor stored."""
    for text in texts:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise UnusableRow("bad_unicode", f"text is not valid Unicode: {error}") from error
