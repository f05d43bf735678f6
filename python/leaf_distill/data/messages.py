"""Reads chat turns, ShareGPT's turns, content parts, text and JSON text as messages."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from typing import Any

from leaf_distill.data.example import Message, UnusableRow

ROLES = dict.fromkeys(("gpt", "chatgpt", "model", "bot"), "assistant")
ROLES |= {"human": "user", "observation": "tool"}
"""The roles of chat templates for ShareGPT's names."""


def read_messages(column: str, value: Any, *, role: str | None = None) -> list[Message]:
    """Read a column as messages; plain text is one message of `role`, if that is given.

    Raises:
        UnusableRow: The column holds something else, or a turn without text.
    """
    if value is None:
        value = "" if role else []
    if isinstance(value, str):
        parsed = _parsed_turns(value)
        if parsed is None and role:
            return [{"role": role, "content": value}]
        value = value if parsed is None else parsed
    if not isinstance(value, list | tuple):
        kind = "text or messages" if role else "messages"
        raise UnusableRow("not_text", f"{column}: must be {kind}, got {type(value).__name__}")
    return [_message(column, turn) for turn in value]


def _parsed_turns(text: str) -> list[Any] | None:
    """Return the messages that a JSON text holds, None where it is another text."""
    if not text.lstrip().startswith("["):
        return None
    try:
        turns = json.loads(text)
    except ValueError:
        return None
    known = all(isinstance(turn, dict) and turn.keys() & {"role", "from"} for turn in turns)
    return turns if turns and known else None


def _message(column: str, turn: Any) -> Message:
    """Read one message: text for role and content, and all other keys that hold a value."""
    turn = _without_none(turn) if isinstance(turn, Mapping) else {}
    if "role" not in turn and isinstance(turn.get("from"), str):
        name = turn.pop("from").lower()
        role = ROLES.get(name, name)
        if role not in ("system", "user", "assistant", "tool"):
            raise UnusableRow("unknown_role", f"{column}: must hold known roles, got {name!r}")
        turn = {"role": role, "content": turn.pop("value", None), **turn}
    content = turn.get("content")
    if content is None and len(turn.keys() - {"role", "content"}):
        content = ""  # a turn of nothing but tool calls or reasoning
    if isinstance(content, list):
        content = "".join(_part(column, part) for part in content)
    if not isinstance(turn.get("role"), str) or not isinstance(content, str):
        raise UnusableRow("not_text", f"{column}: must hold messages with text as role and content")
    return {**turn, "content": content}


def _part(column: str, part: Any) -> str:
    kind = part.get("type", "text") if isinstance(part, dict) else type(part).__name__
    if kind == "text" and isinstance(text := part.get("text"), str):
        return text
    raise UnusableRow("not_text", f"{column}: must hold content parts of text, got {kind!r}")


def _without_none(value: Any) -> Any:
    """Drop the keys without a value: Arrow gives every struct of a column all of its keys."""
    if isinstance(value, Mapping):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [_without_none(item) for item in value]
    return value


def add_context(turns: list[Message], fields: Mapping[str, Any], notes: list[str]) -> list[Message]:
    """Put the columns `system` and `history` before a conversation; a system turn in it wins."""
    head, rest = (turns[:1], turns[1:]) if turns and turns[0]["role"] == "system" else ([], turns)
    system = fields.get("system")
    if system is not None and not isinstance(system, str):
        raise UnusableRow("not_text", f"system: must be text, got {type(system).__name__}")
    if system and system.strip():
        if not head:
            head = [{"role": "system", "content": system}]
        elif head[0]["content"] != system:
            notes.append("system_column_dropped")
    history: list[Message] = []
    for pair in decoded("history", fields, list) or []:
        if not isinstance(pair, list) or [type(text) for text in pair] != [str, str]:
            raise UnusableRow("bad_history", "history: must hold pairs of user and assistant text")
        roles = zip(("user", "assistant"), pair, strict=True)
        history += [{"role": role, "content": text} for role, text in roles]
    return [*head, *history, *rest]


def decoded(column: str, fields: Mapping[str, Any], kind: type) -> Any:
    """Return a column's list or dict, which may be JSON text, without keys that hold no value."""
    value = fields.get(column)
    if isinstance(value, str):
        with contextlib.suppress(ValueError):  # refused below
            value = json.loads(value) if value.strip() else None
    if value is not None and not isinstance(value, kind):
        raise UnusableRow(
            f"bad_{column}", f"{column}: must be a {kind.__name__} or its JSON, got {value!r:.60}"
        )
    return _without_none(value)


def check_unicode(values: Any) -> None:
    """Refuse half of a surrogate pair, which can neither be tokenized nor stored."""
    try:
        json.dumps(values, ensure_ascii=False, default=str, skipkeys=True).encode()
    except UnicodeEncodeError as error:
        raise UnusableRow("bad_unicode", f"the text is not valid Unicode: {error}") from error
