"""Characters of a row's analyzed text as characters of its messages, and back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from leaf_distill.data.example import Example, Range


def in_messages(example: Example, ranges: Iterable[Range]) -> list[dict[str, int]]:
    """Return characters of `example.text` as characters of single messages.

    Args:
        example: a row.
        ranges: characters [start, stop) of its text; one over a border between two messages gives
            a span in each. An empty one is the place before a character.

    Returns:
        For each span, the index of its `message`, and `start` and `stop` in that message's content.
        The index after the last message is the completion, of which the text is the beginning.
    """
    return [
        {"message": place, "start": max(start, first) - first, "stop": min(stop, last) - first}
        for start, stop in ranges
        for place, (first, last) in zip(example.places, example.parts, strict=True)
        if max(start, first) < min(stop, last) or start == stop in range(first, last)
    ]


def in_text(example: Example, spans: Iterable[Mapping[str, int]]) -> tuple[Range, ...]:
    """Return characters of single messages as sorted characters of `example.text`.

    Args:
        example: a row.
        spans: as `in_messages` gives them.

    Returns:
        A range [start, stop) for each span, sorted.

    Raises:
        ValueError: a span is in no analyzed message, or reaches beyond its message.
    """
    parts = dict(zip(example.places, example.parts, strict=True))
    ranges = []
    for span in spans:
        first, last = parts.get(span["message"], (0, -1))
        if not 0 <= span["start"] <= span["stop"] <= last - first:
            raise ValueError(
                f"spans: must be characters within the messages {list(parts)} of "
                f"{[stop - start for start, stop in parts.values()]} characters, got {dict(span)}"
            )
        ranges.append((first + span["start"], first + span["stop"]))
    return tuple(sorted(ranges))
