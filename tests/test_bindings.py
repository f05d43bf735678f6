"""A direct call of a compiled op raises if it would read or write memory outside its tensors."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from op_samples import kl_tensors, raw_topk_tensors, span_tensors
from torch import Tensor

SCALARS = (1.0, 1.0, 1.0, 0.0, 0.0, 0.0)
ONES = torch.ones


def kl(*, inplace: bool = False, **changed: Tensor) -> Any:
    names = ("student", "teacher", "row_weight")
    tensors = dict(zip(names, kl_tensors(), strict=True)) | changed
    op = torch.ops.leaf_ext.dual_kl_ if inplace else torch.ops.leaf_ext.dual_kl
    return op(*tensors.values(), *SCALARS, True, True)


def topk(*, inplace: bool = False, **changed: Tensor) -> Any:
    names = ("student", "teacher_ids", "teacher_logprobs", "teacher_tail", "row_weight")
    tensors = dict(zip(names, raw_topk_tensors(), strict=True)) | changed
    op = torch.ops.leaf_ext.topk_kl_ if inplace else torch.ops.leaf_ext.topk_kl
    return op(*tensors.values(), 1.0, 1.0, 0.0, True, True)


def spans(*, packed: bool = False, **changed: Any) -> Any:
    """Return 3 sequences: a batch of 20 tokens each, or 60 packed tokens."""
    names = ("teacher", "student", "domain")
    tensors = dict(zip(names, span_tensors(), strict=True))
    arguments: dict[str, Any] = {
        **{name: t.reshape(60) if packed else t for name, t in tensors.items()},
        "prunable": None,
        "cu_seqlens": torch.tensor([0, 20, 40, 60]) if packed else None,
        "max_seqlen": 20,
        **changed,
    }
    *first, cu_seqlens, max_seqlen = arguments.values()
    options = (False, 1.0, 0.4, False, 0.5, math.inf, 0, 1)
    return torch.ops.leaf_ext.detect_spans(*first, *options, cu_seqlens, max_seqlen)


def test_the_unchanged_calls_are_right() -> None:
    """The calls below therefore fail because of the one argument that each changes."""
    for result in (kl(), kl(inplace=True), topk(), topk(inplace=True), spans(), spans(packed=True)):
        assert result[0].numel()


BAD: dict[str, tuple[Callable[[], object], str]] = {
    "norm_scalar": (lambda: torch.ops.leaf_ext.grad_norm(torch.tensor(1.0)), "grad must have"),
    "norm_float64": (lambda: torch.ops.leaf_ext.grad_norm(ONES(2, 3).double()), "grad must be"),
    "norm_integer": (lambda: torch.ops.leaf_ext.grad_norm(ONES(2, 3).long()), "grad must be"),
    "kl_student_scalar": (lambda: kl(student=torch.tensor(1.0)), r"student must be \[N, V\]"),
    "kl_student_float64": (lambda: kl(student=ONES(4, 9).double()), "student must be"),
    "kl_no_vocabulary": (lambda: kl(student=ONES(4, 0)), r"student must be \[N, V\]"),
    "kl_turned": (lambda: kl(student=ONES(9, 4).t()), "student must have a contiguous last"),
    "kl_teacher_rows": (lambda: kl(teacher=ONES(3, 9)), "teacher must have the student's 4 rows"),
    "kl_teacher_float64": (lambda: kl(teacher=ONES(4, 9).double()), "teacher must be"),
    "kl_teacher_3d": (lambda: kl(teacher=ONES(4, 9, 1)), r"teacher must be \[N, V\]"),
    "kl_weight_short": (lambda: kl(row_weight=ONES(3)), r"row_weight must be \[N\] with N = 4"),
    "kl_weight_2d": (lambda: kl(row_weight=ONES(4, 1)), r"row_weight must be \[N\] with N = 4"),
    "kl_weight_scalar": (lambda: kl(row_weight=torch.tensor(1.0)), "row_weight must be"),
    "kl_weight_float64": (lambda: kl(row_weight=ONES(4).double()), "row_weight must be float32"),
    "kl_weight_strided": (lambda: kl(row_weight=ONES(8)[::2]), "row_weight must be contiguous"),
    "kl_shared_rows": (
        lambda: kl(student=ONES(9).expand(4, 9), inplace=True),
        "rows of student must not overlap",
    ),
    "topk_student_3d": (lambda: topk(student=ONES(4, 9, 1)), r"student must be \[N, V\]"),
    "topk_ids_dtype": (
        lambda: topk(teacher_ids=ONES(4, 3, dtype=torch.int32)),
        "teacher_ids must be int64",
    ),
    "topk_ids_rows": (
        lambda: topk(teacher_ids=ONES(3, 3).long()),
        r"teacher_ids must be \[N, k\] with N = 4 and 1 <= k <= 1024",
    ),
    "topk_ids_1d": (lambda: topk(teacher_ids=ONES(4).long()), r"teacher_ids must be \[N, k\]"),
    "topk_no_ids": (
        lambda: topk(teacher_ids=ONES(4, 0).long(), teacher_logprobs=ONES(4, 0)),
        r"teacher_ids must be \[N, k\]",
    ),
    "topk_too_many_ids": (
        lambda: topk(teacher_ids=ONES(4, 1025).long(), teacher_logprobs=ONES(4, 1025)),
        r"teacher_ids must be \[N, k\]",
    ),
    "topk_logprobs_shape": (lambda: topk(teacher_logprobs=ONES(4, 2)), "teacher_logprobs must be"),
    "topk_logprobs_strided": (
        lambda: topk(teacher_logprobs=ONES(3, 4).t()),
        "teacher_logprobs must be contiguous",
    ),
    "topk_tail_short": (
        lambda: topk(teacher_tail=ONES(3)),
        r"teacher_tail must be \[N\] with N = 4",
    ),
    "topk_weight_strided": (
        lambda: topk(row_weight=ONES(8)[::2]),
        "row_weight must be contiguous",
    ),
    "topk_shared_rows": (
        lambda: topk(student=ONES(9).expand(4, 9), inplace=True),
        "rows of student must not overlap",
    ),
    "spans_domain_dtype": (lambda: spans(domain=ONES(3, 20)), "domain must be bool"),
    "spans_teacher_rows": (lambda: spans(teacher=ONES(2, 20)), "teacher must have the shape"),
    "spans_student_length": (lambda: spans(student=ONES(3, 19)), "student must have the shape"),
    "spans_student_scalar": (lambda: spans(student=torch.tensor(1.0)), "student must have"),
    "spans_teacher_4d": (lambda: spans(teacher=ONES(3, 20, 2, 2)), "teacher must have 2 or 3"),
    "spans_norm_half": (lambda: spans(teacher=ONES(3, 20).half()), "float32 norms"),
    "spans_one_gradient": (lambda: spans(teacher=ONES(3, 20, 4)), "norms or gradients as teacher"),
    "spans_gradient_float64": (
        lambda: spans(teacher=ONES(3, 20, 4).double(), student=ONES(3, 20, 4)),
        "teacher must be",
    ),
    "spans_prunable_dtype": (lambda: spans(prunable=ONES(3, 20)), "prunable must be bool"),
    "spans_prunable_shape": (lambda: spans(prunable=ONES(3, 19).bool()), "prunable must have"),
    "spans_length": (lambda: spans(max_seqlen=21), "max_seqlen must be T = 20"),
    "spans_flat": (lambda: spans(domain=ONES(60).bool()), r"domain must be \[B, T\]"),
    "packed_past_the_end": (
        lambda: spans(packed=True, cu_seqlens=torch.tensor([0, 20, 40, 61]), max_seqlen=21),
        r"cu_seqlens must ascend within \[0, N = 60\].*got 61 at index 3",
    ),
    "packed_below_0": (
        lambda: spans(packed=True, cu_seqlens=torch.tensor([-1, 10])),
        "got -1 at index 0",
    ),
    "packed_falling": (
        lambda: spans(packed=True, cu_seqlens=torch.tensor([0, 20, 10])),
        "got 10 at index 2",
    ),
    "packed_too_long": (lambda: spans(packed=True, max_seqlen=19), "by at most max_seqlen = 19"),
    "packed_dtype": (
        lambda: spans(packed=True, cu_seqlens=torch.tensor([0.0, 60.0])),
        "cu_seqlens must be int64",
    ),
    "packed_scalar": (
        lambda: spans(packed=True, cu_seqlens=torch.tensor(60)),
        r"cu_seqlens must be \[B \+ 1\]",
    ),
    "packed_batch": (
        lambda: spans(domain=ONES(3, 20).bool(), cu_seqlens=torch.tensor([0, 20])),
        r"domain must be \[N\] with cu_seqlens",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_wrong_call_raises(case: str) -> None:
    call, message = BAD[case]
    with pytest.raises(RuntimeError, match=message):
        call()
