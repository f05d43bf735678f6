"""Helpers for your own training loop: capture the embedding's gradient, cut spans out of ids."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from numbers import Integral
from typing import Any, TypeVar, overload

import torch
from torch import Tensor

from leaf_ext.ops import Spans
from leaf_ext.ops.checks import require, require_tensor

T = TypeVar("T")
_CAPTURE, _CUT = "capture_embedding_grad", "cut_spans"


class CapturedGrad:
    """The output of one module during a forward pass; made by `capture_embedding_grad`."""

    def __init__(self) -> None:
        self._outputs: list[Tensor] = []

    def grad(self, loss: Tensor, *, retain_graph: bool = False) -> Tensor:
        """Differentiate a loss with respect to the captured output.

        No parameter's `.grad` changes. The captured output is released afterwards, so that the next
        forward pass can be captured in the same block.

        Args:
            loss: [], in nats, computed by the one forward pass since the last call. A factor does
                not change the result of `detect_spans`; multiply the loss of a float16 model by
                1024, so that small gradients do not become 0.
            retain_graph: keeps the graph and the captured output, for a backward that follows.
        Returns:
            The gradient, [B, T, H], of the output's dtype, in nats per unit of embedding.
        Raises:
            ValueError: the module was not called exactly once, or the loss does not depend on it.
        """
        calls = len(self._outputs)
        require(calls == 1, _CAPTURE, "embedding", "called once before grad()", f"{calls} calls")
        require_tensor(_CAPTURE, "loss", loss)
        require(loss.numel() == 1, _CAPTURE, "loss", "a scalar", f"shape {tuple(loss.shape)}")
        needed = "computed from the embedding's output with gradients enabled"
        require(loss.requires_grad, _CAPTURE, "loss", needed, "a loss without a graph")
        (gradient,) = torch.autograd.grad(
            loss, self._outputs, retain_graph=retain_graph, allow_unused=True
        )
        require(gradient is not None, _CAPTURE, "loss", needed, "one that does not depend on it")
        if not retain_graph:
            self._outputs.clear()
        return gradient

    def _capture(self, module: torch.nn.Module, args: tuple[Any, ...], output: Any) -> Tensor:
        """The forward hook."""
        require_tensor(_CAPTURE, "the embedding's output", output)
        needed = "run with gradients enabled (torch.enable_grad())"
        require(torch.is_grad_enabled(), _CAPTURE, "the forward", needed, "torch.no_grad()")
        captured: Tensor = output if output.requires_grad else output.detach().requires_grad_()
        self._outputs.append(captured)
        return captured.clone()  # some models scale their embedding in place


@contextmanager
def capture_embedding_grad(embedding: torch.nn.Module) -> Iterator[CapturedGrad]:
    """Capture the gradient of a loss at the output of a module, such as the input embedding.

        with capture_embedding_grad(model.get_input_embeddings()) as captured:
            loss = model(input_ids=input_ids, labels=labels).loss
        gradient = captured.grad(loss)                     # for grad_norm and detect_spans

    The module's weights may be frozen or not. The model's result and training are unchanged.

    Args:
        embedding: the module; its output is one floating-point tensor, [B, T, H].
    Yields:
        A `CapturedGrad`, whose `grad` may be called within the block or after it.
    Raises:
        ValueError: in the forward, under `torch.no_grad()` or `torch.inference_mode()`, or where
            the output is not a tensor.
    """
    captured = CapturedGrad()
    handle = embedding.register_forward_hook(captured._capture)
    try:
        yield captured
    finally:
        handle.remove()


@overload
def cut_spans(
    values: Tensor, spans: Sequence[tuple[int, int]], *, collective: bool = ...
) -> list[Tensor]: ...


@overload
def cut_spans(
    values: Sequence[T], spans: Sequence[tuple[int, int]], *, collective: bool = ...
) -> list[list[T]]: ...


def cut_spans(
    values: Tensor | Sequence[T], spans: Sequence[tuple[int, int]], *, collective: bool = False
) -> list[Tensor] | list[list[T]]:
    """Cut spans out of one sequence: its token ids, or its labels or mask with the same spans.

    Args:
        values: [T], a tensor or a list.
        spans: (start, stop) of each span, 0 <= start < stop <= T, as in `Spans.tolist()[i]`.
        collective: makes one cut without any of the spans; otherwise each cut lacks one span.
    Returns:
        The shortened sequences, of the type of `values` (a list for a sequence): one a span, in the
        order of the spans; with `collective` one in all. Empty where there is no span.
    Raises:
        ValueError: a span outside the sequence, or `values` of several sequences.
    """
    if isinstance(values, Tensor):
        require(values.dim() == 1, _CUT, "values", "1-D [T]", f"shape {tuple(values.shape)}")
    whose = "the (start, stop) pairs of one sequence (Spans.tolist()[i])"
    several = isinstance(spans, Iterable) and not isinstance(spans, (str, Spans, Tensor))
    require(several, _CUT, "spans", whose, type(spans).__name__)
    length = len(values)
    cuts = [range(*_checked(span, length)) for span in spans]
    groups = [cuts] if collective and cuts else [[cut] for cut in cuts]
    kept = [sorted(set(range(length)).difference(chain(*group))) for group in groups]
    if isinstance(values, Tensor):
        return [values[torch.tensor(index, device=values.device).long()] for index in kept]
    return [[values[at] for at in index] for index in kept]


def _checked(span: Sequence[int], length: int) -> tuple[int, int]:
    needed = f"pairs (start, stop) with 0 <= start < stop <= T = {length}"
    pair = isinstance(span, Sequence) and len(span) == 2
    whole = pair and all(isinstance(border, Integral) for border in span)
    require(whole and 0 <= span[0] < span[1] <= length, _CUT, "spans", needed, span)
    return int(span[0]), int(span[1])
