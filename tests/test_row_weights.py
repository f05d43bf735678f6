"""Row weights that combine two terms into one loss."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import leaf_ext


def test_row_weights_are_the_two_terms() -> None:
    branch = torch.tensor([0, 0, 0, 1, 1, 0], dtype=torch.bool)
    live = torch.tensor([1, 1, 0, 1, 1, 1], dtype=torch.bool)
    pool = leaf_ext.row_weights(branch, live)
    assert pool.dtype == torch.float32
    torch.testing.assert_close(pool, live / 5)
    mixed = leaf_ext.row_weights(branch.long(), live, kd_weight=0.7)
    torch.testing.assert_close(mixed, torch.tensor([0.7, 0.7, 0, 0.45, 0.45, 0.7]) / 3)
    counted = leaf_ext.row_weights(branch, live, kd_weight=0.5, n_kd=10, n_cd=torch.tensor(20))
    torch.testing.assert_close(counted, torch.tensor([1, 1, 0, 0.5, 0.5, 1]) * 0.05)


@pytest.mark.parametrize("kd_weight", ["pool", 0.3])
def test_a_term_without_rows_leaves_the_other_one_alone(kd_weight: Any) -> None:
    live = torch.tensor([True, True, False])
    for branch in (torch.zeros(3, dtype=torch.bool), torch.ones(3, dtype=torch.bool)):
        weight = leaf_ext.row_weights(branch, live, kd_weight=kd_weight)
        torch.testing.assert_close(weight, torch.tensor([0.5, 0.5, 0.0]))
    nothing = leaf_ext.row_weights(live, torch.zeros(3, dtype=torch.bool), kd_weight=kd_weight)
    assert not nothing.any() and nothing.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_may_count_in_part(dtype: torch.dtype) -> None:
    branch = torch.tensor([0, 0, 1, 1, 1])
    live = torch.tensor([1, 0, 0.25, 0.25, 0], dtype=dtype)
    pool = leaf_ext.row_weights(branch, live)
    assert pool.dtype == dtype
    torch.testing.assert_close(pool, live / 1.5)
    mixed = leaf_ext.row_weights(branch, live, kd_weight=0.4)
    torch.testing.assert_close(mixed, torch.tensor([0.4, 0, 0.3, 0.3, 0], dtype=dtype))
    counted = leaf_ext.row_weights(branch, live, kd_weight=0.4, n_kd=2, n_cd=0.75)
    torch.testing.assert_close(counted, torch.tensor([0.2, 0, 0.2, 0.2, 0], dtype=dtype))
