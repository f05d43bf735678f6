"""Threads, seeds and backends of all tests."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

# A pure-Python build (LEAF_BUILD_EXT=0) has no backend "cpu"; every other one must pass its tests.
PURE_PYTHON = os.environ.get("LEAF_TEST_PURE_PYTHON") == "1"
BACKENDS = ("reference",) if PURE_PYTHON else ("reference", "cpu")


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
