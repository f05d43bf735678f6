"""The memory of freed CPU tensors is given to the next ones of their size."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import leaf_ext
from leaf_ext import memory, native

MANY = 1 << 16  # float32 values, 256 KiB


@pytest.fixture(autouse=True)
def compiled() -> None:
    if native.ERROR is not None or leaf_ext.build_info()["torch"] != torch.__version__:
        pytest.skip("the compiled modules are missing, or of another torch")
    assert memory._module() is not None


def passes(layers: int) -> Iterator[int]:
    """Keep a tensor a layer, as a forward pass does, and yield where its temporary ones lie."""
    kept = []
    for _ in range(layers):
        temporary = torch.ones(MANY)
        kept.append(temporary * 2)
        place = temporary.data_ptr()
        del temporary
        yield place


def resident() -> int:
    """Return the MiB of this process's memory that are its own."""
    lines = Path("/proc/self/status").read_text().splitlines()
    line = next(one for one in lines if one.startswith("RssAnon"))
    return int(line.split()[1]) >> 10


def test_a_freed_tensor_makes_room_for_the_next_of_its_size() -> None:
    with leaf_ext.use_cpu_memory_pool():
        assert len(set(passes(50))) == 1
    with leaf_ext.use_cpu_memory_pool():
        held = torch.ones(8 * MANY)  # the rest is little beside it, and so is kept
        place = torch.ones(MANY).data_ptr()
        assert torch.ones(MANY - MANY // 16).data_ptr() == place  # nearly its size
        # The block is idle, and neither half its size nor more than it lies there.
        assert torch.ones(MANY // 2).data_ptr() != place
        assert torch.ones(MANY + MANY // 4).data_ptr() != place
        assert torch.ones(MANY).data_ptr() == place and held.sum() == 8 * MANY


def test_sizes_that_never_come_again_do_not_fill_the_memory() -> None:
    draw = np.random.default_rng(0)
    before = resident()
    with leaf_ext.use_cpu_memory_pool():
        held = torch.ones(16 << 18)  # 16 MiB
        for step in range(400):  # 1 to 7 MiB
            torch.ones((1 << 18) + step * (1 << 12))
        for rows in draw.integers(1, 512, 300).tolist():
            one, two = torch.ones(rows, 2048), torch.ones(rows, 2048)
            del one, two
        # Without a bound they would be hundreds of MiB.
        assert resident() - before < 60 and held.sum() == 16 << 18


def test_tensors_outlive_the_block_and_may_grow() -> None:
    before = torch.ones(MANY)
    with leaf_ext.use_cpu_memory_pool():
        made = before * 3
        del before
    made.resize_(2 * MANY)[MANY:] = 4.0
    assert made[:MANY].eq(3).all() and made[MANY:].eq(4).all()
    with leaf_ext.use_cpu_memory_pool():
        again = made + 1
        del made  # from outside of the block
        shared = torch.ones(MANY).share_memory_()
    assert again[:MANY].eq(4).all() and again[MANY:].eq(5).all() and shared.eq(1).all()


def test_blocks_may_be_nested_and_end_by_an_error() -> None:
    with leaf_ext.use_cpu_memory_pool():
        with pytest.raises(ZeroDivisionError), leaf_ext.use_cpu_memory_pool():
            raise ZeroDivisionError
        assert len(set(passes(20))) == 1  # the outer block holds on
    with pytest.raises(RuntimeError, match="more often than enter"):
        memory._module().leave()


def test_values_are_those_of_a_pass_without_it() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(torch.nn.Linear(300, 300) for _ in range(4)))
    given = torch.randn(100, 300, requires_grad=True)

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        given.grad = None
        model(given).relu().sum().backward()
        return [one.grad for one in (given, *model.parameters()) if one.grad is not None]

    expected = gradients()
    with leaf_ext.use_cpu_memory_pool():
        found = gradients()
    assert len(found) == 9
    assert all(torch.equal(one, two) for one, two in zip(found, expected, strict=True))


def test_memory_that_libraries_free_themselves() -> None:
    """oneDNN frees what it took by the allocator that it finds then."""
    few, many = torch.randn(20, 30), torch.randn(200, 300)
    expected = [torch.nn.functional.gelu(one) for one in (few, many)]
    with leaf_ext.use_cpu_memory_pool():
        found = [torch.nn.functional.gelu(one) for one in (few, many)]
    assert all(torch.equal(one, two) for one, two in zip(found, expected, strict=True))


def test_threads_share_it_without_sharing_a_tensor() -> None:
    wrong = []

    def work(value: float) -> None:
        for _ in range(200):
            with leaf_ext.use_cpu_memory_pool():
                one = torch.full((MANY,), value)
                two = one + value
                del one
                if not (torch.full((MANY,), value).eq(value).all() and two.eq(2 * value).all()):
                    wrong.append(value)

    threads = [threading.Thread(target=work, args=(float(value),)) for value in range(1, 5)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert not wrong


def test_a_child_process_can_allocate() -> None:
    """A child has no thread that would give back a lock that was held when it began.

    The lock is held for some 2 % of the time: most runs would meet it.
    """
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            with leaf_ext.use_cpu_memory_pool():
                held = [torch.empty(1 << 13) for _ in range(3000)]
            del held

    thread = threading.Thread(target=work)
    thread.start()
    try:
        for _ in range(200):
            time.sleep(0.002)
            if (child := os.fork()) == 0:
                signal.alarm(20)  # else it could wait for ever
                with leaf_ext.use_cpu_memory_pool():
                    torch.empty(MANY)
                os._exit(0)
            assert os.waitpid(child, 0)[1] == 0
    finally:
        stop.set()
        thread.join()


def test_a_profiler_sees_each_tensor() -> None:
    with (
        leaf_ext.use_cpu_memory_pool(),
        torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
        ) as profiled,
    ):
        for _ in range(10):
            torch.empty(MANY)
    events = [one for one in profiled.events() if one.name == "aten::empty"]
    assert sum(one.cpu_memory_usage for one in events) >= 10 * 4 * MANY


def test_another_torch_than_that_of_the_build_gets_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.11.0")
    memory._module.cache_clear()
    try:
        assert memory._module() is None
        with leaf_ext.use_cpu_memory_pool():
            assert torch.ones(MANY).sum() == MANY
    finally:
        memory._module.cache_clear()
