"""Saliencies against a plain loop in float64, and what a call leaves behind in the model."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from leaf_distill.data.prompt import Rendering
from leaf_distill.models.saliency import saliency

VOCABULARY = 50
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "attention_dropout": 0.0,
}


class HeadlessLlama(LlamaForCausalLM):
    """A model that does not tell which module its head is."""

    def get_output_embeddings(self) -> None:
        return None


def gpt2() -> PreTrainedModel:
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    )


def gemma2() -> PreTrainedModel:
    config = Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=0.5)
    return Gemma2ForCausalLM(config)


MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "tied": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True)),
    "headless": lambda: HeadlessLlama(LlamaConfig(**SIZES)),
    "softcap": gemma2,
    "divided": lambda: GraniteForCausalLM(GraniteConfig(**SIZES, logits_scaling=3.0)),
    "scaled": lambda: CohereForCausalLM(CohereConfig(**SIZES, logit_scale=0.25)),
    "gpt2": gpt2,
}


def build(name: str = "llama") -> PreTrainedModel:
    torch.manual_seed(0)
    model = MODELS[name]()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.05)
    return model


def rendering(prompt: int, labels: int, seed: int = 0, avoid: int | None = None) -> Rendering:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY - 1, (prompt + labels,), generator=generator)
    if avoid is not None:
        ids[ids == avoid] = 3
    mask = [False] * prompt + [True] * labels
    nowhere = [(-1, -1)] * (prompt + labels)
    return Rendering(ids.tolist(), mask, [not m for m in mask], [not m for m in mask], nowhere)


ROWS = [rendering(5, 1, 1), rendering(12, 7, 2), rendering(3, 14, 3), rendering(20, 4, 4)]


def plain_loop(model: PreTrainedModel, row: Rendering) -> tuple[float, np.ndarray]:
    """The definition, one row at a time, in float64, with the model's own full logits."""
    exact = copy.deepcopy(model).double().eval()
    embeddings = exact.get_input_embeddings()(torch.tensor([row.input_ids])).detach()
    embeddings.requires_grad_(True)
    logits = exact(inputs_embeds=embeddings).logits[0]
    labels = [at for at, is_label in enumerate(row.label_mask) if is_label]
    chances = torch.log_softmax(logits, -1)
    loss = -torch.stack([chances[at - 1, row.input_ids[at]] for at in labels]).mean()
    (gradient,) = torch.autograd.grad(loss, embeddings)
    return loss.item(), gradient[0].norm(dim=-1).numpy()


@pytest.mark.parametrize("name", MODELS)
def test_equals_a_plain_loop_in_float64(name: str) -> None:
    model = build(name)
    for row, result in zip(ROWS, saliency(model, ROWS), strict=True):
        nll, norms = plain_loop(model, row)
        assert result.nll == pytest.approx(nll, rel=1e-5)
        assert result.norms.dtype == np.float32
        np.testing.assert_allclose(result.norms, norms, rtol=1e-4, atol=2e-6 * norms.max())
        assert not result.invalid


def test_batch_equals_one_by_one() -> None:
    model = build()
    for row, result in zip(ROWS, saliency(model, ROWS), strict=True):
        (alone,) = saliency(model, [row])
        assert result.nll == pytest.approx(alone.nll, rel=5e-6)
        np.testing.assert_allclose(result.norms, alone.norms, rtol=5e-6)


def test_only_what_predicts_the_labels_reaches_the_head() -> None:
    model, seen = build(), []
    model.lm_head.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    saliency(model, ROWS)
    assert seen == [(1, sum(sum(row.label_mask) for row in ROWS), VOCABULARY)]


def test_positions_after_the_last_prediction_have_no_gradient() -> None:
    (result,) = saliency(build(), [ROWS[1]])
    assert result.norms[-1] == 0.0
    assert (result.norms[:-1] > 0).all()


@pytest.mark.parametrize("where", ["token", "padding"])
def test_nan_marks_only_its_own_row(where: str) -> None:
    bad = 7
    rows = [rendering(6, 3, 5, avoid=bad), rendering(15, 4, 6, avoid=bad)]
    model = build()
    expected = saliency(model, rows)
    spoiled = copy.deepcopy(rows[0])
    spoiled.input_ids[2] = bad
    with torch.no_grad():
        model.get_input_embeddings().weight[bad if where == "token" else 0] = torch.nan
    results = saliency(model, [rows[0], spoiled, rows[1]])
    assert [result.invalid for result in results] == [False, where == "token", False]
    for result, before in zip(results[::2], expected, strict=True):
        np.testing.assert_allclose(result.norms, before.norms, rtol=5e-6)


def test_the_model_is_left_as_it_was() -> None:
    model = build().train()
    model.model.layers[0].eval()
    model.lm_head.weight.requires_grad_(False)
    flags = [weight.requires_grad for weight in model.parameters()]
    modes = [module.training for module in model.modules()]
    with torch.no_grad():
        saliency(model, ROWS)
    assert [weight.requires_grad for weight in model.parameters()] == flags
    assert [module.training for module in model.modules()] == modes
    assert all(weight.grad is None for weight in model.parameters())
    assert not model.get_input_embeddings()._forward_hooks
    assert not model.lm_head._forward_pre_hooks


def test_the_model_is_left_as_it_was_after_an_error() -> None:
    model = build().train()

    def fail(module: torch.nn.Module, args: object, output: object) -> None:
        raise RuntimeError("out of memory")

    model.model.norm.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        saliency(model, ROWS)
    assert model.training and all(weight.requires_grad for weight in model.parameters())
    assert not model.get_input_embeddings()._forward_hooks
    assert not model.lm_head._forward_pre_hooks


def test_dropout_is_off_and_frozen_weights_make_no_difference() -> None:
    torch.manual_seed(0)
    sizes = SIZES | {"attention_dropout": 0.5}
    model = LlamaForCausalLM(LlamaConfig(**sizes)).train()
    first, second = saliency(model, ROWS), saliency(model.requires_grad_(False), ROWS)
    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(one.norms, other.norms)


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.bfloat16, 0.15), (torch.float16, 0.02), (torch.float64, 1e-5)],
)
def test_other_precisions(dtype: torch.dtype, tolerance: float) -> None:
    model = build()
    exact = saliency(model, ROWS)
    for row, reference in zip(saliency(model.to(dtype), ROWS), exact, strict=True):
        assert not row.invalid and row.norms.dtype == np.float32
        scale = reference.norms.max()
        np.testing.assert_allclose(row.norms, reference.norms, atol=tolerance * scale)
        assert row.norms.argmax() == reference.norms.argmax()


def test_float16_keeps_gradients_below_its_smallest_number() -> None:
    model = build()
    with torch.no_grad():
        model.lm_head.weight.mul_(1e-3)
        model.get_input_embeddings().weight.mul_(1e3)
    exact = saliency(model, ROWS)
    for row, reference in zip(saliency(model.half(), ROWS), exact, strict=True):
        assert 0 < reference.norms.max() < 1e-4
        np.testing.assert_allclose(row.norms, reference.norms, atol=0.02 * reference.norms.max())


def test_a_row_without_labels_is_named() -> None:
    with pytest.raises(ValueError, match=r"rows\[1\].*label"):
        saliency(build(), [ROWS[0], rendering(4, 0)])


def test_no_rows_no_results() -> None:
    assert saliency(build(), []) == []
