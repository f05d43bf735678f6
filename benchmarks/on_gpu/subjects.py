"""Inputs, variants and expected results of each op. A variant is compared before it is timed."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from checked import compiled, exact_kl, exact_linear, on_backend, refuse_unless, relative
from torch import Tensor
from torch.nn.functional import cross_entropy

import leaf_ext
from leaf_ext.dispatch import resolve
from leaf_ext.ops.logit_options import logit_options
from leaf_ext.schema import gradient_rows
from leaf_ext.testing import cases, eager

from . import peers
from .clock import Clock, Step

# A peer may be inexact (the table shows its error), but must not compute something else.
_PEER_BOUND = 0.3
# So many rows, spread evenly, are compared in float64; all rows would take seconds.
_SOME = 64
_OURS = ("cuda", "triton", "cpu")
Truth = tuple[str, Tensor, Tensor, float]  # name, result, truth, bound for our kernels


def some(clock: Clock, count: int) -> Tensor:
    return torch.linspace(0, count - 1, min(count, _SOME), device=clock.device).long()


class Random:
    """Tensors on the device, seeded by the case."""

    def __init__(self, case: object, clock: Clock) -> None:
        number = zlib.crc32(str(case).encode())
        self.device, self.seed = clock.device, torch.Generator(clock.device).manual_seed(number)

    def normal(self, dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.device).normal_(generator=self.seed)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, device=self.device, generator=self.seed)


def tensors_in(result: Any) -> list[Tensor]:
    """Yield the tensors of a tensor, a tuple or a dataclass."""
    if result is None or isinstance(result, Tensor):
        return [] if result is None else [result]
    parts = result if isinstance(result, tuple) else vars(result).values()
    return [tensor for part in parts for tensor in tensors_in(part)]


def differentiated(loss: Step, leaves: int) -> Step:
    """Return a step with loss, gradients of the first tensors (leaves), and further results."""

    def step(*tensors: Tensor) -> tuple[Any, ...]:
        found = loss(*tensors)
        value, *rest = found if isinstance(found, tuple) else (found,)
        value.backward()
        return value.detach(), *(tensor.grad for tensor in tensors[:leaves]), *rest

    return step


class Subject:
    """The inputs of one case. A variant is a backend or another project, with its options."""

    op: Callable[..., Any]
    eager: Callable[..., Any]
    leaves = 0
    tensors: tuple[Tensor, ...]
    options: Mapping[str, Any] = {}  # of our kernels, besides those of a variant

    def __init__(self, case: Any, clock: Clock) -> None:
        self.case, self.clock, self.random = case, clock, Random(case, clock)

    def backend(self, name: str) -> str:
        """Return the backend, or the CPU's in a rehearsal of the GPU's."""
        return "cpu" if name == "cuda" and not self.clock.on_gpu else name

    def arguments(self, variant: str) -> tuple[Tensor, ...]:
        """Return the arguments; fresh ones if a call overwrites them."""
        return self.tensors

    def step(self, variant: str) -> Step:
        name, *how = variant.split()
        if name in _OURS:
            options = {"inplace_grad": True} if "inplace" in how else {}
            options |= {"return_rows": True} if "rows" in how else {}
            options |= self.options
            step = on_backend(type(self).op, self.backend(name), **options)
        elif name in ("eager", "compiled"):
            step = type(self).eager
            step = compiled(step, not self.clock.on_gpu) if name == "compiled" else step
        else:
            step = peers.LOSSES[variant](self.clock.on_gpu)
        step = differentiated(step, self.leaves) if self.leaves else step
        return self.clock.captured(step, self.tensors) if "graph" in how else step

    def truths(self, result: Any) -> Iterator[Truth]:
        raise NotImplementedError

    def check(self, variant: str, step: Step) -> dict[str, Any]:
        """Return the error of a result, and the bytes that must be moved for it."""
        arguments = self.arguments(variant)
        size, result = sum(t.nbytes for t in arguments), step(*arguments)
        ours, off = variant.startswith(_OURS), 0.0
        for what, found, truth, bound in self.truths(result) if result is not None else ():
            off = relative(found, truth)
            refuse_unless(off, bound if ours else max(bound, _PEER_BOUND), what)
        return {"error": off, "bytes": size + sum(t.nbytes for t in tensors_in(result))}


class Copy(Subject):
    """A copy, which shows the bandwidth of the device's memory."""

    def step(self, variant: str) -> Step:
        size = 2**30 if self.clock.on_gpu else 2**20
        self.tensors = (torch.ones(size, dtype=torch.uint8, device=self.clock.device),)
        target = torch.empty_like(self.tensors[0])
        return lambda source: target.copy_(source)

    def truths(self, result: Any) -> Iterator[Truth]:
        yield "copy", result[:_SOME], self.tensors[0][:_SOME], 0.0


class KL(Subject):
    """Logits of both models; the weights are 1, so that the loss is a sum over the rows.

    If a case has rows that are not live, every third row has weight 0 and contains NaN.
    """

    op, eager, leaves = leaf_ext.dual_kl, eager.eager_dual_kl, 1

    def __init__(self, case: cases.KLCase, clock: Clock) -> None:
        super().__init__(case, clock)
        widths = case.student_vocabulary, case.teacher_vocabulary
        logits = [self.random.normal(case.dtype, case.rows, v).mul_(case.std) for v in widths]
        live = torch.arange(case.rows, device=clock.device) % 3 != (1 if case.live < 1 else 3)
        for z in logits:
            z[~live] = float("nan")
        self.tensors = (*logits, live.float())
        self.options = {"divergence": case.divergence}
        chunks = zip(*(z.split(256) for z in logits), strict=True)
        kl = torch.cat([eager.eager_divergence_rows(*both, **self.options) for both in chunks])
        self.kl = kl.where(live, torch.zeros_like(kl))
        self.some = some(clock, case.rows)
        part = (t[self.some] for t in self.tensors)
        _, self.gradient = exact_kl(*part, at_once=16, **self.options)

    def arguments(self, variant: str) -> tuple[Tensor, ...]:
        is_leaf = "narrow" not in variant and variant != "orda"
        return self.tensors[0].clone().requires_grad_(is_leaf), *self.tensors[1:]

    def step(self, variant: str) -> Step:
        name, *how = variant.split()
        if variant == "orda":
            return peers.orda_rows()
        if "narrow" not in how:
            return super().step(variant)
        # linear_dual_kl makes this call in training.
        rows = "rows" in how
        namespace = resolve("dual_kl_", self.clock.device, self.backend(name), self.case.dtype)
        op = getattr(torch.ops, namespace).dual_kl_
        # A CPU has no narrower gradient.
        dtype = torch.bfloat16 if self.clock.on_gpu else None
        scalars = logit_options("dual_kl", 1.0, 1.0, None, self.case.divergence)

        def step(*tensors: Tensor) -> tuple[Any, ...]:
            loss, _, found = op(*tensors, *scalars, True, rows, dtype)
            return loss, gradient_rows(tensors[0], dtype), *([(found[0],)] if rows else [])

        def on_a_copy(*_: Tensor) -> tuple[Any, ...]:
            return step(self.tensors[0].clone(), *self.tensors[1:])

        return self.clock.captured(on_a_copy, ()) if "graph" in how else step

    def truths(self, result: Any) -> Iterator[Truth]:
        return logit_truths(self, result)


def logit_truths(subject: Any, result: Any) -> Iterator[Truth]:
    """Yield the truths of a loss of logits: of `kl` [N], and of `gradient` at the rows `some`."""
    loss, gradient, *rows = result
    yield "loss", loss, subject.kl.double().sum(), 1e-4
    if rows:
        yield "KL of the rows", rows[0][0], subject.kl, 1e-4
    bound = max(1e-5, torch.finfo(gradient.dtype).eps)
    yield "gradient", gradient[subject.some], subject.gradient, bound


class Linear(Subject):
    """Hidden states and heads of both models, and labels, if the case has them."""

    op, eager, leaves = leaf_ext.linear_dual_kl, eager.eager_linear_dual_kl, 2

    def __init__(self, case: cases.LinearCase, clock: Clock) -> None:
        super().__init__(case, clock)
        kl, tensors = case.logits, []
        for width in (case.student_hidden, case.teacher_hidden):
            head = self.random.normal(kl.dtype, kl.student_vocabulary, width)
            tensors.append(self.random.normal(kl.dtype, kl.rows, width))
            tensors.append(head.mul_(kl.std / width**0.5))
        self.tensors = (*tensors, torch.ones(kl.rows, device=clock.device))
        self.options = {"divergence": kl.divergence}
        self.some, self.words = some(clock, kl.rows), some(clock, kl.student_vocabulary)
        self.labels = None
        if case.labels:
            labels = (self.random.uniform(kl.rows) * kl.student_vocabulary).long()
            self.labels = labels.clamp(max=kl.student_vocabulary - 1), self.random.uniform(kl.rows)
        part = (t if t is tensors[1] or t is tensors[3] else t[self.some] for t in self.tensors)
        of_some = self.labels and (self.labels[0][self.some], self.labels[1][self.some])
        exact = exact_linear(tuple(part), _SOME, of_some, **self.options)
        self.hidden_grad = exact[1][0]
        self.total, self.head_grad = self.sums()
        if self.labels:
            self.options |= dict(zip(("labels", "label_weight"), self.labels, strict=True))

    def sums(self) -> tuple[Tensor, Tensor]:
        """Return sums over all rows: the loss, and the head's gradient of some words.

        The logits are float32, because the products of all rows in float64 would take seconds.
        """
        hidden, head, teacher_hidden, teacher_head, weight = self.tensors
        heads = head.float(), teacher_head.float()
        total = weight.new_zeros((), dtype=torch.float64)
        gradient = total.new_zeros(len(self.words), head.shape[1])
        for rows in torch.arange(len(weight), device=weight.device).split(512):
            student = (hidden[rows].float() @ heads[0].T).requires_grad_()
            teacher = teacher_hidden[rows].float() @ heads[1].T
            loss = eager.eager_divergence_rows(student, teacher, **self.options).double().sum()
            if self.labels:
                nll = cross_entropy(student, self.labels[0][rows], reduction="none")
                loss = loss + (self.labels[1][rows] * nll).double().sum()
            (slope,) = torch.autograd.grad(loss, student)
            total += loss.detach()
            gradient += slope[:, self.words].double().T @ hidden[rows].double()
        return total, gradient

    def arguments(self, variant: str) -> tuple[Tensor, ...]:
        return *(t.detach().requires_grad_() for t in self.tensors[:2]), *self.tensors[2:]

    def step(self, variant: str) -> Step:
        if variant != "bare products":
            return super().step(variant)
        # The four products that the mathematics needs, each of all rows at once.
        hidden, head, teacher_hidden, teacher_head = (t.detach() for t in self.tensors[:4])
        student, teacher = (head.new_empty(len(hidden), len(head)) for _ in range(2))
        hidden_grad, head_grad = torch.empty_like(hidden), torch.empty_like(head)

        def step(*_: Tensor) -> None:
            torch.mm(hidden, head.T, out=student)
            torch.mm(teacher_hidden, teacher_head.T, out=teacher)
            torch.mm(student, head, out=hidden_grad)
            torch.mm(student.T, hidden, out=head_grad)

        return step

    def truths(self, result: Any) -> Iterator[Truth]:
        loss, hidden_grad, head_grad, *_ = result
        # The library rounds 16-bit logits; the error averages out over many rows.
        yield "loss", loss, self.total, 1e-3 if self.clock.on_gpu else 1e-2
        yield "head's gradient", head_grad[self.words], self.head_grad, 0.03
        yield "hidden states' gradient", hidden_grad[self.some], self.hidden_grad, 0.03


class Norm(Subject):
    """Gradients of one model."""

    op, eager = leaf_ext.grad_norm, eager.eager_grad_norm

    def __init__(self, case: cases.NormCase, clock: Clock) -> None:
        super().__init__(case, clock)
        self.tensors = (self.random.normal(case.dtype, *case.shape).mul_(case.magnitude),)

    def truths(self, result: Any) -> Iterator[Truth]:
        rows = self.tensors[0].flatten(0, 1)
        part = some(self.clock, len(rows))
        yield "norm", result.flatten()[part], rows[part].double().norm(dim=-1), 1e-5


class Spans(Subject):
    """Norms or gradients of both models. Eager PyTorch makes spans, compiled stops at scores."""

    op, eager = leaf_ext.detect_spans, eager.eager_scores

    def __init__(self, case: cases.SpansCase, clock: Clock) -> None:
        super().__init__(case, clock)
        shape = case.batch, case.length
        norms = [self.random.uniform(*shape).square() for _ in range(2)]
        if case.hidden:  # gradients of tokens differ in magnitude, as those of a model do
            normal = (self.random.normal(case.dtype, *shape, width) for width in case.hidden)
            norms = [x.mul_(norm[..., None]) for x, norm in zip(normal, norms, strict=True)]
        self.tensors = (*norms, self.random.uniform(*shape) < case.in_domain)
        self.options = {"scale": case.scale, "student_weight": case.student_weight}

    def truths(self, result: Any) -> Iterator[Truth]:
        *both, domain = self.tensors
        norms = [t.double().norm(dim=-1) if t.dim() == 3 else t for t in both]
        exact, single = (
            leaf_ext.detect_spans(
                *(n.to(dtype) for n in norms), domain, backend="reference", **self.options
            )
            for dtype in (torch.float64, torch.float32)
        )
        exactly = self.case.hidden is None and self.case.scale == "minmax"
        if isinstance(result, leaf_ext.Spans) and exactly:
            yield "spans", result.span, single.span, 0.0  # equal norms give equal spans
        score = result.score if isinstance(result, leaf_ext.Spans) else result
        yield "score", score[domain], exact.score[domain], 1e-5


SUBJECTS: dict[str, type[Subject]] = {
    "copy": Copy,
    "dual_kl": KL,
    "linear_dual_kl": Linear,
    "grad_norm": Norm,
    "detect_spans": Spans,
}
