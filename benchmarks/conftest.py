"""Options of the benchmarks, and the description of the machine in their JSON."""

from __future__ import annotations

import sys
import time
from typing import Any

import pytest
import torch

import leaf_ext


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--tiny",
        action="store_true",
        help="small inputs and a quick compiler: checks that every benchmark runs; times nothing",
    )


@pytest.fixture(scope="session")
def tiny(pytestconfig: pytest.Config) -> bool:
    return bool(pytestconfig.getoption("--tiny"))


@pytest.fixture(scope="session")
def copy_bandwidth(tiny: bool) -> float:
    """The best of several tensor copies in this run, in GB/s of bytes read plus written."""
    source = torch.ones((1 if tiny else 256) * 2**20 // 4)
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(3 if tiny else 15):
        start = time.perf_counter()
        target.copy_(source)
        best = min(best, time.perf_counter() - start)
    return 2 * source.nbytes / best / 1e9


def pytest_benchmark_update_machine_info(config: object, machine_info: dict[str, Any]) -> None:
    machine_info["torch"] = torch.__version__
    machine_info["threads"] = torch.get_num_threads()
    machine_info["leaf_ext"] = leaf_ext.build_info()
    machine_info["command"] = " ".join(["pytest", *sys.argv[1:]])
