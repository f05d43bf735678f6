"""Finds the tokens of earlier assistant turns, by their characters in the rendered prompt."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

import numpy as np

from leaf_distill.data.example import Mask, Range
from leaf_distill.data.offsets import text_offsets
from leaf_distill.data.template import Place


def earlier_turns(messages: Sequence[dict[str, str]]) -> tuple[int, ...]:
    """Return the indices of a prompt's assistant turns that have a text."""
    return tuple(
        at
        for at, turn in enumerate(messages)
        if turn["role"] == "assistant" and turn["content"].strip()
    )


def turn_tokens(
    places: Iterable[Place],
    text: str,
    ids: Sequence[int],
    spans: Sequence[Range],
    end_ids: Collection[int],
) -> Mask:
    """Return the tokens of turns, each with the end token behind it, where there is one.

    A token that has characters of the template beside those of a turn is none of its tokens; white
    space does not count.

    Args:
        places: where the turns stand.
        text: the rendered conversation.
        ids, spans: its T tokens, and their characters.
        end_ids: tokens that end a turn.

    Returns:
        bool [T].
    """
    mask = np.zeros(len(ids), dtype=np.bool_)
    starts, stops = np.asarray(spans, dtype=np.int64).reshape(-1, 2).T
    for place in places:
        # Some tokenizers trim white space from offsets, others join what stands before a turn.
        mask |= text_offsets(list(spans), place.start, place.stop, place.shift, text)[:, 0] >= 0
        for at in ((starts < place.stop) & (stops > place.start)).nonzero()[0].tolist():
            beside = text[starts[at] : place.start] + text[place.stop : stops[at]]
            mask[at] |= not beside.strip()
        behind = int(np.searchsorted(starts, place.stop))
        while behind < len(ids) and ids[behind] not in end_ids:
            if text[starts[behind] : stops[behind]].strip():
                break  # the template goes on without an end
            behind += 1
        else:
            mask[behind : behind + 1] = True
    return mask
