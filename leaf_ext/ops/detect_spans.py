"""Public `detect_spans`: checks, result, fake kernels."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from leaf_ext.dispatch import Backend, implementation
from leaf_ext.ops import checks
from leaf_ext.schema import LIBRARIES, accum_dtype

_OP = "detect_spans"
Scale = Literal["minmax", "log"]
Rule = Literal["absolute", "quantile"]
_SHOWN = 8  # sequences whose counts `print` shows


@dataclass(frozen=True, repr=False)
class Spans:
    """Spans of confounding tokens, in tensors of fixed shapes on the inputs' device.

    Attributes:
        span: [B, ceil(T/2), 2] int64, [start, stop) token positions within the sequence, sorted;
            unused rows are -1.
        count: [B] int64, the number of spans.
        score: like domain, float32 in [0, 1] (Eq. 5); NaN outside the domain and in sequences whose
            status is not 0.
        confounder: like domain, bool.
        status: [B] int64: 0; 1 if a value of the teacher in the domain is NaN or inf, 2 if one of
            the student is, 3 if both have one. Such a sequence has no spans.
    """

    span: Tensor
    count: Tensor
    score: Tensor
    confounder: Tensor
    status: Tensor

    def tolist(self) -> list[list[tuple[int, int]]]:
        """Return the spans of each sequence as (start, stop), in tokens. Waits for the device."""
        counts = self.count.tolist()
        longest = max(counts, default=0)
        rows = self.span[:, :longest].tolist()
        return [
            [(start, stop) for start, stop in row[:count]]
            for row, count in zip(rows, counts, strict=True)
        ]

    def __repr__(self) -> str:
        """Return one line with the counts of the first sequences. Waits for the device."""
        batch, shape = self.count.shape[0], tuple(self.score.shape)
        text = f"Spans(batch={batch}, shape={shape}, device={str(self.count.device)!r}"
        if type(self.count) is not Tensor or self.count.is_meta:  # a traced tensor has no values
            return f"{text})"
        counts = ", ".join(map(str, self.count[:_SHOWN].tolist()))
        more = ", ..." if batch > _SHOWN else ""
        not_finite = int(self.status.count_nonzero())
        return f"{text}, counts=[{counts}{more}], not_finite={not_finite})"


def detect_spans(
    teacher: Tensor,
    student: Tensor,
    domain: Tensor,
    *,
    prunable: Tensor | None = None,
    scale: Scale = "minmax",
    student_weight: float = 1.0,
    threshold: float = 0.10,
    rule: Rule = "absolute",
    cap: float = 0.5,
    teacher_max: float | None = None,
    join_gap: int = 0,
    min_length: int = 1,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    backend: Backend = "auto",
) -> Spans:
    """Detect spans of tokens to which the student reacts far more than the teacher.

        s_hat = (s - min s) / (max s - min s)   over the domain     (LeaF, arXiv:2506.07851, Eq. 3)
        gap   = s_hat_teacher - student_weight * s_hat_student                              (Eq. 4)
        score = (gap - min gap) / (max gap - min gap)                                       (Eq. 5)
        confounder = domain & prunable & (score <= cut) & (s_hat_teacher <= teacher_max)

    With scale "log" the gap is that of s_hat = log(max(s, 1e-4 max s)), or of 0 if max s is 0. Then
    one token with a large norm does not set the scale of all others. A factor common to a model's
    norms cancels in Eq. 5: with a weight of 1 the score is that of log(s_teacher / s_student).
    Backends differ by the rounding of logarithms, and not at all with scale "minmax".

    Args:
        teacher, student: norms [B, T] float32, or gradients [B, T, H_teacher], [B, T, H_student]
            in float32, float16 or bfloat16; packed: [N] or [N, H] with `cu_seqlens`. float64 with
            backend="reference".
        domain: [B, T] or [N] bool, the tokens over which minima and maxima are taken.
        prunable: like domain, the tokens that may be cut; by default all of the domain.
        scale: "minmax" (the paper) or "log", where a negative value counts as a norm of 0.
        student_weight: the student's factor in the gap, in [0, 1e30]; 1 in the paper.
        threshold: in [0, 1]. With rule "absolute" it is the cut; with "quantile" (the authors'
            release) cut = min(cap, sorted(score)[min(n - 1, floor(threshold * n))]) of n tokens.
        rule: "absolute" or "quantile".
        cap: the largest cut of rule "quantile", in [0, 1].
        teacher_max: the largest s_hat_teacher of a confounder, in [0, 1]; with both scales that of
            Eq. 3.
        join_gap: the largest number of domain tokens between runs that are joined.
        min_length: the shortest span that is kept, in tokens.
        cu_seqlens: [B + 1] int32 or int64, the borders of packed sequences. The values are checked
            on a CPU only.
        max_seqlen: an upper bound on the length of a packed sequence, which stands for T; required
            with `cu_seqlens`.
        backend: "auto", "cpu", "cuda", "triton" or "reference".
    Returns:
        `Spans`, not differentiable. The host does not wait for the device until `tolist()`.
    Raises:
        ValueError: wrong dtype, shape, device or range.
        RuntimeError: the backend is not available (says why).
    """
    _check_tensors(teacher, student, domain, prunable, cu_seqlens, backend)
    checks.require(scale in ("minmax", "log"), _OP, "scale", '"minmax" or "log"', repr(scale))
    # A larger weight could make the float32 gap infinite.
    student_weight = checks.require_number(_OP, "student_weight", student_weight, 0, 1e30)
    checks.require(
        rule in ("absolute", "quantile"), _OP, "rule", '"absolute" or "quantile"', repr(rule)
    )
    threshold = checks.require_number(_OP, "threshold", threshold, 0, 1)
    cap = checks.require_number(_OP, "cap", cap, 0, 1)
    highest = math.inf
    if teacher_max is not None:
        highest = checks.require_number(_OP, "teacher_max", teacher_max, 0, 1)
    join_gap = checks.require_integer(_OP, "join_gap", join_gap, 0)
    min_length = checks.require_integer(_OP, "min_length", min_length, 1)
    length = _sequence_length(domain, cu_seqlens, max_seqlen)
    run = implementation(_OP, domain.device, backend, teacher.dtype)
    return Spans(
        *run(
            checks.unit_stride(teacher.detach()),
            checks.unit_stride(student.detach()),
            domain.contiguous(),
            None if prunable is None else prunable.contiguous(),
            scale == "log",
            student_weight,
            threshold,
            rule == "quantile",
            cap,
            highest,
            join_gap,
            min_length,
            None if cu_seqlens is None else cu_seqlens.to(torch.int64).contiguous(),
            length,
        )
    )


def _check_tensors(
    teacher: Tensor,
    student: Tensor,
    domain: Tensor,
    prunable: Tensor | None,
    cu_seqlens: Tensor | None,
    backend: str,
) -> None:
    checks.require_tensor(_OP, "domain", domain)
    checks.require(domain.dtype == torch.bool, _OP, "domain", "torch.bool", domain.dtype)
    dims, layout = (2, "[B, T]") if cu_seqlens is None else (1, "[N] with cu_seqlens")
    shape = tuple(domain.shape)
    checks.require(domain.dim() == dims, _OP, "domain", layout, f"shape {shape}")
    for argument, saliency in (("teacher", teacher), ("student", student)):
        checks.require_float(_OP, argument, saliency, backend)
        checks.require_device(_OP, argument, saliency, domain.device)
        got = f"shape {tuple(saliency.shape)}"
        needed = f"norms {shape} or gradients {shape} x H like domain"
        fits = tuple(saliency.shape[:dims]) == shape and saliency.dim() in (dims, dims + 1)
        checks.require(fits, _OP, argument, needed, got)
        wide = accum_dtype(saliency.dtype)
        norms_ok = saliency.dim() > dims or saliency.dtype == wide
        checks.require(norms_ok, _OP, argument, "float32 when it holds norms", saliency.dtype)
    needed = f"of {teacher.dim()} dimensions like teacher"
    got = f"shape {tuple(student.shape)}"
    checks.require(student.dim() == teacher.dim(), _OP, "student", needed, got)
    checks.require_same_width(_OP, "student", student, teacher)
    if prunable is not None:
        checks.require_tensor(_OP, "prunable", prunable)
        checks.require(prunable.dtype == torch.bool, _OP, "prunable", "torch.bool", prunable.dtype)
        checks.require_shape(_OP, "prunable", prunable, shape, f"{shape} like domain")
        checks.require_device(_OP, "prunable", prunable, domain.device)


def _sequence_length(domain: Tensor, cu_seqlens: Tensor | None, max_seqlen: int | None) -> int:
    """Return T: the width of a padded batch, or the bound given for a packed one."""
    if cu_seqlens is None:
        needed = "None without cu_seqlens"
        checks.require(max_seqlen is None, _OP, "max_seqlen", needed, max_seqlen)
        return domain.shape[1]
    length = checks.require_integer(_OP, "max_seqlen", max_seqlen, 0)
    checks.require_tensor(_OP, "cu_seqlens", cu_seqlens)
    whole = cu_seqlens.dtype in (torch.int32, torch.int64)
    checks.require(whole, _OP, "cu_seqlens", "int32 or int64", cu_seqlens.dtype)
    got = f"shape {tuple(cu_seqlens.shape)}"
    fits = cu_seqlens.dim() == 1 and cu_seqlens.shape[0] >= 1
    checks.require(fits, _OP, "cu_seqlens", "1-D [B + 1]", got)
    checks.require_device(_OP, "cu_seqlens", cu_seqlens, domain.device)
    if cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():
        borders = cu_seqlens.tolist()
        steps = [stop - start for start, stop in pairwise(borders)]
        ascending = (
            borders[0] == 0 and borders[-1] == domain.shape[0] and min(steps, default=0) >= 0
        )
        needed = f"ascending from 0 to N = {domain.shape[0]}"
        checks.require(ascending, _OP, "cu_seqlens", needed, borders)
        longest = max(steps, default=0)
        needed = f"at least the longest sequence, {longest}"
        checks.require(length >= longest, _OP, "max_seqlen", needed, length)
    return length


def _fake(
    teacher: Tensor,
    student: Tensor,
    domain: Tensor,
    prunable: Tensor | None,
    log_scale: bool,
    student_weight: float,
    threshold: float,
    quantile: bool,
    cap: float,
    teacher_max: float,
    join_gap: int,
    min_length: int,
    cu_seqlens: Tensor | None,
    max_seqlen: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    sequences = domain.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    count = domain.new_empty((sequences,), dtype=torch.int64)
    span = count.new_empty((sequences, (max_seqlen + 1) // 2, 2))
    score = torch.empty_like(
        domain, dtype=accum_dtype(teacher.dtype), memory_format=torch.contiguous_format
    )
    confounder = torch.empty_like(domain, memory_format=torch.contiguous_format)
    return span, count, score, confounder, torch.empty_like(count)


for _namespace, _library in LIBRARIES.items():
    torch.library.register_fake(f"{_namespace}::{_OP}", _fake, lib=_library)
