"""Saliency norms and spans."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from checked import WrongResult, compiled, on_backend, refuse_unless, relative
from torch import Tensor

import leaf_ext
from leaf_ext.schema import OPS
from leaf_ext.testing import cases, eager

from .subject import Setting, Timed, errors

# Spans come from scores that are compared with a cut: the rounding of norms may turn a few.
_DIFFERENT_TOKENS = 1e-3


class Norm:
    """Gradients of one model."""

    def __init__(self, case: cases.NormCase, setting: Setting) -> None:
        if setting.tiny:
            case = replace(case, shape=(2, 8, case.shape[-1] // 100))
        self.case, self.setting = case, setting
        empty = torch.empty(case.shape, dtype=case.dtype, device=setting.device)
        self.grad = empty.normal_(0, case.magnitude, generator=setting.seed(case))
        self.truth = leaf_ext.grad_norm(self.grad.double(), backend="reference")

    def timed(self, variant: str) -> Timed:
        if variant in ("cuda", "triton", "reference"):
            step = on_backend(leaf_ext.grad_norm, self.setting.backend(variant))
        elif variant == "eager":
            step = eager.eager_grad_norm
        else:
            step = compiled(eager.eager_grad_norm, self.setting.tiny)

        def check() -> dict[str, float]:
            off = relative(step(self.grad), self.truth)
            refuse_unless(off, 1e-5, "norm")
            return errors(loss=off)

        sizes = {
            "rows": self.grad.shape[:-1].numel(),
            "H": self.grad.shape[-1],
            "itemsize": self.case.dtype.itemsize,
        }
        moved = OPS["grad_norm"].bytes_moved(sizes)
        return Timed(step, lambda: (self.grad,), check, moved)


class Spans:
    """Norms, or gradients, of both models."""

    def __init__(self, case: cases.SpansCase, setting: Setting) -> None:
        if setting.tiny:
            hidden = case.hidden and (case.hidden[0] // 100, case.hidden[1] // 100)
            case = replace(case, batch=2, length=40, hidden=hidden)
        self.case, self.setting = case, setting
        shape, seed = (case.batch, case.length), setting.seed(case)

        def uniform(*size: int) -> Tensor:
            return torch.rand(size, device=setting.device, generator=seed)

        if case.hidden is None:
            saliency = [uniform(*shape).square() for _ in range(2)]
        else:
            # Each token's gradient has a magnitude of its own, as norms have in reality.
            saliency = [
                torch.empty(*shape, width, dtype=case.dtype, device=setting.device)
                .normal_(generator=seed)
                .mul_(uniform(*shape, 1).to(case.dtype))
                for width in case.hidden
            ]
        domain = uniform(*shape) < case.in_domain
        self.tensors = (*saliency, domain)
        self.truth = self.reference(torch.float64)

    def reference(self, dtype: torch.dtype) -> leaf_ext.Spans:
        teacher, student, domain = self.tensors
        norms = (leaf_ext.grad_norm(t.double()) if t.dim() == 3 else t for t in (teacher, student))
        return leaf_ext.detect_spans(*(n.to(dtype) for n in norms), domain, backend="reference")

    def function(self, variant: str) -> Callable[..., Any]:
        """Eager makes the spans by cumulative sums; compiled stops at the scores."""
        if variant in ("cuda", "triton", "reference"):
            return on_backend(leaf_ext.detect_spans, self.setting.backend(variant))
        plain = eager.eager_spans if variant == "eager" else eager.eager_scores
        if self.case.hidden is None:
            whole = plain
        else:

            def whole(teacher: Tensor, student: Tensor, domain: Tensor) -> Any:
                return plain(*(eager.eager_grad_norm(t) for t in (teacher, student)), domain)

        return whole if variant == "eager" else compiled(whole, self.setting.tiny)

    def timed(self, variant: str) -> Timed:
        name, _, graph = variant.partition(" ")
        step = self.function(name)
        if graph:
            step = self.setting.clock.captured(step, self.tensors)
        check = lambda: self.compare(step(*self.tensors))  # noqa: E731
        return Timed(step, lambda: self.tensors, check, self.moved, has_memory=not graph)

    def compare(self, result: Any) -> dict[str, float]:
        domain = self.tensors[-1]
        if isinstance(result, leaf_ext.Spans):
            result = (result.score, result.span, result.count)
        score, *spans = result if isinstance(result, tuple) else (result,)
        off = relative(score[domain], self.truth.score[domain])
        refuse_unless(off, 1e-5, "score")
        if spans and self.case.hidden is None:
            # From the same norms come the same spans.
            expected = self.reference(torch.float32)
            if not all(map(torch.equal, spans, (expected.span, expected.count))):
                raise WrongResult("other spans than the reference's: no speed for it")
        elif spans:
            different = (score <= 0.10) != (self.truth.score <= 0.10)
            share = float((different & domain).sum() / domain.sum())
            refuse_unless(share, _DIFFERENT_TOKENS, "share of confounders")
        return errors(loss=off)

    @property
    def moved(self) -> int:
        case, tokens = self.case, self.case.batch * self.case.length
        sizes = {"tokens": tokens, "B": case.batch, "T": case.length}
        moved = OPS["detect_spans"].bytes_moved(sizes)
        if case.hidden is not None:  # gradients are read in place of norms
            moved += tokens * (sum(case.hidden) * case.dtype.itemsize - 2 * 4)
        return moved
