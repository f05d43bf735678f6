"""Bounds of a batch: by the device's memory, and halved where that is not enough."""

from __future__ import annotations

import pytest
import torch
from architectures import SIZES
from transformers import LlamaConfig, MixtralConfig

from leaf_distill.models import memory
from leaf_distill.models.memory import (
    CPU_ANSWER_TOKENS,
    CPU_BATCH_TOKENS,
    batch_tokens,
    count_halvings,
    default_batch_tokens,
    with_smaller_batches,
)

GIB = 1 << 30
BILLION = LlamaConfig(
    **{"vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 8192},
    **{"num_hidden_layers": 24, "num_attention_heads": 16},
)


def fits(rows: int) -> None:
    """Real memory, or the real error of an allocator."""
    torch.empty((1 << 50) if rows > 2 else 1)


def test_a_batch_that_is_too_large_runs_in_halves(caplog: pytest.LogCaptureFixture) -> None:
    seen = []

    def run(batch: list[int]) -> list[int]:
        seen.append(len(batch))
        fits(len(batch))
        return [10 * item for item in batch]

    assert with_smaller_batches(list(range(7)), run) == [10 * item for item in range(7)]
    assert seen == [7, 4, 2, 2, 3, 2, 1]
    assert "lower max_batch_tokens" in caplog.records[0].getMessage()


def test_a_row_that_is_too_large_is_said() -> None:
    with pytest.raises(ValueError, match=r"^max_batch_tokens: .* single row .*; lower max_length"):
        with_smaller_batches([1, 2], lambda batch: fits(9) or [])

    def run(batch: list[int]) -> list[int]:
        raise MemoryError

    with pytest.raises(ValueError, match=r"^max_batch_tokens: "):
        with_smaller_batches([1], run)


def test_other_errors_pass() -> None:
    def run(batch: list[int]) -> list[int]:
        raise RuntimeError("a size does not match")

    with pytest.raises(RuntimeError, match="a size does not match"):
        with_smaller_batches([1, 2], run)


def test_the_default_on_a_cpu() -> None:
    assert default_batch_tokens(LlamaConfig(**SIZES), "float32", "cpu") == CPU_BATCH_TOKENS == 512
    answers = default_batch_tokens(LlamaConfig(**SIZES), "float32", "cpu", answers=True)
    assert answers == CPU_ANSWER_TOKENS == 8192


def test_a_cpu_without_the_memory_gets_smaller_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    def answers(dtype: str) -> int:
        return default_batch_tokens(BILLION, dtype, "cpu", answers=True)

    monkeypatch.setattr(memory, "free_memory", lambda: 11 * GIB)
    monkeypatch.setattr(memory, "machine_memory", lambda: 64 * GIB)
    # The 2.2 billion weights take 9 GB in float32, and a token of an answer 1.7 MB.
    assert 256 <= answers("float32") < 2000
    assert answers("bfloat16") == CPU_ANSWER_TOKENS  # by the whole memory
    alone = answers("float32")
    monkeypatch.setattr(memory, "free_memory", lambda: 22 * GIB)
    launched = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    for name, value in {**launched, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    assert answers("float32") == alone  # each of two processes has half


def test_weights_that_are_loaded_are_not_subtracted_twice() -> None:
    def answers(free: int) -> int:
        return default_batch_tokens(BILLION, "float32", "cpu", free=free, answers=True)

    assert 256 <= answers(11 * GIB) < 2000
    assert answers(64 * GIB) == CPU_ANSWER_TOKENS


def test_free_memory_is_part_of_the_machines() -> None:
    assert 0 < memory.free_memory() <= memory.machine_memory()


def test_answers_take_less_memory_than_gradients() -> None:
    eight = LlamaConfig(
        **{"vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336},
        **{"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8},
    )
    with_gradients = batch_tokens(eight, 80 * GIB, 2)
    answering = batch_tokens(eight, 80 * GIB, 2, answers=True)
    # 32 layers keep 131 kB of a token in bfloat16, twice while the cache grows.
    assert 10 * with_gradients < answering and answering > 1 << 16
    assert answering * 131_072 * 2 < 40 * GIB


def test_a_batch_of_a_small_model_has_an_end() -> None:
    small = LlamaConfig(**SIZES)
    assert batch_tokens(small, 80 * GIB, 2) == 1 << 16
    assert batch_tokens(small, 80 * GIB, 2, answers=True) == 1 << 19


def test_halved_batches_are_counted() -> None:
    def run(batch: list[int]) -> list[int]:
        fits(len(batch))
        return batch

    with count_halvings() as halvings:
        with_smaller_batches(list(range(7)), run)
        with count_halvings() as inner:
            with_smaller_batches([1, 2], run)
    assert (halvings.count, inner.count) == (3, 0)


def test_the_default_of_a_gpu_follows_memory_and_model() -> None:
    def tokens(free: int, itemsize: int = 2, config: object = BILLION) -> int:
        return batch_tokens(config, free * GIB, itemsize)

    # 24 layers keep 3.1 MB of a token in bfloat16 and the logits take 1.8 MB; the 2.2 billion
    # weights take 4.5 GB.
    assert 1900 < tokens(24) < 2300
    assert tokens(80) > 3 * tokens(24) > 6 * tokens(12)
    assert tokens(24, 4) < tokens(24) / 2
    assert tokens(1) == 256 and tokens(24, 2, LlamaConfig(**SIZES)) == 65536
    assert 256 <= tokens(24, 2, MixtralConfig()) <= 65536


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_default_fits_a_gpu() -> None:
    assert 256 <= default_batch_tokens(BILLION, "bfloat16", "cuda") <= 65536
