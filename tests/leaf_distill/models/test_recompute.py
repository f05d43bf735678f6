"""Products that compute an activation again: the same gradients from less memory."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from architectures import build
from torch import Tensor, nn
from torch.nn import functional

from leaf_distill.models.recompute import LeanProducts


def gradient(run: Callable[[Tensor], Tensor], *, lean: bool) -> tuple[Tensor, list[Tensor]]:
    """Return the gradient at the input, and all that was kept for it, once each."""
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    states = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        with LeanProducts() if lean else nullcontext():
            output = run(states)
        (found,) = torch.autograd.grad(output.square().sum(), states)
    return found, list(kept.values())


class Gated(nn.Module):
    """A gated layer, as models of language have it."""

    def __init__(self, act: nn.Module, *, last: bool = False, spoil: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gate, self.up, self.act = nn.Linear(32, 48), nn.Linear(32, 48), act
        self.last, self.spoil = last, spoil
        self.requires_grad_(False)

    def forward(self, states: Tensor) -> Tensor:
        active = self.act(self.gate(states))
        if self.spoil:
            active.add_(1.0)
        factor = self.up(states)
        product: Tensor = factor * active if self.last else active * factor
        return product


ACTS = [nn.SiLU(), nn.GELU(), nn.GELU("tanh"), nn.ReLU()]


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("act", ACTS, ids=str)
def test_the_gradient_is_the_same_and_less_is_kept(act: nn.Module, last: bool) -> None:
    layer = Gated(act, last=last)
    (plain, much), (found, little) = (gradient(layer, lean=lean) for lean in (False, True))
    assert torch.equal(found, plain)
    # A ReLU keeps its output in any case.
    assert len(much) - len(little) == (0 if isinstance(act, nn.ReLU) else 1)


@pytest.mark.parametrize("act", [nn.SiLU(inplace=True), *ACTS[:2]], ids=str)
def test_what_is_written_over_is_kept_as_it_is(act: nn.Module) -> None:
    layer = Gated(act, spoil=not getattr(act, "inplace", False))
    (plain, much), (found, little) = (gradient(layer, lean=lean) for lean in (False, True))
    assert torch.equal(found, plain) and len(little) == len(much)


def test_a_change_of_what_is_computed_again_is_noticed() -> None:
    layer = Gated(nn.SiLU())
    states = torch.randn(2, 5, 32).requires_grad_()
    with LeanProducts():
        gate = layer.gate(states)
        product = layer.act(gate) * layer.up(states)
    with torch.no_grad():
        gate.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


@pytest.mark.parametrize("last", [False, True])
def test_the_product_lies_in_memory_as_it_would(last: bool) -> None:
    states, turned = torch.randn(2, 5, 3).requires_grad_(), torch.randn(2, 3, 5).transpose(1, 2)
    products = []
    for mode in (nullcontext(), LeanProducts()):
        with mode:
            active = functional.silu(states)
            products.append(turned * active if last else active * turned)
    plain, lean = products
    assert type(lean.grad_fn) is not type(plain.grad_fn)
    assert torch.equal(lean, plain) and lean.stride() == plain.stride()


def test_an_activation_without_a_gradient_is_kept_as_it_is() -> None:
    states, gate = torch.ones(2, 5).requires_grad_(), torch.zeros(2, 5)
    with LeanProducts():
        product = functional.silu(gate) * states
    gate.add_(1.0)  # nothing else would notice it
    (found,) = torch.autograd.grad(product.sum(), states)
    assert torch.equal(found, torch.zeros(2, 5))


def test_an_input_may_be_given_by_name() -> None:
    found = []
    for lean in (False, True):
        found.append(
            gradient(lambda states: functional.gelu(input=2 * states) * states, lean=lean)[0]
        )
    assert torch.equal(*found)


def test_a_model_keeps_a_layer_width_less_for_each_layer() -> None:
    model = build().requires_grad_(False)

    def run(states: Tensor) -> Tensor:
        output: Tensor = model.model(inputs_embeds=states, use_cache=False).last_hidden_state
        return output

    (plain, much), (found, little) = (gradient(run, lean=lean) for lean in (False, True))
    assert torch.equal(found, plain)
    wide = (2, 5, model.config.intermediate_size)
    counts = [sum(tensor.shape == wide for tensor in kept) for kept in (much, little)]
    assert counts == [3 * model.config.num_hidden_layers, 2 * model.config.num_hidden_layers]
