"""`linear_dual_kl` over chunks of rows: library products around the backend's own `dual_kl_`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from leaf_ext.native import prefer_huge_pages
from leaf_ext.schema import accumulated, hidden_grad_dtype

_CHUNK_ELEMENTS = 2**26


def default_chunk_size(vocabulary: int) -> int:
    """Rows whose logits fill 2^26 elements, 32 to 4096."""
    return max(32, min(4096, _CHUNK_ELEMENTS // max(1, vocabulary)))


@dataclass(frozen=True)
class _Head:
    """A linear head in the dtype of its products, with one workspace for the logits of a chunk."""

    weight: Tensor
    bias: Tensor | None
    workspace: Tensor

    @staticmethod
    def of(weight: Tensor, bias: Tensor | None, rows: int) -> _Head:
        # float16 products overflow and lose small gradients; float32 copies of the head do not.
        dtype = torch.float32 if weight.dtype == torch.float16 else weight.dtype
        weight = weight.to(dtype)
        workspace = prefer_huge_pages(weight.new_empty(rows, weight.shape[0]))
        return _Head(weight, None if bias is None else bias.to(dtype), workspace)

    def rows_of(self, hidden: Tensor, index: Tensor) -> Tensor:
        return hidden.index_select(0, index).to(self.weight.dtype)

    def logits(self, hidden: Tensor) -> Tensor:
        out = self.workspace[: hidden.shape[0]]
        if self.bias is None:
            return torch.mm(hidden, self.weight.T, out=out)
        return torch.addmm(self.bias, hidden, self.weight.T, out=out)


@dataclass(frozen=True)
class _Gradients:
    """The gradients that were asked for; the others are empty."""

    hidden: Tensor
    head: Tensor
    bias: Tensor
    product: Tensor | None

    def add(self, slope: Tensor, head: _Head, hidden: Tensor, index: Tensor, first: bool) -> None:
        """Adds one chunk: `slope` is the gradient of its logits. The first one fills the head's."""
        if self.hidden.dim() == 2:
            self.hidden.index_copy_(0, index, (slope @ head.weight).to(self.hidden.dtype))
        if self.product is not None:
            product = torch.mm(slope.T, hidden, out=self.product)
            self.head.copy_(product) if first else self.head.add_(product)
        elif self.head.dim() == 2:
            self.head.addmm_(slope.T, hidden, beta=0 if first else 1)
        if self.bias.numel():
            self.bias.add_(slope.sum(0, dtype=self.bias.dtype))


def over(namespace: str) -> Callable[..., tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]:
    """The op for a namespace, on that namespace's `dual_kl` and `dual_kl_`."""

    def linear_dual_kl(
        student_hidden: Tensor,
        student_head: Tensor,
        teacher_hidden: Tensor,
        teacher_head: Tensor,
        row_weight: Tensor,
        student_bias: Tensor | None,
        teacher_bias: Tensor | None,
        temperature: float,
        student_scale: float,
        teacher_scale: float,
        student_softcap: float,
        teacher_softcap: float,
        need_hidden_grad: bool,
        need_head_grad: bool,
        need_bias_grad: bool,
        need_rows: bool,
        chunk_size: int,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        ops = getattr(torch.ops, namespace)
        scalars = (temperature, student_scale, teacher_scale, student_softcap, teacher_softcap)
        need_grad = need_hidden_grad or need_head_grad or need_bias_grad
        live = row_weight.nonzero().squeeze(1)
        size = max(1, min(chunk_size, live.numel()))
        wide = accumulated(student_hidden.dtype)
        loss = row_weight.new_zeros((), dtype=wide)
        rows = loss.new_zeros(4, row_weight.shape[0] if need_rows else 0)
        with torch.autocast(student_hidden.device.type, enabled=False):
            student = _Head.of(student_head, student_bias, size)
            teacher = _Head.of(teacher_head, teacher_bias, size)
            grads = _gradients(
                student_hidden, student, need_hidden_grad, need_head_grad, need_bias_grad
            )
            for number, index in enumerate(torch.split(live, size)):
                hidden = student.rows_of(student_hidden, index)
                z_s = student.logits(hidden)
                z_t = teacher.logits(teacher.rows_of(teacher_hidden, index))
                weight = row_weight.index_select(0, index)
                if need_grad:
                    part, _, measures = ops.dual_kl_(z_s, z_t, weight, *scalars, True, need_rows)
                    grads.add(z_s, student, hidden, index, first=number == 0)
                else:
                    part, _, _, measures = ops.dual_kl(z_s, z_t, weight, *scalars, False, need_rows)
                loss += part
                if need_rows:
                    rows.index_copy_(1, index, measures)
        return loss, grads.hidden, grads.head, grads.bias, rows

    return linear_dual_kl


def _gradients(
    hidden: Tensor, head: _Head, need_hidden: bool, need_head: bool, need_bias: bool
) -> _Gradients:
    wide, weight = accumulated(hidden.dtype), head.weight
    narrow = need_head and weight.dtype != wide

    def zeros(shape: torch.Size, needed: bool, dtype: torch.dtype) -> Tensor:
        return hidden.new_zeros(shape if needed else 0, dtype=dtype if needed else wide)

    def unwritten(shape: torch.Size, dtype: torch.dtype) -> Tensor:
        return prefer_huge_pages(hidden.new_empty(shape, dtype=dtype))

    return _Gradients(
        hidden=zeros(hidden.shape, need_hidden, hidden_grad_dtype(hidden.dtype)),
        head=unwritten(weight.shape, wide) if need_head else hidden.new_zeros(0, dtype=wide),
        bias=zeros(weight.shape[:1], need_bias, wide),
        product=unwritten(weight.shape, weight.dtype) if narrow else None,
    )
