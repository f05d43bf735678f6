"""Threads, seeds and backends of all tests."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import pytest
import torch
from quick_interpreter import quicken_the_interpreter

# Without a GPU the Triton kernels run in Triton's interpreter. Triton asks for this when it is
# imported, so it is said before anything imports leaf_ext; on a GPU they run on the GPU.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"

from leaf_ext.schema import NAMESPACES, TRITON  # noqa: E402

# A pure-Python build (LEAF_BUILD_EXT=0) has no backend "cpu"; every other one must pass its tests.
PURE_PYTHON = os.environ.get("LEAF_TEST_PURE_PYTHON") == "1"
BACKENDS = (
    "reference",
    *(() if PURE_PYTHON else ("cpu",)),
    *(("triton",) if sys.platform == "linux" else ()),  # there is no Triton elsewhere
)

if INTERPRETED and "triton" in BACKENDS:
    quicken_the_interpreter()


@pytest.hookimpl(tryfirst=True)  # before "-m" looks at the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes the interpreter long is slow: a case that says so, and hundreds of examples."""
    for item in items:
        params = item.callspec.params if hasattr(item, "callspec") else {}
        interpreted = INTERPRETED and params.get("backend") == "triton"
        examples = getattr(getattr(item, "obj", None), "is_hypothesis_test", False)
        long = examples or getattr(params.get("case"), "slow_to_interpret", False)
        if interpreted and long:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def device() -> torch.device:
    """Where the Triton kernels run."""
    return torch.device("cpu" if INTERPRETED else "cuda")


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, device: torch.device) -> Iterator[str]:
    """Tensors that the test makes lie where the backend runs."""
    torch.set_default_device(device if request.param == "triton" else "cpu")
    yield str(request.param)
    torch.set_default_device(None)


@pytest.fixture(params=NAMESPACES)
def namespace(request: pytest.FixtureRequest, device: torch.device) -> Iterator[str]:
    """The same by the namespace of the ops."""
    torch.set_default_device(device if request.param == TRITON else "cpu")
    yield str(request.param)
    torch.set_default_device(None)


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
