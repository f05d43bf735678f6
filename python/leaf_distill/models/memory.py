"""Bounds the tokens of a batch by the free memory, and halves a batch that is too large."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any, Final, TypeVar

import torch

from leaf_distill.ranks import processes

logger = logging.getLogger(__name__)

Item = TypeVar("Item")
Result = TypeVar("Result")

CPU_BATCH_TOKENS: Final = 512
"""Larger batches are hardly faster on a CPU, and take memory in proportion."""
CPU_ANSWER_TOKENS: Final = 8192
"""While a model answers, every step reads all weights, for one row as for many."""
EXACT: Final = ("float32", "float64")
"""Dtypes in which a row's values do not depend on the shape of its batch beyond rounding."""
_FEWEST: Final = 256
_MOST: Final = 1 << 16
_MOST_OF_ANSWERS: Final = 1 << 19
"""A step reads all weights, for one row as for many; but a run that is killed loses its batch."""
_SHORTEST: Final = 128
"""Tokens of a row with its answer, for the logits that each row has."""
_CGROUP: Final = Path("/sys/fs/cgroup")


def default_batch_tokens(
    config: Any,
    dtype: str,
    device: torch.device | str,
    *,
    free: int | None = None,
    answers: bool = False,
    weight_itemsize: float | None = None,
) -> int:
    """Return how many tokens, padding included, one batch should hold on a device.

    Args:
        config: the configuration of a model that is to be loaded.
        dtype: the name of the dtype of its weights.
        device: the device that it will run on.
        free: bytes of this machine's memory for the model, its weights included; None: what is
            free now.
        answers: whether the model answers, without gradients.
        weight_itemsize: bytes of a linear layer's weight, where they are quantized.

    Returns:
        Half of the tokens that fit beside the weights by a cautious estimate, of a forward and
        backward pass or of answers; at least 256, and at most 65,536 or, for answers, 524,288; on
        a CPU at most 512 or, for answers, 8192.
    """
    device, itemsize = torch.device(device), getattr(torch, dtype).itemsize
    if device.type == "cuda":
        # The whole memory, not what is free: the plan of the batches must be the same in a rerun.
        total = torch.cuda.get_device_properties(device).total_memory
        return batch_tokens(
            config, total, itemsize, answers=answers, weight_itemsize=weight_itemsize
        )
    # Where results depend on the plan, it must not depend on what else is running.
    if dtype not in EXACT:
        memory = machine_memory()
    else:
        memory = (free_memory() if free is None else free) // processes()
    most = CPU_ANSWER_TOKENS if answers else CPU_BATCH_TOKENS
    fitting = batch_tokens(
        config, memory, itemsize, answers=answers, weight_itemsize=weight_itemsize
    )
    return min(most, fitting)


def batch_tokens(
    config: Any,
    free: int,
    itemsize: int,
    *,
    answers: bool = False,
    weight_itemsize: float | None = None,
) -> int:
    """Return how many tokens fit into half of the memory that the weights leave of `free` bytes.

    Args:
        config: the configuration of a model that is to be loaded.
        free: bytes of memory, weights included.
        itemsize: bytes of a value of the model's dtype.
        answers: whether the model answers, without gradients.
        weight_itemsize: bytes of a linear layer's weight, where they are quantized.
    """
    text = config.get_text_config()
    hidden = int(getattr(text, "hidden_size", 0) or 1024)
    layers = int(getattr(text, "num_hidden_layers", 0) or 24)
    inner = _number(text, "intermediate_size", "ffn_dim", "n_inner") or 4 * hidden
    vocabulary = int(text.vocab_size)
    layer_weights = layers * (4 * hidden * hidden + 3 * hidden * inner)
    weights = layer_weights * (weight_itemsize or itemsize) + 2 * vocabulary * hidden * itemsize
    if answers:
        # The cache of keys and values, which is copied as it grows, and one layer's states.
        heads = _number(text, "num_attention_heads") or 1
        shared = _number(text, "num_key_value_heads") or heads
        width = _number(text, "head_dim") or hidden // heads
        a_token = (4 * layers * shared * width + 6 * hidden + 3 * inner) * itemsize
        # A row's logits are in float32, and twice more while a token is drawn.
        a_token += vocabulary * 12 // _SHORTEST
    else:
        # A layer keeps about 16 values of its width and 4 of its inner width for the backward pass.
        # A label's logits exist in the model's dtype, in float32, and as the gradients of both.
        a_token = layers * (16 * hidden + 4 * inner) * itemsize + vocabulary * (8 + 2 * itemsize)
    most = _MOST_OF_ANSWERS if answers else _MOST
    return min(max(int((free - weights) / 2) // a_token, _FEWEST), most)


def machine_memory() -> int:
    """Return the bytes of memory that this process may use, also within a container's limit."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min(total, _limit() or total)


def free_memory() -> int:
    """Return the bytes of memory that are free now, by Linux's count; elsewhere all of it."""
    free = machine_memory()
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        line = next(one for one in lines if one.startswith("MemAvailable:"))
        free = min(free, int(line.split()[1]) * 1024)
    with contextlib.suppress(OSError, ValueError):
        if limit := _limit():
            used = int((_CGROUP / "memory.current").read_text())
            free = min(free, limit - used + _file_cache())
    return max(0, free)


def _limit() -> int | None:
    """Return the limit of this process's container, None if it has none."""
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):  # "max" is no number
            return int((_CGROUP / name).read_text())
    return None


def _file_cache() -> int:
    """Return the bytes of files that a container's memory holds and gives up when it is full."""
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = (_CGROUP / "memory.stat").read_text().splitlines()
        return int(next(one for one in lines if one.startswith("inactive_file ")).split()[1])
    return 0


class Halvings:
    """How many batches ran in halves, because the memory was not enough."""

    def __init__(self) -> None:
        self.count = 0


_counted: ContextVar[Halvings | None] = ContextVar("halvings", default=None)


@contextlib.contextmanager
def count_halvings() -> Iterator[Halvings]:
    """Count the batches that `with_smaller_batches` halves within the block."""
    halvings = Halvings()
    token = _counted.set(halvings)
    try:
        yield halvings
    finally:
        _counted.reset(token)


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
    if halvings := _counted.get():
        halvings.count += 1
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
