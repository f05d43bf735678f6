"""L2 norm of each token's embedding gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from leaf_ext.reference.upcast import upcast


def grad_norm(grad: Tensor) -> Tensor:
    """Compute the L2 norm over the last dimension.

        g[i] = || dL/de[i, :] ||_2          (LeaF, arXiv:2506.07851, Eq. 2)

    The row is divided by its largest magnitude before squaring, so that entries from 1e-30 to 1e30
    neither vanish nor overflow in float32. inf gives inf and NaN gives NaN.
    """
    wide = upcast(grad)
    if wide.shape[-1] == 0:
        return wide.new_zeros(wide.shape[:-1])
    largest = wide.abs().amax(dim=-1, keepdim=True)
    divisor = torch.where((largest > 0) & largest.isfinite(), largest, torch.ones_like(largest))
    norm = (wide / divisor).square().sum(dim=-1).sqrt() * divisor.squeeze(-1)
    return torch.where(largest.squeeze(-1).isfinite(), norm, largest.squeeze(-1))
