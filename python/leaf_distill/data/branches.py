"""Reads the columns by which the dataset of `leaf detect` tells what a row was made from."""

from __future__ import annotations

import contextlib
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from numbers import Number
from typing import Any, get_args

from leaf_distill.data.example import Branch, Example, Message
from leaf_distill.data.messages import check_unicode, read_messages
from leaf_distill.data.ranges import in_text
from leaf_distill.data.source import Record

Span = dict[str, int]


def plain(value: Any) -> Any:
    """Return a value as Python's own types, or None if it is a NaN."""
    if hasattr(value, "tolist"):  # of numpy, as pandas hands on a list
        value = value.tolist()
    missing = isinstance(value, Number) and value != value  # Decimal and numpy have a NaN too
    return None if missing else value


def read_branches(examples: Sequence[Example], records: Sequence[Record]) -> None:
    """Fill in the original that each row belongs to, and what makes it another row than that.

    A candidate that was not accepted leaves. A counterfactual whose original is not among the rows
    has no `cut`. A column `branch` with other values than those of `leaf detect` is left alone.

    Args:
        examples: the rows as they were read.
        records: their columns.

    Raises:
        ValueError: a column is malformed; the sentence names row and column.
    """
    values = [record.get("branch") for record in records]
    if not any(values) or any(value not in (None, *get_args(Branch)) for value in values):
        return
    seen: Counter[int] = Counter()
    spans: dict[int, list[Span]] = {}
    for position, (example, record) in enumerate(zip(examples, records, strict=True)):
        with _named(position):
            example.row_id = _integer(record, "row_id", position)
            if record.get("branch") not in (None, "original"):
                _read_origin(example, record, seen)
                spans[position] = _spans(record.get("spans"))
            if example.outcome is None:
                _read_context(example, record)
            _read_accepted(example, record)
            example.verdict = _text(record, "student_verdict")
    _read_cuts(examples, spans)


@contextlib.contextmanager
def _named(position: int) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(f"dataset: row {position}: {error}") from error


def _read_origin(example: Example, record: Record, seen: Counter[int]) -> None:
    """Read which candidate of which original a row is, and what the teacher reads in its place."""
    example.row_id = _integer(record, "parent_id", example.row_id)
    given = _integer(record, "candidate_id", -1)
    example.candidate_id = given if given >= 0 else seen[example.row_id]
    seen[example.row_id] += 1
    example.strategy = _text(record, "strategy")
    inserted = plain(record.get("inserted")) or ()
    if not isinstance(inserted, list | tuple) or not all(isinstance(t, str) for t in inserted):
        raise ValueError(f"inserted: must be a list of texts, got {inserted!r:.60}")
    example.inserted = tuple(inserted)
    theirs = plain(record.get("teacher_prompt"))
    if (record["branch"] == "cross") is (theirs is None):
        raise ValueError(
            "teacher_prompt: must be messages on rows of the branch cross and only there, got "
            f"{theirs!r:.60} on {record['branch']}"
        )
    if theirs is not None:
        example.teacher_messages = _teacher_messages(theirs)


def _teacher_messages(value: Any) -> tuple[Message, ...]:
    turns = tuple(read_messages("teacher_prompt", value, role="user"))
    if not turns or turns[-1]["role"] != "user" or not turns[-1]["content"].strip():
        raise ValueError("teacher_prompt: must end with a user turn that has text")
    check_unicode(turns)
    return turns


def _read_context(example: Example, record: Record) -> None:
    """Divide the completion into what both models are given and what is trained."""
    context, segment = _integer(record, "context", 0), _integer(record, "segment", 0)
    length = len(example.completion)
    if context and not 0 < context < length:
        raise ValueError(
            f"context: must be from 0 to below the {length} characters of the completion, got "
            f"{context}"
        )
    if segment < 0:
        raise ValueError(f"segment: must be at least 0, got {segment}")
    example.segment = segment or int(context > 0)
    example.prefix, example.completion = example.completion[:context], example.completion[context:]
    if context and example.reply is not None:  # its further keys cannot be divided
        example.reply = None
        example.notes.append("message_key_ignored")


def _read_accepted(example: Example, record: Record) -> None:
    accepted = plain(record.get("accepted"))
    if accepted not in (None, True, False):
        raise ValueError(f"accepted: must be true or false, got {accepted!r:.60}")
    if accepted is not None and not accepted:
        reason = plain(record.get("reason"))
        example.leave("rows", "not_accepted", f"`leaf detect` says {reason!r:.80}")


def _text(record: Record, name: str) -> str | None:
    """Return a short code."""
    value = plain(record.get(name))
    if value is not None and not (isinstance(value, str) and value.isprintable()):
        raise ValueError(f"{name}: must be the name of one, got {value!r:.60}")
    return value


def _integer(record: Record, name: str, missing: int) -> int:
    value = plain(record.get(name))
    if value is None:
        return missing
    with contextlib.suppress(TypeError, ValueError, OverflowError):
        if int(value) == value and abs(value) < 2**63:
            return int(value)
    raise ValueError(
        f"{name}: must be a whole number of 64 bits, got {value!r:.60}; rename the column `branch` "
        "if it is not that of `leaf detect`"
    )


def _spans(value: Any) -> list[Span]:
    spans = plain(value)
    try:
        return [{key: int(one[key]) for key in ("message", "start", "stop")} for one in spans or ()]
    except (TypeError, ValueError, OverflowError, LookupError) as error:
        raise ValueError(
            f"spans: must be a list of message, start and stop, whole numbers, got {value!r:.60}"
        ) from error


def _read_cuts(examples: Sequence[Example], spans: Mapping[int, Sequence[Span]]) -> None:
    """Set the turns that a row and its counterfactuals are cut in, and `cut` in the row's text."""
    places: dict[int, set[int]] = defaultdict(set)
    for position, found in spans.items():
        if not examples[position].segment:
            places[examples[position].row_id].update(span["message"] for span in found)
    for example in examples:
        last = len(example.messages) - 1
        inside = {place for place in places[example.row_id] if 0 <= place <= last}
        example.turns = tuple(sorted(inside)) if inside - {last} else ()
    # A counterfactual follows its original, also where the rows of several runs are together.
    latest: dict[int, Example] = {}
    for position, example in enumerate(examples):
        if example.branch == "original" and example.messages:
            latest[example.row_id] = example
        original = latest.get(example.row_id)
        if position in spans and original is not None:
            response = original.prefix + original.completion
            with _named(position):
                cut_in = replace(original, segment=example.segment, prefix=response)
                example.cut = in_text(cut_in, spans[position])
