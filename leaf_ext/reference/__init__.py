"""Pure torch, the only written copy of the mathematics; every other backend is measured against it.

Inputs are upcast to float32; float64 stays float64. Importing the package makes the functions the
implementations of the namespace `leaf_ext_reference`.
"""

from __future__ import annotations

from leaf_ext.reference.detect_spans import detect_spans
from leaf_ext.reference.dual_kl import dual_kl, dual_kl_
from leaf_ext.reference.grad_norm import grad_norm
from leaf_ext.reference.linear_dual_kl import linear_dual_kl, linear_topk_kl
from leaf_ext.reference.scale import scale_, scaled
from leaf_ext.reference.topk_kl import topk_kl, topk_kl_
from leaf_ext.schema import LIBRARIES, REFERENCE

for _name, _function in {
    "grad_norm": grad_norm,
    "detect_spans": detect_spans,
    "dual_kl": dual_kl,
    "dual_kl_": dual_kl_,
    "linear_dual_kl": linear_dual_kl,
    "topk_kl": topk_kl,
    "topk_kl_": topk_kl_,
    "linear_topk_kl": linear_topk_kl,
    "scaled": scaled,
    "scale_": scale_,
}.items():
    LIBRARIES[REFERENCE].impl(_name, _function, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]

__all__ = [
    "detect_spans",
    "dual_kl",
    "dual_kl_",
    "grad_norm",
    "linear_dual_kl",
    "linear_topk_kl",
    "scale_",
    "scaled",
    "topk_kl",
    "topk_kl_",
]
