"""Makes the tensors of a case, seeded by its name."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import torch
from torch import Tensor

from leaf_ext.testing.cases import KLCase, LinearCase, NormCase, SpansCase, TopkCase


@dataclass(frozen=True)
class KLInputs:
    student: Tensor
    teacher: Tensor
    row_weight: Tensor


@dataclass(frozen=True)
class TopkInputs:
    student: Tensor
    ids: Tensor
    logprobs: Tensor
    tail: Tensor | None
    row_weight: Tensor


@dataclass(frozen=True)
class LinearInputs:
    student_hidden: Tensor
    student_head: Tensor
    teacher_hidden: Tensor
    teacher_head: Tensor
    row_weight: Tensor
    student_bias: Tensor | None
    teacher_bias: Tensor | None
    labels: Tensor | None
    label_weight: Tensor | None


@dataclass(frozen=True)
class SpansInputs:
    teacher: Tensor
    student: Tensor
    domain: Tensor
    prunable: Tensor | None
    cu_seqlens: Tensor | None
    max_seqlen: int | None


def generator(case: object) -> torch.Generator:
    return torch.Generator("cpu").manual_seed(zlib.crc32(str(case).encode()))


def normal(seed: torch.Generator, *shape: int) -> Tensor:
    """Draw numbers on the CPU, so that they are equal on every device, and move them there."""
    return torch.randn(shape, generator=seed, device="cpu").to(torch.get_default_device())


def uniform(seed: torch.Generator, *shape: int) -> Tensor:
    return torch.rand(shape, generator=seed, device="cpu").to(torch.get_default_device())


def strided(tensor: Tensor, before: int = 3, after: int = 8) -> Tensor:
    """Copy to rows that are separate in memory, with NaN before and after each."""
    width = tensor.shape[-1]
    room = tensor.new_full((*tensor.shape[:-1], before + width + after), float("nan"))
    view = room[..., before : before + width]
    view.copy_(tensor)
    return view


def norm_inputs(case: NormCase) -> Tensor:
    grad = normal(generator(case), *case.shape) * case.magnitude
    grad = grad.to(case.dtype)
    return strided(grad) if case.strided else grad


def row_weight(rows: int, live: float, seed: torch.Generator) -> Tensor:
    """Draw weights of about 1/rows; a share `live` of them is not 0."""
    weight = uniform(seed, rows).add(0.5).div(max(1, rows))
    return weight * (uniform(seed, rows) < live)


def kl_inputs(case: KLCase) -> KLInputs:
    """Rows of weight 0 contain NaN, which reveals an op that reads them."""
    seed = generator(case)
    if case.slow:
        return _large_kl_inputs(case, seed)
    teacher = normal(seed, case.rows, case.teacher_vocabulary) * case.std
    student = normal(seed, case.rows, case.student_vocabulary) * case.std
    if case.noise is not None:
        student = teacher + student / case.std * case.noise
    if case.minus_infinity:
        # The teacher has no probability where the student has none, so that the KL is finite. For
        # the reverse KL it is the other way round.
        common = min(case.teacher_vocabulary, case.student_vocabulary)
        absent = uniform(seed, case.rows, common) < case.minus_infinity
        both = uniform(seed, case.rows, common) < 0.5
        reverse = case.divergence == "reverse_kl"
        of_teacher, of_student = (absent & both, absent) if reverse else (absent, absent & both)
        teacher[:, :common].masked_fill_(of_teacher, float("-inf"))
        student[:, :common].masked_fill_(of_student, float("-inf"))
    weight = row_weight(case.rows, case.live, seed)
    student, teacher = student.to(case.dtype), teacher.to(case.dtype)
    student[weight == 0] = float("nan")
    teacher[weight == 0] = float("nan")
    if case.strided:
        student, teacher = strided(student), strided(teacher)
    return KLInputs(student, teacher, weight)


def _large_kl_inputs(case: KLCase, seed: torch.Generator) -> KLInputs:
    """More than 2^31 student logits with only the last rows live; one teacher row for all."""
    student = torch.empty(case.rows, case.student_vocabulary, dtype=case.dtype)
    student[-3:] = (normal(seed, 3, student.shape[1]) * case.std).to(case.dtype)
    teacher = normal(seed, 1, case.teacher_vocabulary) * case.std
    weight = torch.zeros(case.rows)
    weight[-3:] = 1 / 3
    return KLInputs(student, teacher.to(case.dtype).expand(case.rows, -1), weight)


def topk_inputs(case: TopkCase) -> TopkInputs:
    """Rows of weight 0 contain NaN and ids outside of the vocabulary."""
    given = kl_inputs(case.logits)
    ids, logprobs, tail = stored_teacher(given.teacher, case.logits.temperature, case.k)
    if case.tail == "none":
        logprobs = logprobs - logprobs.double().logsumexp(-1, keepdim=True).float()
        tail = torch.full_like(tail, -torch.inf)
    dropped = given.row_weight == 0
    ids[dropped], logprobs[dropped], tail[dropped] = -7, torch.nan, torch.nan
    if case.logits.strided:
        ids, logprobs = ids.T.contiguous().T, logprobs.T.contiguous().T
    kept = None if case.tail == "computed" else tail
    return TopkInputs(given.student, ids, logprobs, kept, given.row_weight)


def stored_teacher(logits: Tensor, temperature: float, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return k ids of each row, in no order, their log-probabilities, and that of all others."""
    # A row that stands for all, of the slow case, is computed once.
    rows = logits[:1] if logits.stride(0) == 0 else logits
    log_p = (rows.double() / temperature).log_softmax(-1)
    ids = log_p.topk(k).indices.flip(1)
    logprobs = log_p.gather(1, ids).float()
    tail = log_p.scatter(1, ids, -torch.inf).logsumexp(-1).float()
    size = logits.shape[0]
    return ids.expand(size, k).clone(), logprobs.expand(size, k).clone(), tail.expand(size).clone()


def linear_inputs(case: LinearCase) -> LinearInputs:
    """Hidden states and heads whose logits have a standard deviation of about the case's."""
    seed, kl = generator(case), case.logits

    def model(width: int, vocabulary: int) -> tuple[Tensor, Tensor, Tensor | None]:
        hidden = normal(seed, kl.rows, width)
        head = normal(seed, vocabulary, width) * (kl.std / width**0.5)
        bias = normal(seed, vocabulary) if case.bias else None
        return hidden.to(kl.dtype), head.to(kl.dtype), None if bias is None else bias.to(kl.dtype)

    student_hidden, student_head, student_bias = model(case.student_hidden, kl.student_vocabulary)
    teacher_hidden, teacher_head, teacher_bias = model(case.teacher_hidden, kl.teacher_vocabulary)
    weight = row_weight(kl.rows, kl.live, seed)
    labels, label_weight = None, None
    dropped = weight == 0
    if case.labels:
        vocabulary = min(kl.student_vocabulary, kl.teacher_vocabulary)
        labels = (uniform(seed, kl.rows) * vocabulary).long().clamp(max=vocabulary - 1)
        labels[uniform(seed, kl.rows) < 0.2] = -100
        label_weight = uniform(seed, kl.rows).add(0.5).div(max(1, kl.rows))
        label_weight[::3] = 0
        dropped = dropped & (label_weight == 0)
        labels[dropped] = vocabulary + 5
    student_hidden[dropped] = float("nan")
    teacher_hidden[weight == 0] = float("nan")
    return LinearInputs(
        student_hidden,
        student_head,
        teacher_hidden,
        teacher_head,
        weight,
        student_bias,
        teacher_bias,
        labels,
        label_weight,
    )


def spans_inputs(case: SpansCase) -> SpansInputs:
    seed = generator(case)
    shape: tuple[int, ...] = (case.batch, case.length)
    cu_seqlens, max_seqlen = None, None
    if case.lengths:
        cu_seqlens = torch.tensor([0, *case.lengths]).cumsum(0)
        max_seqlen = max(case.lengths)
        shape = (sum(case.lengths),)

    def saliency(width: int | None) -> Tensor:
        if width is None:
            return uniform(seed, *shape).square()
        return (normal(seed, *shape, width) * 1e-3).to(case.dtype)

    widths = case.hidden or (None, None)
    teacher, student = saliency(widths[0]), saliency(widths[1])
    domain = uniform(seed, *shape) < case.in_domain
    prunable = uniform(seed, *shape) < 0.6 if case.prunable else None
    if case.kind == "constant":
        teacher, student = torch.full_like(teacher, 0.3), torch.full_like(student, 0.7)
    elif case.kind == "identical":
        student = teacher.clone()
    elif case.kind == "proportional":
        student = teacher * 3
    elif case.kind == "signed":
        factors = torch.tensor([1.0, -1.0, 0.0, 1e-5])
        per_token = (*shape, *(1 for _ in teacher.shape[len(shape) :]))
        teacher, student = (
            x * factors[(uniform(seed, *shape) * 4).long()].view(per_token).to(x.dtype)
            for x in (teacher, student)
        )
    elif case.kind == "ties":
        teacher, student = teacher.mul(4).round(), student.mul(4).round()
    elif case.kind == "nan":
        # One sequence has a NaN in its domain, another one an inf outside of it.
        teacher.view(-1)[3], student.view(-1)[-2] = float("nan"), float("inf")
        domain.view(-1)[3], domain.view(-1)[-2] = True, False
    return SpansInputs(teacher, student, domain, prunable, cu_seqlens, max_seqlen)
