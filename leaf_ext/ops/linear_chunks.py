"""Losses of a linear head over chunks of rows: matrix products around a loss of logits."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from leaf_ext.native import has_amx, prefer_huge_pages
from leaf_ext.schema import accum_dtype, gradient_rows, hidden_grad_dtype

# Rows of a head's gradient that are computed at once if products cannot be added to it directly and
# need separate memory.
_SLAB = 8192
# Logits of the teacher that a CPU computes at once: fewer rows read the head too often.
_TEACHER_LOGITS = 1 << 25


def default_chunk_size(vocabulary: int, device: torch.device, dtype: torch.dtype) -> int:
    """Return the rows of a chunk, 32 to 4096, for at most 2^27 logits, on a GPU 2^28.

    It is 2^29 for bfloat16 on a GPU, where the teacher's logits take a quarter of the student's.
    """
    exponent = 27 if device.type == "cpu" else 29 if dtype == torch.bfloat16 else 28
    most = (1 << exponent) // max(1, vocabulary)
    step = 256 if most >= 1024 else 32
    most = max(32, min(4096, most // step * step))
    return min(most, 2 * _piece_size(vocabulary)) if device.type == "cpu" else most


def _piece_size(vocabulary: int) -> int:
    """Return the rows with which torch computes the gradient of hidden states fastest on a CPU."""
    return max(256, min(4096, 2**23 // max(1, vocabulary) // 32 * 32))


def kept_head_dtype(hidden: Tensor, chunk_size: int) -> torch.dtype:
    """Return the dtype in which the gradient of a head is kept for the backward.

    The sum of several chunks is float32. The product of a single chunk is kept in bfloat16 if
    torch gives no wider one. Under torch.compile the number of rows may be unknown, and float32
    is used.
    """
    wide = accum_dtype(hidden.dtype)
    if hidden.dtype != torch.bfloat16 or torch.compiler.is_compiling():
        return wide
    if hidden.shape[0] > chunk_size or _multiplies_to_float32(hidden.device, hidden.dtype):
        return wide
    return _factor_dtype(hidden.device, hidden.dtype)


@functools.cache
def _multiplies_to_float32(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether the device's library multiplies this dtype into float32, as CUDA's does."""
    if dtype == torch.float32:
        return False  # products of float32 are float32 anyway
    ones, sums = (torch.ones(8, 8, dtype=d, device=device) for d in (dtype, torch.float32))
    try:
        torch.addmm(sums, ones, ones, out_dtype=torch.float32, out=sums)
        return bool((torch.mm(ones, ones, out_dtype=torch.float32) == sums - 1).all())
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError):
        return False


@functools.cache
def _multiplies_bfloat16() -> bool:
    """Return whether this CPU has instructions for bfloat16 products (AVX-512, AMX, AVX10.2, Arm).

    Without them bfloat16 products are slower than float32 products, and less accurate.
    """
    capabilities = torch.cpu.get_capabilities()
    names = ("avx512_bf16", "amx_bf16", "avx10_2", "bf16", "sve_bf16")
    return any(capabilities.get(name, False) for name in names)


def _factor_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype to which the factors of a product are converted."""
    if _multiplies_to_float32(device, dtype):
        return dtype
    # float16 products overflow and lose small gradients; products of float32 copies do not.
    emulated = dtype == torch.bfloat16 and device.type == "cpu" and not _multiplies_bfloat16()
    return torch.float32 if dtype == torch.float16 or emulated else dtype


@dataclass(frozen=True)
class Products:
    """Matrix products of a device: by whom, of what dtype, and into what dtype."""

    device: str
    dtype: torch.dtype  # of the factors
    logits: torch.dtype
    to_float32: bool  # by torch
    amx: bool  # by `bfloat16_matmul` of this package, into float32 too

    @staticmethod
    def of(hidden: Tensor) -> Products:
        dtype = _factor_dtype(hidden.device, hidden.dtype)
        to_float32 = _multiplies_to_float32(hidden.device, hidden.dtype)
        cpu = hidden.device.type == "cpu"
        return Products(
            hidden.device.type,
            dtype,
            torch.float32 if to_float32 else dtype,
            to_float32,
            cpu and dtype == torch.bfloat16 and not to_float32 and has_amx(),
        )

    def piece_size(self, vocabulary: int, chunk_size: int) -> int:
        """Return the rows of the teacher's logits that are computed at once."""
        if self.device == "cpu" and not self.to_float32:
            most = _TEACHER_LOGITS // max(1, vocabulary) // 32 * 32
            return min(chunk_size, max(_piece_size(vocabulary), most))
        # A call gives float16 gradients one scale, which must hold for all rows of a product.
        several = self.to_float32 and self.dtype != torch.float16
        return -(-chunk_size // 4) if several else chunk_size

    def into(self, out: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """out = a @ b"""
        if self.amx:
            torch.ops.leaf_ext.bfloat16_matmul(out, a, b, False)
            return out
        if self.to_float32 and out.dtype == torch.float32:
            return torch.mm(a, b, out_dtype=torch.float32, out=out)
        return torch.mm(a, b, out=out)

    def add_into(self, out: Tensor, a: Tensor, b: Tensor) -> None:
        """out += a @ b, for `out` in float32"""
        if self.amx:
            torch.ops.leaf_ext.bfloat16_matmul(out, a, b, True)
        elif self.to_float32:
            torch.addmm(out, a, b, out_dtype=torch.float32, out=out)
        else:
            out.addmm_(a, b)


@dataclass(frozen=True)
class Head:
    """A linear head in the dtype of its products, and a workspace for the logits of a chunk."""

    weight: Tensor
    bias: Tensor | None
    products: Products
    workspace: Tensor

    @staticmethod
    def of(weight: Tensor, bias: Tensor | None, products: Products, rows: int) -> Head:
        weight = weight.to(products.dtype)
        width = weight.shape[0]
        # On a GPU fast products and our kernels need rows at multiples of 16 bytes. A CPU's library
        # would read the padding of such rows, which may contain NaN.
        stride = -(-width // 8) * 8 if products.to_float32 else width
        workspace = weight.new_empty(rows, stride, dtype=products.logits)
        bias = None if bias is None else bias.to(products.logits)
        return Head(weight, bias, products, prefer_huge_pages(workspace)[:, :width])

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
    """The requested gradients; the others are empty."""

    hidden: Tensor
    head: Tensor
    bias: Tensor
    product: Tensor | None  # of a slab, if it cannot be added to the head's gradient directly
    widened: Tensor | None  # the same in the dtype of the head's gradient, if that is another

    def add_rows(self, slope: Tensor, scale: Tensor, head: Head, index: Tensor) -> None:
        """Add the part of rows; `slope` is their logits' gradient (times `scale` if float16)."""
        unscaled = self._unscaled(slope.dtype, scale)
        if self.hidden.dim() == 2:
            shape = (index.numel(), self.hidden.shape[1])
            dtype = self.hidden.dtype if head.products.to_float32 else slope.dtype
            part = head.products.into(slope.new_empty(shape, dtype=dtype), slope, head.weight)
            self.hidden.index_copy_(0, index, unscaled(part).to(self.hidden.dtype))
        if self.bias.numel():
            self.bias.add_(unscaled(slope.sum(0, dtype=self.bias.dtype)))

    def add_chunk(
        self, slope: Tensor, scale: Tensor, head: Head, hidden: Tensor, first: bool
    ) -> None:
        """Add the chunk's part to the head's gradient; the first chunk overwrites it."""
        products = head.products
        if self.head.dim() != 2:
            return
        if self.product is None:
            add = products.into if first else products.add_into
            add(self.head, slope.T, hidden)
            return
        unscaled = self._unscaled(slope.dtype, scale)
        for begin in range(0, self.head.shape[0], _SLAB):
            slab = self.head[begin : begin + _SLAB]
            columns = slope[:, begin : begin + _SLAB]
            part = unscaled(products.into(self.product[: slab.shape[0]], columns.T, hidden))
            if first:
                slab.copy_(part)
            else:  # torch would widen a narrower part into new memory
                slab.add_(part if self.widened is None else self.widened[: len(part)].copy_(part))

    @staticmethod
    def _unscaled(dtype: torch.dtype, scale: Tensor) -> Callable[[Tensor], Tensor]:
        return (lambda part: part.div_(scale)) if dtype == torch.float16 else (lambda part: part)


class Needs(NamedTuple):
    """The last arguments of a linear loss."""

    hidden_grad: bool
    head_grad_dtype: torch.dtype | None
    bias_grad: bool
    rows: bool
    chunk_size: int


# Called with logits of a piece, which it overwrites with their gradient of the dtype, if one is
# given (see `gradient_rows`), and with the indices of the rows. Returns loss, grad_scale and rows.
PieceLoss = Callable[[Tensor, Tensor, torch.dtype | None], tuple[Tensor, Tensor, Tensor]]
Model = tuple[Tensor, Tensor, Tensor | None]  # hidden states, head and bias
Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def run_chunks(
    op: str,
    student: Model,
    live: Tensor,
    vocabulary: int,
    measures: int,
    needs: Needs,
    piece_loss: Callable[[int], PieceLoss],
) -> Gradients:
    """Sum a loss over chunks of the live rows of `student`, which is hidden states, head and bias.

    `piece_loss(rows)` returns the loss of pieces of at most so many rows; `vocabulary` is the
    largest of both models; a piece has `measures` rows of measures. Returns the loss, the gradients
    of the student's tensors and the measures of all rows.
    """
    student_hidden, student_head, student_bias = student
    need_head = needs.head_grad_dtype is not None
    need_grad = needs.hidden_grad or need_head or needs.bias_grad
    wide, total = accum_dtype(student_hidden.dtype), student_hidden.shape[0]
    if needs.head_grad_dtype not in (None, wide) and total > needs.chunk_size:
        raise RuntimeError(
            f"{op}: head_grad_dtype must be {wide} where several chunks are added up "
            f"({total} rows in chunks of {needs.chunk_size}), got {needs.head_grad_dtype}"
        )
    products = Products.of(student_hidden)
    piece = max(1, min(products.piece_size(vocabulary, needs.chunk_size), live.numel()))
    # torch computes the gradient of hidden states on a CPU fastest with few rows at once.
    few = products.device == "cpu" and not products.to_float32 and not products.amx
    size = piece if few and not need_head else max(1, min(needs.chunk_size, live.numel()))
    loss = student_hidden.new_zeros((), dtype=torch.float64)  # the sum of many parts
    scale = student_hidden.new_ones((), dtype=wide)  # the scale of a chunk without rows
    rows = scale.new_zeros(measures, total if needs.rows else 0)
    with torch.autocast(student_hidden.device.type, enabled=False):
        head = Head.of(student_head, student_bias, products, size)
        grads = _gradients(
            student_hidden, head, needs.hidden_grad, needs.head_grad_dtype, needs.bias_grad
        )
        loss_of = piece_loss(piece)
        dtype = head.weight.dtype
        for number, chunk in enumerate(torch.split(live, size)):
            hidden = head.rows_of(student_hidden, chunk)
            logits = head.logits(hidden)
            for begin in range(0, chunk.numel(), piece):
                index, z = chunk[begin : begin + piece], logits[begin : begin + piece]
                part, scale, found = loss_of(z, index, dtype if need_grad else None)
                if need_grad and few:
                    slope, step = gradient_rows(z, dtype), _piece_size(vocabulary)
                    for at in range(0, len(slope), step):
                        grads.add_rows(slope[at : at + step], scale, head, index[at : at + step])
                loss += part
                if needs.rows:
                    rows.index_copy_(1, index, found)
            # A float16 slope has one scale, because it is one piece a chunk.
            slope = gradient_rows(logits, dtype)
            if need_grad and not few:
                grads.add_rows(slope, scale, head, chunk)
            if need_head:
                grads.add_chunk(slope, scale, head, hidden, first=number == 0)
    return loss.to(wide), grads.hidden, grads.head, grads.bias, rows


def _gradients(
    hidden: Tensor,
    head: Head,
    need_hidden: bool,
    head_dtype: torch.dtype | None,
    need_bias: bool,
) -> _Gradients:
    wide, weight = accum_dtype(hidden.dtype), head.weight
    # Each chunk of float16 factors has its own scale. Other narrow factors are multiplied into
    # float32 only if the library can.
    to_float32 = head.products.to_float32
    needs_product = weight.dtype == torch.float16 if to_float32 else weight.dtype != head_dtype
    needs_product = needs_product and not head.products.amx

    def zeros(shape: torch.Size, needed: bool, dtype: torch.dtype) -> Tensor:
        return hidden.new_zeros(shape if needed else 0, dtype=dtype if needed else wide)

    def unwritten(shape: torch.Size, dtype: torch.dtype) -> Tensor:
        return prefer_huge_pages(hidden.new_empty(shape, dtype=dtype))

    slab = torch.Size((min(_SLAB, weight.shape[0]), weight.shape[1]))
    product = wide if to_float32 else weight.dtype
    widens = head_dtype and needs_product and product != head_dtype
    return _Gradients(
        hidden=zeros(hidden.shape, need_hidden, hidden_grad_dtype(hidden.dtype)),
        head=unwritten(weight.shape, head_dtype) if head_dtype else hidden.new_zeros(0, dtype=wide),
        bias=zeros(weight.shape[:1], need_bias, wide),
        product=unwritten(slab, product) if head_dtype and needs_product else None,
        widened=unwritten(slab, head_dtype) if head_dtype and widens else None,
    )
