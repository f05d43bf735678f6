"""The cost of a pass, counted without weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from architectures import SIZES
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig

from leaf_distill.models.estimate import rough_cost, saliency_cost


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
