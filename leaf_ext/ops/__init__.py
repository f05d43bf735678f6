"""Public functions: argument checks, autograd and fake kernels, once for all backends."""

from __future__ import annotations

from leaf_ext.ops.detect_spans import Spans, detect_spans
from leaf_ext.ops.dual_kl import DualKLRows, dual_kl
from leaf_ext.ops.grad_norm import grad_norm
from leaf_ext.ops.linear_dual_kl import linear_dual_kl
from leaf_ext.ops.linear_topk_kl import linear_topk_kl
from leaf_ext.ops.row_weights import row_weights
from leaf_ext.ops.topk_kl import topk_kl
from leaf_ext.ops.vocab_parallel import vocab_parallel_dual_kl

__all__ = [
    "DualKLRows",
    "Spans",
    "detect_spans",
    "dual_kl",
    "grad_norm",
    "linear_dual_kl",
    "linear_topk_kl",
    "row_weights",
    "topk_kl",
    "vocab_parallel_dual_kl",
]
