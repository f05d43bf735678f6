"""`linear_dual_kl` over chunks of rows: library products around the backend's own `dual_kl_`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from leaf_ext.native import prefer_huge_pages
from leaf_ext.schema import accumulated, gradient_rows, hidden_grad_dtype

# Of one chunk of logits. The products of a GPU need more rows to run at full speed.
_CHUNK_ELEMENTS = {"cpu": 2**26, "cuda": 2**28}


def default_chunk_size(vocabulary: int, device: torch.device) -> int:
    """Rows whose logits fill 2^26 elements, on a GPU 2^28: 32 to 4096, whole tiles of a product."""
    rows = _CHUNK_ELEMENTS.get(device.type, 2**26) // max(1, vocabulary)
    step = 256 if rows >= 1024 else 32
    return max(32, min(4096, rows // step * step))


@functools.cache
def _multiplies_to_float32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the device's library multiplies this dtype into float32 (CUDA's does)."""
    if dtype == torch.float32:
        return False  # it does nothing else
    ones, sums = (torch.ones(8, 8, dtype=d, device=device) for d in (dtype, torch.float32))
    try:
        torch.addmm(sums, ones, ones, out_dtype=torch.float32, out=sums)
        return bool((torch.mm(ones, ones, out_dtype=torch.float32) == sums - 1).all())
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError):
        return False


@dataclass(frozen=True)
class _Products:
    """How matrices are multiplied on a device: into float32 where it can."""

    dtype: torch.dtype  # of the factors
    logits: torch.dtype
    to_float32: bool

    @staticmethod
    def of(hidden: Tensor) -> _Products:
        if _multiplies_to_float32(hidden.device, hidden.dtype):
            return _Products(hidden.dtype, torch.float32, True)
        # float16 products overflow and lose small gradients; of float32 copies they do not.
        dtype = torch.float32 if hidden.dtype == torch.float16 else hidden.dtype
        return _Products(dtype, dtype, False)

    def into(self, out: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """out = a @ b"""
        if self.to_float32 and out.dtype == torch.float32:
            return torch.mm(a, b, out_dtype=torch.float32, out=out)
        return torch.mm(a, b, out=out)

    def add_into(self, out: Tensor, a: Tensor, b: Tensor) -> None:
        """out += a @ b, for `out` in float32"""
        if self.to_float32:
            torch.addmm(out, a, b, out_dtype=torch.float32, out=out)
        else:
            out.addmm_(a, b)


@dataclass(frozen=True)
class _Head:
    """A linear head as its products need it, with one workspace for the logits of a chunk."""

    weight: Tensor
    bias: Tensor | None
    products: _Products
    workspace: Tensor

    @staticmethod
    def of(weight: Tensor, bias: Tensor | None, products: _Products, rows: int) -> _Head:
        weight = weight.to(products.dtype)
        width = weight.shape[0]
        # A GPU's fast products, and our kernels there, need rows at multiples of 16 bytes. A CPU's
        # library reads beyond the end of such rows, where there may be a NaN.
        apart = -(-width // 8) * 8 if products.to_float32 else width
        workspace = weight.new_empty(rows, apart, dtype=products.logits)
        bias = None if bias is None else bias.to(products.logits)
        return _Head(weight, bias, products, prefer_huge_pages(workspace)[:, :width])

    def rows_of(self, hidden: Tensor, index: Tensor) -> Tensor:
        return hidden.index_select(0, index).to(self.weight.dtype)

    def logits(self, hidden: Tensor) -> Tensor:
        out = self.workspace[: hidden.shape[0]]
        if self.bias is not None and not self.products.to_float32:
            return torch.addmm(self.bias, hidden, self.weight.T, out=out)
        self.products.into(out, hidden, self.weight.T)
        return out if self.bias is None else out.add_(self.bias)


@dataclass(frozen=True)
class _Gradients:
    """The gradients that were asked for; the others are empty."""

    hidden: Tensor
    head: Tensor
    bias: Tensor
    product: Tensor | None  # of one chunk, where it cannot be added to the head's at once

    def add(
        self, slope: Tensor, scale: Tensor, head: _Head, hidden: Tensor, index: Tensor, first: bool
    ) -> None:
        """Adds a chunk: `slope` is the gradient of its logits, in float16 multiplied by `scale`.

        The first chunk fills the head's gradient.
        """
        products = head.products
        unscaled = self._unscaled(slope.dtype, scale)
        if self.hidden.dim() == 2:
            part = slope.new_empty(hidden.shape, dtype=self.hidden.dtype)
            self.hidden.index_copy_(0, index, unscaled(products.into(part, slope, head.weight)))
        if self.product is not None:
            product = unscaled(products.into(self.product, slope.T, hidden))
            self.head.copy_(product) if first else self.head.add_(product)
        elif self.head.dim() == 2 and first:
            products.into(self.head, slope.T, hidden)
        elif self.head.dim() == 2:
            products.add_into(self.head, slope.T, hidden)
        if self.bias.numel():
            self.bias.add_(unscaled(slope.sum(0, dtype=self.bias.dtype)))

    @staticmethod
    def _unscaled(dtype: torch.dtype, scale: Tensor) -> Callable[[Tensor], Tensor]:
        return (lambda part: part.div_(scale)) if dtype == torch.float16 else (lambda part: part)


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
            student = _Head.of(student_head, student_bias, _Products.of(student_hidden), size)
            teacher = _Head.of(teacher_head, teacher_bias, _Products.of(teacher_hidden), size)
            grads = _gradients(
                student_hidden, student, need_hidden_grad, need_head_grad, need_bias_grad
            )
            for number, index in enumerate(torch.split(live, size)):
                hidden = student.rows_of(student_hidden, index)
                z_s = student.logits(hidden)
                z_t = teacher.logits(teacher.rows_of(teacher_hidden, index))
                weight = row_weight.index_select(0, index)
                if need_grad:
                    dtype = student.weight.dtype
                    part, scale, measures = ops.dual_kl_(
                        z_s, z_t, weight, *scalars, True, need_rows, dtype
                    )
                    slope = gradient_rows(z_s, dtype)
                    grads.add(slope, scale, student, hidden, index, first=number == 0)
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
    # Of float16 factors each chunk has its own scale; other narrow factors are multiplied into
    # float32 only where the library can.
    to_float32 = head.products.to_float32
    apart = weight.dtype == torch.float16 if to_float32 else weight.dtype != wide

    def zeros(shape: torch.Size, needed: bool, dtype: torch.dtype) -> Tensor:
        return hidden.new_zeros(shape if needed else 0, dtype=dtype if needed else wide)

    def unwritten(shape: torch.Size, dtype: torch.dtype) -> Tensor:
        return prefer_huge_pages(hidden.new_empty(shape, dtype=dtype))

    return _Gradients(
        hidden=zeros(hidden.shape, need_hidden, hidden_grad_dtype(hidden.dtype)),
        head=unwritten(weight.shape, wide) if need_head else hidden.new_zeros(0, dtype=wide),
        bias=zeros(weight.shape[:1], need_bias, wide),
        product=unwritten(weight.shape, wide if to_float32 else weight.dtype)
        if need_head and apart
        else None,
    )
