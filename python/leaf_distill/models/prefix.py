"""Reuses the keys and values of a prompt's first tokens for several rows that begin with them."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np
import torch

from leaf_distill.data.example import Ids, Rendering
from leaf_distill.models.checks import embedding_rows, input_device, max_positions
from leaf_distill.models.label_logits import LabelBatch, label_output
from leaf_distill.models.quantization import rounding

if TYPE_CHECKING:  # seconds to import
    from transformers import PreTrainedModel
    from transformers.cache_utils import DynamicCache

logger = logging.getLogger(__name__)

_NAMES: Final = ("cache", "past_key_values")
"""The cache as a model's argument and in its output; the second name is the older one."""
_reuses: Final[weakref.WeakKeyDictionary[Any, bool]] = weakref.WeakKeyDictionary()


class Prefix(NamedTuple):
    """The keys and values of one row in each layer, [1, *, T, *], and the cache's name."""

    name: str
    layers: list[tuple[torch.Tensor, torch.Tensor]]


def run_row(
    model: PreTrainedModel, row: Rendering, *, keep: bool = True
) -> tuple[torch.Tensor, Prefix | None]:
    """Return one row's logits [L, V] at its labels, and its keys and values if they are kept.

    They are None, too, if they cannot be cut at any token: a layer with a sliding window or a
    recurrent state has forgotten earlier tokens, or holds one state for all of them.
    """
    batch = LabelBatch([row], input_device(model))
    batch.arguments["use_cache"] = keep
    logits, output = label_output(model, batch)
    return logits, _prefix_of(output, len(row)) if keep else None


def run_behind(
    model: PreTrainedModel, rows: Sequence[Rendering], prefix: Prefix | None, start: int
) -> torch.Tensor:
    """Return the logits [L, V] of rows whose first `start` tokens are those of a prefix.

    Args:
        model: the model that made the prefix.
        rows: whole rows; the first label of each stands behind token `start`.
        prefix: as `run_row` returns it; None computes the rows as a whole.
        start: tokens that are reused.
    """
    if prefix is None:
        start = 0
    batch = LabelBatch([row[start:] for row in rows], input_device(model))
    if prefix is not None and start:
        cache = _beginning(prefix, start, len(rows))
        batch.arguments |= {"use_cache": True, prefix.name: cache}
    return label_output(model, batch)[0]


def can_reuse(model: PreTrainedModel) -> bool:
    """Whether rows behind a prefix have the logits that they have as a whole.

    It is tried on two short rows, once for each model. What a model does with a cache is its own
    affair: if the two differ by more than rounding, whole rows are slower and right.
    """
    if model not in _reuses:
        try:
            _reuses[model] = _probe(model)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # an architecture raises whatever its forward raises
            logger.debug("%s cannot go on from a prefix: %s", type(model).__name__, error)
            _reuses[model] = False
        if not _reuses[model]:
            logger.info(
                "%s has no keys and values that can be reused: its changed prompts run as a whole",
                type(model).__name__,
            )
    return _reuses[model]


def _probe(model: PreTrainedModel) -> bool:
    rows, length = embedding_rows(model), min(8, max_positions(model.config) or 8)
    start = length // 2
    if rows < 2 or length < 4:
        return False
    first = np.arange(1, length + 1) * rows // (length + 2)
    other = np.where(np.arange(length) >= start, (first + rows // 2) % rows, first)
    pair = [_row(first, start), _row(other[:-1], start)]
    _, prefix = run_row(model, pair[0])
    if prefix is None:
        return False
    whole = run_behind(model, pair, None, 0).double()
    reused = run_behind(model, pair, prefix, start).double()
    finite = whole.isfinite()
    if not bool(finite.any()) or not torch.equal(finite, reused.isfinite()):
        return False
    tolerance = max(1e-4, 8 * rounding(model)) * float(whole[finite].abs().max())
    return float((whole - reused)[finite].abs().max()) <= tolerance


def _row(ids: Any, start: int) -> Rendering:
    """Return a row whose labels begin behind token `start`."""
    ids = np.asarray(ids, dtype=np.int32)
    nowhere = np.full((len(ids), 2), -1, dtype=np.int32)
    return Rendering(ids, np.arange(len(ids)) > start, nowhere, np.zeros(len(ids), np.bool_))


def _prefix_of(output: Any, length: int) -> Prefix | None:
    from transformers.cache_utils import DynamicCache, DynamicLayer

    for name in _NAMES:
        cache = output.get(name)
        if type(cache) is DynamicCache:
            layers = [
                (layer.keys, layer.values) if type(layer) is DynamicLayer else (None, None)
                for layer in cache.layers
            ]
            whole = [
                (keys, values)
                for keys, values in layers
                if keys is not None
                and values is not None
                and keys.dim() == values.dim() == 4
                and keys.shape[2] == values.shape[2] == length
            ]
            return Prefix(name, whole) if whole and len(whole) == len(layers) else None
    return None


def _beginning(prefix: Prefix, start: int, size: int) -> DynamicCache:
    """Return a cache of `size` equal rows with the first `start` tokens of a prefix."""
    from transformers.cache_utils import DynamicCache

    cache = DynamicCache()
    for index, layer in enumerate(prefix.layers):
        # Nothing is copied before the cache's first update, which copies in any case.
        keys, values = (states[:, :, :start].expand(size, -1, -1, -1) for states in layer)
        cache.update(keys, values, index)
    return cache


def common_length(one: Ids, other: Ids) -> int:
    """Return how many first tokens two sequences have in common."""
    length = min(len(one), len(other))
    differ = np.flatnonzero(np.asarray(one[:length]) != np.asarray(other[:length]))
    return int(differ[0]) if len(differ) else length
