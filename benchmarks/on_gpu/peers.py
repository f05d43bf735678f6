"""Other projects' kernels, where they are installed. Their losses are means over the rows.

Each function imports what it needs when it is asked, and returns what is to be timed; whatever it
raises becomes a line of the table.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import metadata
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

PACKAGES = ("liger-kernel", "quack-kernels")


def versions() -> dict[str, str]:
    """Of the peers that are installed."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _from_logits(divergence: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    """They take log-probabilities: torch makes them, in float32 as ours are."""

    def loss(student: Tensor, teacher: Tensor, _: Tensor) -> Tensor:
        log_s = log_softmax(student, -1, dtype=torch.float32)
        return divergence(log_s, log_softmax(teacher, -1, dtype=torch.float32))

    return loss


def liger_kldiv() -> Callable[..., Tensor]:
    from liger_kernel.transformers.kl_div import LigerKLDIVLoss

    return _from_logits(LigerKLDIVLoss(reduction="batchmean", log_target=True))


def liger_jsd() -> Callable[..., Tensor]:
    """beta = 0 is the forward KL divergence."""
    from liger_kernel.transformers.jsd import LigerJSD

    return _from_logits(LigerJSD(beta=0.0))


def liger_fused_jsd() -> Callable[..., Tensor]:
    from liger_kernel.transformers.fused_linear_jsd import LigerFusedLinearJSD

    fused = LigerFusedLinearJSD(jsd_beta=0.0)

    def loss(*tensors: Tensor) -> Tensor:
        return fused(*tensors[:4], None)

    return loss


def liger_chunked(compiled: bool) -> Callable[..., Tensor]:
    """Its distillation loss with all the weight on the soft labels."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    fused: Any = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0, compiled=compiled
    )

    def loss(*tensors: Tensor) -> Tensor:
        labels = torch.zeros(tensors[0].shape[0], dtype=torch.int64, device=tensors[0].device)
        return fused(*tensors[:4], labels)

    return loss


def quack_cross_entropy() -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Loss of each row and its gradient, for which every logit is read once."""
    from quack.cross_entropy import cross_entropy_fwd

    def step(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        return cross_entropy_fwd(logits, target, return_dx=True)

    return step
