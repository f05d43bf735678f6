"""The timed functions, and the float64 results that they are compared with before timing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

import leaf_ext


def on_backend(function: Callable[..., Any], backend: str, **options: Any) -> Callable[..., Any]:
    def call(first: Tensor, *rest: Any) -> Any:
        # The argument is a leaf, which `inplace_grad` must not overwrite; it may overwrite a view.
        first = first.view_as(first) if options.get("inplace_grad") else first
        return function(first, *rest, backend=backend, **options)

    return call


def compiled(function: Callable[..., Any], tiny: bool) -> Callable[..., Any]:
    """Compile for the shapes of the first call; earlier compilations are discarded."""
    torch.compiler.reset()
    return torch.compile(function, backend="aot_eager" if tiny else "inductor", dynamic=False)


def backward(loss: Callable[..., Tensor], trained: int) -> Callable[..., Tensor]:
    """Return a step of forward and backward, with the first `trained` arguments as leaves."""

    def step(*tensors: Tensor) -> Tensor:
        for tensor in tensors[:trained]:
            tensor.grad = None
        value = loss(*tensors)
        value.backward()
        return value.detach()

    return step


def relative(result: Tensor, truth: Tensor) -> float:
    return float((result.double() - truth.double()).norm() / truth.double().norm())


def worst_relative(result: Tensor, truth: Tensor, rows: int, scale: float = 1.0) -> float:
    """Return the largest relative error, block by block: all in float64 would take gigabytes.

    `scale` is the factor of the result: 1/N if the truth is a sum and the result a mean.
    """
    blocks = zip(result.split(rows), truth.split(rows), strict=True)
    found = [relative(ours.double() / scale, theirs) for ours, theirs in blocks]
    return next((error for error in found if error != error), max(found))  # NaN is the worst


class WrongResult(AssertionError):
    """A result is wrong, so that it is not timed."""


def refuse_unless(close: float, bound: float, what: str) -> None:
    if not close <= bound:  # NaN is not close
        raise WrongResult(f"{what} is off by {close:.2g} (bound {bound:.2g}): no speed for it")


def _blocks(rows: int, at_once: int) -> Iterator[slice]:
    return (slice(start, start + at_once) for start in range(0, rows, at_once))


def exact_kl(
    student: Tensor, teacher: Tensor, weight: Tensor, at_once: int, **options: Any
) -> tuple[float, Tensor]:
    """Return the loss in float64, and the gradient of all rows rounded to float32."""
    total, gradient = 0.0, torch.empty_like(student, dtype=torch.float32)
    for rows in _blocks(student.shape[0], at_once):
        leaf = student[rows].double().requires_grad_()
        exact = teacher[rows].double(), weight[rows].double()
        loss = leaf_ext.dual_kl(leaf, *exact, backend="reference", **options)
        loss.backward()
        total += float(loss.detach())
        assert leaf.grad is not None
        gradient[rows] = leaf.grad
    return total, gradient


def exact_topk(
    student: Tensor, ids: Tensor, logprobs: Tensor, weight: Tensor, at_once: int
) -> tuple[float, Tensor]:
    """Return the loss of `topk_kl` in float64, and the gradient rounded to float32."""
    total, gradient = 0.0, torch.empty_like(student, dtype=torch.float32)
    for rows in _blocks(student.shape[0], at_once):
        leaf = student[rows].double().requires_grad_()
        given = ids[rows], logprobs[rows].double(), weight[rows].double()
        loss = leaf_ext.topk_kl(leaf, *given, backend="reference")
        loss.backward()
        total += float(loss.detach())
        assert leaf.grad is not None
        gradient[rows] = leaf.grad
    return total, gradient


def exact_linear(
    tensors: Sequence[Tensor],
    at_once: int,
    labels: tuple[Tensor, Tensor] | None = None,
    **options: Any,
) -> tuple[float, list[Tensor]]:
    """Return `linear_dual_kl`'s loss and gradients (hidden states, head) in float64.

    `labels` are the labels of the rows and their weights.
    """
    student_hidden, student_head, teacher_hidden, teacher_head, weight = tensors
    head, frozen = student_head.double().requires_grad_(), teacher_head.double()
    total, gradient = 0.0, torch.empty_like(student_hidden, dtype=torch.float64)
    for rows in _blocks(student_hidden.shape[0], at_once):
        leaf = student_hidden[rows].double().requires_grad_()
        others = teacher_hidden[rows].double(), frozen, weight[rows].double()
        if labels is not None:
            options |= {"labels": labels[0][rows], "label_weight": labels[1][rows].double()}
        loss = leaf_ext.linear_dual_kl(leaf, head, *others, backend="reference", **options)
        loss.backward()
        total += float(loss.detach())
        assert leaf.grad is not None
        gradient[rows] = leaf.grad
    assert head.grad is not None
    return total, [gradient, head.grad]
