"""The losses for a teacher of which k ids are known; see subjects.py."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from checked import exact_topk
from torch import Tensor

import leaf_ext
from leaf_ext.testing import cases, eager

from . import subjects
from .clock import Clock
from .subjects import Subject, Truth, some

_AT_ONCE = 256


class Topk(Subject):
    """Logits of the student, ids and log-probabilities of a random teacher.

    If a case has rows that are not live, every third row has weight 0 and contains NaN.
    """

    op, eager, leaves = leaf_ext.topk_kl, eager.eager_topk_kl, 1

    def __init__(self, case: cases.TopkCase, clock: Clock) -> None:
        super().__init__(case, clock)
        kl = case.logits
        student = self.random.normal(kl.dtype, kl.rows, kl.student_vocabulary).mul_(kl.std)
        live = torch.arange(kl.rows, device=clock.device) % 3 != (1 if kl.live < 1 else 3)
        student[~live] = float("nan")
        ids, logprobs = self.teacher(kl, case.k)
        self.tensors = (student, ids, logprobs, live.float())
        chunks = zip(*(t.split(_AT_ONCE) for t in self.tensors[:3]), strict=True)
        rows = torch.cat([eager.eager_topk_rows(*chunk) for chunk in chunks])
        self.kl = rows.where(live, torch.zeros_like(rows))
        self.some = some(clock, kl.rows)
        _, self.gradient = exact_topk(*(t[self.some] for t in self.tensors), at_once=16)

    def teacher(self, kl: cases.KLCase, k: int) -> tuple[Tensor, Tensor]:
        """Return the k most likely ids of each row [N, k] and their log-probabilities."""
        found: list[tuple[Tensor, Tensor]] = []
        for start in range(0, kl.rows, _AT_ONCE):
            rows = min(_AT_ONCE, kl.rows - start)
            logits = self.random.normal(torch.float32, rows, kl.student_vocabulary).mul_(kl.std)
            found.append(logits.log_softmax(-1).topk(k))
        logprobs, ids = (torch.cat(parts) for parts in zip(*found, strict=True))
        return ids, logprobs

    def arguments(self, variant: str) -> tuple[Tensor, ...]:
        return self.tensors[0].clone().requires_grad_(), *self.tensors[1:]

    def truths(self, result: tuple[Tensor, ...]) -> Iterator[Truth]:
        return subjects.logit_truths(self, result)


class LinearTopk(Topk):
    """Hidden states and head of the student; the results are those of its logits in float32."""

    op, leaves = leaf_ext.linear_topk_kl, 2

    def __init__(self, case: cases.LinearCase, clock: Clock) -> None:
        Subject.__init__(self, case, clock)
        kl, width = case.logits, case.student_hidden
        hidden = self.random.normal(kl.dtype, kl.rows, width)
        head = self.random.normal(kl.dtype, kl.student_vocabulary, width).mul_(kl.std / width**0.5)
        teacher = self.teacher(kl, case.k)
        self.tensors = (hidden, head, *teacher, torch.ones(kl.rows, device=clock.device))
        self.some, self.words = some(clock, kl.rows), some(clock, kl.student_vocabulary)
        self.total = torch.zeros((), dtype=torch.float64, device=clock.device)
        self.head_grad = self.total.new_zeros(len(self.words), width)
        self.hidden_grad = torch.empty_like(hidden, dtype=torch.float32)
        for rows in torch.arange(kl.rows, device=clock.device).split(512):
            logits = (hidden[rows].float() @ head.float().T).requires_grad_()
            loss = eager.eager_topk_rows(logits, *(t[rows] for t in teacher)).double().sum()
            (slope,) = torch.autograd.grad(loss, logits)
            self.total += loss.detach()
            self.hidden_grad[rows] = slope @ head.float()
            self.head_grad += slope[:, self.words].double().T @ hidden[rows].double()

    def arguments(self, variant: str) -> tuple[Tensor, ...]:
        return *(t.detach().requires_grad_() for t in self.tensors[:2]), *self.tensors[2:]

    def truths(self, result: tuple[Tensor, ...]) -> Iterator[Truth]:
        loss, hidden_grad, head_grad, *_ = result
        yield "loss", loss, self.total, 1e-3 if self.clock.on_gpu else 1e-2
        yield "head's gradient", head_grad[self.words], self.head_grad, 0.03
        yield "hidden states' gradient", hidden_grad[self.some], self.hidden_grad[self.some], 0.03


SUBJECTS = {**subjects.SUBJECTS, "topk_kl": Topk, "linear_topk_kl": LinearTopk}
