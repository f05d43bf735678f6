"""The losses, forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from checked import (
    backward,
    compiled,
    exact_kl,
    exact_linear,
    on_backend,
    refuse_unless,
    relative,
    worst_relative,
)
from torch import Tensor

import leaf_ext
from leaf_ext.schema import OPS
from leaf_ext.testing import cases, eager

from . import peers
from .subject import Setting, Timed, errors, require_room

# A peer may be as inexact as it is (the table says how inexact), but not compute something else.
_PEER_BOUND = 0.3
Loss = Callable[..., Tensor]


def _ours(variant: str, op: Callable[..., Tensor], setting: Setting) -> Loss:
    name, _, how = variant.partition(" ")
    options = {"inplace_grad": True} if how == "inplace" else {}
    return on_backend(op, setting.backend(name), **options)


class KL:
    """Logits of both models; the weights are 1, so that the loss is a sum over the rows."""

    def __init__(self, case: cases.KLCase, setting: Setting) -> None:
        if setting.tiny:
            width = case.student_vocabulary // 1000 + 1
            case = replace(case, rows=8, student_vocabulary=width, teacher_vocabulary=width)
        self.case, self.setting = case, setting
        shape = (case.rows, case.student_vocabulary)
        at_once = setting.at_once(shape[1])
        # Both inputs, a leaf, its gradient and the truth of it; and what the float64 truth needs.
        needed = shape[0] * (4 * case.dtype.itemsize + 4) + at_once * 20 * 8
        require_room(setting, needed * shape[1])
        seed = setting.seed(case)
        self.student, self.teacher = (
            torch.empty(shape, dtype=case.dtype, device=setting.device).normal_(
                0, case.std, generator=seed
            )
            for _ in range(2)
        )
        self.weight = torch.ones(case.rows, device=setting.device)
        self.total, self.gradient = exact_kl(self.student, self.teacher, self.weight, at_once)

    def loss(self, variant: str) -> Loss:
        if variant.startswith(("cuda", "triton", "reference")):
            return _ours(variant, leaf_ext.dual_kl, self.setting)
        return {
            "eager": lambda: eager.eager_dual_kl,
            "compiled": lambda: compiled(eager.eager_dual_kl, self.setting.tiny),
            "liger KLDiv": peers.liger_kldiv,
            "liger JSD": peers.liger_jsd,
        }[variant]()

    def timed(self, variant: str) -> Timed:
        if variant.startswith("quack"):
            return self.cross_entropy()
        step, peer = backward(self.loss(variant), 1), variant.startswith("liger")
        scale = 1 / self.case.rows if peer else 1.0

        def prepare() -> tuple[Tensor, ...]:
            return self.student.clone().requires_grad_(), self.teacher, self.weight

        def check() -> dict[str, float]:
            arguments = prepare()
            value = float(step(*arguments)) / scale
            grad = arguments[0].grad
            assert grad is not None
            exactness = torch.finfo(self.case.dtype).eps
            loss = abs(value - self.total) / abs(self.total)
            rows = self.setting.at_once(grad.shape[1])
            off = worst_relative(grad, self.gradient, rows, scale)
            refuse_unless(loss, _PEER_BOUND if peer else 1e-5, "loss")
            refuse_unless(off, _PEER_BOUND if peer else max(1e-5, exactness), "gradient")
            return errors(loss=loss, gradient=off)

        case = self.case
        sizes = {"N": case.rows, "V_s": case.student_vocabulary, "V_t": case.teacher_vocabulary}
        moved = OPS["dual_kl"].bytes_moved(sizes | {"itemsize": case.dtype.itemsize})
        return Timed(step, prepare, check, moved)

    def cross_entropy(self) -> Timed:
        """Another function of one logit tensor: what a kernel reaches that reads a row once."""
        step = peers.quack_cross_entropy()
        logits = self.student
        places = torch.arange(logits.shape[0], device=logits.device) * 7919 % logits.shape[1]

        def check() -> dict[str, float]:
            losses, slopes = step(logits, places)
            rows = self.setting.at_once(logits.shape[1])
            off = []
            for start in range(0, logits.shape[0], rows):
                part = slice(start, start + rows)
                leaf = logits[part].double().requires_grad_()
                exact = torch.nn.functional.cross_entropy(leaf, places[part], reduction="none")
                exact.sum().backward()
                assert leaf.grad is not None
                off += [relative(losses[part], exact.detach()), relative(slopes[part], leaf.grad)]
            refuse_unless(max(off), _PEER_BOUND, "cross entropy")
            return errors(loss=max(off[::2]), gradient=max(off[1::2]))

        moved = 2 * logits.nbytes + logits.shape[0] * (4 + 8)
        return Timed(step, lambda: (logits, places), check, moved)


class Linear:
    """Hidden states and heads of both models."""

    def __init__(self, case: cases.LinearCase, setting: Setting) -> None:
        if setting.tiny:
            logits = replace(case.logits, rows=8, student_vocabulary=96, teacher_vocabulary=96)
            hidden = case.student_hidden // 100, case.teacher_hidden // 100
            case = replace(case, logits=logits, student_hidden=hidden[0], teacher_hidden=hidden[1])
        self.case, self.setting = case, setting
        rows, vocabulary = case.logits.rows, case.logits.student_vocabulary
        # The heads in float64 with the gradient of one; logits in bfloat16 twice.
        heads = 8 * vocabulary * (3 * case.student_hidden + case.teacher_hidden)
        require_room(setting, heads + 4 * rows * vocabulary)
        seed = setting.seed(case)

        def normal(height: int, width: int, std: float) -> Tensor:
            empty = torch.empty(height, width, dtype=case.logits.dtype, device=setting.device)
            return empty.normal_(0, std, generator=seed)

        tensors = []
        for width in (case.student_hidden, case.teacher_hidden):
            tensors.append(normal(rows, width, 1.0))
            tensors.append(normal(vocabulary, width, case.logits.std / width**0.5))
        self.tensors = (*tensors, torch.ones(rows, device=setting.device))
        self.total, exact = exact_linear(self.tensors, setting.at_once(vocabulary))
        self.gradients = [gradient.float() for gradient in exact]

    def loss(self, variant: str) -> Loss:
        tiny = self.setting.tiny
        if variant in ("cuda", "triton", "reference"):
            return _ours(variant, leaf_ext.linear_dual_kl, self.setting)
        return {
            "eager": lambda: eager.eager_linear_dual_kl,
            "compiled": lambda: compiled(eager.eager_linear_dual_kl, tiny),
            "liger chunked JSD": lambda: peers.liger_chunked(compiled=not tiny),
            "liger fused JSD": peers.liger_fused_jsd,
        }[variant]()

    def timed(self, variant: str) -> Timed:
        if variant == "bare products":
            return self.products()
        step, peer = backward(self.loss(variant), 2), variant.startswith("liger")
        scale = 1 / self.case.logits.rows if peer else 1.0

        def prepare() -> tuple[Tensor, ...]:
            leaves = (t.detach().requires_grad_() for t in self.tensors[:2])
            return (*leaves, *self.tensors[2:])

        def check() -> dict[str, float]:
            arguments = prepare()
            value = float(step(*arguments)) / scale
            loss, off = abs(value - self.total) / abs(self.total), []
            for ours, theirs in zip(arguments[:2], self.gradients, strict=True):
                assert ours.grad is not None
                off.append(worst_relative(ours.grad, theirs, 4096, scale))
            # 16-bit logits: their rounding is the library's, and averages out over many rows.
            bound = 1e-2 if self.setting.tiny else 1e-3
            refuse_unless(loss, _PEER_BOUND if peer else bound, "loss")
            refuse_unless(max(off), _PEER_BOUND if peer else 0.03, "gradient")
            return errors(loss=loss, gradient=max(off))

        return Timed(step, prepare, check, self.moved)

    @property
    def moved(self) -> int:
        case = self.case
        sizes = {
            **{"N": case.logits.rows, "H_s": case.student_hidden, "H_t": case.teacher_hidden},
            **{"V_s": case.logits.student_vocabulary, "V_t": case.logits.teacher_vocabulary},
        }
        return OPS["linear_dual_kl"].bytes_moved(sizes | {"itemsize": case.logits.dtype.itemsize})

    def products(self) -> Timed:
        """The four products that the mathematics needs, each of all rows at once."""
        hidden, head, teacher_hidden, teacher_head, _ = self.tensors
        rows, vocabulary = hidden.shape[0], head.shape[0]
        student, teacher = (head.new_empty(rows, vocabulary) for _ in range(2))
        hidden_grad, head_grad = torch.empty_like(hidden), torch.empty_like(head)

        def step() -> None:
            torch.mm(hidden, head.T, out=student)
            torch.mm(teacher_hidden, teacher_head.T, out=teacher)
            torch.mm(student, head, out=hidden_grad)
            torch.mm(student.T, hidden, out=head_grad)

        def check() -> dict[str, float]:
            step()
            some = slice(0, 16)
            off = [
                relative(student[some], hidden[some].double() @ head.double().T),
                relative(teacher[some], teacher_hidden[some].double() @ teacher_head.double().T),
                relative(hidden_grad[some], student[some].double() @ head.double()),
                relative(head_grad[some], student[:, some].double().T @ hidden.double()),
            ]
            refuse_unless(max(off), 0.03, "product")
            return errors(gradient=max(off))

        return Timed(step, lambda: (), check, self.moved)
