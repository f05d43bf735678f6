"""Products that compute an activation again in the backward pass, and so keep less memory."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any, Final, NamedTuple

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.overrides import TorchFunctionMode

# These keep their input. A ReLU and a sigmoid keep their output.
_ACTIVATIONS: Final = frozenset({functional.silu, functional.gelu})
_PRODUCTS: Final = frozenset({torch.mul, torch.Tensor.mul, torch.Tensor.__mul__})


class _Activation(NamedTuple):
    """The output of the last activation as it was made, and what made it."""

    output: weakref.ref[torch.Tensor]
    version: int
    given: torch.Tensor
    again: Callable[[torch.Tensor], torch.Tensor]


class LeanProducts(TorchFunctionMode):
    """Replaces the product of a gated layer by one that keeps no output of its activation.

    The product keeps both factors for its gradient. One of them is an activation, which keeps its
    input in any case, and takes hardly any time: a fifth less memory in a layer of Llama's kind.
    The values are the same to the bit.
    """

    def __init__(self) -> None:
        super().__init__()
        self._last: _Activation | None = None

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _PRODUCTS and self._last is not None and len(args) == 2 and not kwargs:
            output = self._last.output()
            if output is not None and output._version == self._last.version:
                for active, factor in (args, args[::-1]):
                    if active is output and _fits(active, factor):
                        product: Any = _Product  # apply is untyped
                        return product.apply(
                            active, factor, self._last.given, self._last.again, active is args[0]
                        )
        result = func(*args, **kwargs)
        # Without a gradient nothing keeps the input, and one that is written over is lost.
        if func in _ACTIVATIONS and args and result.requires_grad and result is not args[0]:
            given, rest = args[0].detach(), args[1:]  # not the graph before it
            again = partial(_call, func, rest, kwargs)
            self._last = _Activation(weakref.ref(result), result._version, given, again)
        return result


def _call(func: Any, rest: Any, kwargs: dict[str, Any], given: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = func(given, *rest, **kwargs)
    return result


def _fits(active: torch.Tensor, factor: Any) -> bool:
    return (
        isinstance(factor, torch.Tensor)
        and factor is not active
        and (factor.shape, factor.dtype) == (active.shape, active.dtype)
    )


class _Product(torch.autograd.Function):
    """The product of an activation's output and a factor."""

    @staticmethod
    def forward(
        context: Any,
        active: torch.Tensor,
        factor: torch.Tensor,
        given: torch.Tensor,
        again: Callable[[torch.Tensor], torch.Tensor],
        in_order: bool,
    ) -> torch.Tensor:
        context.save_for_backward(factor, given)
        context.again = again
        # The first factor decides how the product lies in memory, which later products depend on.
        return active * factor if in_order else factor * active

    @staticmethod
    @once_differentiable
    def backward(
        context: Any, *gradients: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, None, None, None]:
        factor, given = context.saved_tensors
        return gradients[0] * factor, gradients[0] * context.again(given), None, None, None
