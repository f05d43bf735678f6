"""Moves the gradient norms of one tokenization of a text to another one."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from leaf_distill.data.example import Floats

Offsets = npt.NDArray[np.integer[Any]]


def pool(norms: Floats, offsets_t: Offsets, offsets_s: Offsets) -> Floats:
    """Return the norms of the teacher's tokens at the student's tokens of the same text.

    Each token's norm is spread evenly over its characters; a character has the sum of what its
    tokens give it; and the student's tokens that share a character take equal parts of it. The sum
    of all norms stays the same, so that a word does not weigh more because one tokenizer splits it
    into more tokens; the mean or the maximum over the tokens that overlap would count such a norm
    several times. The norm of the summed gradients would be an alternative of its own, but two
    models' embeddings have different spaces, and the norms alone are kept.

    Args:
        norms: float [d_t], of the teacher's tokens.
        offsets_t: int [d_t, 2], characters [start, stop) of the teacher's tokens.
        offsets_s: int [d_s, 2], those of the student's tokens. Tokens may share characters, and
            characters may have no token.

    Returns:
        [d_s], of the dtype of `norms`; the norms themselves where the offsets are equal. What
        falls on characters without a student's token goes to the tokens of the nearest character
        that has one, the earlier of two; so nothing is lost unless there is no token at all.

    Raises:
        ValueError: the shapes do not fit each other, or a token has no character.
    """
    norms = np.asarray(norms)
    for name, offsets in (("offsets_t", offsets_t), ("offsets_s", offsets_s)):
        shaped = np.ndim(offsets) == 2 and np.shape(offsets)[1] == 2
        if not shaped or (offsets[:, 0] < 0).any() or (offsets[:, 0] >= offsets[:, 1]).any():
            raise ValueError(
                f"{name}: must be [d, 2] with 0 <= start < stop, got the shape {np.shape(offsets)}"
                f"{' with a token of no character' if shaped else ''}; give domain tokens only"
            )
    if norms.shape != (len(offsets_t),):
        raise ValueError(
            f"norms: must be one number for each of the {len(offsets_t)} tokens of offsets_t, got "
            f"the shape {norms.shape}"
        )
    if np.array_equal(offsets_t, offsets_s):
        return norms.copy()
    if not len(norms) or not len(offsets_s):
        return np.zeros(len(offsets_s), norms.dtype)
    token_t, character_t = _characters(offsets_t)
    token_s, character_s = _characters(offsets_s)
    share = norms.astype(np.float64) / (offsets_t[:, 1] - offsets_t[:, 0])
    sharers = np.bincount(character_s)
    taken = _nearest(character_t, np.flatnonzero(sharers))
    mass = np.bincount(taken, weights=share[token_t], minlength=len(sharers))
    parts = mass[character_s] / sharers[character_s]
    pooled: Floats = np.bincount(token_s, weights=parts).astype(norms.dtype)
    return pooled


def _characters(offsets: Offsets) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return each token's index and each of its characters, one entry a character."""
    lengths = (offsets[:, 1] - offsets[:, 0]).astype(np.int64)
    token = np.repeat(np.arange(len(lengths)), lengths)
    before = np.cumsum(lengths) - lengths
    return token, np.arange(len(token)) + (offsets[:, 0] - before)[token]


def _nearest(
    characters: npt.NDArray[np.int64], covered: npt.NDArray[np.int64]
) -> npt.NDArray[np.int64]:
    """Return for each character the nearest of `covered`, which is sorted; the earlier of two."""
    after = np.searchsorted(covered, characters).clip(0, len(covered) - 1)
    before = np.maximum(after - 1, 0)
    closer = np.abs(characters - covered[before]) <= np.abs(covered[after] - characters)
    nearest: npt.NDArray[np.int64] = covered[np.where(closer, before, after)]
    return nearest
