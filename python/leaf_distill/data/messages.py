"""Messages from what datasets hold: chat turns, ShareGPT's, content parts, text, JSON text."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from typing import Any

from leaf_distill.data.example import Message, UnusableRow

ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "observation": "tool",
}
"""ShareGPT's names of roles, where they differ from those of chat templates."""


def read_messages(column: str, value: Any, *, role: str | None = None) -> list[Message]:
    """Read a column as messages; text is one message of `role`, where that is given.

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
        raise UnusableRow("not_text", f"{column} must be {kind}, got {type(value).__name__}.")
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
    return turns if known and turns else None


def _message(column: str, turn: Any) -> Message:
    """Read one message: text for role and content, and all other keys that hold a value."""
    turn = _without_none(turn) if isinstance(turn, Mapping) else {}
    if "role" not in turn and isinstance(turn.get("from"), str):
        name = turn.pop("from").lower()
        role = ROLES.get(name, name)
        if role not in ("system", "user", "assistant", "tool"):
            raise UnusableRow("unknown_role", f"{column} holds a turn from {name!r}.")
        turn = {"role": role, "content": turn.pop("value", None), **turn}
    content = turn.get("content")
    if content is None and len(turn.keys() - {"role", "content"}):
        content = ""  # a turn of nothing but tool calls or reasoning
    if isinstance(content, list):
        content = "".join(_part(column, part) for part in content)
    if not isinstance(turn.get("role"), str) or not isinstance(content, str):
        raise UnusableRow("not_text", f"{column} holds a message without a text role or content.")
    return {**turn, "content": content}


def _part(column: str, part: Any) -> str:
    if isinstance(part, dict) and part.get("type", "text") == "text":
        text = part.get("text")
        if isinstance(text, str):
            return text
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    raise UnusableRow("not_text", f"{column} holds a content part that is no text: {kind!r}.")


def _without_none(value: Any) -> Any:
    """Drop the keys without a value: Arrow gives every struct of a column all of its keys."""
    if isinstance(value, Mapping):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [_without_none(item) for item in value]
    return value


def add_context(turns: list[Message], fields: Mapping[str, Any], notes: list[str]) -> list[Message]:
    """Put the columns `system` and `history` before a conversation; its own system turn wins."""
    own, rest = (turns[:1], turns[1:]) if turns and turns[0]["role"] == "system" else ([], turns)
    system = fields.get("system")
    if system is not None and not isinstance(system, str):
        raise UnusableRow("not_text", f"system must be text, got {type(system).__name__}.")
    if system and system.strip():
        if not own:
            own = [{"role": "system", "content": system}]
        elif own[0]["content"] != system:
            notes.append("system_column_dropped")
    history: list[Message] = []
    for pair in decoded("history", fields.get("history"), list) or []:
        if not isinstance(pair, list) or [type(text) for text in pair] != [str, str]:
            raise UnusableRow("bad_history", "history must hold pairs of user and assistant text.")
        history.append({"role": "user", "content": pair[0]})
        history.append({"role": "assistant", "content": pair[1]})
    return [*own, *history, *rest]


def decoded(column: str, value: Any, kind: type) -> Any:
    """Return a list or dict that may be given as JSON text, without keys that hold no value."""
    if isinstance(value, str):
        with contextlib.suppress(ValueError):  # said below
            value = json.loads(value) if value.strip() else None
    if value is not None and not isinstance(value, kind):
        raise UnusableRow(
            f"bad_{column}", f"{column} must be a {kind.__name__} or its JSON, got {value!r:.60}."
        )
    return _without_none(value)
