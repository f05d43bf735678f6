"""Threads, seeds and backends of all tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from leaf_ext import dispatch

# Every backend that runs on this machine. That "cpu" is among them is a test of its own.
BACKENDS = tuple(
    name
    for name in dispatch.BACKENDS
    if name != "auto" and dispatch.missing(name, torch.device("cpu"), torch.float32) is None
)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Memory that an op allocates and forgets to write holds NaN (or the largest integer)."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.utils.deterministic.fill_uninitialized_memory = fill
    torch.use_deterministic_algorithms(deterministic)
