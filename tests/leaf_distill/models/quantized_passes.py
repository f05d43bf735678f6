"""Program: passes of a model with rounded weights beside those with its own, as JSON.

    python quantized_passes.py DIRECTORY METHOD

The tests run it in an environment with torchao and bitsandbytes.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np
import torch

from leaf_distill.data.example import Example, Rendering
from leaf_distill.data.prompt import Renderer
from leaf_distill.models.generation import generate
from leaf_distill.models.intervention import answer_kl
from leaf_distill.models.loading import LazyModel, load_model
from leaf_distill.models.saliency import saliency, token_nll

ROWS = [
    (
        "Tom has 7 red apples and buys 12 more on a rainy Monday. How many apples does he have?",
        "Tom has 7 + 12 = 19 apples. The answer is 19.",
    ),
    (
        "A train with 4 old wagons carries 30 people in each wagon. How many people are on it?",
        "There are 4 * 30 = 120 people on the train. The answer is 120.",
    ),
    ("What is the capital of France?", "The capital of France is Paris."),
]


def size(tensor: Any) -> int:
    """Return the bytes of a tensor, or of those that a rounded one consists of."""
    if hasattr(tensor, "__tensor_flatten__"):
        return sum(size(getattr(tensor, part)) for part in tensor.__tensor_flatten__()[0])
    return int(tensor.numel() * tensor.element_size())


def kept(model: Any, rows: list[Rendering]) -> int:
    """Return the bytes that the forward pass of a saliency keeps beside the weights."""
    weights = {part.untyped_storage()._cdata for part in model.parameters()}
    found: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            found[storage._cdata] = size(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        saliency(model, rows)
    return sum(found.values())


def with_floats(lazy: LazyModel, rounded: Any) -> list[list[float]]:
    """Return the norms of a plain model that has the values of the rounded weights."""
    plain = load_model(lazy.name, device="cpu", dtype="float32")
    values = dict(rounded.named_parameters())
    for name, weight in plain.named_parameters():
        value = values[name]
        if hasattr(value, "quant_state"):
            from bitsandbytes.functional import dequantize_4bit

            value = dequantize_4bit(value.data, value.quant_state)
        elif hasattr(value, "dequantize") and hasattr(value, "__tensor_flatten__"):
            value = value.dequantize()
        weight.data = value.detach().to(weight.dtype)
    return norms(plain, render(lazy))


def render(lazy: LazyModel) -> list[Rendering]:
    renderer = Renderer(lazy.tokenizer)
    return [
        renderer.render(Example(at, ({"role": "user", "content": prompt},), answer))
        for at, (prompt, answer) in enumerate(ROWS)
    ]


def norms(model: Any, rows: list[Rendering]) -> list[list[float]]:
    found = zip(saliency(model, rows), rows, strict=True)
    return [one.norms[row.domain].tolist() for one, row in found]


def passes(lazy: LazyModel) -> dict[str, Any]:
    """Return the norms and likelihoods of each row, interventions on the first, and answers."""
    model, renderer = lazy.load(), Renderer(lazy.tokenizer)
    rows = render(lazy)
    prompts = [row.input_ids[~row.loss_mask] for row in rows]
    places = np.flatnonzero(rows[0].domain)
    answers = generate(
        model,
        lazy.tokenizer,
        [ids.tolist() for ids in prompts],
        end_ids=renderer.end_ids,
        max_new_tokens=12,
    )
    return {
        "norms": norms(model, rows),
        # LLM.int8 rounds the states too, so that no plain model is the same.
        "plain": [] if lazy.quantization in (None, "bnb8") else with_floats(lazy, model),
        "nll": [values.tolist() for values in token_nll(model, rows)],
        "kl": answer_kl(model, rows[0], [np.delete(prompts[0], at) for at in places]).tolist(),
        "answers": [one.text for one in answers],
        "kept": kept(model, rows[:1]),
        "graded": [bool(weight.grad is not None) for weight in model.parameters()],
        "megabytes": sum(map(size, model.parameters())) / 1e6,
        "fingerprint": LazyModel(model, processing_class=lazy.tokenizer).fingerprint,
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    directory, method = sys.argv[1:]
    found = {
        name: passes(LazyModel(directory, device="cpu", dtype="float32", quantization=quantization))
        for name, quantization in (("whole", None), ("rounded", method))
    }
    print("PASSES", json.dumps(found))
