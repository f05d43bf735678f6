"""The characters of the analyzed text that each token of a rendering stands for."""

from __future__ import annotations

import unicodedata
from itertools import chain

import numpy as np
from numpy.typing import NDArray


def solid_tokens(offsets: NDArray[np.int32], text: str) -> NDArray[np.bool_]:
    """Return which tokens of the text hold more than white space."""
    # The number of characters before each one that are no white space.
    solid = np.cumsum([0, *(not character.isspace() for character in text)])
    mask: NDArray[np.bool_] = (offsets[:, 0] >= 0) & (solid[offsets[:, 1]] > solid[offsets[:, 0]])
    return mask


def text_offsets(
    spans: list[tuple[int, int]], start: int, stop: int, shift: int, text: str
) -> NDArray[np.int32]:
    """Return characters of the analyzed text for tokens inside [start, stop), and -1 elsewhere.

    Some tokenizers trim characters from their offsets, or drop them. A token takes the marks that
    follow it, such as accents, which belong to its last character; the token that begins after the
    last character so far takes the other characters in between, and the last one what is left.

    Args:
        spans: characters [start, stop) of each token in `text`.
        start, stop: where the analyzed text stands in `text`.
        shift: characters of the analyzed text that `text` lacks in front.
        text: what was tokenized.

    Returns:
        int32 [T, 2]; tokens that are the bytes of one character share it.
    """
    flat = np.fromiter(chain.from_iterable(spans), dtype=np.int32, count=2 * len(spans))
    first, last = flat[0::2], flat[1::2].copy()
    reached = np.empty_like(last)  # the last character before each token
    reached[:1], reached[1:] = start, last[:-1]
    reached = np.maximum.accumulate(reached)
    for at in np.flatnonzero((first > reached) & (reached > start)):
        marked = _end_of_marks(text, int(reached[at]), min(int(first[at]), stop))
        if marked > reached[at]:
            last[:at][last[:at] == reached[at]] = marked
            reached[at] = marked
    begin = np.minimum(first, reached)
    inside = (first >= start) & (last <= stop) & (begin < last)
    for at in np.flatnonzero(inside)[-1:]:
        left = text[last[at] : stop].rstrip()
        if left and not (first[at + 1 :] < stop).any():
            last[inside & (last == last[at])] += len(left)
    offsets = np.full((len(spans), 2), -1, dtype=np.int32)
    offsets[inside, 0] = begin[inside] + (shift - start)
    offsets[inside, 1] = last[inside] + (shift - start)
    return offsets


def _end_of_marks(text: str, at: int, stop: int) -> int:
    """Return the end of the combining marks and joiners that begin at a character."""
    while at < stop and unicodedata.category(text[at]) in ("Mn", "Mc", "Me", "Cf"):
        at += 1
    return at
