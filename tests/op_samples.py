"""Small inputs of every op, for tests of the contract."""

from __future__ import annotations

import torch
from torch import Tensor


def kl_tensors(rows: int = 4, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    student, teacher = torch.randn(rows, 9).to(dtype), torch.randn(rows, 11).to(dtype)
    return student, teacher, torch.tensor([0.2, 0.0, 0.5, 0.3])[:rows]


def span_tensors() -> tuple[Tensor, Tensor, Tensor]:
    return torch.rand(3, 20), torch.rand(3, 20), torch.ones(3, 20, dtype=torch.bool)


def linear_tensors(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    shapes = ((4, 3), (9, 3), (4, 5), (11, 5))
    tensors = [torch.randn(shape).to(dtype) for shape in shapes]
    return [*tensors, torch.tensor([0.2, 0.0, 0.5, 0.3])]


def topk_tensors(rows: int = 4, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """Return logits, ids, log-probabilities and row weights of `topk_kl`."""
    student, teacher, weight = kl_tensors(rows, dtype)
    logprobs, ids = teacher.float().log_softmax(-1)[:, :9].topk(3)
    return student, ids, logprobs, weight


def raw_topk_tensors() -> tuple[Tensor, ...]:
    """Return the tensors of the op itself, which also takes the tail."""
    student, ids, logprobs, weight = topk_tensors()
    return student, ids, logprobs, torch.full((4,), -1.0), weight


def linear_topk_tensors() -> list[Tensor]:
    return [torch.randn(4, 3), torch.randn(9, 3), *raw_topk_tensors()[1:]]
