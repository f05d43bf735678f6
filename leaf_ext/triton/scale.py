"""to = from * factor. The factor is on the device, and the host does not wait for it. Scaling in
place by 1, as in a plain loss.backward(), costs a launch and no memory traffic.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from leaf_ext.triton.launch import check, check_adjacent, on_device_of, options
from leaf_ext.triton.narrow import narrow

_BLOCK = 4096
_WARPS = 8


@triton.jit
def multiply_kernel(
    source,
    target,
    factor,
    source_stride,
    target_stride,
    width,
    blocks_per_row,
    INPLACE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    scale = tl.load(factor)
    if INPLACE & (scale == 1.0):
        return
    program = tl.program_id(0)
    row = (program // blocks_per_row).to(tl.int64)
    columns = (program % blocks_per_row) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    x = tl.load(source + row * source_stride + columns, mask=inside, other=0.0).to(tl.float32)
    value = narrow(x * scale, target.dtype.element_ty)
    tl.store(target + row * target_stride + columns, value, mask=inside)


def scaled(grad: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """Run the op with a result in new memory."""
    result = torch.empty(grad.shape, dtype=dtype, device=grad.device)
    width = grad.shape[-1] if grad.dim() else 1
    _run("scaled", grad.reshape(-1, max(1, width)), result.view(-1, max(1, width)), factor)
    return result


def scale_(grad: Tensor, factor: Tensor) -> None:
    """Run the op in place."""
    check(grad.dim() == 2, f"scale_: grad must be [N, V], got shape {tuple(grad.shape)}")
    _run("scale_", grad, grad, factor)


def _run(op: str, source: Tensor, target: Tensor, factor: Tensor) -> None:
    check_adjacent(op, "grad", source)
    check(
        factor.dtype == torch.float32 and factor.numel() == 1,
        f"{op}: factor must be one float32, got {factor.dtype} {tuple(factor.shape)}",
    )
    rows, width = source.shape
    if source.numel() == 0:
        return
    block = min(_BLOCK, triton.next_power_of_2(width))
    blocks = triton.cdiv(width, block)
    with on_device_of(source):
        multiply_kernel[(rows * blocks,)](
            source, target, factor, source.stride(0), target.stride(0), width, blocks,
            INPLACE=source is target, BLOCK=block, **options(_WARPS),
        )  # fmt: skip
