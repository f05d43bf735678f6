"""The helpers for other training loops, on real models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CTRLConfig, CTRLLMHeadModel, LlamaConfig, LlamaForCausalLM

import leaf_ext

IDS = torch.tensor([[3, 7, 1, 7, 9, 2], [5, 5, 8, 0, 4, 6]])


def llama() -> Any:
    config = LlamaConfig(
        vocab_size=16, hidden_size=8, intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    return LlamaForCausalLM(config).double()


def ctrl() -> Any:
    """Return a model that scales the output of its embedding in place."""
    config = CTRLConfig(
        vocab_size=16, n_embd=8, dff=16, n_layer=2, n_head=2, n_positions=16,
        resid_pdrop=0, embd_pdrop=0, tie_word_embeddings=False,
    )  # fmt: skip
    return CTRLLMHeadModel(config).double()


def captured_grad(model: Any) -> Tensor:
    with leaf_ext.capture_embedding_grad(model.get_input_embeddings()) as captured:
        loss = model(input_ids=IDS, labels=IDS).loss
    return captured.grad(loss)


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("make", [llama, ctrl])
def test_the_gradients_of_a_token_add_up_to_its_weight_row_s(make: Any, frozen: bool) -> None:
    model = make()
    embedding = model.get_input_embeddings()
    model(input_ids=IDS, labels=IDS).loss.backward()
    of_weight = embedding.weight.grad
    model.zero_grad(set_to_none=True)
    model.requires_grad_(not frozen)
    grad = captured_grad(model)
    assert grad.shape == (*IDS.shape, 8) and grad.dtype == torch.float64
    added_up = torch.zeros_like(of_weight).index_add(0, IDS.flatten(), grad.flatten(0, 1))
    torch.testing.assert_close(added_up, of_weight, rtol=1e-10, atol=1e-14)
    assert all(weight.grad is None for weight in model.parameters())
    assert all(weight.requires_grad != frozen for weight in model.parameters())


def test_the_model_and_a_backward_after_it_are_unchanged() -> None:
    model = llama()
    plain = model(input_ids=IDS, labels=IDS)
    plain.loss.backward()
    expected = [weight.grad for weight in model.parameters()]
    model.zero_grad(set_to_none=True)
    with leaf_ext.capture_embedding_grad(model.get_input_embeddings()) as captured:
        result = model(input_ids=IDS, labels=IDS)
    assert torch.equal(result.logits, plain.logits)
    kept = captured.grad(result.loss, retain_graph=True)
    result.loss.backward()
    for weight, grad in zip(model.parameters(), expected, strict=True):
        assert torch.equal(weight.grad, grad)
    assert torch.equal(captured_grad(model), kept)
    assert not model.get_input_embeddings()._forward_hooks


def test_the_forward_may_enable_gradients_itself() -> None:
    model = llama()
    with (
        torch.no_grad(),
        leaf_ext.capture_embedding_grad(model.get_input_embeddings()) as captured,
        torch.enable_grad(),
    ):
        loss = model(input_ids=IDS, labels=IDS).loss
    with torch.no_grad():
        grad = captured.grad(loss)
    assert torch.equal(grad, captured_grad(model))


def test_one_block_captures_a_batch_after_another() -> None:
    model = llama()
    with leaf_ext.capture_embedding_grad(model.get_input_embeddings()) as captured:
        found = [captured.grad(model(input_ids=i[None], labels=i[None]).loss) for i in IDS]
    both = captured_grad(model)
    torch.testing.assert_close(torch.cat(found) / 2, both)


def test_a_block_that_fails_leaves_no_hook() -> None:
    model = llama()
    with (
        pytest.raises(IndexError),
        leaf_ext.capture_embedding_grad(model.get_input_embeddings()),
    ):
        model(input_ids=IDS + 100)
    assert not model.get_input_embeddings()._forward_hooks


def test_what_cannot_be_captured_is_refused() -> None:
    model = llama()
    embedding = model.get_input_embeddings()
    for guard in (torch.no_grad, torch.inference_mode):
        with (
            pytest.raises(ValueError, match=r"the forward must be run with gradients enabled"),
            guard(),
            leaf_ext.capture_embedding_grad(embedding),
        ):
            model(input_ids=IDS)
    with leaf_ext.capture_embedding_grad(embedding) as captured:
        with pytest.raises(ValueError, match=r"called once before grad\(\), got 0 calls"):
            captured.grad(torch.ones((), requires_grad=True))
        loss = model(input_ids=IDS, labels=IDS).loss
        with pytest.raises(ValueError, match=r"loss must be a scalar, got shape \(2,\)"):
            captured.grad(torch.stack((loss, loss)))
        with pytest.raises(ValueError, match=r"loss must be computed from .* without a graph"):
            captured.grad(loss.detach())
        with pytest.raises(ValueError, match=r"loss must be computed from .* not depend on it"):
            captured.grad(torch.ones((), requires_grad=True) * 2)
        model(input_ids=IDS)
        with pytest.raises(ValueError, match=r"called once before grad\(\), got 2 calls"):
            captured.grad(loss)
    with (
        pytest.raises(ValueError, match="the embedding's output must be a tensor"),
        leaf_ext.capture_embedding_grad(model.model),
    ):
        model(input_ids=IDS)


VALUES = [10, 11, 12, 13, 14, 15]
SPANS = [(0, 2), (3, 4)]


@pytest.mark.parametrize("kind", [list, tuple, torch.tensor], ids=["list", "tuple", "tensor"])
def test_spans_are_cut_one_at_a_time_or_all(kind: Any) -> None:
    def lists(cuts: list[Any]) -> list[list[int]]:
        assert all(isinstance(cut, Tensor if kind is torch.tensor else list) for cut in cuts)
        return [list(map(int, cut)) for cut in cuts]

    values = kind(VALUES)
    assert lists(leaf_ext.cut_spans(values, SPANS)) == [[12, 13, 14, 15], [10, 11, 12, 14, 15]]
    assert lists(leaf_ext.cut_spans(values, SPANS, collective=True)) == [[12, 14, 15]]
    assert lists(leaf_ext.cut_spans(values, [(0, 6)])) == [[]]
    for collective in (False, True):
        assert leaf_ext.cut_spans(values, [], collective=collective) == []
    assert list(map(int, values)) == VALUES


def test_a_mask_is_cut_like_its_ids() -> None:
    ids, mask = torch.arange(6), torch.tensor([True, False, True, True, False, True])
    for cut_ids, cut_mask in zip(*(leaf_ext.cut_spans(v, SPANS) for v in (ids, mask)), strict=True):
        assert cut_mask.dtype == torch.bool and torch.equal(mask[cut_ids], cut_mask)


def test_the_spans_of_detection_are_those_that_are_cut() -> None:
    teacher, student = torch.tensor([[0.1, 0.9, 1.0, 0.5]]), torch.tensor([[1.0, 0.1, 0.2, 0.6]])
    domain = torch.ones(1, 4, dtype=torch.bool)
    (spans,) = leaf_ext.detect_spans(teacher, student, domain).tolist()
    assert leaf_ext.cut_spans(["a", "b", "c", "d"], spans) == [["b", "c", "d"]]


@pytest.mark.parametrize(
    ("values", "spans", "message"),
    [
        (VALUES, [(2, 7)], r"spans must be pairs .* T = 6, got \(2, 7\)"),
        (VALUES, [(3, 3)], r"spans must be pairs .* T = 6, got \(3, 3\)"),
        (VALUES, [(-1, 3)], r"spans must be pairs .* got \(-1, 3\)"),
        (VALUES, [(0.5, 3)], r"spans must be pairs .* got \(0.5, 3\)"),
        (VALUES, [3], "spans must be pairs .* got 3"),
        (torch.zeros(2, 6), SPANS, r"values must be 1-D \[T\], got shape \(2, 6\)"),
        (VALUES, torch.tensor(SPANS), "spans must be the .* of one sequence .*, got Tensor"),
        (VALUES, None, "spans must be the .* of one sequence .*, got NoneType"),
    ],
)
def test_bad_spans_are_named(values: Any, spans: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"cut_spans: {message}"):
        leaf_ext.cut_spans(values, spans)


def test_the_spans_of_a_batch_are_refused() -> None:
    saliency = torch.rand(2, 6)
    spans: Any = leaf_ext.detect_spans(saliency, saliency, saliency >= 0)
    with pytest.raises(ValueError, match=r"of one sequence .*tolist\(\)\[i\]\), got Spans"):
        leaf_ext.cut_spans(VALUES, spans)
