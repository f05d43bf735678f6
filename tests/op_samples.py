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
