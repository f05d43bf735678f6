"""The divergences of `dual_kl` other than KL: their definitions, limits and hard values."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, kl_divergence
from torch.nn import functional

import leaf_ext
from leaf_ext.ops.logit_options import Divergence

OTHERS: tuple[Divergence, ...] = ("reverse_kl", "jsd", 0.1, 0.99)
OPTIONS: list[dict[str, Any]] = [
    {},
    {"temperature": 2.5},
    {"temperature": 0.8, "logit_scale": (1.7, 0.4), "logit_softcap": (3.0, 4.0)},
]


def logits(rows: int = 5, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    student = torch.randn(rows, 11).mul(2).to(dtype).requires_grad_()
    weight = torch.rand(rows).add(0.1).to(torch.promote_types(dtype, torch.float32))
    weight[1] = 0
    return student, torch.randn(rows, 13).mul(2).to(dtype), weight


def by_definition(
    student: Tensor, teacher: Tensor, weight: Tensor, divergence: Divergence, **options: Any
) -> Tensor:
    """Return the loss from torch's distributions and their mixture."""
    temperature = options.get("temperature", 1.0)
    scales = options.get("logit_scale", (1.0, 1.0))
    caps = options.get("logit_softcap", (None, None))
    p_s, p_t = (
        Categorical(logits=(c * (z * k / c).tanh() if c else z * k) / temperature)
        for z, k, c in zip((student[:, :11], teacher[:, :11]), scales, caps, strict=True)
    )
    if divergence == "kl":
        rows = kl_divergence(p_t, p_s)
    elif divergence == "reverse_kl":
        rows = kl_divergence(p_s, p_t)
    else:
        beta = 0.5 if isinstance(divergence, str) else divergence
        mixture = Categorical(probs=beta * p_t.probs + (1 - beta) * p_s.probs)
        rows = beta * kl_divergence(p_t, mixture) + (1 - beta) * kl_divergence(p_s, mixture)
    loss: Tensor = temperature**2 * (weight * rows).sum()
    return loss


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("divergence", ["kl", *OTHERS])
def test_the_definition_by_autograd(divergence: Divergence, options: dict[str, Any]) -> None:
    student, teacher, weight = logits(dtype=torch.float64)
    expected = by_definition(student, teacher, weight, divergence, **options)
    found = leaf_ext.dual_kl(
        student, teacher, weight, divergence=divergence, backend="reference", **options
    )
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    gradients = [torch.autograd.grad(value, student)[0] for value in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("divergence", OTHERS)
@pytest.mark.parametrize("inplace_grad", [False, True])
def test_the_definition_on_each_backend(
    divergence: Divergence, inplace_grad: bool, backend: str
) -> None:
    student, teacher, weight = logits()
    expected = by_definition(
        *(t.double() for t in (student, teacher, weight)), divergence, **OPTIONS[2]
    )
    found = leaf_ext.dual_kl(
        student.clone(), teacher, weight, divergence=divergence, inplace_grad=inplace_grad,
        backend=backend, **OPTIONS[2],
    )  # fmt: skip
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)
    gradients = [torch.autograd.grad(value, student)[0] for value in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("divergence", OTHERS)
def test_the_linear_loss_is_that_of_its_logits(divergence: Divergence, backend: str) -> None:
    hidden, head = torch.randn(9, 4, requires_grad=True), torch.randn(11, 4, requires_grad=True)
    teacher, teacher_head, weight = torch.randn(9, 5), torch.randn(13, 5), torch.rand(9)
    both = {"divergence": divergence, "temperature": 2.0, "return_rows": True, "backend": backend}
    loss, rows = leaf_ext.linear_dual_kl(
        hidden, head, teacher, teacher_head, weight, chunk_size=4, **both
    )
    plain, plain_rows = leaf_ext.dual_kl(
        functional.linear(hidden, head), functional.linear(teacher, teacher_head), weight, **both
    )
    torch.testing.assert_close(loss, plain, rtol=1e-5, atol=0)
    torch.testing.assert_close(rows.kl, plain_rows.kl, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(loss, 4 * (weight * rows.kl).sum(), rtol=1e-5, atol=0)
    gradients = [torch.autograd.grad(value, (hidden, head)) for value in (loss, plain)]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_the_limits_of_beta_are_the_two_kls(backend: str) -> None:
    # The error of a share is its size times the ratios of the probabilities, so these are small;
    # float32 would lose the digits of a share that is much smaller.
    student, teacher, weight = logits()
    student, teacher = (0.3 * student.detach()).requires_grad_(), 0.3 * teacher

    def gradient(divergence: Divergence, share: float) -> list[Tensor]:
        loss = leaf_ext.dual_kl(student, teacher, weight, divergence=divergence, backend=backend)
        return [loss.detach() / share, torch.autograd.grad(loss, student)[0] / share]

    for divergence, beta, share in (("kl", 1e-4, 1e-4), ("reverse_kl", 1 - 1e-4, 1e-4)):
        for ours, limit in zip(gradient(beta, share), gradient(divergence, 1.0), strict=True):
            torch.testing.assert_close(ours, limit, rtol=3e-3, atol=3e-4)


def test_jsd_is_the_mean_of_both_directions(backend: str) -> None:
    student, teacher, weight = (t.detach() for t in logits())
    options = {"divergence": "jsd", "backend": backend}
    there = leaf_ext.dual_kl(student, teacher, weight, **options)
    back = leaf_ext.dual_kl(teacher, student, weight, **options)
    torch.testing.assert_close(there, back, rtol=1e-5, atol=0)
    assert 0 < float(there) < float(weight.sum()) * math.log(2)


@pytest.mark.parametrize("divergence", OTHERS)
def test_nearly_equal_models_keep_three_digits(divergence: Divergence, backend: str) -> None:
    teacher = torch.randn(4, 50_000) * 3
    student = (teacher + torch.randn(4, 50_000) * 1.4e-3 + 50.0).requires_grad_()
    weight = torch.ones(4)

    def measured(backend: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        loss, rows = leaf_ext.dual_kl(
            student.to(dtype), teacher.to(dtype), weight.to(dtype), divergence=divergence,
            return_rows=True, backend=backend,
        )  # fmt: skip
        return rows.kl, torch.autograd.grad(loss, student)[0]

    exact, exact_gradient = measured("reference", torch.float64)
    found, gradient = measured(backend, torch.float32)
    assert 0 < float(exact.max()) < 1e-5
    torch.testing.assert_close(found.double(), exact, rtol=1e-3, atol=0)
    assert (gradient - exact_gradient).norm() < 1e-2 * exact_gradient.norm()


def test_equal_models_have_no_loss_and_no_gradient(backend: str) -> None:
    student = torch.randn(3, 5000).mul(5).requires_grad_()
    for divergence in OTHERS:
        loss = leaf_ext.dual_kl(
            student, student.detach(), torch.ones(3), divergence=divergence, backend=backend
        )
        (gradient,) = torch.autograd.grad(loss, student)
        assert 0 <= float(loss.detach()) < 1e-12 and float(gradient.abs().max()) < 1e-7


def by_tokens(p_s: Tensor, p_t: Tensor, divergence: Divergence) -> Tensor:
    """Return the divergence as sums over the tokens that a distribution allows."""

    def kl(p: Tensor, q: Tensor) -> Tensor:
        allowed = p > 0
        return (p[allowed] * (p[allowed] / q[allowed]).log()).sum()

    if divergence == "reverse_kl":
        return kl(p_s, p_t)
    beta = 0.5 if isinstance(divergence, str) else divergence
    mixture = beta * p_t + (1 - beta) * p_s
    return beta * kl(p_t, mixture) + (1 - beta) * kl(p_s, mixture)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_token_that_the_teacher_excludes(dtype: torch.dtype, backend: str) -> None:
    """The reverse KL is infinite with a finite gradient away from the token; JSD is finite."""
    student, teacher = torch.zeros(1, 4, dtype=dtype), torch.zeros(1, 4, dtype=dtype)
    teacher[0, 1] = -math.inf
    student.requires_grad_()
    weight = torch.ones(1)
    loss = leaf_ext.dual_kl(student, teacher, weight, divergence="reverse_kl", backend=backend)
    (gradient,) = torch.autograd.grad(loss, student)
    assert loss == math.inf
    away = (1000 + math.log(4 / 3)) / 16  # of log-ratios 1000 and, on the others, log(3/4)
    expected = torch.tensor([[-away, 3 * away, -away, -away]])
    rounding = torch.finfo(dtype).eps
    torch.testing.assert_close(gradient.float(), expected, rtol=rounding + 2e-4, atol=0)
    for beta in (0.5, 0.1, 0.99):
        loss = leaf_ext.dual_kl(student, teacher, weight, divergence=beta, backend=backend)
        exact, wide = student.detach().double().requires_grad_(), teacher.double()
        p_s, p_t = exact.softmax(-1), wide.softmax(-1)
        truth = by_tokens(p_s, p_t, beta)
        torch.testing.assert_close(loss.double(), truth, rtol=1e-5, atol=0)
        pair = torch.autograd.grad(loss, student)[0], torch.autograd.grad(truth, exact)[0]
        torch.testing.assert_close(pair[0].double(), pair[1], rtol=rounding + 1e-5, atol=1e-7)


@pytest.mark.parametrize("divergence", OTHERS)
def test_a_token_that_the_student_or_both_exclude(divergence: Divergence, backend: str) -> None:
    """It adds nothing to the reverse KL, and a finite term to JSD; its own gradient is 0."""
    student, teacher = torch.randn(1, 9), torch.randn(1, 9)
    student[0, 2:4] = -math.inf
    teacher[0, 3] = -math.inf
    exact = student.double().requires_grad_()
    student.requires_grad_()
    loss = leaf_ext.dual_kl(student, teacher, torch.ones(1), divergence=divergence, backend=backend)
    p_s, p_t = exact.softmax(-1), teacher.double().softmax(-1)
    truth = by_tokens(p_s, p_t, divergence)
    torch.testing.assert_close(loss.double(), truth, rtol=1e-5, atol=0)
    pair = torch.autograd.grad(loss, student)[0], torch.autograd.grad(truth, exact)[0]
    torch.testing.assert_close(pair[0].double(), pair[1], rtol=1e-4, atol=1e-7)
    assert not pair[0][0, 2:4].any()


@pytest.mark.parametrize("divergence", OTHERS)
@pytest.mark.parametrize("value", [math.nan, -math.inf], ids=["one_nan", "all_minus_infinity"])
@pytest.mark.parametrize("side", [0, 1], ids=["student", "teacher"])
def test_a_live_row_without_a_distribution_is_nan(
    divergence: Divergence, value: float, side: int, backend: str
) -> None:
    pair = [torch.randn(3, 40), torch.randn(3, 40)]
    pair[side][1] = value if value == -math.inf else pair[side][1]
    pair[side][1, 17] = value
    student = pair[0].requires_grad_()
    loss, rows = leaf_ext.dual_kl(
        student, pair[1], torch.ones(3), divergence=divergence, return_rows=True, backend=backend
    )
    (gradient,) = torch.autograd.grad(loss, student)
    assert loss.isnan() and rows.kl.isnan().tolist() == [False, True, False]
    assert gradient.isnan().any(1).tolist() == [False, True, False]


@pytest.mark.parametrize("inplace_grad", [False, True])
def test_float16_gradients_neither_overflow_nor_vanish(backend: str, inplace_grad: bool) -> None:
    """The bound of the reverse KL's gradient is 256 times that of the others."""
    torch.manual_seed(1)
    student, teacher = (torch.randn(4, 200).mul(s).half() for s in (1, 1))
    student[0, 3], teacher[0, 3] = 500.0, -500.0  # a log-ratio near 1000
    teacher[1, 5] = -math.inf
    for divergence in OTHERS:
        for weight in (torch.full((4,), 1e-7), torch.tensor([200.0, 1.0, 0.0, 1.0])):
            exact = student.double().requires_grad_()
            arguments = {"divergence": divergence}
            leaf_ext.dual_kl(
                exact, teacher.double(), weight.double(), backend="reference", **arguments
            ).backward()
            leaf = student.clone().requires_grad_()
            loss = leaf_ext.dual_kl(
                leaf.clone(), teacher, weight, inplace_grad=inplace_grad, backend=backend,
                **arguments,
            )  # fmt: skip
            scale = 2.0**28 if weight[0] < 1 else 2.0**-3
            (gradient,) = torch.autograd.grad(loss, leaf, torch.tensor(scale))
            assert exact.grad is not None and gradient.isfinite().all()
            for row in range(4):
                truth = exact.grad[row]
                assert (gradient[row].double() / scale - truth).norm() <= 2e-3 * truth.norm()


def test_results_repeat_and_do_not_depend_on_threads() -> None:
    student, teacher, weight = torch.randn(5, 20_001), torch.randn(5, 20_001), torch.rand(5)
    threads = torch.get_num_threads()
    for divergence in OTHERS:
        results = []
        for count in (1, 2, 2):
            torch.set_num_threads(count)
            leaf = student.clone().requires_grad_()
            loss = leaf_ext.dual_kl(leaf, teacher, weight, divergence=divergence, backend="cpu")
            results.append([loss.detach(), torch.autograd.grad(loss, leaf)[0]])
        torch.set_num_threads(threads)
        for other in results[1:]:
            assert all(map(torch.equal, results[0], other))


@pytest.mark.parametrize("inplace_grad", [False, True])
def test_it_compiles_whole(backend: str, inplace_grad: bool) -> None:
    torch.compiler.reset()
    student, teacher, weight = (t.detach() for t in logits())

    def loss(student: Tensor, teacher: Tensor, weight: Tensor) -> Tensor:
        return leaf_ext.dual_kl(
            student * 2, teacher, weight, divergence=0.3, inplace_grad=inplace_grad,
            backend=backend,
        )  # fmt: skip

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    gradients = []
    for run in (loss, compiled):
        leaf = student.clone().requires_grad_()
        run(leaf, teacher, weight).backward()
        gradients.append(leaf.grad)
    assert torch.equal(*gradients)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("jds", r"dual_kl: divergence must be 'kl', 'reverse_kl', 'jsd' or a number .*got 'jds'"),
        (0.0, r"divergence must be a finite number in \[1e-06, 0\.999999\], got 0\.0"),
        (1, r"divergence must be a finite number in \[1e-06, 0\.999999\], got 1"),
        (math.nan, r"divergence must be a finite number in .*, got nan"),
        (True, r"divergence must be a finite number in .*, got True"),
        (None, r"divergence must be a finite number in .*, got None"),
    ],
)
def test_a_divergence_that_does_not_exist(given: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        leaf_ext.dual_kl(*logits(), divergence=given)
