"""Threads, seeds and backends of all tests."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from backends import BACKENDS, EMULATED, INTERPRETED, device_of  # before anything of leaf_ext
from quick_interpreter import quicken_the_interpreter

from leaf_ext import dispatch

if INTERPRETED and "triton" in BACKENDS:
    quicken_the_interpreter()


def left_to_gpus(name: str) -> bool:
    """Return whether a case of over 2^31 logits would take interpreter or emulation hours."""
    slow = (["triton"] if INTERPRETED else []) + (["cpu"] if EMULATED else [])
    return any(f"{backend}-above_2_31" in name for backend in slow)


@pytest.hookimpl(tryfirst=True)  # before "-m" looks at the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark as slow what takes long in the interpreter or the emulation.

    These are cases that say so, and tests with hundreds of examples.
    """
    if INTERPRETED or EMULATED:
        items[:] = [item for item in items if not left_to_gpus(item.name)]
    for item in items:
        params = item.callspec.params if hasattr(item, "callspec") else {}
        backend = params.get("backend")
        interpreted = (INTERPRETED and backend == "triton") or (EMULATED and backend == "cpu")
        examples = getattr(getattr(item, "obj", None), "is_hypothesis_test", False)
        long = examples or getattr(params.get("case"), "slow_to_interpret", False)
        if interpreted and long:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def device() -> torch.device:
    """Return the device of the Triton kernels."""
    return device_of("triton")


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Make the backend's device the default for tensors of the test."""
    torch.set_default_device(device_of(request.param))
    yield str(request.param)
    torch.set_default_device(None)
    if device_of(request.param).type == "cuda":
        wait_for_the_gpu()


def wait_for_the_gpu() -> None:
    """Wait, so that a kernel's fault is reported by the test that launched it.

    After a fault no CUDA call of the process succeeds. pytest-xdist starts another process for the
    remaining tests; without it they fail too.
    """
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        if "PYTEST_XDIST_WORKER" in os.environ:
            os._exit(1)
        raise


@pytest.fixture
def namespace(backend: str) -> str:
    """Return the namespace of the backend's ops."""
    return dispatch.resolve("grad_norm", device_of(backend), backend, torch.float32)


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Fill memory that an op allocates with NaN (or the largest integer)."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    # On a GPU torch's own products and sums are not deterministic, and would raise.
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.utils.deterministic.fill_uninitialized_memory = fill
    torch.use_deterministic_algorithms(deterministic)
