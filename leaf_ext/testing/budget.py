"""The error budget: a result must be as close to the float64 reference as torch in float32."""

from __future__ import annotations

import torch
from torch import Tensor

from leaf_ext.schema import OPS


def error(result: Tensor, oracle: Tensor) -> float:
    """Return the largest difference; equal infinities and NaN in the same places are equal."""
    result = result.to(oracle.dtype)
    same = (result == oracle) | (result.isnan() & oracle.isnan())
    distance = (result - oracle).abs().masked_fill(same, 0.0)
    return float(distance.amax()) if distance.numel() else 0.0


def rounding(oracle: Tensor, dtype: torch.dtype) -> float:
    """Return half a unit in the last place of `dtype` at the largest finite magnitude."""
    finite = oracle[oracle.isfinite()]
    largest = float(finite.abs().amax()) if finite.numel() else 0.0
    limits = torch.finfo(dtype)
    return max(largest * limits.eps / 2, limits.smallest_normal * limits.eps / 2)


def assert_within_budget(
    op: str, what: str, result: Tensor, oracle: Tensor, baseline_error: float
) -> None:
    """Assert |result - oracle| <= factor * |torch in float32 - oracle| + roundings."""
    assert result.shape == oracle.shape, f"{op}: {what} has shape {tuple(result.shape)}"
    budget = OPS[op].budget
    allowed = budget.factor * baseline_error + budget.roundings * rounding(oracle, result.dtype)
    found = error(result, oracle)
    assert found <= allowed, (
        f"{op}: {what} is off by {found:.3g}; torch in float32 is off by {baseline_error:.3g}, "
        f"the budget is {allowed:.3g}"
    )
