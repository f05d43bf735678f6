"""Prompts after which a model's positions end before the longest answer would."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Sequence
from typing import Final

from leaf_distill.detection.cache import RowCache
from leaf_distill.ranks import current

logger = logging.getLogger(__name__)

_warned: Final[weakref.WeakSet[RowCache]] = weakref.WeakSet()


def little_room(lengths: Sequence[int], limit: int | None, max_new_tokens: int) -> str | None:
    """Return a sentence where prompts have room for fewer tokens than an answer may have.

    Args:
        lengths: tokens of each prompt.
        limit: the model's positions, None where it names no limit.
        max_new_tokens: the longest answer in tokens.
    """
    if limit is None:
        return None
    short = sum(limit - length < max_new_tokens for length in lengths)
    if not short:
        return None
    return (
        f"{short} of {len(lengths)} prompts have room for fewer than {max_new_tokens} new tokens "
        f"in {limit} positions, and are answered apart, slowly; --max_new_tokens "
        f"{limit - max(lengths)} fits all"
    )


def warn_of_little_room(name: str, sentence: str | None, cache: RowCache) -> None:
    """Log that sentence about a model, once for a run, which opens the row cache once."""
    if sentence is None or cache in _warned or current().rank:
        return
    _warned.add(cache)
    logger.warning("%s: %s", name, sentence)
