"""Gradients of the losses: the first order is right, everything else is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import leaf_ext
from leaf_ext.reference.dual_kl import apply_temperature, kl_rows

OPTIONS: list[dict[str, Any]] = [
    {},
    {"temperature": 2.5},
    {"logit_scale": (1.7, 0.4)},
    {"logit_softcap": (3.0, None)},
    {"temperature": 0.8, "logit_scale": 1.3, "logit_softcap": 4.0},
]


def logits(rows: int = 5, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    student = torch.randn(rows, 11).mul(2).to(dtype).requires_grad_()
    weight = torch.rand(rows) + 0.1
    weight[1] = 0
    return student, torch.randn(rows, 13).mul(2).to(dtype), weight


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_gradcheck_of_the_reference(options: dict[str, Any]) -> None:
    student, teacher, weight = logits(dtype=torch.float64)

    def loss(z: Tensor) -> Tensor:
        return leaf_ext.dual_kl(z, teacher, weight.double(), backend="reference", **options)

    assert torch.autograd.gradcheck(loss, (student,))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_reference_gradient_is_the_one_of_autograd(options: dict[str, Any]) -> None:
    student, teacher, weight = logits(dtype=torch.float64)
    weight = weight.double()
    temperature = options.get("temperature", 1.0)

    def pair(name: str, none: float) -> tuple[float, float]:
        value = options.get(name, none)
        values = value if isinstance(value, tuple) else (value, value)
        return (values[0] or none, values[1] or none)

    scale, cap = pair("logit_scale", 1.0), pair("logit_softcap", 0.0)
    x_s = apply_temperature(student[:, :11], scale[0], cap[0], temperature)
    x_t = apply_temperature(teacher[:, :11], scale[1], cap[1], temperature)
    plain = temperature**2 * (weight * kl_rows(x_s, x_t)).sum()
    loss = leaf_ext.dual_kl(student, teacher, weight, backend="reference", **options)
    torch.testing.assert_close(loss, plain, rtol=1e-12, atol=0)
    expected, found = (torch.autograd.grad(value, student)[0] for value in (plain, loss))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-15)


@pytest.mark.parametrize("bias", [False, True], ids=["no_bias", "bias"])
def test_gradcheck_of_the_linear_reference(bias: bool) -> None:
    hidden, head = torch.randn(4, 3), torch.randn(7, 3)
    parameters = [t.double().requires_grad_() for t in (hidden, head, torch.randn(7))]
    teacher = torch.randn(4, 5).double(), torch.randn(9, 5).double()
    weight = torch.tensor([0.3, 0.0, 0.2, 0.5], dtype=torch.float64)

    def loss(hidden: Tensor, head: Tensor, student_bias: Tensor | None = None) -> Tensor:
        return leaf_ext.linear_dual_kl(
            hidden, head, *teacher, weight, student_bias=student_bias, backend="reference"
        )

    assert torch.autograd.gradcheck(loss, parameters[: 3 if bias else 2])


def test_gradient_scales_with_grad_output(backend: str) -> None:
    student, teacher, weight = logits()
    loss = leaf_ext.dual_kl(student, teacher, weight, backend=backend)
    (once,) = torch.autograd.grad(loss, student, retain_graph=True)
    (thrice,) = torch.autograd.grad(loss, student, torch.tensor(3.0), retain_graph=True)
    (again,) = torch.autograd.grad(loss, student)
    torch.testing.assert_close(thrice, 3 * once)
    assert torch.equal(again, once)


def test_linear_gradient_scales_with_grad_output(backend: str) -> None:
    hidden, head = torch.randn(6, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    teacher = torch.randn(6, 5), torch.randn(9, 5)
    loss = leaf_ext.linear_dual_kl(hidden, head, *teacher, torch.ones(6), backend=backend)
    once = torch.autograd.grad(loss, (hidden, head), retain_graph=True)
    thrice = torch.autograd.grad(loss, (hidden, head), torch.tensor(3.0), retain_graph=True)
    again = torch.autograd.grad(loss, (hidden, head), torch.tensor(3.0))
    for first, third, last in zip(once, thrice, again, strict=True):
        torch.testing.assert_close(third, 3 * first)
        assert torch.equal(third, last)


def test_the_last_backward_takes_no_new_memory(backend: str) -> None:
    student, teacher, weight = logits()
    saved: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = leaf_ext.dual_kl(student, teacher, weight, backend=backend)
    memory = next(one.data_ptr() for one in saved if one.shape == student.shape)
    by = torch.tensor(3.0)
    (kept,) = torch.autograd.grad(loss, student, by, retain_graph=True)
    assert kept.data_ptr() != memory  # which a second backward reads
    (last,) = torch.autograd.grad(loss, student, by)
    assert last.data_ptr() == memory
    assert torch.equal(last, kept)


def test_inplace_gradient_lies_in_the_logits_and_is_used_up(backend: str) -> None:
    student, teacher, weight = logits()
    (expected,) = torch.autograd.grad(
        leaf_ext.dual_kl(student, teacher, weight, backend=backend), student
    )
    memory = student.detach().clone()
    overwritten = memory.clone().requires_grad_().clone()
    address = overwritten.data_ptr()
    loss = leaf_ext.dual_kl(overwritten, teacher, weight, inplace_grad=True, backend=backend)
    assert torch.equal(overwritten.detach(), expected)
    (found,) = torch.autograd.grad(loss, overwritten, torch.tensor(2.0), retain_graph=True)
    assert found.data_ptr() == address
    torch.testing.assert_close(found, 2 * expected)
    with pytest.raises(RuntimeError, match="second backward"):
        torch.autograd.grad(loss, overwritten)


def test_overwritten_logits_are_noticed_by_others_who_saved_them(backend: str) -> None:
    student, teacher, weight = logits()
    values = student * 1.0
    other = values.square().sum()
    leaf_ext.dual_kl(values, teacher, weight, inplace_grad=True, backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        other.backward()


def test_inplace_without_gradients_leaves_the_logits(backend: str) -> None:
    student, teacher, weight = logits()
    before = student.detach().clone()
    with torch.no_grad():
        leaf_ext.dual_kl(student, teacher, weight, inplace_grad=True, backend=backend)
    assert torch.equal(student.detach(), before)


def test_logits_that_others_need_are_not_overwritten(backend: str) -> None:
    student, teacher, weight = logits()

    def loss(student: Tensor, teacher: Tensor, weight: Tensor = weight) -> Tensor:
        return leaf_ext.dual_kl(student, teacher, weight, inplace_grad=True, backend=backend)

    before = student.detach().clone()
    with pytest.raises(ValueError, match=r"student_logits must be .* a leaf tensor that requires"):
        loss(student, teacher)
    both = torch.randn(8, 11, requires_grad=True).clone()
    shared = "must be in other memory than student_logits"
    with pytest.raises(ValueError, match=f"teacher_logits {shared}"):
        loss(both[:5], both[3:].detach())
    with pytest.raises(ValueError, match=f"teacher_logits {shared}"):
        loss(both[:5, :7], both[:5, 6:].detach())
    with pytest.raises(ValueError, match=f"row_weight {shared}"):
        loss(both[:5], teacher, both.detach()[4, :5])
    assert torch.equal(student.detach(), before)


def test_neighbours_in_memory_are_overwritten_alone(backend: str) -> None:
    """Disjoint rows or columns of one tensor are accepted, with the right result."""
    for student_part, teacher_part in (
        ((slice(0, 4), slice(None)), (slice(4, 8), slice(None))),
        ((slice(None), slice(0, 5)), (slice(None), slice(5, 11))),
        ((slice(None), slice(6, 11)), (slice(None), slice(0, 6))),
    ):
        leaf = torch.randn(8, 11, requires_grad=True)
        weight = torch.rand(leaf[student_part].shape[0])
        gradients = []
        for inplace_grad in (False, True):
            both = leaf.clone()
            student, teacher = both[student_part], both[teacher_part].detach()
            kept = teacher.clone()
            loss = leaf_ext.dual_kl(
                student, teacher, weight, inplace_grad=inplace_grad, backend=backend
            )
            gradients.append(torch.autograd.grad(loss, leaf)[0])
            assert torch.equal(teacher, kept)
        assert torch.equal(*gradients)


@pytest.mark.parametrize("inplace_grad", [False, True])
def test_second_order_is_refused(backend: str, inplace_grad: bool) -> None:
    student, teacher, weight = logits()
    loss = leaf_ext.dual_kl(
        student * 1.0, teacher, weight, inplace_grad=inplace_grad, backend=backend
    )
    with pytest.raises(RuntimeError, match="dual_kl: only first-order"):
        torch.autograd.grad(loss, student, create_graph=True)


def test_second_order_of_the_linear_loss_is_refused(backend: str) -> None:
    hidden = torch.randn(6, 4, requires_grad=True)
    loss = leaf_ext.linear_dual_kl(
        hidden, torch.randn(9, 4), torch.randn(6, 5), torch.randn(9, 5), torch.ones(6),
        backend=backend,
    )  # fmt: skip
    with pytest.raises(RuntimeError, match="linear_dual_kl: only first-order"):
        torch.autograd.grad(loss, hidden, create_graph=True)


FORWARD_MODE = "forward-mode derivatives .* must not be asked for"


@pytest.mark.parametrize("inplace_grad", [False, True])
@pytest.mark.parametrize("argument", [0, 1, 2], ids=["student", "teacher", "weight"])
def test_forward_mode_is_refused(backend: str, argument: int, inplace_grad: bool) -> None:
    tensors = [tensor.detach() for tensor in logits()]

    def loss(value: Tensor) -> Tensor:
        arguments = [*tensors[:argument], value, *tensors[argument + 1 :]]
        return leaf_ext.dual_kl(*arguments, inplace_grad=inplace_grad, backend=backend)

    value = tensors[argument]
    with pytest.raises(RuntimeError, match=f"dual_kl: {FORWARD_MODE}"):
        torch.func.jvp(loss, (value,), (torch.ones_like(value),))
    with pytest.raises(RuntimeError, match=f"dual_kl: {FORWARD_MODE}"):
        torch.func.jacfwd(loss)(value)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(value, torch.ones_like(value))
        with pytest.raises(RuntimeError, match=f"dual_kl: {FORWARD_MODE}"):
            loss(dual)


@pytest.mark.parametrize("argument", range(7))
def test_forward_mode_of_the_linear_loss_is_refused(backend: str, argument: int) -> None:
    shapes = ((6, 4), (9, 4), (6, 5), (9, 5), (6,), (9,), (9,))
    tensors = [torch.rand(shape) for shape in shapes]

    def loss(value: Tensor) -> Tensor:
        arguments = [*tensors[:argument], value, *tensors[argument + 1 :]]
        *arguments, student_bias, teacher_bias = arguments
        return leaf_ext.linear_dual_kl(
            *arguments, student_bias=student_bias, teacher_bias=teacher_bias, backend=backend
        )

    value = tensors[argument]
    with pytest.raises(RuntimeError, match=f"linear_dual_kl: {FORWARD_MODE}"):
        torch.func.jvp(loss, (value,), (torch.ones_like(value),))


@pytest.mark.parametrize("inplace_grad", [False, True])
def test_forward_mode_through_the_backward_is_refused(backend: str, inplace_grad: bool) -> None:
    student, teacher, weight = logits()
    values = student.clone()
    loss = leaf_ext.dual_kl(values, teacher, weight, inplace_grad=inplace_grad, backend=backend)
    with torch.autograd.forward_ad.dual_level():
        one = torch.ones_like(loss)
        factor = torch.autograd.forward_ad.make_dual(one, one)
        with pytest.raises(RuntimeError, match=f"dual_kl: {FORWARD_MODE}"):
            torch.autograd.grad(loss, student, factor)


def test_nothing_flows_to_the_teacher(backend: str) -> None:
    student, teacher, weight = logits()
    teacher.requires_grad_()
    loss = leaf_ext.dual_kl(student, teacher, weight, backend=backend)
    loss.backward()
    assert teacher.grad is None
    frozen = leaf_ext.dual_kl(student.detach(), teacher, weight, backend=backend)
    assert not frozen.requires_grad


def test_no_live_row_is_zero_and_connected(backend: str) -> None:
    student, teacher, weight = logits()
    loss = leaf_ext.dual_kl(student, teacher, weight * 0, backend=backend)
    (grad,) = torch.autograd.grad(loss, student)
    assert loss == 0 and torch.equal(grad, torch.zeros_like(student))
    hidden, head = torch.randn(3, 4, requires_grad=True), torch.randn(6, 4, requires_grad=True)
    loss = leaf_ext.linear_dual_kl(hidden, head, hidden, head, torch.zeros(3), backend=backend)
    assert loss == 0
    assert not any(grad.any() for grad in torch.autograd.grad(loss, (hidden, head)))


@pytest.mark.parametrize("inplace_grad", [False, True])
def test_float16_gradients_of_small_weights_survive(backend: str, inplace_grad: bool) -> None:
    """A weight of 1e-7 puts every entry below float16's range; a loss scale brings it back."""
    torch.manual_seed(1)
    student = torch.randn(4, 200, dtype=torch.float16)
    teacher = torch.randn(4, 200, dtype=torch.float16)
    weight = torch.full((4,), 1e-7)
    exact = student.double().requires_grad_()
    leaf_ext.dual_kl(exact, teacher.double(), weight.double(), backend="reference").backward()
    values = student.requires_grad_().clone()
    loss = leaf_ext.dual_kl(values, teacher, weight, inplace_grad=inplace_grad, backend=backend)
    (loss * 2.0**20).backward()
    assert student.grad is not None and exact.grad is not None
    found = student.grad.double() / 2.0**20
    distance = (found - exact.grad).norm() / exact.grad.norm()
    assert distance < 1e-3


def test_float16_hidden_gradients_of_small_weights_survive(backend: str) -> None:
    hidden = torch.randn(4, 8, dtype=torch.float16, requires_grad=True)
    head = torch.randn(50, 8, dtype=torch.float16, requires_grad=True)
    teacher = torch.randn(4, 8, dtype=torch.float16), torch.randn(50, 8, dtype=torch.float16)
    exact = [t.detach().double().requires_grad_() for t in (hidden, head)]
    weight = torch.full((4,), 1e-7)
    wide = [t.double() for t in teacher]
    leaf_ext.linear_dual_kl(*exact, *wide, weight.double(), backend="reference").backward()
    loss = leaf_ext.linear_dual_kl(hidden, head, *teacher, weight, backend=backend)
    (loss * 2.0**20).backward()
    for found, truth in zip((hidden, head), exact, strict=True):
        assert found.grad is not None and truth.grad is not None
        scaled = found.grad.double() / 2.0**20
        assert (scaled - truth.grad).norm() < 1e-3 * truth.grad.norm()


def test_a_frozen_head_gets_no_gradient_and_its_product_is_not_made() -> None:
    """There is one product a model in the forward, and one each for hidden states and head."""
    counts = {}
    for trained in (False, True):
        hidden = torch.randn(6, 4, requires_grad=True)
        head = torch.randn(9, 4, requires_grad=trained)
        teacher = torch.randn(6, 5), torch.randn(9, 5)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            leaf_ext.linear_dual_kl(hidden, head, *teacher, torch.ones(6)).backward()
        products = ("aten::mm", "aten::addmm_", "aten::addmm")
        counts[trained] = sum(e.count for e in profile.key_averages() if e.key in products)
        assert (head.grad is not None) == trained
    assert counts == {False: 3, True: 4}


def test_without_gradients_only_the_loss_is_computed() -> None:
    arguments = [torch.randn(6, 4), torch.randn(9, 4), torch.randn(6, 5), torch.randn(9, 5)]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        leaf_ext.linear_dual_kl(*arguments, torch.ones(6))
    counts = {event.key: event.count for event in profile.key_averages()}
    assert counts.get("aten::mm", 0) == 2
    assert counts.get("leaf_ext::dual_kl_", 0) == 0
