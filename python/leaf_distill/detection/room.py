"""Prompts after which a model's positions end before the longest answer would."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Sequence
from typing import Final

from leaf_distill.models.loading import LazyModel
from leaf_distill.ranks import current

logger = logging.getLogger(__name__)

_warned: Final[weakref.WeakSet[LazyModel]] = weakref.WeakSet()


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
        f"{short} of {len(lengths)} prompts have room for fewer than max_new_tokens "
        f"({max_new_tokens}) in the model's {limit} positions, and are answered apart, which is "
        f"slow. All have room for --max_new_tokens {limit - max(lengths)}; a lower --max_length "
        "leaves long ones out"
    )


def warn_of_little_room(model: LazyModel, sentence: str | None) -> None:
    """Log that sentence, once for a model of a run."""
    if sentence is None or model in _warned or current().rank:
        return
    _warned.add(model)
    logger.warning("%s: %s", model.name, sentence)
