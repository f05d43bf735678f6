"""Threads, seeds and backends of all tests."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from quick_interpreter import quicken_the_interpreter

# Without a GPU the Triton kernels run in Triton's interpreter. Triton asks for this when it is
# imported, so it is said before anything imports leaf_ext; on a GPU they run on the GPU.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from leaf_ext import dispatch
from leaf_ext.triton import INTERPRETED


def device_of(backend: str) -> torch.device:
    """Where a backend runs in the tests."""
    return torch.device("cuda" if backend == "triton" and not INTERPRETED else "cpu")


# Every backend that runs on this machine. That "cpu" is among them is a test of its own, and what
# compiles the Triton kernels fails without Triton.
BACKENDS = tuple(
    name
    for name in dispatch.BACKENDS
    if name != "auto" and dispatch.missing(name, device_of(name), torch.float32) is None
)

if INTERPRETED and "triton" in BACKENDS:
    quicken_the_interpreter()


@pytest.hookimpl(tryfirst=True)  # before "-m" looks at the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes the interpreter long is slow: a case that says so, and hundreds of examples.

    The case with more than 2^31 logits would take it hours, and is left to GPUs.
    """
    if INTERPRETED:
        items[:] = [item for item in items if "triton-above_2_31" not in item.name]
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
    return device_of("triton")


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Tensors that the test makes lie where the backend runs."""
    torch.set_default_device(device_of(request.param))
    yield str(request.param)
    torch.set_default_device(None)


@pytest.fixture
def namespace(backend: str) -> str:
    """The namespace of the backend's ops."""
    return dispatch.resolve("grad_norm", device_of(backend), backend, torch.float32)


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
