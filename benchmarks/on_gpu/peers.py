"""Other projects' kernels, which are timed if they are installed.

Each function imports its project when it is called; an exception becomes a line of the table.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import metadata
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

PACKAGES = ("liger-kernel", "orda-kernel")


def version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def liger_kldiv(_: bool) -> Callable[..., Tensor]:
    """Liger's KLDiv takes log-probabilities, which torch computes in float32, as our kernels do."""
    from liger_kernel.transformers.kl_div import LigerKLDIVLoss

    divergence = LigerKLDIVLoss(reduction="sum", log_target=True)

    def loss(student: Tensor, teacher: Tensor, _: Tensor) -> Any:
        log_s = log_softmax(student, -1, dtype=torch.float32)
        return divergence(log_s, log_softmax(teacher, -1, dtype=torch.float32))

    return loss


def liger_fused_jsd(_: bool) -> Callable[..., Tensor]:
    """Liger's JSD at beta = 0 is the forward KL divergence, a mean over the rows."""
    from liger_kernel.transformers.fused_linear_jsd import LigerFusedLinearJSD

    fused = LigerFusedLinearJSD(jsd_beta=0.0)
    return lambda *tensors: tensors[0].shape[0] * fused(*tensors[:4], None)


def liger_chunked(on_gpu: bool) -> Callable[..., Tensor]:
    """Liger's distillation loss with all weight on the soft labels, a mean over the rows."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    fused: Any = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0, compiled=on_gpu
    )

    def loss(*tensors: Tensor) -> Tensor:
        rows = tensors[0].shape[0]
        labels = torch.zeros(rows, dtype=torch.int64, device=tensors[0].device)
        result: Tensor = fused(*tensors[:4], labels)
        return rows * result

    return loss


def orda_linear(_: bool) -> Callable[..., Tensor]:
    """orda's linear loss without cross-entropies and without the check of the unused labels."""
    from orda_kernel import KernelConfig, SeparateTeacher, distillation_loss

    config = KernelConfig(assume_valid_labels=True)
    weights = {"student_ce_weight": 0.0, "teacher_ce_weight": 0.0, "kl_weight": 1.0}

    def loss(*tensors: Tensor) -> Any:
        hidden, head, teacher_hidden, teacher_head, _ = tensors
        labels = torch.zeros(hidden.shape[0], dtype=torch.int64, device=hidden.device)
        teacher = SeparateTeacher(hidden=teacher_hidden, weight=teacher_head)
        options = {**weights, "reduction": "sum", "config": config}
        return distillation_loss(hidden, head, labels, teacher, **options).loss

    return loss


def orda_rows() -> Callable[..., tuple[Tensor, Tensor]]:
    """orda's kernel below it, without a public name: the gradient overwrites the logits."""
    from orda_kernel.ops._kernels.separate import frozen

    def step(student: Tensor, teacher: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        labels = torch.zeros(student.shape[0], dtype=torch.int64, device=student.device)
        entropy, kl = torch.zeros_like(weight), torch.zeros_like(weight)
        options = {"kl_weight": 1.0, "kl_temperature": 1.0, "student_scale": 0.0}
        frozen._separate_frozen_fwdbwd(
            student, teacher, labels, entropy, kl, assume_valid=True, **options
        )
        return kl.sum(), student

    return step


# Differentiable losses from logits, or from hidden states and heads, by the variant's name.
LOSSES: dict[str, Callable[[bool], Callable[..., Tensor]]] = {
    "liger KLDiv": liger_kldiv,
    "liger chunked JSD": liger_chunked,
    "liger fused JSD": liger_fused_jsd,
    "orda": orda_linear,
}
