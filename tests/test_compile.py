"""Every op under torch.compile(fullgraph=True), forward and backward."""

from __future__ import annotations

import pytest
import torch
from op_samples import kl_tensors, linear_tensors, topk_tensors
from torch import Tensor

import leaf_ext


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("inplace_grad", [False, True], ids=["copied", "inplace"])
def test_dual_kl_compiles_whole(backend: str, dynamic: bool, inplace_grad: bool) -> None:
    torch.compiler.reset()

    def loss(student: Tensor, teacher: Tensor, weight: Tensor) -> Tensor:
        return leaf_ext.dual_kl(
            student * 2, teacher, weight, inplace_grad=inplace_grad, backend=backend
        )

    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for rows in (4, 3):
        student, teacher, weight = kl_tensors(rows)
        gradients = []
        for run in (loss, compiled):
            leaf = student.clone().requires_grad_()
            (3 * run(leaf, teacher, weight)).backward()
            gradients.append(leaf.grad)
        assert torch.equal(*gradients)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("inplace_grad", [False, True], ids=["copied", "inplace"])
def test_topk_kl_compiles_whole(backend: str, dynamic: bool, inplace_grad: bool) -> None:
    torch.compiler.reset()

    def loss(student: Tensor, *rest: Tensor) -> Tensor:
        return leaf_ext.topk_kl(student * 2, *rest, inplace_grad=inplace_grad, backend=backend)

    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for rows in (4, 3):
        student, *rest = topk_tensors(rows)
        gradients = []
        for run in (loss, compiled):
            leaf = student.clone().requires_grad_()
            (3 * run(leaf, *rest)).backward()
            gradients.append(leaf.grad)
        assert torch.equal(*gradients)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("op", ["linear_topk_kl", "labels"])
def test_linear_losses_compile_whole(backend: str, dynamic: bool, op: str) -> None:
    torch.compiler.reset()
    student, teacher = linear_tensors(), topk_tensors()[1:]
    labels, label_weight = torch.tensor([3, 0, -100, 8]), torch.rand(4)

    def loss(hidden: Tensor, head: Tensor) -> Tensor:
        if op == "labels":
            given = {"labels": labels, "label_weight": label_weight}
            return leaf_ext.linear_dual_kl(hidden, head, *student[2:], **given, backend=backend)
        return leaf_ext.linear_topk_kl(hidden, head, *teacher, backend=backend)

    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    gradients = []
    for run in (loss, compiled):
        leaves = [t.clone().requires_grad_() for t in student[:2]]
        gradients.append(torch.autograd.grad(run(*leaves), leaves))
    for eager, traced in zip(*gradients, strict=True):
        assert torch.equal(eager, traced)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_linear_dual_kl_compiles_whole(backend: str, dynamic: bool) -> None:
    torch.compiler.reset()

    def loss(*tensors: Tensor) -> Tensor:
        return leaf_ext.linear_dual_kl(*tensors, temperature=2.0, backend=backend)

    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    tensors = linear_tensors()
    gradients = []
    for run in (loss, compiled):
        leaves = [t.clone().requires_grad_() for t in tensors[:2]]
        gradients.append(torch.autograd.grad(run(*leaves, *tensors[2:]), leaves))
    for eager, traced in zip(*gradients, strict=True):
        assert torch.equal(eager, traced)


def test_linear_dual_kl_compiles_with_rows_that_data_decide() -> None:
    """The number of hidden states at label positions is unknown before they are computed."""
    torch.compiler.reset()
    tensors = linear_tensors(torch.bfloat16)
    chosen = torch.arange(tensors[0].shape[0]) % 2 == 0

    def loss(hidden: Tensor, head: Tensor) -> Tensor:
        index = chosen.nonzero().squeeze(1)
        rest = (tensors[2][index], tensors[3], tensors[4][index])
        return leaf_ext.linear_dual_kl(hidden[index], head, *rest, chunk_size=8)

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
        gradients = []
        for run in (loss, compiled):
            leaves = [t.clone().requires_grad_() for t in tensors[:2]]
            gradients.append(torch.autograd.grad(run(*leaves), leaves))
    for eager, traced in zip(*gradients, strict=True):
        torch.testing.assert_close(eager, traced)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_detection_compiles_whole(backend: str, dynamic: bool) -> None:
    torch.compiler.reset()

    def detect(teacher: Tensor, student: Tensor, domain: Tensor) -> tuple[Tensor, ...]:
        norms = leaf_ext.grad_norm(teacher, backend=backend)
        spans = leaf_ext.detect_spans(teacher, student, domain, threshold=0.4, backend=backend)
        logs = leaf_ext.detect_spans(
            teacher, student, domain, scale="log", student_weight=0.8, backend=backend
        )
        return norms, spans.span, spans.count, logs.span

    compiled = torch.compile(detect, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for length in (20, 33):
        arguments = (
            torch.randn(2, length, 8),
            torch.randn(2, length, 4),
            torch.rand(2, length) > 0.1,
        )
        for eager, traced in zip(detect(*arguments), compiled(*arguments), strict=True):
            assert torch.equal(eager, traced)


def test_row_weights_compile_whole() -> None:
    torch.compiler.reset()
    branch, live = torch.tensor([0, 1, 0, 1]), torch.tensor([True, True, False, True])

    def weights(kd_weight: float, n_kd: int) -> Tensor:
        return leaf_ext.row_weights(branch, live, kd_weight=kd_weight, n_kd=n_kd)

    compiled = torch.compile(weights, fullgraph=True, dynamic=True, backend="aot_eager")
    for arguments in ((0.5, 3), (0.7, 5)):
        assert torch.equal(compiled(*arguments), weights(*arguments))


def test_the_default_compiler_runs_it() -> None:
    torch.compiler.reset()
    student, teacher, weight = kl_tensors()
    compiled = torch.compile(lambda z: leaf_ext.dual_kl(z * 2, teacher, weight), fullgraph=True)
    gradients = []
    for run in (lambda z: leaf_ext.dual_kl(z * 2, teacher, weight), compiled):
        leaf = student.clone().requires_grad_()
        run(leaf).backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients)
