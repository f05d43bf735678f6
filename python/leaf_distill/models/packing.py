"""Runs the rows of a batch as one sequence without padding, and attention within each row alone.

Only attention reads other tokens. Of `sdpa` it is computed row by row here: the N x N mask with
which transformers keeps packed rows apart costs more than the padding that it saves. Of flash
attention transformers' own kernels for rows of various lengths are used.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn.functional import pad

from leaf_distill.models.checks import (
    embedding_rows,
    eval_mode,
    input_device,
    logits_agree,
    max_positions,
)
from leaf_distill.models.quantization import rounding

logger = logging.getLogger(__name__)

_NAME: Final = "sdpa_of_rows"
_lengths: ContextVar[tuple[int, ...] | None] = ContextVar("lengths", default=None)
"""The lengths of the rows in the forward pass that runs, if they are packed."""
_keeps_apart: Final[weakref.WeakKeyDictionary[Any, bool]] = weakref.WeakKeyDictionary()


@dataclass(frozen=True, eq=False)
class PackedRows:
    """The attention mask of rows that follow one another; each token reads its own row only.

    Attributes:
        lengths: tokens of each row.
        mask: bool [1, 1, T, T] for the longest row, and with its first columns and rows for a
            shorter one: what a token reads, such as a window; None: all tokens before it.
    """

    lengths: tuple[int, ...]
    mask: Tensor | None

    def within(self, length: int) -> Tensor | None:
        """Return the mask [1, 1, length, length] of one row."""
        return None if self.mask is None else self.mask[..., :length, :length]


@contextmanager
def packed(ids: Tensor, attention_mask: Tensor) -> Iterator[dict[str, Any]]:
    """Yield a model's arguments for the rows of a batch as one sequence, for one forward pass.

    Args:
        ids, attention_mask: int64 [B, T].
    """
    kept = attention_mask.bool()
    sizes = kept.sum(dim=1)
    lengths = tuple(sizes.tolist())
    ends = pad(sizes.cumsum(0), (1, 0)).int()
    token = _lengths.set(lengths)
    try:
        yield {
            "input_ids": ids[kept][None],
            "attention_mask": None,
            "position_ids": (kept.cumsum(dim=1) - 1)[kept][None],
            **{"cu_seq_lens_q": ends, "cu_seq_lens_k": ends},
            **{"max_length_q": max(lengths), "max_length_k": max(lengths)},
        }
    finally:
        _lengths.reset(token)


@contextmanager
def padded(ids: Tensor, attention_mask: Tensor) -> Iterator[dict[str, Any]]:
    """Yield a model's arguments for the rows of a batch side by side, as `packed` does.

    A causal model's tokens do not read padding behind them, and without a mask attention takes
    faster kernels. Padding in front keeps its mask.
    """
    behind = bool((attention_mask.diff(dim=1) <= 0).all())
    yield {"input_ids": ids, "attention_mask": None if behind else attention_mask}


@contextmanager
def attention_of_rows(model: Any) -> Iterator[None]:
    """Let `sdpa` in a model take the rows of `packed` one by one; other passes are as before.

    It must last until the backward pass is done, which may compute the forward pass again.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(_NAME, _attention)
    AttentionMaskInterface.register(_NAME, _mask)
    changed = [one for one in _configs(model) if one._attn_implementation == "sdpa"]
    try:
        for config in changed:  # "": the configurations inside it stay as they are
            config._attn_implementation = {"": _NAME}
        yield
    finally:
        for config in changed:
            config._attn_implementation = {"": "sdpa"}


def can_pack(model: Any, role: str) -> bool:
    """Return whether a model keeps packed rows apart, with the logits that they have alone.

    It is tried on two short rows, once for each model: states of a recurrence or a convolution, or
    positions that count on, cross from one row to the next.

    Args:
        model: a causal language model, not yet wrapped for training.
        role: its name in the log.
    """
    if model not in _keeps_apart:
        names = sorted({str(config._attn_implementation) for config in _configs(model)})
        others = [name for name in names if name not in ("sdpa", _NAME) and "flash" not in name]
        _keeps_apart[model] = not others and _try(model)
        if not _keeps_apart[model]:
            logger.info(
                "the %s's rows are padded: %s",
                role,
                f"packed rows need sdpa or flash attention, and it has {', '.join(others)}"
                if others
                else f"{type(model).__name__} does not keep packed rows apart",
            )
    return _keeps_apart[model]


def _configs(model: Any) -> list[Any]:
    """Return the configurations of a model and its parts that name an attention."""
    found = {id(one): one for part in model.modules() if (one := getattr(part, "config", None))}
    return [one for one in found.values() if getattr(one, "_attn_implementation", None)]


def _try(model: Any) -> bool:
    try:
        with attention_of_rows(model):
            return _probe(model)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # an architecture raises whatever its forward raises
        logger.debug("%s cannot run packed rows: %s", type(model).__name__, error)
        return False


@torch.inference_mode()
def _probe(model: Any) -> bool:
    rows, length = embedding_rows(model), min(8, max_positions(model.config) or 8)
    if rows < 2 or length < 2:
        return False
    first = torch.arange(1, length + 1) * rows // (length + 2)
    other = (first + max(1, rows // 2)) % rows
    second = first.flip(0)[1:]

    def logits(*ids: Tensor) -> Tensor:
        batch = torch.nn.utils.rnn.pad_sequence(list(ids), batch_first=True)
        mask = torch.arange(batch.shape[1]) < torch.tensor([[len(row)] for row in ids])
        device = input_device(model)
        with packed(batch.to(device), mask.long().to(device)) as arguments:
            made: Tensor = model(**arguments, use_cache=False).logits[0]
        return made.double()

    def alone(ids: Tensor) -> Tensor:
        made: Tensor = model(input_ids=ids[None].to(input_device(model)), use_cache=False).logits[0]
        return made.double()

    with eval_mode(model):
        both, changed = logits(first, second), logits(other, second)
        separate = torch.cat([alone(first), alone(second)])
    eps = rounding(model)
    # Passes of one shape round alike, so that the second row shows the smallest leak.
    apart = logits_agree(changed[length:], both[length:], max(2e-5, eps))
    return apart and logits_agree(both, separate, max(1e-4, 8 * eps))


# ---- what transformers calls ----


def _mask(*args: Any, **options: Any) -> Any:
    """Return `PackedRows` for packed rows, else the mask of `sdpa`."""
    from transformers.masking_utils import sdpa_mask

    lengths = _lengths.get()
    if lengths is None or options["q_length"] != sum(lengths):
        return sdpa_mask(*args, **options)
    longest, window = max(lengths), options.get("local_size")
    if not options["use_vmap"] and (window is None or longest <= window):
        return PackedRows(lengths, None)
    start = sum(lengths[: lengths.index(longest)])
    size = {"q_length": longest, "kv_length": longest, "q_offset": start, "kv_offset": start}
    return PackedRows(lengths, sdpa_mask(*args, **{**options, **size}))


def _attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: PackedRows | Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Return `sdpa` of the states [1, H, N, D] within each row, [1, N, H, D]."""
    states, rows = [query, key, value], attention_mask
    if not isinstance(rows, PackedRows):
        return _sdpa(module, states, rows, **options), None
    if query.device.type != "cpu":  # launches for each row would take longer than its padding
        return _attention_of_padded(module, states, rows, **options), None
    parts = zip(*(torch.split(one, list(rows.lengths), dim=2) for one in states), strict=True)
    made = [_sdpa(module, part, rows.within(part[0].shape[2]), **options) for part in parts]
    return torch.cat(made, dim=1), None


def _attention_of_padded(
    module: torch.nn.Module, states: Sequence[Tensor], rows: PackedRows, **options: Any
) -> Tensor:
    """Return `_attention` of packed rows by one call, for which alone they are padded."""
    lengths = torch.tensor(rows.lengths)
    count, width = len(lengths), max(rows.lengths)
    at = (torch.arange(width) < lengths[:, None]).flatten().nonzero()[:, 0]
    at = at.to(states[0].device, non_blocking=True)

    def side_by_side(one: Tensor) -> Tensor:
        tokens = one[0].transpose(0, 1)  # [N, H, D]
        made = tokens.new_zeros(count * width, *tokens.shape[1:]).index_copy(0, at, tokens)
        return made.view(count, width, *tokens.shape[1:]).transpose(1, 2)

    made = _sdpa(module, [side_by_side(one) for one in states], rows.within(width), **options)
    return made.flatten(0, 1).index_select(0, at)[None]


def _sdpa(
    module: torch.nn.Module, states: Sequence[Tensor], mask: Tensor | None, **options: Any
) -> Tensor:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    query, key, value = states
    made: Tensor = sdpa_attention_forward(module, query, key, value, mask, **options)[0]
    return made
