"""Keeps the memory of freed CPU tensors for the next ones."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch  # first: it loads the libraries that the compiled module is linked to


@contextmanager
def use_cpu_memory_pool() -> Iterator[None]:
    """Keep the memory of CPU tensors that are freed in the block for the next ones of their size.

    Between the layers of a model, a C library gives parts of a freed tensor's memory to small
    objects that stay. It then fits no further tensor of its size, and each layer takes new memory:
    half as much again as its tensors hold. In the block it waits for a tensor of its size, or one
    that is up to an eighth smaller.

    Where sizes differ all the time there is little to gain: memory is taken anew only when what
    waits is at most a quarter of what is in use. At the end of the block the memory that waits is
    freed; tensors may outlive it. Blocks may be nested, and a block holds for all threads. Tensors
    under 32 KiB, tensors on other devices and a profiler that records memory are left alone.

    From the first block on the pool is torch's allocator for CPU tensors, which outside of blocks
    passes all on to the one before.

    It does nothing without the compiled modules, or with another torch than they were built with.
    """
    module = _module()
    if module is None:
        yield
        return
    module.enter()
    try:
        yield
    finally:
        module.leave()


@functools.cache
def _module() -> Any:
    try:
        module = importlib.import_module("leaf_ext._memory")
    except ImportError:  # not built, or with a torch of other libraries
        return None
    return module if module.torch == torch.__version__ else None
