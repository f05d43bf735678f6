"""The distractors of a problem that is known with and without them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from difflib import SequenceMatcher
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from leaf_distill.data.example import Mask, Range
from leaf_distill.detection.units import clauses

_PIECE = re.compile(r"\s*(?:\w+(?:[.,:/'\u2019-]\w+)*|[^\w\s])")


class Distractors(NamedTuple):
    """The text that was put into a problem.

    Attributes:
        ranges: characters of the longer text, sorted and disjoint.
        lost: words of the plain text that the longer one lacks or writes otherwise; 0 where the
            longer text is the plain one with insertions, which the ranges then describe exactly.
    """

    ranges: tuple[Range, ...]
    lost: int


def distractors(plain: str, adversarial: str) -> Distractors:
    """Find what was put into a plain problem to make the adversarial one.

    The texts are compared word by word; case, white space and punctuation marks are no difference.
    A clause of which two thirds of the letters and digits were put in, and all its numbers, counts
    whole, with its punctuation mark; of any other clause, the words that were put in.
    """
    old, new = _pieces(plain), _pieces(adversarial)
    pairs = _matches([_key(plain, one) for one in old], [_key(adversarial, one) for one in new])
    matched, kept = {one for one, _ in pairs}, {other for _, other in pairs}
    lost = sum(at not in matched and _is_word(plain, one) for at, one in enumerate(old))
    added = np.zeros(len(adversarial), dtype=np.bool_)
    for at, (start, stop) in enumerate(new):
        if at not in kept and _is_word(adversarial, (start, stop)):
            added[start:stop] = True
    letters = np.array([char.isalnum() for char in adversarial], dtype=np.bool_)
    digits = np.array([char.isdigit() for char in adversarial], dtype=np.bool_)
    inside = added.copy()
    for start, stop in clauses(adversarial, [(0, len(adversarial))]):
        clause = slice(start, stop)
        mostly = 3 * (added & letters)[clause].sum() >= 2 * letters[clause].sum() > 0
        if mostly and not (digits & ~added)[clause].any():
            inside[clause] = True
    return Distractors(_runs(inside), lost)


def _matches(old: Sequence[str], new: Sequence[str]) -> list[tuple[int, int]]:
    """Return the positions of equal words, in order.

    The common beginning and end are taken first, so that one insertion is always found whole, also
    between sentences that are repeated.
    """
    most = min(len(old), len(new))
    first = next((at for at in range(most) if old[at] != new[at]), most)
    last = next((at for at in range(most - first) if old[-1 - at] != new[-1 - at]), most - first)
    middle = old[first : len(old) - last], new[first : len(new) - last]
    blocks = SequenceMatcher(None, *middle, autojunk=False).get_matching_blocks()
    pairs = [(at, at) for at in range(first)]
    pairs += [(first + one.a + at, first + one.b + at) for one in blocks for at in range(one.size)]
    return pairs + [(len(old) - at, len(new) - at) for at in range(last, 0, -1)]


def tokens_inside(offsets: NDArray[np.int64], ranges: Sequence[Range]) -> Mask:
    """Return bool [d]: the tokens of which at least half the characters lie in the ranges.

    Args:
        offsets: characters [start, stop) of each token, [d, 2].
        ranges: sorted and disjoint, as `distractors` returns them.
    """
    held = np.zeros(len(offsets), dtype=np.int64)
    for start, stop in ranges:
        low, high = np.maximum(offsets[:, 0], start), np.minimum(offsets[:, 1], stop)
        held += np.maximum(high - low, 0)
    inside: Mask = 2 * held >= np.maximum(offsets[:, 1] - offsets[:, 0], 1)
    return inside


def _pieces(text: str) -> list[Range]:
    """Return words and punctuation marks, each with the white space before it."""
    return [match.span() for match in _PIECE.finditer(text)]


def _key(text: str, one: Range) -> str:
    return text[slice(*one)].strip().lower()


def _is_word(text: str, one: Range) -> bool:
    return any(char.isalnum() for char in text[slice(*one)])


def _runs(inside: Mask) -> tuple[Range, ...]:
    edges = np.flatnonzero(np.diff(np.concatenate(([False], inside, [False]))))
    return tuple((int(a), int(b)) for a, b in zip(edges[::2], edges[1::2], strict=True))
