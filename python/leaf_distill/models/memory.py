"""Bounds the tokens of a batch by the free memory, and halves a batch that is too large."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Sequence
from typing import Any, Final, TypeVar

import torch

logger = logging.getLogger(__name__)

Item = TypeVar("Item")
Result = TypeVar("Result")

CPU_BATCH_TOKENS: Final = 1024
"""Larger batches are no faster on a CPU, and take memory in proportion."""
_FEWEST: Final = 256
_MOST: Final = 65536


def default_batch_tokens(config: Any, dtype: str, device: torch.device | str) -> int:
    """Return how many tokens, padding included, one batch should hold on a device.

    Args:
        config: the configuration of a model that is to be loaded.
        dtype: the name of the dtype of its weights.
        device: the device that it will run on.

    Returns:
        1024 on a CPU. On a GPU, half of the tokens that fit beside the weights by a cautious
        estimate of a forward and backward pass, between 256 and 65,536.
    """
    device = torch.device(device)
    if device.type != "cuda":
        return CPU_BATCH_TOKENS
    # The whole memory, not what is free now: the plan of the batches must be the same in a rerun.
    total = torch.cuda.get_device_properties(device).total_memory
    return batch_tokens(config, total, getattr(torch, dtype).itemsize)


def batch_tokens(config: Any, free: int, itemsize: int) -> int:
    """Return how many tokens fit into half of the memory that the weights leave of `free` bytes.

    Args:
        config: the configuration of a model that is to be loaded.
        free: bytes of memory, weights included.
        itemsize: bytes of a value of the model's dtype.
    """
    text = config.get_text_config()
    hidden = int(getattr(text, "hidden_size", 0) or 1024)
    layers = int(getattr(text, "num_hidden_layers", 0) or 24)
    inner = _number(text, "intermediate_size", "ffn_dim", "n_inner") or 4 * hidden
    vocabulary = int(text.vocab_size)
    weights = layers * (4 * hidden * hidden + 3 * hidden * inner) + 2 * vocabulary * hidden
    # A layer keeps about 16 values of its width and 4 of its inner width for the backward pass. A
    # label's logits exist in the model's dtype, in float32, and as the gradients of both.
    a_token = layers * (16 * hidden + 4 * inner) * itemsize + vocabulary * (8 + 2 * itemsize)
    return min(max((free - weights * itemsize) // 2 // a_token, _FEWEST), _MOST)


def with_smaller_batches(
    batch: Sequence[Item], run: Callable[[Sequence[Item]], list[Result]]
) -> list[Result]:
    """Return `run(batch)`; if the memory is not enough, run its halves one after the other.

    Args:
        batch: the rows of one batch.
        run: returns one result for each row that it is given, in order.

    Raises:
        ValueError: the memory is not enough for a single row.
    """
    try:
        return run(batch)
    except (RuntimeError, MemoryError) as error:
        from accelerate.utils.memory import should_reduce_batch_size

        if not (isinstance(error, MemoryError) or should_reduce_batch_size(error)):
            raise
        reason = (str(error).strip() or "out of memory").splitlines()[0]
    # Outside of the handler, because its exception keeps the tensors of the failed pass.
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if len(batch) < 2:
        raise ValueError(
            f"max_batch_tokens: must let one row fit into the memory, which is full with a single "
            f"row ({reason}); lower max_length, or choose a smaller dtype or model"
        )
    middle = (len(batch) + 1) // 2
    logger.warning(
        "the memory is not enough for a batch of %d rows, which runs in two halves; lower "
        "max_batch_tokens to avoid this",
        len(batch),
    )
    return [
        *with_smaller_batches(batch[:middle], run),
        *with_smaller_batches(batch[middle:], run),
    ]


def _number(config: Any, *names: str) -> int:
    values = (getattr(config, name, None) for name in names)
    return next((value for value in values if isinstance(value, int) and value > 0), 0)
