"""The contract of the ops."""

from __future__ import annotations

import inspect
import math
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from op_samples import (
    kl_tensors,
    linear_tensors,
    linear_topk_tensors,
    raw_topk_tensors,
    span_tensors,
    topk_tensors,
)
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import leaf_ext
from leaf_ext import dispatch, native, reference
from leaf_ext.ops import linear_losses
from leaf_ext.schema import NAMESPACES, OPS
from leaf_ext.testing.inputs import strided

SCALARS = (1.5, 0.9, 1.1, 20.0, 0.0, 0.0)
OTHER_SCALARS = (*SCALARS[:-1], 0.3)  # beta
STUDENT_SCALARS = (1.5, 0.9, 20.0)

assert_equal_bits = partial(torch.testing.assert_close, rtol=0, atol=0)
# On a GPU the order of a row's sum depends on the row's address modulo 16 bytes.
assert_close_in_any_order = partial(torch.testing.assert_close, rtol=1e-6, atol=1e-7)


# -- schemas ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPS)
def test_reference_signature_is_the_schema(name: str) -> None:
    parameters = tuple(inspect.signature(getattr(reference, name)).parameters)
    assert parameters == OPS[name].argument_names


@pytest.mark.parametrize("namespace", NAMESPACES)
@pytest.mark.parametrize("name", OPS)
def test_every_namespace_has_every_op(namespace: str, name: str) -> None:
    registered = getattr(getattr(torch.ops, namespace), name).default._schema
    assert str(registered).removeprefix(f"{namespace}::") == OPS[name].schema
    assert tuple(argument.name for argument in registered.arguments) == OPS[name].argument_names


# The domains are whole, because opcheck compares with ==, and scores outside are NaN.
SAMPLES: dict[str, Callable[[], tuple[Any, ...]]] = {
    "grad_norm": lambda: (torch.randn(3, 5, 7),),
    "detect_spans": lambda: (
        *span_tensors(), None, False, 1.0, 0.4, True, 0.5, math.inf, 1, 1, None, 20,
    ),
    "detect_spans-log": lambda: (
        *span_tensors(), None, True, 0.7, 0.4, True, 0.5, 0.6, 1, 1, None, 20,
    ),
    "detect_spans-packed": lambda: (
        torch.randn(60, 4), torch.randn(60, 6), torch.rand(60) > -1, torch.rand(60) > 0.3,
        False, 2.0, 0.4, False, 0.5, 0.7, 0, 2, torch.tensor([0, 11, 11, 60]), 49,
    ),
    "dual_kl": lambda: (*kl_tensors(), *SCALARS, True, True),
    "dual_kl-loss_only": lambda: (*kl_tensors(), *SCALARS, False, False),
    "dual_kl-autograd": lambda: (
        kl_tensors()[0].requires_grad_(), *kl_tensors()[1:], *SCALARS, True, False,
    ),
    "dual_kl-divergence": lambda: (
        kl_tensors()[0].requires_grad_(), *kl_tensors()[1:], *OTHER_SCALARS, True, True,
    ),
    "dual_kl_": lambda: (*kl_tensors(), *SCALARS, True, True),
    "dual_kl_-divergence": lambda: (*kl_tensors(), *OTHER_SCALARS, True, True),
    "linear_dual_kl": lambda: (
        *linear_tensors(), None, None, None, None, *SCALARS, False, None, False, True, 2,
    ),
    "linear_dual_kl-autograd": lambda: (
        *(t.requires_grad_() for t in linear_tensors()[:2]), *linear_tensors()[2:],
        torch.randn(9, requires_grad=True), torch.randn(11), None, None, *SCALARS, True,
        torch.float32, True, True, 3,
    ),
    "linear_dual_kl-divergence": lambda: (
        *(t.requires_grad_() for t in linear_tensors()[:2]), *linear_tensors()[2:],
        None, None, None, None, *OTHER_SCALARS, True, torch.float32, False, True, 3,
    ),
    "linear_dual_kl-labels": lambda: (
        *(t.requires_grad_() for t in linear_tensors()[:2]), *linear_tensors()[2:],
        None, None, torch.tensor([3, 8, -100, 0]), torch.rand(4), *SCALARS, True,
        torch.float32, False, True, 3,
    ),
    "linear_dual_kl-measured_labels": lambda: (
        *linear_tensors(), None, None, torch.tensor([3, 8, -100, 0]), None, *SCALARS, False, None,
        False, True, 3,
    ),
    "linear_dual_kl-narrow_head": lambda: (
        *(t.requires_grad_() for t in linear_tensors(torch.bfloat16)[:2]),
        *linear_tensors(torch.bfloat16)[2:],
        None, None, None, None, *SCALARS, True, torch.bfloat16, False, False, 100,
    ),
    "topk_kl": lambda: (*raw_topk_tensors(), *STUDENT_SCALARS, True, True),
    "topk_kl-loss_only": lambda: (*raw_topk_tensors(), *STUDENT_SCALARS, False, False),
    "topk_kl-autograd": lambda: (
        raw_topk_tensors()[0].requires_grad_(), *raw_topk_tensors()[1:], *STUDENT_SCALARS, True,
        False,
    ),
    "topk_kl_": lambda: (*raw_topk_tensors(), *STUDENT_SCALARS, True, True),
    "linear_topk_kl": lambda: (
        *linear_topk_tensors(), None, *STUDENT_SCALARS, False, None, False, True, 2,
    ),
    "linear_topk_kl-autograd": lambda: (
        *(t.requires_grad_() for t in linear_topk_tensors()[:2]), *linear_topk_tensors()[2:],
        torch.randn(9, requires_grad=True), *STUDENT_SCALARS, True, torch.float32, True, True, 3,
    ),
}  # fmt: skip


@pytest.mark.parametrize("sample", SAMPLES)
def test_opcheck(namespace: str, sample: str) -> None:
    op = getattr(getattr(torch.ops, namespace), sample.split("-")[0])
    torch.library.opcheck(op.default, SAMPLES[sample]())


# -- backends -----------------------------------------------------------------------------------


def called_ops(run: Callable[[], object]) -> set[str]:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run()
    return {event.key for event in profile.key_averages() if event.key.startswith("leaf_ext")}


def test_each_backend_runs_its_own_namespace(backend: str) -> None:
    namespace = dispatch.resolve("grad_norm", torch.get_default_device(), backend, torch.float32)
    tensors = linear_tensors()

    def run() -> None:
        leaf_ext.grad_norm(tensors[0], backend=backend)
        leaf_ext.detect_spans(*span_tensors(), backend=backend)
        leaf_ext.dual_kl(*kl_tensors(), backend=backend)
        leaf_ext.linear_dual_kl(*tensors, backend=backend)
        student, *teacher = topk_tensors()
        leaf_ext.topk_kl(student, *teacher, backend=backend)
        leaf_ext.linear_topk_kl(*tensors[:2], *teacher, backend=backend)

    found = called_ops(run)
    losses = ("dual_kl", "topk_kl", "linear_dual_kl", "linear_topk_kl")
    assert namespace in NAMESPACES and found == {
        f"{namespace}::{op}" for op in ("grad_norm", "detect_spans", *losses)
    }


def test_auto_on_a_cpu_is_the_compiled_module() -> None:
    assert called_ops(lambda: leaf_ext.grad_norm(torch.ones(2, 2))) == {"leaf_ext::grad_norm"}


def test_float64_runs_in_the_reference_only() -> None:
    grad = torch.randn(3, 4, dtype=torch.float64)
    assert leaf_ext.grad_norm(grad).dtype == torch.float64
    with pytest.raises(ValueError, match=r"grad_norm: grad must be float32.*got torch.float64"):
        leaf_ext.grad_norm(grad, backend="cpu")


def test_a_backend_that_is_not_there_says_why() -> None:
    with pytest.raises(RuntimeError, match=r"grad_norm: backend='cpu' is not available: .*meta"):
        leaf_ext.grad_norm(torch.empty(3, 4, device="meta"), backend="cpu")
    with pytest.raises(
        ValueError, match="backend must be one of auto, reference, cpu, cuda, triton, got 'gpu'"
    ):
        leaf_ext.grad_norm(torch.ones(3, 4), backend="gpu")  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match=r"backend='cuda' is not available: (this|it runs)"):
        leaf_ext.grad_norm(torch.ones(3, 4), backend="cuda")


@pytest.mark.parametrize(
    ("built", "capability", "runs"),
    [
        *(("80", 80, True), ("80", 86, True), ("86", 80, False), ("80", 75, False)),
        *(("80 90 100", 89, True), ("80 90 100", 103, True), ("80 90 100", 120, True)),
        *(("80", 90, True), ("90", 80, False), ("100", 90, False)),
    ],
)
def test_which_gpu_a_build_runs_on(built: str, capability: int, runs: bool) -> None:
    reason = native.lacks_architecture(tuple(built.split()), capability)
    assert (reason is None) == runs
    assert runs or f"this GPU has {capability}" in str(reason)


def test_auto_says_once_that_it_runs_the_reference(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "_said", set())
    for _ in range(2):
        assert leaf_ext.grad_norm(torch.empty(3, 4, device="meta")).shape == (3,)
    (record,) = caplog.records
    assert "running the slower reference" in record.message and "'meta'" in record.message


def test_float64_in_the_reference_is_no_fallback(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "_said", set())
    monkeypatch.setattr(native, "missing", lambda backend, device: "it is not there")
    leaf_ext.grad_norm(torch.ones(3, 4, dtype=torch.float64))
    assert not caplog.records


def test_the_reference_detects_without_waiting_for_the_device() -> None:
    """The size of a selection, for instance, would need values, which a meta tensor lacks."""
    tensors = [t.reshape(60).to("meta") for t in span_tensors()]
    borders = torch.tensor([0, 20, 60], device="meta")
    for log_scale in (False, True):
        gap = (log_scale, 0.9)
        spans = reference.detect_spans(
            *tensors, tensors[2], *gap, 0.4, True, 0.5, 0.7, 1, 2, borders, 40
        )
        assert spans.span.shape == (2, 20, 2) and spans.score.shape == (60,)


def test_build_info_names_the_backend() -> None:
    assert "cpu" in leaf_ext.build_info()["backends"]


def test_import_needs_only_torch_and_is_cheap() -> None:
    """Only modules of torch, leaf_ext and the standard library are loaded."""
    code = (
        "import sys, torch, torch.library; before = set(sys.modules)\n"
        "import leaf_ext\n"
        "new = {name.split('.')[0] for name in set(sys.modules) - before}\n"
        "print(*sorted(new - {'leaf_ext'} - set(sys.stdlib_module_names)))\n"
        "print('numpy' in set(sys.modules) - before)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["False"]


# -- autocast and values -------------------------------------------------------------------------


def test_autocast_casts_as_a_linear_layer_does(backend: str) -> None:
    hidden, head, *rest = linear_tensors()
    hidden.requires_grad_()
    head.requires_grad_()
    with torch.autocast(torch.get_default_device().type, dtype=torch.bfloat16):
        loss = leaf_ext.linear_dual_kl(hidden, head, *rest, backend=backend)
    found = torch.autograd.grad(loss, (hidden, head))
    narrow = [t.detach().bfloat16().requires_grad_() for t in (hidden, head)]
    teacher = [t.bfloat16() for t in rest[:2]]
    expected_loss = leaf_ext.linear_dual_kl(*narrow, *teacher, rest[2], backend=backend)
    expected = torch.autograd.grad(expected_loss, narrow)
    assert torch.equal(loss, expected_loss) and loss.dtype == torch.float32
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == torch.float32 and torch.equal(ours, theirs.float())


def test_autocast_leaves_dual_kl_in_float32(backend: str) -> None:
    student, teacher, weight = kl_tensors()
    plain = leaf_ext.dual_kl(student, teacher, weight, backend=backend)
    with torch.autocast(torch.get_default_device().type, dtype=torch.bfloat16):
        assert torch.equal(leaf_ext.dual_kl(student, teacher, weight, backend=backend), plain)


# -- numbers ------------------------------------------------------------------------------------


def test_an_impossible_token_is_infinite_with_a_finite_gradient(backend: str) -> None:
    student, teacher = torch.zeros(1, 3), torch.zeros(1, 3)
    student[0, 1] = -math.inf
    student.requires_grad_()
    loss = leaf_ext.dual_kl(student, teacher, torch.ones(1), backend=backend)
    loss.backward()
    assert loss == math.inf
    torch.testing.assert_close(student.grad, torch.tensor([[1 / 6, -1 / 3, 1 / 6]]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("value", [math.nan, -math.inf], ids=["one_nan", "all_minus_infinity"])
@pytest.mark.parametrize("side", [0, 1], ids=["student", "teacher"])
def test_a_live_row_without_a_distribution_is_nan(
    backend: str, dtype: torch.dtype, value: float, side: int
) -> None:
    pair = [torch.randn(3, 40).to(dtype), torch.randn(3, 40).to(dtype)]
    pair[side][1] = value if value == -math.inf else pair[side][1]
    pair[side][1, 17] = value
    loss, rows = leaf_ext.dual_kl(*pair, torch.ones(3), return_rows=True, backend=backend)
    assert loss.isnan()
    assert rows.kl.isnan().tolist() == [False, True, False]


def test_nearly_equal_models_keep_three_digits(backend: str) -> None:
    """At a KL of about 1e-6 the sum of p_t log p_t - p_t log p_s in float32 keeps one digit."""
    teacher = torch.randn(4, 50_000) * 3
    student = teacher + torch.randn(4, 50_000) * 1.4e-3
    weight = torch.ones(4)
    exact = leaf_ext.dual_kl(
        student.double(), teacher.double(), weight.double(), return_rows=True, backend="reference"
    )[1].kl
    assert 1e-7 < float(exact.max()) < 1e-5
    found = leaf_ext.dual_kl(student, teacher, weight, return_rows=True, backend=backend)[1].kl
    torch.testing.assert_close(found.double(), exact, rtol=1e-3, atol=0)


def test_the_models_may_have_different_dtypes(backend: str) -> None:
    student, teacher, weight = kl_tensors()
    mixed = leaf_ext.dual_kl(student, teacher.bfloat16(), weight, backend=backend)
    wide = leaf_ext.dual_kl(student, teacher.bfloat16().float(), weight, backend=backend)
    torch.testing.assert_close(mixed, wide, rtol=1e-6, atol=0)


def test_only_the_common_vocabulary_counts(backend: str) -> None:
    student, teacher, weight = torch.randn(4, 9), torch.randn(4, 11), torch.ones(4)
    teacher[:, 9:] = math.nan
    student.requires_grad_()
    loss = leaf_ext.dual_kl(student, teacher, weight, backend=backend)
    same = leaf_ext.dual_kl(student, teacher[:, :9], weight, backend=backend)
    assert_close_in_any_order(loss, same)
    wide = torch.cat((student.detach(), torch.full((4, 5), math.nan)), 1).requires_grad_()
    leaf_ext.dual_kl(wide, teacher[:, :9], weight, backend=backend).backward()
    loss.backward()
    assert wide.grad is not None and student.grad is not None
    assert_close_in_any_order(wide.grad[:, :9], student.grad)
    assert not wide.grad[:, 9:].any()


def test_ties_agree_at_the_lowest_index(backend: str) -> None:
    teacher = torch.zeros(2, 40)
    student = torch.zeros(2, 40)
    student[1, 33] = teacher[1, 33] = teacher[1, 2] = 1.0
    rows = leaf_ext.dual_kl(student, teacher, torch.ones(2), return_rows=True, backend=backend)[1]
    assert rows.agreement.tolist() == [1.0, 0.0]


def test_chunks_do_not_change_the_loss(backend: str) -> None:
    tensors = [torch.randn(37, 8), torch.randn(300, 8), torch.randn(37, 6), torch.randn(300, 6)]
    results = []
    for chunk_size in (1, 5, 37, 1000):
        leaves = [t.clone().requires_grad_() for t in tensors[:2]]
        loss = leaf_ext.linear_dual_kl(
            *leaves, *tensors[2:], torch.ones(37), chunk_size=chunk_size, backend=backend
        )
        results.append([loss, *torch.autograd.grad(loss, leaves)])
    for other in results[1:]:
        for left, right in zip(results[0], other, strict=True):
            torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-6)


class LargestTensor(TorchDispatchMode):
    """Records the size of the largest tensor that an operation returns."""

    elements = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(value, Tensor):
                self.elements = max(self.elements, value.numel())
        return result


@pytest.mark.parametrize(
    "run",
    [linear_losses.make_linear_dual_kl("leaf_ext"), reference.linear_dual_kl],
    ids=["chunks", "reference"],
)
def test_memory_of_the_linear_loss_does_not_grow_with_the_logits(run: Callable[..., Any]) -> None:
    rows, vocabulary, width, chunk_size = 400, 1000, 4, 10
    tensors = [torch.randn(n, width) for n in (rows, vocabulary, rows, vocabulary)]
    options = (1.0, 1.0, 1.0, 0.0, 0.0, 0.0, True, torch.float32, False, True, chunk_size)
    with LargestTensor() as largest:
        run(*tensors, torch.ones(rows), None, None, None, None, *options)
    assert largest.elements <= max(chunk_size * vocabulary, rows * width, vocabulary * width)


def test_a_head_gradient_accumulates_in_float32() -> None:
    """With 1000 chunks each part would vanish beside a sum in bfloat16."""
    rows = 1000
    hidden, head = torch.ones(rows, 1).bfloat16(), torch.tensor([[0.5], [0.0]]).bfloat16()
    teacher = torch.ones(rows, 1).bfloat16(), torch.tensor([[0.0], [0.5]]).bfloat16()
    head.requires_grad_()
    loss = leaf_ext.linear_dual_kl(
        hidden, head, *teacher, torch.full((rows,), 1 / rows), chunk_size=1
    )
    loss.backward()
    expected = 2 * torch.tensor([0.5, 0.0]).softmax(0)[0] - 1
    assert head.grad is not None
    torch.testing.assert_close(head.grad[0, 0].float(), expected, rtol=2**-7, atol=0)


def test_strides_do_not_change_values(backend: str) -> None:
    student, teacher, weight = kl_tensors()
    turned = student.t().contiguous().t().requires_grad_()
    spread = weight[:, None].expand(4, 3).contiguous()[:, 1]
    plain = student.requires_grad_()
    losses = [
        leaf_ext.dual_kl(plain, teacher, weight, backend=backend),
        leaf_ext.dual_kl(turned, teacher.t().contiguous().t(), spread, backend=backend),
    ]
    assert torch.equal(*losses)
    gradients = [torch.autograd.grad(x, z)[0] for x, z in zip(losses, (plain, turned), strict=True)]
    assert torch.equal(*gradients)
    for width, assert_same in ((12, assert_equal_bits), (9, assert_close_in_any_order)):
        # Rows of 12 floats have the same address modulo 16 bytes; rows of 9 floats do not.
        broadcast = torch.randn(1, width).expand(4, width)
        one = leaf_ext.dual_kl(broadcast, teacher, weight, backend=backend)
        assert_same(one, leaf_ext.dual_kl(broadcast.clone(), teacher, weight, backend=backend))


class Addresses(TorchDispatchMode):
    """Records the addresses of the tensors that the project's ops are given."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.namespace.startswith("leaf_ext"):
            self.seen += [a.data_ptr() for a in args if isinstance(a, Tensor)]
        return func(*args, **(kwargs or {}))


def test_rows_that_lie_apart_are_read_in_place(backend: str) -> None:
    student, teacher, weight = kl_tensors()
    expected = leaf_ext.dual_kl(student, teacher, weight, backend=backend)
    # 8 floats before and after each row keep its address modulo 16 bytes.
    for before, assert_same in ((8, assert_equal_bits), (3, assert_close_in_any_order)):
        apart = [strided(student, before), strided(teacher, before)]
        with Addresses() as addresses:
            loss = leaf_ext.dual_kl(*apart, weight, backend=backend)
            norm = leaf_ext.grad_norm(apart[0], backend=backend)
        owners = (*apart, weight, apart[0])
        assert addresses.seen == [tensor.data_ptr() for tensor in owners]
        assert_same(loss, expected)
        assert_equal_bits(norm, leaf_ext.grad_norm(student, backend=backend))


def test_norms_of_nan_and_infinity(backend: str) -> None:
    grad = torch.tensor([[1.0, math.nan], [math.inf, 1.0], [-math.inf, math.nan], [3.0, 4.0]])
    norm = leaf_ext.grad_norm(grad, backend=backend)
    assert norm[0].isnan() and norm[1] == math.inf and norm[2].isnan() and norm[3] == 5.0


def test_detection_is_not_differentiable(backend: str) -> None:
    grad = torch.randn(2, 5, 3, requires_grad=True)
    assert not leaf_ext.grad_norm(grad, backend=backend).requires_grad
    domain = torch.ones(2, 5, dtype=torch.bool)
    assert not leaf_ext.detect_spans(grad, grad, domain, backend=backend).score.requires_grad


def test_kernels_leave_subnormal_numbers_to_others(backend: str) -> None:
    """The kernels flush their own subnormal results; those of torch's threads are kept."""
    logits = torch.randn(3, 40000)
    leaf_ext.dual_kl(logits, logits.flip(1), torch.ones(3), backend=backend)
    tiny = torch.full((2**18,), 1e-39)
    assert bool((tiny * 0.5 > 0).all())


def test_calls_of_other_sizes_between_change_nothing(backend: str) -> None:
    inputs = {width: torch.randn(2, 5, width) for width in (7, 4097, 13000)}
    for width in (7, 4097, 13000, 4097, 7):
        student, teacher = inputs[width]
        results = []
        for each in (backend, "reference"):
            leaf = student.clone().requires_grad_()
            loss = leaf_ext.dual_kl(leaf, teacher, torch.ones(5), backend=each)
            results.append((loss.detach(), *torch.autograd.grad(loss, leaf)))
        for found, expected in zip(*results, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_several_chunks_are_not_added_up_in_bfloat16() -> None:
    tensors = linear_tensors(torch.bfloat16)
    options = (*SCALARS, True, torch.bfloat16, False, False, 2)
    with pytest.raises(RuntimeError, match=r"head_grad_dtype must be torch\.float32"):
        torch.ops.leaf_ext.linear_dual_kl(*tensors, None, None, None, None, *options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_more_dropped_rows_than_a_cache_holds(dtype: torch.dtype) -> None:
    rows, width = 2**25 // 8001 // dtype.itemsize + 2, 8001  # 32 MiB
    memory = torch.full((rows * (width + 3) + 1,), float("nan")).to(dtype)
    student = memory[1:].view(rows, width + 3)[:, :width]
    student[5] = torch.randn(width)
    weight = torch.zeros(rows)
    weight[5] = 1.0
    given = student[5:6].clone().requires_grad_()
    teacher = torch.zeros(rows, width, dtype=dtype)
    leaf_ext.dual_kl(given, teacher[:1], torch.ones(1)).backward()
    result = student.detach().requires_grad_()
    leaf_ext.dual_kl(result.view_as(result), teacher, weight, inplace_grad=True)
    assert torch.equal(student[5:6], given.grad)
    assert int(student.count_nonzero()) == int(given.grad.count_nonzero())
    assert bool(memory[1:].view(rows, width + 3)[:, width:].isnan().all()) and memory[0].isnan()


def test_printed_spans_are_one_short_line() -> None:
    teacher = torch.tensor(
        [[1.0, 0.1, 0.9, 0.1], [1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, float("nan")]]
    )
    student = torch.tensor([[0.1, 1.0, 0.1, 1.0], [1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0]])
    domain = torch.ones(3, 4, dtype=torch.bool)
    spans = leaf_ext.detect_spans(teacher, student, domain)
    expected = "Spans(batch=3, shape=(3, 4), device='cpu', counts=[2, 0, 0], not_finite=1)"
    assert repr(spans) == str(spans) == expected
    norms = torch.rand(1000, 4)
    many = leaf_ext.detect_spans(norms, norms, norms >= 0)
    counts = f"[{', '.join(['0'] * 8)}, ...]"
    assert repr(many) == (
        f"Spans(batch=1000, shape=(1000, 4), device='cpu', counts={counts}, not_finite=0)"
    )
    packed = leaf_ext.detect_spans(
        norms[0], norms[0], norms[0] >= 0, cu_seqlens=torch.tensor([0, 1, 4]), max_seqlen=3
    )
    assert repr(packed) == "Spans(batch=2, shape=(4,), device='cpu', counts=[0, 0], not_finite=0)"


def test_spans_without_values_are_printed_without_counts() -> None:
    with FakeTensorMode():
        norms = torch.rand(2, 4)
        spans = leaf_ext.detect_spans(norms, norms, norms >= 0)
    assert repr(spans) == "Spans(batch=2, shape=(2, 4), device='cpu')"
