"""Carries values of one tokenizer's tokens over to the tokens of another one."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from leaf_distill.data.example import Floats

Offsets = npt.NDArray[np.integer[Any]]


def pool(values: Floats, offsets: Offsets, onto: Offsets) -> Floats:
    """Spread each token's value over its characters, and sum it up over the other tokens.

    A value is spread evenly, so that the sum over a text stays what it was. Tokens that are bytes
    of one character add up to the character's value, and share it evenly where they receive it.
    The alternatives are the mean or the maximum over a token, which would give a word the same
    value whether it is one token or four, although the student's own values are split among four.

    Args:
        values: float32 [m], one for each token, such as gradient norms.
        offsets: [m, 2], the characters [start, stop) of each, in the order of the text.
        onto: [d, 2], those of the other tokenizer's tokens.

    Returns:
        float32 [d]; `values` themselves where the offsets are equal. Characters that only one
        tokenizer's tokens cover give or get nothing.
    """
    if np.array_equal(offsets, onto):
        return values
    length = int(max(offsets.max(initial=0), onto.max(initial=0)))
    # What a character has before it, by differences of each token's value a character.
    rates = np.zeros(length + 1)
    share = values.astype(np.float64) / (offsets[:, 1] - offsets[:, 0])
    np.add.at(rates, offsets[:, 0], share)
    np.add.at(rates, offsets[:, 1], -share)
    sharing = np.zeros(length + 1)
    np.add.at(sharing, onto[:, 0], 1)
    np.add.at(sharing, onto[:, 1], -1)
    a_character = np.cumsum(rates)[:-1] / np.maximum(np.cumsum(sharing)[:-1], 1)
    before = np.concatenate([[0.0], np.cumsum(a_character)])
    pooled: Floats = (before[onto[:, 1]] - before[onto[:, 0]]).astype(np.float32)
    return np.maximum(pooled, 0)  # a difference of sums may be just below 0
