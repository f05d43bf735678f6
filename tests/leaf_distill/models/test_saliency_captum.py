"""Saliency against captum's, another project's implementation of the same definition."""

from __future__ import annotations

import importlib.util
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from causal_types import tiny
from test_saliency import ROWS

from leaf_distill.data.example import Example, Rendering
from leaf_distill.data.prompt import Renderer
from leaf_distill.models.loading import load_model
from leaf_distill.models.saliency import saliency

pytestmark = pytest.mark.slow
TYPES = ["llama", "gpt2", "gemma2", "gemma3_text", "qwen2", "mixtral", "mamba"]


def captum_norms(model: Any, row: Rendering) -> np.ndarray:
    assert importlib.util.find_spec("captum"), "captum is not installed; run: make test-slow"
    from captum.attr import Saliency

    ids = torch.from_numpy(row.input_ids).long()
    picked = torch.from_numpy(row.loss_mask[1:])

    def nll(embeddings: torch.Tensor) -> torch.Tensor:
        logits = model(inputs_embeds=embeddings, use_cache=False).logits[0, :-1].float()
        losses = torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none")
        return losses[picked].mean()[None]

    embeddings = model.get_input_embeddings()(ids[None]).detach().requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it names the gradients that it switches on
        gradient = Saliency(nll).attribute(embeddings, abs=False)
    return gradient[0].detach().double().norm(dim=-1).numpy()


@pytest.mark.parametrize("name", TYPES)
def test_tiny_models_have_captums_norms(name: str) -> None:
    model = tiny(name)
    for row, result in zip(ROWS, saliency(model, ROWS), strict=True):
        expected = captum_norms(model, row)
        np.testing.assert_allclose(result.norms, expected, rtol=1e-4, atol=1e-6 * expected.max())


def test_smollm2_has_captums_norms(smollm2_path: str) -> None:
    from leaf_distill.models.tokenizer import load_tokenizer

    model, tokenizer = load_model(smollm2_path, dtype="float32"), load_tokenizer(smollm2_path)
    renderer = Renderer(tokenizer)
    talks = [
        ("Tom has 7 apples and 3 red hats. He buys 12 apples. How many apples?", "19"),
        ("What is 2 + 2? By the way, my cat is called Six.", "2 + 2 is 4."),
    ]
    rows = [
        renderer.render(Example(0, ({"role": "user", "content": question},), answer))
        for question, answer in talks
    ]
    for row, result in zip(rows, saliency(model, rows), strict=True):
        expected = captum_norms(model, row)
        np.testing.assert_allclose(result.norms, expected, rtol=1e-3, atol=2e-5 * expected.max())
        domain = row.domain
        ranks = np.argsort(np.argsort(result.norms[domain]))
        assert np.abs(ranks - np.argsort(np.argsort(expected[domain]))).max() <= 1
