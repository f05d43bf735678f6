"""The memory of freed CPU tensors is given to the next ones of their size."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch

import leaf_ext
from leaf_ext import memory

MANY = 1 << 16  # float32 values, 256 KiB


@pytest.fixture(autouse=True)
def compiled() -> None:
    if memory._module() is None:
        pytest.skip("the compiled module is missing, or of another torch")


def passes(layers: int) -> Iterator[int]:
    """Keep a tensor a layer, as a forward pass does, and yield where its temporary ones lie."""
    kept = []
    for _ in range(layers):
        temporary = torch.ones(MANY)
        kept.append(temporary * 2)
        place = temporary.data_ptr()
        del temporary
        yield place


def test_a_freed_tensor_makes_room_for_the_next_of_its_size() -> None:
    with leaf_ext.use_cpu_memory_pool():
        assert len(set(passes(50))) == 1
    with leaf_ext.use_cpu_memory_pool():
        place = torch.ones(MANY).data_ptr()
        assert torch.ones(MANY - MANY // 16).data_ptr() == place  # nearly its size
        assert torch.ones(MANY // 2).data_ptr() != place
        assert torch.ones(MANY + MANY // 4).data_ptr() != place


def test_tensors_outlive_the_block_and_may_grow() -> None:
    before = torch.ones(MANY)
    with leaf_ext.use_cpu_memory_pool():
        made = before * 3
        del before
    made.resize_(2 * MANY)[MANY:] = 4.0
    assert made[:MANY].eq(3).all() and made[MANY:].eq(4).all()
    with leaf_ext.use_cpu_memory_pool():
        again = made + 1
        place = made.data_ptr()
        del made  # it was allocated outside of the block: it is not kept
        assert again[:MANY].eq(4).all()
    assert again[MANY:].eq(5).all() and place != 0


def test_blocks_may_be_nested_and_end_by_an_error() -> None:
    with leaf_ext.use_cpu_memory_pool():
        with pytest.raises(ZeroDivisionError), leaf_ext.use_cpu_memory_pool():
            raise ZeroDivisionError
        assert len(set(passes(20))) == 1  # the outer block holds on


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
    """oneDNN frees what it took by the allocator that is in use then."""
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


def test_another_torch_than_that_of_the_build_gets_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.11.0")
    memory._module.cache_clear()
    try:
        assert memory._module() is None
        with leaf_ext.use_cpu_memory_pool():
            assert torch.ones(MANY).sum() == MANY
    finally:
        memory._module.cache_clear()
