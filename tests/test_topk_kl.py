"""`topk_kl`, `linear_topk_kl` and the labels of `linear_dual_kl` beside what they must equal."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from op_samples import linear_tensors, topk_tensors
from torch import Tensor
from torch.nn import functional

import leaf_ext
from leaf_ext.testing.inputs import stored_teacher

OPTIONS: list[dict[str, Any]] = [
    {},
    {"temperature": 2.5},
    {"temperature": 0.8, "logit_scale": 1.3, "logit_softcap": 4.0},
]


def gradient(loss: Tensor, student: Tensor) -> Tensor:
    (found,) = torch.autograd.grad(loss, student)
    return found


def student_logits(rows: int, vocabulary: int) -> Tensor:
    return torch.randn(rows, vocabulary).mul(3).requires_grad_()


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_hard_labels_are_the_cross_entropy(backend: str, options: dict[str, Any]) -> None:
    student, weight = student_logits(6, 5000), torch.rand(6)
    labels = torch.randint(5000, (6,))
    loss = leaf_ext.topk_kl(
        student, labels[:, None], torch.zeros(6, 1), weight, backend=backend, **options
    )
    temperature, cap = options.get("temperature", 1.0), options.get("logit_softcap")
    y = student.double() * options.get("logit_scale", 1.0)
    y = y if cap is None else cap * torch.tanh(y / cap)
    nll = functional.cross_entropy(y / temperature, labels, reduction="none")
    expected = temperature**2 * (weight * nll).sum()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    found, wanted = gradient(loss, student), gradient(expected, student)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
def test_all_ids_are_dual_kl_and_fewer_are_below_it(backend: str, dtype: torch.dtype) -> None:
    student, teacher, weight = student_logits(8, 60), torch.randn(8, 60) * 3, torch.rand(8)
    full, rows = leaf_ext.dual_kl(
        student, teacher, weight, temperature=2.0, return_rows=True, backend=backend
    )
    last: Tensor = rows.kl
    for k in (60, 59, 20, 3, 1):
        ids, logprobs, _ = stored_teacher(teacher, 2.0, k)
        loss, found = leaf_ext.topk_kl(
            student, ids.to(dtype), logprobs, weight,
            temperature=2.0, return_rows=True, backend=backend,
        )  # fmt: skip
        if k == 60:
            torch.testing.assert_close(loss, full, rtol=1e-6, atol=0)
            for ours, theirs in zip(found, rows, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=1e-6)
            torch.testing.assert_close(
                gradient(loss, student), gradient(full, student), rtol=1e-5, atol=1e-7
            )
        # Tokens that are merged into one outcome are not told apart any more.
        assert bool((found.kl <= last + 2e-6).all()) and bool((found.kl >= 0).all())
        last = found.kl


def test_nearly_equal_models_keep_three_digits(backend: str) -> None:
    teacher = torch.randn(4, 20_000) * 3
    student = teacher + torch.randn(4, 20_000) * 3e-3 + 50.0
    for k in (20, 200):
        ids, logprobs, tail = stored_teacher(teacher, 1.0, k)
        arguments = (ids, logprobs, torch.ones(4))
        options: dict[str, Any] = {"teacher_tail_logprob": tail, "return_rows": True}
        found = leaf_ext.topk_kl(student, *arguments, backend=backend, **options)[1].kl
        log_s = student.double().log_softmax(-1)
        others = log_s.scatter(1, ids, -math.inf).logsumexp(-1, keepdim=True)
        log_s = torch.cat((log_s.gather(1, ids), others), 1)
        log_t = torch.cat((logprobs, tail[:, None]), 1).double().log_softmax(-1)
        exact = (log_s.exp() - log_t.exp() + log_t.exp() * (log_t - log_s)).sum(-1)
        # Logits near 50 have a rounding error, which the exact value shares.
        assert 1e-7 < float(exact.min()) < float(exact.max()) < 1e-5
        torch.testing.assert_close(found.double(), exact, rtol=1e-3, atol=0)


def test_a_tiny_rest_of_the_student_is_right(backend: str) -> None:
    """Its mass, e^-200, is no float32; a difference to 1 would be 0 much sooner."""
    student = torch.zeros(2, 3000)
    student[:, 5], student[:, 7] = 200.0, 199.0
    student.requires_grad_()
    ids, logprobs = torch.tensor([[5, 7]] * 2), torch.tensor([[0.5, 0.3]] * 2).log()
    weight = torch.ones(2)
    loss, rows = leaf_ext.topk_kl(student, ids, logprobs, weight, return_rows=True, backend=backend)
    q = torch.tensor([1.0, math.exp(-1)], dtype=torch.float64)
    q = q / q.sum()
    p = logprobs[0].double().exp()
    rest = 1 - p.sum()
    log_u = math.log(2998) - 200 + float(q[0].log())
    expected = (p * (p / q).log()).sum() + rest * (rest.log() - log_u)
    torch.testing.assert_close(rows.kl.double(), expected.expand(2), rtol=1e-6, atol=0)
    found = gradient(loss, student)[0]
    torch.testing.assert_close(found[[5, 7]].double(), q - p, rtol=1e-5, atol=1e-7)
    others = torch.ones(3000, dtype=torch.bool).index_fill(0, ids[0], False)
    expected_others = (-rest / 2998).expand(2998)
    torch.testing.assert_close(found[others].double(), expected_others, rtol=1e-5, atol=0)


def test_a_rest_that_the_student_excludes_is_infinite_with_a_finite_gradient(backend: str) -> None:
    student = torch.zeros(2, 40)
    student[:, 2:] = -math.inf
    student.requires_grad_()
    ids, logprobs = torch.tensor([[0, 1]] * 2), torch.tensor([[0.5, 0.25]] * 2).log()
    loss = leaf_ext.topk_kl(student, ids, logprobs, torch.ones(2), backend=backend)
    found = gradient(loss, student)
    assert loss == math.inf and not found[:, 2:].any()
    torch.testing.assert_close(found[:, :2], torch.tensor([[0.0, 0.25]] * 2))
    none = torch.full((2,), -math.inf)
    finite = leaf_ext.topk_kl(
        student, ids, logprobs, torch.ones(2), teacher_tail_logprob=none, backend=backend
    )
    expected = 2 * (2 / 3 * math.log(4 / 3) + 1 / 3 * math.log(2 / 3))  # of 2/3 and 1/3
    torch.testing.assert_close(finite, torch.tensor(expected))


@pytest.mark.parametrize(
    "side", ["logit_of_an_id", "other_logit", "logits", "logprob", "tail", "logprobs"]
)
def test_a_live_row_without_a_distribution_is_nan(backend: str, side: str) -> None:
    student, ids = torch.randn(3, 40), torch.tensor([[4, 9, 30]] * 3)
    logprobs, tail = torch.full((3, 3), -1.5), torch.full((3,), -1.0)
    if side == "logits":
        student[1] = -math.inf
    elif side == "logprobs":
        logprobs[1], tail[1] = -math.inf, -math.inf
    else:
        changed, column = {
            "logit_of_an_id": (student, 9), "other_logit": (student, 10), "logprob": (logprobs, 2),
        }.get(side, (tail[:, None], 0))  # fmt: skip
        changed[1, column] = math.nan
    loss, rows = leaf_ext.topk_kl(
        student, ids, logprobs, torch.ones(3), teacher_tail_logprob=tail, return_rows=True,
        backend=backend,
    )  # fmt: skip
    assert loss.isnan()
    assert rows.kl.isnan().tolist() == [False, True, False]
    assert rows.agreement.isnan().tolist() == [False, True, False]


def test_the_default_rest_is_what_is_left_of_1(backend: str) -> None:
    student, ids, logprobs, weight = topk_tensors()
    left = torch.log(-torch.expm1(logprobs.double().logsumexp(-1))).float()
    default, given = (
        leaf_ext.topk_kl(student, ids, logprobs, weight, teacher_tail_logprob=tail, backend=backend)
        for tail in (None, left)
    )
    torch.testing.assert_close(default, given, rtol=1e-6, atol=0)
    # A sum above 1, of rounded log-probabilities, leaves nothing.
    above = logprobs - logprobs.logsumexp(-1, keepdim=True) + 1e-3
    rounded = leaf_ext.topk_kl(student, ids, above, weight, backend=backend)
    none = torch.full_like(left, -math.inf)
    exact = leaf_ext.topk_kl(
        student, ids, above - 1e-3, weight, teacher_tail_logprob=none, backend=backend
    )
    torch.testing.assert_close(rounded, exact, rtol=1e-5, atol=0)


def test_ties_agree_at_the_lowest_id(backend: str) -> None:
    student = torch.zeros(3, 9000)
    student[0, 8000] = student[0, 300] = student[1, 300] = student[2, 8000] = 1.0
    ids = torch.tensor([[8000, 300], [8000, 300], [300, 8000]])
    logprobs = torch.full((3, 2), math.log(0.5))
    rows = leaf_ext.topk_kl(
        student, ids, logprobs, torch.ones(3), return_rows=True, backend=backend
    )[1]
    assert rows.agreement.tolist() == [1.0, 1.0, 0.0]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_gradcheck_of_the_reference(options: dict[str, Any]) -> None:
    student, ids, logprobs, weight = topk_tensors()
    leaf, weights = student.double().requires_grad_(), weight.double()

    def loss(z: Tensor) -> Tensor:
        return leaf_ext.topk_kl(z, ids, logprobs.double(), weights, backend="reference", **options)

    assert torch.autograd.gradcheck(loss, (leaf,))


def test_the_same_bits_each_time_and_for_any_number_of_threads(backend: str) -> None:
    teacher = torch.randn(3, 9011) * 3
    ids, logprobs, _ = stored_teacher(teacher, 1.0, 70)
    threads, results = torch.get_num_threads(), []
    for count in (1, 2, 2):
        torch.set_num_threads(count)
        torch.manual_seed(1)
        student = torch.randn(3, 9011).mul(3).requires_grad_()
        loss = leaf_ext.topk_kl(student, ids, logprobs, torch.ones(3), backend=backend)
        results.append((loss.detach(), gradient(loss, student)))
    torch.set_num_threads(threads)
    if backend != "reference":
        first, *others = results
        for other in others:
            assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_only_first_order_gradients_and_one_backward_in_place(backend: str) -> None:
    student, ids, logprobs, weight = topk_tensors()
    leaf = student.requires_grad_()
    loss = leaf_ext.topk_kl(leaf, ids, logprobs, weight, backend=backend)
    once = torch.autograd.grad(loss, leaf, retain_graph=True)[0]
    torch.testing.assert_close(
        torch.autograd.grad(loss, leaf, torch.tensor(3.0), retain_graph=True)[0], 3 * once
    )
    with pytest.raises(RuntimeError, match="topk_kl: only first-order gradients exist"):
        torch.autograd.grad(loss, leaf, create_graph=True)
    overwritten = leaf * 1.0
    address = overwritten.data_ptr()
    loss = leaf_ext.topk_kl(overwritten, ids, logprobs, weight, inplace_grad=True, backend=backend)
    assert torch.equal(overwritten.detach(), once)
    (found,) = torch.autograd.grad(loss, overwritten, retain_graph=True)
    assert found.data_ptr() == address
    with pytest.raises(RuntimeError, match="topk_kl: a second backward"):
        torch.autograd.grad(loss, overwritten)


def test_ids_elsewhere_touch_no_other_memory(namespace: str) -> None:
    """A direct call checks no id; one outside of the vocabulary is left out."""
    memory = torch.full((30, 16), 7.0)
    student = memory[10:13, 2:11]
    student.copy_(torch.randn(3, 9))
    before = memory.clone()
    ids = torch.tensor([[0, 9, 2**40], [-1, 3, 4], [2, -(2**40), 2**31]])
    if namespace == "leaf_ext_reference":
        pytest.skip("the reference raises")
    run = getattr(torch.ops, namespace).topk_kl_
    given = (ids, torch.full((3, 3), -2.0), torch.full((3,), -1.0), torch.ones(3))
    run(student, *given, 1.0, 1.0, 0.0, True, True)
    before[10:13, 2:11] = memory[10:13, 2:11]
    assert torch.equal(memory, before) and bool(student.isfinite().all())


# -- labels of linear_dual_kl ---------------------------------------------------------------------


def labelled(backend: str, **options: Any) -> tuple[Tensor, leaf_ext.DualKLRows]:
    torch.manual_seed(0)
    return leaf_ext.linear_dual_kl(
        *linear_tensors(), backend=backend, return_rows=True, chunk_size=3, **options
    )


def test_labels_without_a_weight_are_only_measured(backend: str) -> None:
    labels = torch.tensor([3, 999, 8, -100])  # the weight of the second row is 0
    plain, _ = labelled(backend)
    loss, rows = labelled(backend, labels=labels)
    torch.manual_seed(0)
    hidden, head, *_ = linear_tensors()
    nll = functional.cross_entropy(
        hidden @ head.T, labels.clamp(max=8), ignore_index=-100, reduction="none"
    )
    nll[1] = 0
    assert torch.equal(loss, plain)
    torch.testing.assert_close(rows.nll, nll, rtol=1e-5, atol=1e-6)
    assert not labelled(backend)[1].nll.any()


def test_a_row_counts_if_either_weight_does(backend: str) -> None:
    labels, label_weight = torch.tensor([3, 4, 8, 0]), torch.tensor([0.0, 0.7, 0.5, 0.0])
    plain, plain_rows = labelled(backend)
    loss, rows = labelled(backend, labels=labels, label_weight=label_weight)
    torch.testing.assert_close(loss, plain + (label_weight * rows.nll).sum())
    assert bool((rows.nll > 0).all()) and rows.kl[1] == 0
    torch.testing.assert_close(rows.kl, plain_rows.kl)


def test_labels_in_float16_share_one_scale(backend: str) -> None:
    """Gradients of both terms are float16 sums, though their sizes differ by 10^4."""
    tensors = linear_tensors(torch.float16)
    labels, label_weight = torch.tensor([3, 4, 8, 0]), torch.full((4,), 1e-4)

    def gradients(dtype: torch.dtype, backend: str) -> tuple[Tensor, ...]:
        weights = torch.promote_types(dtype, torch.float32)
        leaves = [t.to(dtype).requires_grad_() for t in tensors[:2]]
        loss = leaf_ext.linear_dual_kl(
            *leaves, *(t.to(dtype) for t in tensors[2:4]), tensors[4].to(weights),
            labels=labels, label_weight=label_weight.to(weights), backend=backend,
        )  # fmt: skip
        return torch.autograd.grad(loss, leaves)

    exact = gradients(torch.float64, "reference")
    for found, wanted in zip(gradients(torch.float16, backend), exact, strict=True):
        torch.testing.assert_close(found.double(), wanted, rtol=2e-3, atol=1e-5)
