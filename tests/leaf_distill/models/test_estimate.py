"""The cost of a pass, counted without weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from architectures import SIZES
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig

from leaf_distill.models.estimate import (
    Speed,
    answer_seconds,
    logit_bytes,
    rough_cost,
    saliency_cost,
)


@pytest.mark.parametrize("config", [LlamaConfig(**SIZES), MixtralConfig(**SIZES)])
def test_the_weights_of_a_model_are_counted_without_them(config: Any) -> None:
    cost = saliency_cost(LlamaConfig(**SIZES), "float32", 2, 8, 6)
    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    weights = [*model.parameters(), *model.buffers()]
    assert cost.weights == sum(one.numel() * one.element_size() for one in weights)
    rough = rough_cost(config, "float32", 2, 8, 6)
    assert 0.3 < rough.weights / cost.weights < 30 and rough.flops > 0 < rough.kept


def test_the_flops_of_a_pass_are_those_of_its_products() -> None:
    config = LlamaConfig(**SIZES)
    cost = saliency_cost(config, "float32", 2, 8, 6)
    model = LlamaForCausalLM(config)
    body = sum(one.weight.numel() for one in model.model.modules()
               if isinstance(one, torch.nn.Linear))  # fmt: skip
    products = 4 * (16 * body + 6 * model.lm_head.weight.numel())
    assert products <= cost.flops < 1.3 * products


def test_the_time_of_answers_counts_every_step_and_prompt() -> None:
    config = LlamaConfig(**{**SIZES, "num_hidden_layers": 0})  # no overhead, nothing is cached
    speed = Speed(flops=1e6, bytes=1e9, weight_bytes=1e5, layer_seconds=1.0)
    # 4000 bytes are 1000 weights: 2 operations each for 3 x 10 tokens, and 5 readings.
    assert answer_seconds(config, "float32", 4000, 3, 10, 5, speed) == pytest.approx(0.06 + 0.2)


def test_each_layer_takes_its_time_in_each_step() -> None:
    config = LlamaConfig(**SIZES)
    quick, slow = (
        answer_seconds(config, "float32", 4000, 3, 10, 5, Speed(1e6, 1e9, 1e5, layer_seconds))
        for layer_seconds in (0.0, 0.5)
    )
    assert slow - quick == pytest.approx(0.5 * 5 * config.num_hidden_layers)


@pytest.mark.parametrize(("dtype", "a_logit"), [("float32", 4 + 8), ("bfloat16", 6 + 8)])
def test_a_logit_is_counted_as_a_saliency_keeps_it(dtype: str, a_logit: int) -> None:
    few, many = (saliency_cost(LlamaConfig(**SIZES), dtype, 2, 8, count).kept for count in (6, 12))
    assert many - few == 6 * SIZES["vocab_size"] * a_logit
    # Beside many logits there are two times those of a sum.
    assert logit_bytes(1 << 27, "float32", "cpu") == (4 << 27) + (8 << 20)
    assert logit_bytes(1 << 27, "float32", "cuda") == (4 << 27) + (8 << 26)


def test_keys_and_values_make_long_answers_slower() -> None:
    config = LlamaConfig(**SIZES)
    speed = Speed(flops=1e18, bytes=1e3, weight_bytes=1e18, layer_seconds=0.0)
    times = [answer_seconds(config, "float32", 0, rows, 0, 10_000, speed) for rows in (1, 3)]
    assert times[1] == pytest.approx(3 * times[0], rel=0.01)
    # A layer keeps a key and a value of the model's width for each head; read, read, written.
    token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4
    assert times[0] == pytest.approx(10_000 * 3 * 5_000 * token / 1e3, rel=0.01)
