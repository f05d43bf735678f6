"""The Triton backend beyond the case table: compiled kernels, and borders of blocks."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import leaf_ext

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="there is no Triton elsewhere")

SCRIPT = Path(__file__).with_name("triton_compile.py")
KERNELS = {
    *("norm_kernel", "norm_pair_kernel", "rows_kernel"),
    *("loss_kernel", "multiply_kernel", "scale_kernel", "spans_kernel", "topk_rows_kernel"),
}


@pytest.mark.parametrize(
    "arguments",
    [
        *(pytest.param([arch], id=f"sm_{arch}") for arch in ("80", "90", "100")),
        *(
            pytest.param([arch, "--all"], id=f"sm_{arch}-all", marks=pytest.mark.slow)
            for arch in ("80", "90", "100")
        ),
        pytest.param(["90", "--all", "--ones"], id="ones", marks=pytest.mark.slow),
    ],
)
def test_every_kernel_compiles_without_spills(arguments: list[str], tmp_path: Path) -> None:
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, str(SCRIPT), *arguments]
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr[-3000:]
    found = [json.loads(line) for line in run.stdout.splitlines()]
    assert {kernel["kernel"] for kernel in found} == KERNELS
    for kernel in found:
        assert kernel["spilled"] == 0, kernel
        assert kernel["shared"] <= 48 * 1024, kernel


def test_triton_on_a_cpu_asks_for_its_interpreter() -> None:
    code = "import torch, leaf_ext; leaf_ext.grad_norm(torch.ones(3, 4), backend='triton')"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )
    assert "RuntimeError: grad_norm: backend='triton' is not available" in run.stderr
    assert "TRITON_INTERPRET=1" in run.stderr


def test_triton_runs_on_no_other_device() -> None:
    with pytest.raises(
        RuntimeError, match=r"backend='triton' is not available: .*got meta tensors"
    ):
        leaf_ext.grad_norm(torch.empty(3, 4, device="meta"), backend="triton")


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make blocks so small that small inputs run every loop and use every carry."""
    for name in ("detect_spans", "grad_norm"):
        monkeypatch.setattr(importlib.import_module(f"leaf_ext.triton.{name}"), "_BLOCK", 16)
    module = importlib.import_module("leaf_ext.triton.dual_kl")
    monkeypatch.setattr(module, "block_of", lambda *_, **__: (16, 1))


@pytest.mark.parametrize("join_gap", [0, 2, 40])
@pytest.mark.parametrize("rule", ["absolute", "quantile"])
@pytest.mark.parametrize("scale", ["minmax", "log"])
def test_spans_cross_blocks(
    small_blocks: None, device: torch.device, scale: Any, rule: str, join_gap: int
) -> None:
    """Spans, joins and walls cross one or several borders of blocks."""
    length = 100
    teacher, student = torch.rand(3, length), torch.rand(3, length)
    domain = torch.rand(3, length) > 0.02
    teacher[1, 10:60], student[1, 10:60] = 0.1, 0.9  # one span over four blocks
    domain[1, 10:60] = True
    student[2] *= torch.rand(length) > 0.9  # a few confounders, far apart
    found, expected = (
        leaf_ext.detect_spans(
            *(t.to(on) for t in (teacher, student, domain)),
            scale=scale,
            student_weight=0.9,
            threshold=0.4,
            rule="quantile" if rule == "quantile" else "absolute",
            join_gap=join_gap,
            min_length=2,
            backend=backend,
        )
        for backend, on in (("triton", device), ("reference", torch.device("cpu")))
    )
    assert any(len(spans) > 0 for spans in expected.tolist())
    assert torch.equal(found.span.cpu(), expected.span)
    assert torch.equal(found.count.cpu(), expected.count)
    assert torch.equal(found.confounder.cpu(), expected.confounder)


def test_losses_and_norms_cross_blocks(small_blocks: None, device: torch.device) -> None:
    student, teacher, weight = torch.randn(3, 50), torch.randn(3, 55), torch.rand(3)
    student[0, 40] = teacher[0, 40] = 9.0  # the largest of both in the third block
    student[1, 3] = student[1, 40] = teacher[1, 3] = 9.0  # a tie: the first one counts
    results = []
    for backend, on in (("triton", device), ("reference", torch.device("cpu"))):
        leaf = student.to(on).requires_grad_()
        loss, rows = leaf_ext.dual_kl(
            leaf, teacher.to(on), weight.to(on), return_rows=True, backend=backend
        )
        loss.backward()
        norm = leaf_ext.grad_norm(student.to(on), backend=backend)
        results.append([loss.detach(), leaf.grad, *rows, norm])
    assert results[1][5].tolist()[:2] == [1.0, 1.0]
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-5, atol=1e-7)


def test_borders_on_a_gpu_are_not_trusted(device: torch.device) -> None:
    """Unchecked borders never lead outside a tensor, and the scores of missed tokens are NaN."""
    importlib.import_module("leaf_ext.triton")
    norms, inside = torch.rand(10, device=device), torch.ones(10, dtype=torch.bool, device=device)
    borders = torch.tensor([2, 1000, -5, 8], device=device)
    span, count, score, confounder, _ = torch.ops.leaf_ext_triton.detect_spans(
        norms,
        norms.flip(0),
        inside,
        None,
        False,
        1.0,
        1.0,
        False,
        1.0,
        float("inf"),
        0,
        1,
        borders,
        4,
    )
    assert span.shape == (3, 2, 2) and int(span.max()) <= 4
    assert count.tolist() == [1, 0, 1]
    assert score.isnan().tolist() == [False] * 6 + [True] * 4
    assert not confounder[6:].any()


def test_a_direct_call_with_a_wrong_shape_is_refused() -> None:
    student, teacher = torch.randn(3, 5), torch.randn(2, 5)
    scalars = (1.0, 1.0, 1.0, 0.0, 0.0, 0.0)
    with pytest.raises(RuntimeError, match=r"dual_kl: teacher must be \[N, V\]"):
        torch.ops.leaf_ext_triton.dual_kl(student, teacher, torch.ones(3), *scalars, True, True)
    with pytest.raises(RuntimeError, match="row_weight must be contiguous float32"):
        torch.ops.leaf_ext_triton.dual_kl(student, student, torch.ones(2), *scalars, True, True)
    with pytest.raises(RuntimeError, match="rows of student must not overlap"):
        shared = student[:1].expand(3, 5)
        torch.ops.leaf_ext_triton.dual_kl_(shared, student, torch.ones(3), *scalars, True, True)
