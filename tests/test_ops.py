"""Every op, backend and case of the table against the reference in float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import leaf_ext
from leaf_ext.ops import linear_chunks
from leaf_ext.reference.detect_spans import spans_of
from leaf_ext.schema import LOG_FLOOR
from leaf_ext.testing import cases, inputs
from leaf_ext.testing.budget import assert_within_budget, error
from leaf_ext.testing.eager import eager_divergence_rows, eager_grad_norm, eager_topk_rows

# The error of two computed norms together, in half units in the last place.
NORM_UNITS = 4
# The error of a float32 logarithm, in such units of its value.
LOG_UNITS = 4
pytestmark = pytest.mark.usefixtures("poisoned_memory")


def table(rows: Sequence[Any]) -> list[Any]:
    return [
        pytest.param(row, id=str(row), marks=[pytest.mark.slow] if row.slow else []) for row in rows
    ]


@pytest.mark.parametrize("case", table(cases.NORM_CASES))
def test_grad_norm(case: cases.NormCase, backend: str) -> None:
    grad = inputs.norm_inputs(case)
    oracle = leaf_ext.grad_norm(grad.double(), backend="reference")
    # torch's squares overflow or underflow where ours must not, so it is measured at magnitude 1.
    unit = (grad.float() / case.magnitude).contiguous()
    exact = torch.linalg.vector_norm(unit.double(), dim=-1)
    baseline = error(eager_grad_norm(unit), exact) * case.magnitude
    norm = leaf_ext.grad_norm(grad, backend=backend)
    assert norm.dtype == torch.float32
    assert_within_budget("grad_norm", "norm", norm, oracle, baseline)


def reference_results(
    case: cases.KLCase, student: Tensor, teacher: Tensor, weight: Tensor
) -> dict[str, Tensor]:
    student = student.requires_grad_()
    loss, rows = leaf_ext.dual_kl(
        student, teacher, weight, return_rows=True, backend="reference", **case.options
    )
    loss.backward()
    assert student.grad is not None
    return {"loss": loss.detach(), "gradient": student.grad, **rows._asdict()}


def eager_results(
    case: cases.KLCase, student: Tensor, teacher: Tensor, weight: Tensor
) -> dict[str, Tensor]:
    student = student.requires_grad_()
    kl = eager_divergence_rows(student, teacher, **case.options)
    (case.temperature**2 * (weight * kl).sum()).backward()
    assert student.grad is not None
    return {"kl": kl.detach(), "gradient": student.grad}


def float32_errors(
    case: cases.KLCase, given: inputs.KLInputs, oracle: dict[str, Tensor]
) -> dict[str, float]:
    """Return the worst error of torch in float32, in plain torch and in the reference.

    One order of summation can be right by chance, so the vocabulary is also reversed and shuffled.
    """
    live = given.row_weight != 0
    weight = given.row_weight[live]
    common = min(case.student_vocabulary, case.teacher_vocabulary)
    worst = dict.fromkeys(oracle, 0.0)
    identity = torch.arange(common)
    orders = [identity, identity.flip(0)]
    if common < 20_000:
        orders.append(torch.randperm(common))
    for order in orders:
        back = order.argsort()
        student, teacher = (
            t.detach()[live][:, order].float() for t in (given.student, given.teacher)
        )
        for compute in (reference_results, eager_results):
            found = compute(case, student.clone(), teacher, weight)
            found["gradient"] = found["gradient"][:, back]
            for name, value in found.items():
                truth = oracle[name][:, :common] if name == "gradient" else oracle[name]
                worst[name] = max(worst[name], error(value, truth))
    worst["loss"] = max(worst["loss"], case.temperature**2 * float(weight.sum()) * worst["kl"])
    return worst


@pytest.mark.parametrize("inplace_grad", [False, True], ids=["copied", "inplace"])
@pytest.mark.parametrize("case", table(cases.KL_CASES))
def test_dual_kl(case: cases.KLCase, backend: str, inplace_grad: bool) -> None:
    given = inputs.kl_inputs(case)
    weight, live = given.row_weight, given.row_weight != 0
    oracle = reference_results(
        case, given.student[live].double(), given.teacher[live].double(), weight[live].double()
    )
    torch_errors = float32_errors(case, given, oracle)

    student = given.student.requires_grad_()
    loss, rows = leaf_ext.dual_kl(
        student.view_as(student),  # inplace_grad refuses a leaf
        given.teacher,
        weight,
        inplace_grad=inplace_grad,
        return_rows=True,
        backend=backend,
        **case.options,
    )
    loss.backward()

    assert loss.dtype == rows.kl.dtype == torch.float32
    assert student.grad is not None and student.grad.dtype == case.dtype
    for part, counts in zip(student.grad.split(512), live.split(512), strict=True):
        assert not part[~counts].any()  # in parts, because the slow case fills most of the memory
    assert not torch.stack(rows)[:, ~live].any()
    torch.testing.assert_close(
        rows.agreement[live], oracle["agreement"].float(), rtol=0, atol=0, equal_nan=True
    )
    ours = {"gradient": student.grad[live], "loss": loss.detach()}
    ours |= {name: value[live] for name, value in rows._asdict().items()}
    for name, result in ours.items():
        assert_within_budget("dual_kl", name, result, oracle[name], torch_errors[name])


def topk_results(
    case: cases.TopkCase, given: inputs.TopkInputs, rows: Any, dtype: torch.dtype, **options: Any
) -> dict[str, Tensor]:
    """Return what `topk_kl` gives on some of the rows in a dtype."""
    weight_dtype = torch.promote_types(dtype, torch.float32)
    student = given.student.detach()[rows].to(dtype).requires_grad_()
    loss, measures = leaf_ext.topk_kl(
        student.view_as(student),  # inplace_grad refuses a leaf
        given.ids[rows],
        given.logprobs[rows].to(weight_dtype),
        given.row_weight[rows].to(weight_dtype),
        teacher_tail_logprob=None if given.tail is None else given.tail[rows].to(weight_dtype),
        return_rows=True,
        **case.logits.logit_options,
        **options,
    )
    loss.backward()
    assert student.grad is not None
    return {"loss": loss.detach(), "gradient": student.grad, **measures._asdict()}


def topk_eager_results(
    case: cases.TopkCase, given: inputs.TopkInputs, rows: Tensor
) -> dict[str, Tensor]:
    student = given.student.detach()[rows].float().requires_grad_()
    tail = None if given.tail is None else given.tail[rows]
    kl = eager_topk_rows(
        student, given.ids[rows], given.logprobs[rows], tail, **case.logits.logit_options
    )
    (case.logits.temperature**2 * (given.row_weight[rows] * kl).sum()).backward()
    assert student.grad is not None
    return {"kl": kl.detach(), "gradient": student.grad}


def topk_float32_errors(
    case: cases.TopkCase, given: inputs.TopkInputs, live: Tensor, oracle: dict[str, Tensor]
) -> dict[str, float]:
    """Return the worst error of torch in float32; see `float32_errors`."""
    worst = dict.fromkeys(oracle, 0.0)
    vocabulary = case.logits.student_vocabulary
    orders = [torch.arange(vocabulary), torch.arange(vocabulary).flip(0)]
    if vocabulary < 20_000:
        orders.append(torch.randperm(vocabulary))
    for order in orders:
        back = order.argsort()
        ids = back[given.ids.clamp(min=0)]
        moved = replace(given, student=given.student.detach()[:, order], ids=ids)
        for found in (
            topk_results(case, moved, live, torch.float32, backend="reference"),
            topk_eager_results(case, moved, live),
        ):
            found["gradient"] = found["gradient"][:, back]
            for name, value in found.items():
                worst[name] = max(worst[name], error(value, oracle[name]))
    total = float(given.row_weight[live].sum())
    worst["loss"] = max(worst["loss"], case.logits.temperature**2 * total * worst["kl"])
    return worst


@pytest.mark.parametrize("inplace_grad", [False, True], ids=["copied", "inplace"])
@pytest.mark.parametrize("case", table(cases.TOPK_CASES))
def test_topk_kl(case: cases.TopkCase, backend: str, inplace_grad: bool) -> None:
    given = inputs.topk_inputs(case)
    live = given.row_weight != 0
    counted = live.nonzero().squeeze(1)
    oracle = topk_results(case, given, counted, torch.float64, backend="reference")
    torch_errors = topk_float32_errors(case, given, counted, oracle)
    everything = slice(None)
    ours = topk_results(
        case, given, everything, case.logits.dtype, inplace_grad=inplace_grad, backend=backend
    )
    assert ours["loss"].dtype == ours["kl"].dtype == torch.float32
    for part, counts in zip(ours["gradient"].split(512), live.split(512), strict=True):
        assert not part[~counts].any()
    assert bool((ours["kl"] >= 0).all())
    for name, result in ours.items():
        if result.dim():
            assert name == "gradient" or not result[~live].any()
            result = result[live]
        if name == "agreement":
            torch.testing.assert_close(result, oracle[name].float(), rtol=0, atol=0)
        else:
            assert_within_budget("topk_kl", name, result, oracle[name], torch_errors[name])


@pytest.mark.parametrize("case", table(cases.LINEAR_CASES + cases.LINEAR_LABEL_CASES))
def test_linear_dual_kl(case: cases.LinearCase, backend: str) -> None:
    given = inputs.linear_inputs(case)
    live = counted_rows(given)

    def run(dtype: torch.dtype, backend: str, chunk_size: int | None, rows: Tensor) -> list[Tensor]:
        hidden, head = given.student_hidden[rows].to(dtype), given.student_head.to(dtype)
        biases = [
            None if bias is None else bias.to(dtype)
            for bias in (given.student_bias, given.teacher_bias)
        ]
        parameters = [t.requires_grad_() for t in (hidden, head, biases[0]) if t is not None]
        loss, measures = leaf_ext.linear_dual_kl(
            hidden,
            head,
            given.teacher_hidden[rows].to(dtype),
            given.teacher_head.to(dtype),
            given.row_weight[rows].to(torch.promote_types(dtype, torch.float32)),
            student_bias=biases[0],
            teacher_bias=biases[1],
            **hard_labels(given, rows, dtype),
            chunk_size=chunk_size,
            return_rows=True,
            backend=backend,
            **case.logits.options,
        )
        gradients = torch.autograd.grad(loss, parameters)
        return [loss.detach(), measures.kl, measures.nll, *gradients]

    everything = torch.ones_like(live)
    oracle = run(torch.float64, "reference", None, live)
    result = run(case.logits.dtype, backend, case.chunk_size, everything)
    # The library makes the products, so the baseline has the same logits, in the inputs' dtype.
    plain = eager_linear(case, given, live)
    assert not any(rows[~live].any() for rows in result[1:4])
    result[1:4] = (rows[live] for rows in result[1:4])
    for name, ours, truth, theirs in zip(
        ("loss", "kl", "nll", "hidden gradient", "head gradient", "bias gradient"),
        result,
        oracle,
        plain,
        strict=False,
    ):
        assert_within_budget("linear_dual_kl", name, ours, truth, error(theirs, truth))


def counted_rows(given: inputs.LinearInputs) -> Tensor:
    weight = given.row_weight
    return weight != 0 if given.label_weight is None else (weight != 0) | (given.label_weight != 0)


def hard_labels(given: inputs.LinearInputs, rows: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    if given.labels is None or given.label_weight is None:
        return {}
    weight = given.label_weight[rows].to(torch.promote_types(dtype, torch.float32))
    return {"labels": given.labels[rows], "label_weight": weight}


def eager_linear(case: cases.LinearCase, given: inputs.LinearInputs, live: Tensor) -> list[Tensor]:
    """Return loss, KL and gradients in plain torch on the live rows, with products as ours."""
    dtype = linear_chunks._factor_dtype(given.student_hidden.device, case.logits.dtype)
    hidden = given.student_hidden[live].to(dtype).requires_grad_()
    head = given.student_head.to(dtype).requires_grad_()
    biases = [
        None if bias is None else bias.to(dtype)
        for bias in (given.student_bias, given.teacher_bias)
    ]
    parameters = [hidden, head] + ([biases[0].requires_grad_()] if biases[0] is not None else [])
    student = torch.nn.functional.linear(hidden, head, biases[0])
    teacher = torch.nn.functional.linear(
        given.teacher_hidden[live].to(dtype), given.teacher_head.to(dtype), biases[1]
    )
    weight = given.row_weight[live]
    kl = eager_divergence_rows(student, teacher.nan_to_num(), **case.logits.options)
    kl = torch.where(weight != 0, kl, torch.zeros_like(kl))
    loss = case.logits.temperature**2 * (weight * kl).sum()
    nll = torch.zeros_like(kl)
    if given.labels is not None and given.label_weight is not None:
        nll = eager_nll(student, given.labels[live], case.logits)
        loss = loss + (given.label_weight[live] * nll).sum()
    return [loss.detach(), kl.detach(), nll.detach(), *torch.autograd.grad(loss, parameters)]


def eager_nll(student: Tensor, labels: Tensor, case: cases.KLCase) -> Tensor:
    def first(value: Any) -> Any:
        return value[0] if isinstance(value, tuple) else value

    y = student[:, : min(case.student_vocabulary, case.teacher_vocabulary)].float()
    y, cap = y * first(case.logit_scale), first(case.logit_softcap)
    if cap is not None:
        y = cap * torch.tanh(y / cap)
    return torch.nn.functional.cross_entropy(y, labels, ignore_index=-100, reduction="none")


@pytest.mark.parametrize("case", table(cases.LINEAR_TOPK_CASES))
def test_linear_topk_kl(case: cases.LinearCase, backend: str) -> None:
    """The same as `topk_kl` of the products, chunk by chunk."""
    given = inputs.linear_inputs(case)
    live, dtype = given.row_weight != 0, case.logits.dtype
    teacher_logits = given.teacher_hidden.double() @ given.teacher_head.double().T
    ids, logprobs, _ = inputs.stored_teacher(teacher_logits, case.logits.temperature, case.k)
    ids[~live] = -7
    names = ("loss", "kl", "hidden gradient", "head gradient", "bias gradient")

    def run(dtype: torch.dtype, product_dtype: torch.dtype | None, rows: Tensor) -> list[Tensor]:
        """Return loss, KL and gradients; the op under test makes products without a dtype."""
        of_weights = torch.promote_types(dtype, torch.float32)
        hidden, head = (
            t.to(dtype).requires_grad_() for t in (given.student_hidden[rows], given.student_head)
        )
        bias = given.student_bias
        bias = None if bias is None else bias.to(dtype).requires_grad_()
        teacher = ids[rows], logprobs[rows].to(of_weights), given.row_weight[rows].to(of_weights)
        options: dict[str, Any] = {"return_rows": True, **case.logits.logit_options}
        if product_dtype is None:
            options |= {"student_bias": bias, "chunk_size": case.chunk_size, "backend": backend}
            loss, measures = leaf_ext.linear_topk_kl(hidden, head, *teacher, **options)
        else:
            factors = [None if t is None else t.to(product_dtype) for t in (hidden, head, bias)]
            z = torch.nn.functional.linear(*factors)
            loss, measures = leaf_ext.topk_kl(z, *teacher, backend="reference", **options)
        parameters = [t for t in (hidden, head, bias) if t is not None]
        return [loss.detach(), measures.kl, *torch.autograd.grad(loss, parameters)]

    oracle = run(torch.float64, torch.float64, live)
    result = run(dtype, None, torch.ones_like(live))
    factor_dtype = linear_chunks._factor_dtype(given.student_hidden.device, dtype)
    plain = run(dtype, factor_dtype, live)
    assert not result[1][~live].any() and not result[2][~live].any()
    result[1], result[2] = result[1][live], result[2][live]
    for name, ours, truth, theirs in zip(names, result, oracle, plain, strict=False):
        assert_within_budget("linear_topk_kl", name, ours, truth, error(theirs, truth))


def detect(case: cases.SpansCase, given: inputs.SpansInputs, backend: str) -> leaf_ext.Spans:
    double = backend == "float64"
    saliencies = (t.double() if double else t for t in (given.teacher, given.student))
    return leaf_ext.detect_spans(
        *saliencies,
        given.domain,
        prunable=given.prunable,
        cu_seqlens=given.cu_seqlens,
        max_seqlen=given.max_seqlen,
        backend="reference" if double else backend,
        **case.options,
    )


def sequences(values: Tensor, given: inputs.SpansInputs) -> list[Tensor]:
    if given.cu_seqlens is None:
        return list(values)
    return list(values.split(given.cu_seqlens.diff().tolist()))


@pytest.mark.parametrize("case", table(cases.SPANS_CASES))
def test_detect_spans(case: cases.SpansCase, backend: str) -> None:
    given = inputs.spans_inputs(case)
    oracle, spans = detect(case, given, "float64"), detect(case, given, backend)
    assert torch.equal(spans.status, oracle.status)
    assert spans.span.shape == oracle.span.shape and spans.score.dtype == torch.float32
    assert torch.equal(spans.score.isnan(), oracle.score.isnan())
    if case.hidden is None and case.scale == "minmax":  # equal norms give equal bits
        same = detect(case, given, "reference")
        assert torch.equal(spans.span, same.span) and torch.equal(spans.count, same.count)
        assert torch.equal(spans.confounder, same.confounder)
        torch.testing.assert_close(spans.score, same.score, rtol=0, atol=0, equal_nan=True)
    norms = (
        leaf_ext.grad_norm(t.double()) if case.hidden else t.double()
        for t in (given.teacher, given.student)
    )
    for domain, score, truth, ours, theirs, *pair in zip(
        *(
            sequences(t, given)
            for t in (
                given.domain,
                spans.score,
                oracle.score,
                spans.confounder,
                oracle.confounder,
                *norms,
            )
        ),
        strict=True,
    ):
        band = rounding_band(case, *(norm[domain] for norm in pair))
        assert error(score, truth) <= band
        assert not (ours & ~domain).any()
        differ = ours != theirs
        if differ.any():
            cut = case.threshold
            if case.rule == "quantile":
                ranked = truth[domain].sort().values
                rank = min(len(ranked) - 1, int(case.threshold * len(ranked)))
                cut = min(case.cap, float(ranked[rank]))
            assert ((truth[differ] - cut).abs() <= band).all()
    if torch.equal(spans.confounder, oracle.confounder):
        assert torch.equal(spans.span, oracle.span)
    for row, (confounder, domain) in enumerate(
        zip(sequences(spans.confounder, given), sequences(given.domain, given), strict=True)
    ):
        span, count = spans_of(confounder[None], domain[None], case.join_gap, case.min_length)
        found = spans.span[row, : int(spans.count[row])]
        assert torch.equal(found, span[0, : int(count)])
        assert (spans.span[row, int(spans.count[row]) :] == -1).all()


def rounding_band(case: cases.SpansCase, teacher: Tensor, student: Tensor) -> float:
    """Return the allowed error of a score: the rounding of the gap divided by the gap's range.

    Norms computed from gradients are off by a few units, which normalization may magnify.
    """
    if teacher.numel() == 0 or not bool((teacher + student).isfinite().all()):
        return 0.0
    unit = torch.finfo(torch.float32).eps / 2
    gap_of = min_max_gap if case.scale == "minmax" else log_gap
    gap, off = gap_of(case, teacher, student, unit)
    width = float(gap.amax() - gap.amin())
    return 4 * off / width + 3 * unit if width > 0 else 0.0


def min_max_gap(
    case: cases.SpansCase, teacher: Tensor, student: Tensor, unit: float
) -> tuple[Tensor, float]:
    """Return the gap and its rounding; s_hat is two differences and a quotient of norms."""
    gap, off = torch.zeros_like(teacher), unit * max(1.0, case.student_weight)
    for norm, weight in ((teacher, 1.0), (student, -case.student_weight)):
        spread = norm.amax() - norm.amin()
        if spread > 0:
            gap += weight * (norm - norm.amin()) / spread
            magnified = NORM_UNITS * float(norm.amax() / spread) if case.hidden else 0
            # A weight of 1 is exact; another one is rounded, and so is its product.
            off += unit * abs(weight) * (3 + 2 * (abs(weight) != 1) + magnified)
    return gap, off


def log_gap(
    case: cases.SpansCase, teacher: Tensor, student: Tensor, unit: float
) -> tuple[Tensor, float]:
    """Return the gap and its rounding. A logarithm is off by up to LOG_UNITS of its value."""
    shares = [
        norm.div(norm.amax()).clamp(min=LOG_FLOOR) if norm.amax() > 0 else torch.ones_like(norm)
        for norm in (teacher, student)
    ]
    ratio, rest = shares[0], case.student_weight
    if rest >= 0.5:
        ratio, rest = ratio / shares[1], rest - 1
    first, second = ratio.log(), rest * shares[1].log()
    share = unit * (2 + (NORM_UNITS if case.hidden else 0))  # quotient and floor
    off = share * (2 + abs(rest)) + unit + unit * LOG_UNITS * float(first.abs().amax())
    off += unit * (LOG_UNITS + 2) * float(second.abs().amax())
    gap = first - second
    return gap, off + unit * float(gap.abs().amax())
