"""Public `grad_norm`."""

from __future__ import annotations

import torch
from torch import Tensor

from leaf_ext.dispatch import Backend, implementation
from leaf_ext.ops.checks import require, require_float, unit_stride
from leaf_ext.schema import LIBRARIES, accum_dtype


def grad_norm(grad: Tensor, *, backend: Backend = "auto") -> Tensor:
    """Compute the L2 norm of each token's embedding gradient.

        g[i] = || dL/de[i, :] ||_2          (LeaF, arXiv:2506.07851, Eq. 2)

    Args:
        grad: [*, H], float32, float16 or bfloat16 (float64 with backend="reference").
        backend: "auto", "cpu", "cuda", "triton" or "reference".
    Returns:
        [*] float32 (float64 for float64), in the gradient's unit (nats per unit of embedding), not
        differentiable. Accurate for entries from 1e-30 to 1e30; NaN gives NaN, inf gives inf.
    Raises:
        ValueError: wrong dtype, or no dimension.
        RuntimeError: the backend is not available (says why).
    """
    require_float("grad_norm", "grad", grad, backend)
    require(grad.dim() >= 1, "grad_norm", "grad", "[*, H]", "a 0-dim tensor")
    run = implementation("grad_norm", grad.device, backend, grad.dtype)
    norm: Tensor = run(unit_stride(grad.detach()))
    return norm


def _fake(grad: Tensor) -> Tensor:
    return grad.new_empty(grad.shape[:-1], dtype=accum_dtype(grad.dtype))


for _namespace, _library in LIBRARIES.items():
    torch.library.register_fake(f"{_namespace}::grad_norm", _fake, lib=_library)
