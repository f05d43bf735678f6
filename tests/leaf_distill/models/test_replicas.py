"""Rows on threads of their own have the values that they have alone."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor

from leaf_distill.models import replicas
from leaf_distill.models.replicas import replicate, run_each


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    before = torch.get_num_threads()
    monkeypatch.setattr(replicas, "_cores", lambda: 8)
    torch.set_num_threads(8)
    yield 8
    torch.set_num_threads(before)


def make_model(**options: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    config = hf.LlamaConfig(vocab_size=90, **sizes, **heads, **options)
    return hf.LlamaForCausalLM(config).eval().requires_grad_(False)


def rows_of(*lengths: int) -> list[Tensor]:
    return [torch.arange(length)[None] % 89 for length in lengths]


def logits(model: Any, ids: Tensor) -> Tensor:
    made: Tensor = model(input_ids=ids, use_cache=False).logits
    return made


def test_copies_share_the_weights_and_nothing_else(threads: int) -> None:
    model = make_model()
    models = replicate(model)
    assert len(models) == 4 and models[0] is model
    for name, weight in model.named_parameters():
        assert all(one.get_parameter(name) is weight for one in models)
    for name, buffer in model.named_buffers():
        assert len({one.get_buffer(name).data_ptr() for one in models}) == 4, name
        assert all(torch.equal(one.get_buffer(name), buffer) for one in models)


def rope(kind: str) -> dict[str, Any]:
    options: dict[str, Any] = {"rope_type": kind, "rope_theta": 10000.0, "factor": 4.0}
    if kind == "longrope":
        options |= {"short_factor": [1.0] * 8, "long_factor": [9.0] * 8}
        options |= {"original_max_position_embeddings": 16}
    return {"rope_parameters": options, "max_position_embeddings": 16}


@pytest.mark.parametrize("kind", ["linear", "longrope"])
def test_rows_do_not_depend_on_those_beside_them(kind: str, threads: int) -> None:
    """With longrope the frequencies, in a buffer, are others above 16 tokens."""
    model = make_model(**rope(kind))
    rows = rows_of(*[9, 40, 12, 33, 5, 28] * 4)
    models = replicate(model)
    expected = [run_each(logits, models, [row])[0] for row in rows]
    found = run_each(logits, models, rows)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_model_that_remembers_rows_reads_them_in_order(threads: int) -> None:
    model = make_model(**rope("dynamic"))
    assert replicate(model) == [model]


def test_weights_that_a_library_has_rounded_are_not_copied(threads: int) -> None:
    model = make_model()
    model.config.quantization_config = {"quant_method": "gptq"}
    assert replicate(model) == [model]


def test_rows_are_not_crowded_on_the_cores_of_one_thread(
    threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    model, cores = make_model(), os.sched_getaffinity(0)
    if len(cores) == 1:
        pytest.skip("this machine has one core")
    torch.set_num_threads(len(cores))
    assert len(replicate(model)) > 1
    try:
        os.sched_setaffinity(0, {min(cores)})  # as libgomp does with OMP_PROC_BIND
        assert replicate(model) == [model]
    finally:
        os.sched_setaffinity(0, cores)


def test_each_row_runs_as_the_caller_would(threads: int) -> None:
    weight = torch.ones(3, 3, requires_grad=True)
    seen = []

    def run(model: Tensor, row: Tensor) -> Tensor:
        seen.append(torch.get_num_threads())
        return row @ model

    with torch.autocast("cpu", torch.bfloat16):
        made = run_each(run, [weight] * 4, [torch.full((2, 3), float(i)) for i in range(9)])
    assert [float(one[0, 0]) for one in made] == [3.0 * i for i in range(9)]
    assert {one.dtype for one in made} == {torch.bfloat16}
    assert not any(one.requires_grad for one in made)
    assert seen == [2] * 9 and torch.get_num_threads() == threads
    assert run_each(run, [weight], [torch.ones(1, 3)])[0].dtype == torch.float32
    assert seen[-1] == torch.get_num_threads() == threads


def test_an_error_of_a_row_is_raised(threads: int) -> None:
    def run(model: None, row: int) -> Tensor:
        if row == 2:
            raise ValueError(f"row {row}")
        return torch.ones(row)

    with pytest.raises(ValueError, match="row 2"):
        run_each(run, [None] * 2, list(range(5)))
    assert torch.get_num_threads() == threads
