"""The whole sequence that a model reads for an example, as texts that say what each part is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from typing import Literal, NamedTuple

import numpy as np

from leaf_distill.data.example import Example, Range, UnusableRow
from leaf_distill.data.offsets import text_offsets
from leaf_distill.data.prompt import Renderer
from leaf_distill.data.template import Place

Kind = Literal["template", "message", "text", "completion"]
"""The template's own words; a message that is not analyzed; the analyzed text, which alone can be
cut; and the labels, with the name of the end token."""


class Part(NamedTuple):
    """A part of a sequence."""

    kind: Kind
    text: str


def sequence(renderer: Renderer, example: Example) -> list[Part]:
    """Return the sequence of tokens that `Renderer.render` makes, as texts in order.

    No two neighbors are of one kind, and none is empty. Where the template does not write the other
    messages as they are, they count as the template's.

    Raises:
        UnusableRow: as for `render`.
    """
    one = renderer.written(example)
    parts = [Part("template", one.start)]
    at = 0
    for place, kind in _places(renderer, example, one.prompt):
        parts += [
            Part("template", one.prompt[at : place.start]),
            Part(kind, one.prompt[place.start : place.stop]),
        ]
        at = place.stop
    # A template may write something between the prompt and the response.
    own = max(len(one.prefix) - len(example.prefix), 0)
    parts += [
        Part("template", one.prompt[at:] + one.prefix[:own]),
        Part("text", one.prefix[own:]),
        Part("completion", one.completion + one.end),
    ]
    grouped = groupby((part for part in parts if part.text), key=lambda part: part.kind)
    return [Part(kind, "".join(part.text for part in group)) for kind, group in grouped]


def label_texts(renderer: Renderer, example: Example) -> tuple[str, list[Range]]:
    """Return the text of an example's completion and end token, and the characters of each label.

    Tokens that are the bytes of one character share it. Labels in earlier turns do not count.

    Raises:
        UnusableRow: as for `Renderer.render`.
    """
    one = renderer.written(example)
    text, last = one.completion, len(one.completion)
    offsets = text_offsets(one.spans, 0, last, 0, text)
    # A token without characters of its own stands where the one before it ends.
    reached = np.maximum.accumulate(np.maximum(offsets[:, 1], 0))
    ranges = [
        (int(start), int(stop)) if start >= 0 else (int(end), int(end))
        for (start, stop), end in zip(offsets, reached, strict=True)
    ]
    return text + one.end, [*ranges, (last, last + len(one.end))]


def _places(renderer: Renderer, example: Example, prompt: str) -> Sequence[tuple[Place, Kind]]:
    """Return where the contents of the messages stand in the prompt, and what each is."""
    whole = replace(example, segment=0, prefix="", renderings={}, notes=[])
    analyzed = () if example.segment else example.places
    contents = [turn.get("content") for turn in example.messages]
    given = tuple(at for at, one in enumerate(contents) if isinstance(one, str) and one)
    for turns in (tuple(sorted({*given, *analyzed})), analyzed):
        if not turns:
            continue
        try:
            places = renderer.template.find_texts(replace(whole, turns=turns), prompt)
        except UnusableRow:
            continue
        kinds: list[Kind] = ["text" if turn in analyzed else "message" for turn in turns]
        return list(zip(places, kinds, strict=True))
    return []
