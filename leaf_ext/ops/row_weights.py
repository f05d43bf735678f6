"""Row weights that combine the two terms of LeaF's loss."""

from __future__ import annotations

import numbers
from typing import Literal

import torch
from torch import Tensor

from leaf_ext.ops.checks import (
    require,
    require_device,
    require_shape,
    require_tensor,
)

Count = float | Tensor


def row_weights(
    branch: Tensor,
    live: Tensor,
    *,
    kd_weight: float | Literal["pool"] = "pool",
    n_kd: Count | None = None,
    n_cd: Count | None = None,
) -> Tensor:
    """Return kd_weight / n_kd for originals and (1 - kd_weight) / n_cd for counterfactuals.

        L = kd_weight * L_kd + (1 - kd_weight) * L_cd     (LeaF, arXiv:2506.07851, section 3)

    "pool" means kd_weight = n_kd / (n_kd + n_cd): every row has the same weight. If one term has no
    rows, the rows of the other have weight 1 / n.

    Args:
        branch: [N] bool or integer, 1 = counterfactual.
        live: [N] bool, True = the row counts; or float32 or float64, how much it counts, at least
            0, by which its weight is multiplied and n is the sum.
        kd_weight: "pool" or a number in [0, 1].
        n_kd, n_cd: live rows of each term in the whole optimizer step, numbers or 0-dim tensors
            (the host does not wait for the device). By default they are counted in this batch.
    Returns:
        [N] float32, or float64 like `live`; 0 on rows that do not count.
    Raises:
        ValueError: wrong dtype, shape, device or range.
    """
    _check(branch, live, kd_weight)
    counterfactual, rows = branch != 0, live.double()
    kd, cd = rows * ~counterfactual, rows * counterfactual
    kd_rows = _count("n_kd", n_kd, kd)
    cd_rows = _count("n_cd", n_cd, cd)
    if kd_weight == "pool":
        weight = rows / _not_zero(kd_rows + cd_rows)
    else:
        alone = (kd_rows == 0) | (cd_rows == 0)
        share = torch.where(alone, (kd_rows > 0).double(), float(kd_weight))
        weight = kd * (share / _not_zero(kd_rows)) + cd * ((1 - share) / _not_zero(cd_rows))
    return weight.to(torch.float64 if live.dtype == torch.float64 else torch.float32)


def _not_zero(count: Tensor) -> Tensor:
    return torch.where(count == 0, 1, count)


def _check(branch: Tensor, live: Tensor, kd_weight: object) -> None:
    op = "row_weights"
    require_tensor(op, "branch", branch)
    require_tensor(op, "live", live)
    whole = not (branch.is_floating_point() or branch.is_complex())
    require(whole, op, "branch", "bool or integer", branch.dtype)
    require(branch.dim() == 1, op, "branch", "1-D [N]", f"shape {tuple(branch.shape)}")
    dtypes = (torch.bool, torch.float32, torch.float64)
    needed = "torch.bool, torch.float32 or torch.float64"
    require(live.dtype in dtypes, op, "live", needed, live.dtype)
    require_shape(op, "live", live, tuple(branch.shape), f"[N] with N = {branch.shape[0]}")
    require_device(op, "live", live, branch.device)
    number = isinstance(kd_weight, numbers.Real) and not isinstance(kd_weight, bool)
    inside = number and 0 <= float(kd_weight) <= 1  # type: ignore[arg-type]  # a number
    if not (inside or kd_weight == "pool"):  # torch.compile cannot trace the repr of a number
        require(False, op, "kd_weight", '"pool" or a number in [0, 1]', repr(kd_weight))


def _count(argument: str, given: Count | None, rows: Tensor) -> Tensor:
    if given is None:
        return rows.sum()
    if isinstance(given, Tensor):
        require(given.dim() == 0, "row_weights", argument, "0-dim", f"shape {tuple(given.shape)}")
        return given.to(rows.device)
    number = isinstance(given, numbers.Real) and not isinstance(given, bool) and given >= 0
    if not number:
        require(False, "row_weights", argument, "a number >= 0 or a 0-dim tensor", repr(given))
    return torch.tensor(float(given), dtype=rows.dtype, device=rows.device)
