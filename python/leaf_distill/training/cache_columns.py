"""A teacher's signal on the disk as columns of Parquet, a list of each for a row."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from leaf_distill.data.example import Rendering

Columns = dict[str, np.ndarray[Any, Any]]
"""The signal of a row by the name of a column, one-dimensional each."""

STEPS_A_NAT: Final = 8192
"""Log-probabilities are stored in whole steps: to 1/16384 nat, as exact for small ones as large."""
INFINITE: Final = 2**20 - 1  # steps for a probability of 0

_FLOATS: Final = {
    "float64": pa.float64(),
    "float32": pa.float32(),
    "float16": pa.float16(),
    "bfloat16": pa.float16(),  # its bits
}
_TOP_K: Final = {"ids": pa.int32(), "steps": pa.int32(), "tail_logprob": pa.float32()}


def row_key(ids: np.ndarray[Any, Any], at: np.ndarray[Any, Any]) -> bytes:
    """Return the key of a row, 16 bytes: a digest of its ids [T] and label positions, bool [T]."""
    state = hashlib.sha256(np.ascontiguousarray(ids, dtype="<i4").tobytes())
    state.update(np.packbits(np.asarray(at, dtype=np.bool_)).tobytes())
    return state.digest()[:16]


def rendering_key(rendering: Rendering) -> bytes:
    """Return the key of a rendered row."""
    return row_key(rendering.input_ids, np.append(rendering.loss_mask[1:], False))


def column_types(manifest: Mapping[str, Any]) -> list[tuple[str, pa.DataType]]:
    """Return the name and type of the columns of a signal, of which each row has a list."""
    if manifest["signal"] == "topk":
        return list(_TOP_K.items())
    return [("states", _FLOATS[manifest["dtype"]])]


def part_files(directory: Path) -> list[Path]:
    """Return the files of rows in the directory of a cache."""
    return sorted(directory.glob("part-*.parquet"))


def hidden_columns(states: Tensor) -> Columns:
    """Return hidden states [n, H] as a column; bfloat16 as the bits of float16."""
    bits = states.view(torch.float16) if states.dtype == torch.bfloat16 else states
    return {"states": bits.cpu().numpy().reshape(-1)}


def top_k_columns(logits: Tensor, top_k: int, temperature: float) -> Columns:
    """Return the k largest log-probabilities of each row, and the exact mass of all others.

    Args:
        logits: float32 or float64 [n, V].
        top_k: how many, at most V.
        temperature: divides the logits.

    Returns:
        As of `stored_columns`; the tail is NaN where a logit is.
    """
    logprobs = (logits / temperature).log_softmax(-1)
    top, ids = logprobs.topk(top_k)
    return stored_columns(ids, top, logprobs.scatter(1, ids, -torch.inf).logsumexp(-1))


def stored_columns(ids: Tensor, top: Tensor, tail: Tensor) -> Columns:
    """Return log-probabilities as they are stored.

    Args:
        ids, top: [n, k], the tokens and their log-probabilities, largest first.
        tail: [n], the logarithm of the other tokens' mass.

    Returns:
        `ids` [n * k]; `steps` [n * k]: the first log-probability of a row in 1 / STEPS_A_NAT,
        negated, then how far each lies below the one before; and `tail_logprob` [n].
    """
    steps = (top.double() * -STEPS_A_NAT).round().clamp(0, INFINITE - 1)
    steps = steps.masked_fill(top.isneginf(), INFINITE).nan_to_num(0)
    steps = steps.diff(dim=1, prepend=torch.zeros_like(steps[:, :1]))
    return {
        "ids": ids.flatten().int().cpu().numpy(),
        "steps": steps.flatten().cpu().numpy().astype(np.int32),
        "tail_logprob": tail.float().cpu().numpy(),
    }


def top_k_logprobs(steps: Tensor) -> Tensor:
    """Return log-probabilities, float64 [n, k], from their steps, int64 [n, k]."""
    total = steps.cumsum(dim=1)
    return (total.double() / -STEPS_A_NAT).masked_fill(total == INFINITE, -torch.inf)
