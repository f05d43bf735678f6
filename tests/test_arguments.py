"""Bad arguments raise one sentence: "op: argument must be X, got Y"."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from op_samples import kl_tensors, linear_tensors, span_tensors, topk_tensors

import leaf_ext

ONES = torch.ones


def topk(**changed: Any) -> object:
    """Call `topk_kl` with [4, 9] logits and 3 ids a row, the second of which has weight 0."""
    names = ("student_logits", "teacher_ids", "teacher_logprobs", "row_weight")
    torch.manual_seed(0)
    arguments: dict[str, Any] = dict(zip(names, topk_tensors(), strict=True))
    return leaf_ext.topk_kl(**arguments | changed)


def with_id(row: int, value: int) -> torch.Tensor:
    ids = torch.tensor([[2, 5, 7]] * 4)
    ids[row, 1] = value
    return ids


BAD: dict[str, tuple[Callable[[], object], str]] = {
    "norm_dtype": (
        lambda: leaf_ext.grad_norm(ONES(3, 4, dtype=torch.int64)),
        "grad_norm: grad must be float32, float16, bfloat16",
    ),
    "norm_scalar": (lambda: leaf_ext.grad_norm(torch.tensor(1.0)), r"grad must be \[\*, H\]"),
    "norm_list": (lambda: leaf_ext.grad_norm([1.0]), "grad must be a tensor, got list"),  # type: ignore[arg-type]
    "kl_student_1d": (
        lambda: leaf_ext.dual_kl(ONES(9), ONES(4, 9), ONES(4)),
        r"dual_kl: student_logits must be 2-D \[N, V_s\], got shape \(9,\)",
    ),
    "kl_teacher_dtype": (
        lambda: leaf_ext.dual_kl(ONES(4, 9), ONES(4, 9).double(), ONES(4)),
        "teacher_logits must be no wider than the other model's, got torch.float64",
    ),
    "kl_integer": (
        lambda: leaf_ext.dual_kl(ONES(4, 9), ONES(4, 9).long(), ONES(4)),
        "teacher_logits must be float32.*got torch.int64",
    ),
    "kl_rows": (
        lambda: leaf_ext.dual_kl(ONES(4, 9), ONES(5, 9), ONES(4)),
        r"teacher_logits must be \[N, V_t\] with N = 4 rows like student_logits, got shape \(5",
    ),
    "kl_no_vocabulary": (
        lambda: leaf_ext.dual_kl(ONES(4, 0), ONES(4, 9), ONES(4)),
        "student_logits must be over a vocabulary of at least 1",
    ),
    "kl_weight_dtype": (
        lambda: leaf_ext.dual_kl(ONES(4, 9), ONES(4, 9), ONES(4).bfloat16()),
        "row_weight must be torch.float32, got torch.bfloat16",
    ),
    "kl_weight_shape": (
        lambda: leaf_ext.dual_kl(ONES(4, 9), ONES(4, 9), ONES(4, 1)),
        r"row_weight must be \[N\] with N = 4 rows, got shape \(4, 1\)",
    ),
    "kl_weight_grad": (
        lambda: leaf_ext.dual_kl(ONES(4, 9), ONES(4, 9), ONES(4, requires_grad=True)),
        "row_weight must be a constant",
    ),
    "kl_device": (
        lambda: leaf_ext.dual_kl(ONES(4, 9), ONES(4, 9, device="meta"), ONES(4)),
        "teacher_logits must be on cpu like the first argument, got meta",
    ),
    "kl_temperature": (
        lambda: leaf_ext.dual_kl(*kl_tensors(), temperature=0.0),
        "temperature must be a finite number > 0, got 0.0",
    ),
    "kl_scale": (
        lambda: leaf_ext.dual_kl(*kl_tensors(), logit_scale=(1.0, float("nan"))),
        "logit_scale must be a finite number > 0, got nan",
    ),
    "kl_softcap": (
        lambda: leaf_ext.dual_kl(*kl_tensors(), logit_softcap=float("inf")),
        "logit_softcap must be a finite number > 0, got inf",
    ),
    "kl_pair": (
        lambda: leaf_ext.dual_kl(*kl_tensors(), logit_scale=(1.0, 1.0, 1.0)),  # type: ignore[arg-type]
        r"logit_scale must be a number or a pair \(student, teacher\)",
    ),
    "kl_pair_of_one": (
        lambda: leaf_ext.dual_kl(*kl_tensors(), logit_softcap=[30.0]),  # type: ignore[arg-type]
        r"logit_softcap must be a number or a pair \(student, teacher\), got \[30.0\]",
    ),
    "kl_boolean": (
        lambda: leaf_ext.dual_kl(*kl_tensors(), temperature=True),
        "temperature must be a finite number > 0, got True",
    ),
    "kl_inplace_shared": (
        lambda: leaf_ext.dual_kl(ONES(9).expand(4, 9), ONES(4, 9), ONES(4), inplace_grad=True),
        "student_logits must be rows of adjacent elements that share no memory",
    ),
    "topk_ids_dtype": (
        lambda: topk(teacher_ids=ONES(4, 3)),
        "topk_kl: teacher_ids must be int64 or int32, got torch.float32",
    ),
    "topk_ids_shape": (
        lambda: topk(teacher_ids=ONES(4).long()),
        r"teacher_ids must be \[N, k\] with N = 4 rows like row_weight and 1 <= k <= 9, got shape",
    ),
    "topk_more_ids_than_tokens": (
        lambda: topk(teacher_ids=ONES(4, 10).long(), teacher_logprobs=ONES(4, 10)),
        "teacher_ids must be .* 1 <= k <= 9, got shape",
    ),
    "topk_id_too_large": (
        lambda: topk(teacher_ids=with_id(2, 9)),
        r"teacher_ids must be in \[0, V = 9\) in rows that count, got 9",
    ),
    "topk_id_negative": (lambda: topk(teacher_ids=with_id(2, -100)), "rows that count, got -100"),
    "topk_id_twice": (
        lambda: topk(teacher_ids=with_id(3, 7)),
        "teacher_ids must be distinct in a row, got 7 twice",
    ),
    "topk_logprobs_dtype": (
        lambda: topk(teacher_logprobs=ONES(4, 3).half()),
        "teacher_logprobs must be torch.float32, got torch.float16",
    ),
    "topk_logprobs_shape": (
        lambda: topk(teacher_logprobs=ONES(4, 2)),
        r"teacher_logprobs must be \[N, k\] like teacher_ids, got shape \(4, 2\)",
    ),
    "topk_tail_shape": (
        lambda: topk(teacher_tail_logprob=ONES(4, 1)),
        r"teacher_tail_logprob must be \[N\] with N = 4 rows, got shape \(4, 1\)",
    ),
    "topk_scale_pair": (
        lambda: topk(logit_scale=(1.0, 2.0)),
        r"logit_scale must be a finite number > 0, got \(1.0, 2.0\)",
    ),
    "topk_weight_grad": (
        lambda: topk(row_weight=ONES(4, requires_grad=True)),
        "topk_kl: row_weight must be a constant",
    ),
    "linear_topk_rows": (
        lambda: leaf_ext.linear_topk_kl(ONES(5, 3), ONES(9, 3), *topk_tensors()[1:]),
        r"linear_topk_kl: row_weight must be \[N\] with N = 5 rows, got shape \(4,\)",
    ),
    "labels_dtype": (
        lambda: leaf_ext.linear_dual_kl(*linear_tensors(), labels=ONES(4)),
        "linear_dual_kl: labels must be torch.int64, got torch.float32",
    ),
    "labels_too_large": (
        lambda: leaf_ext.linear_dual_kl(*linear_tensors(), labels=torch.tensor([0, 20, 9, 1])),
        "labels must be below the common vocabulary, 9, in rows that count, got 9",
    ),
    "labels_missing": (
        lambda: leaf_ext.linear_dual_kl(*linear_tensors(), label_weight=ONES(4)),
        "labels must be given with label_weight, got None",
    ),
    "label_weight_shape": (
        lambda: leaf_ext.linear_dual_kl(
            *linear_tensors(), labels=ONES(4).long(), label_weight=ONES(3)
        ),
        r"label_weight must be \[N\] with N = 4 rows, got shape \(3,\)",
    ),
    "linear_student_hidden_list": (
        lambda: leaf_ext.linear_dual_kl([1], *linear_tensors()[1:]),  # type: ignore[arg-type]
        "linear_dual_kl: student_hidden must be a tensor, got list",
    ),
    "linear_teacher_hidden_none": (
        lambda: leaf_ext.linear_dual_kl(*linear_tensors()[:2], None, *linear_tensors()[3:]),  # type: ignore[arg-type]
        "linear_dual_kl: teacher_hidden must be a tensor, got NoneType",
    ),
    "linear_teacher_head_none": (
        lambda: leaf_ext.linear_dual_kl(*linear_tensors()[:3], None, ONES(4)),  # type: ignore[arg-type]
        "linear_dual_kl: teacher_head must be a tensor, got NoneType",
    ),
    "linear_bias_list": (
        lambda: leaf_ext.linear_dual_kl(*linear_tensors(), student_bias=[1.0]),  # type: ignore[arg-type]
        "linear_dual_kl: student_bias must be a tensor, got list",
    ),
    "linear_head_width": (
        lambda: leaf_ext.linear_dual_kl(ONES(4, 3), ONES(9, 2), ONES(4, 5), ONES(9, 5), ONES(4)),
        r"linear_dual_kl: student_head must be \[V, H\] with V >= 1 and H = 3 like student_hidden",
    ),
    "linear_head_dtype": (
        lambda: leaf_ext.linear_dual_kl(
            ONES(4, 3), ONES(9, 3).half(), ONES(4, 5), ONES(9, 5), ONES(4)
        ),
        "student_head must be torch.float32 like student_hidden, got torch.float16",
    ),
    "linear_rows": (
        lambda: leaf_ext.linear_dual_kl(ONES(4, 3), ONES(9, 3), ONES(3, 5), ONES(9, 5), ONES(4)),
        "teacher_hidden must be .* with N = 4 rows",
    ),
    "linear_bias": (
        lambda: leaf_ext.linear_dual_kl(*linear_tensors(), teacher_bias=ONES(9)),
        r"teacher_bias must be \[V\] with V = 11, got shape \(9,\)",
    ),
    "linear_chunk": (
        lambda: leaf_ext.linear_dual_kl(*linear_tensors(), chunk_size=0),
        "chunk_size must be an integer >= 1, got 0",
    ),
    "linear_weight_grad": (
        lambda: leaf_ext.linear_dual_kl(*linear_tensors()[:4], ONES(4, requires_grad=True)),
        "linear_dual_kl: row_weight must be a constant",
    ),
    "spans_domain": (
        lambda: leaf_ext.detect_spans(ONES(2, 3), ONES(2, 3), ONES(2, 3)),
        "detect_spans: domain must be torch.bool, got torch.float32",
    ),
    "spans_shape": (
        lambda: leaf_ext.detect_spans(ONES(2, 4), ONES(2, 3), ONES(2, 3).bool()),
        r"teacher must be norms \(2, 3\) or gradients \(2, 3\) x H like domain, got shape \(2",
    ),
    "spans_norm_dtype": (
        lambda: leaf_ext.detect_spans(ONES(2, 3).half(), ONES(2, 3), ONES(2, 3).bool()),
        "teacher must be float32 when it holds norms, got torch.float16",
    ),
    "spans_mixed": (
        lambda: leaf_ext.detect_spans(ONES(2, 3, 4), ONES(2, 3), ONES(2, 3).bool()),
        "student must be of 3 dimensions like teacher",
    ),
    "spans_threshold": (
        lambda: leaf_ext.detect_spans(*span_tensors(), threshold=1.5),
        r"threshold must be a finite number in \[0, 1\], got 1.5",
    ),
    "spans_rule": (
        lambda: leaf_ext.detect_spans(*span_tensors(), rule="rank"),  # type: ignore[arg-type]
        'rule must be "absolute" or "quantile"',
    ),
    "spans_scale": (
        lambda: leaf_ext.detect_spans(*span_tensors(), scale="ratio"),  # type: ignore[arg-type]
        'detect_spans: scale must be "minmax" or "log", got \'ratio\'',
    ),
    "spans_weight": (
        lambda: leaf_ext.detect_spans(*span_tensors(), student_weight=-0.5),
        r"student_weight must be a finite number in \[0, 1e\+30\], got -0.5",
    ),
    "spans_weight_nan": (
        lambda: leaf_ext.detect_spans(*span_tensors(), student_weight=float("nan")),
        "student_weight must be a finite number .*, got nan",
    ),
    "spans_weight_inf": (
        lambda: leaf_ext.detect_spans(*span_tensors(), student_weight=float("inf")),
        "student_weight must be a finite number .*, got inf",
    ),
    "spans_join_gap": (
        lambda: leaf_ext.detect_spans(*span_tensors(), join_gap=-1),
        "join_gap must be an integer >= 0, got -1",
    ),
    "spans_max_seqlen": (
        lambda: leaf_ext.detect_spans(*span_tensors(), max_seqlen=20),
        "max_seqlen must be None without cu_seqlens",
    ),
    "spans_borders": (
        lambda: leaf_ext.detect_spans(
            ONES(5), ONES(5), ONES(5).bool(), cu_seqlens=torch.tensor([0, 6]), max_seqlen=6
        ),
        r"cu_seqlens must be ascending from 0 to N = 5, got \[0, 6\]",
    ),
    "spans_too_long": (
        lambda: leaf_ext.detect_spans(
            ONES(5), ONES(5), ONES(5).bool(), cu_seqlens=torch.tensor([0, 5]), max_seqlen=4
        ),
        "max_seqlen must be at least the longest sequence, 5, got 4",
    ),
    "weights_live": (
        lambda: leaf_ext.row_weights(ONES(3).bool(), ONES(3).half()),
        "row_weights: live must be torch.bool, torch.float32 or torch.float64, got torch.float16",
    ),
    "weights_kd": (
        lambda: leaf_ext.row_weights(ONES(3).bool(), ONES(3).bool(), kd_weight=1.5),
        r'kd_weight must be "pool" or a number in \[0, 1\], got 1.5',
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_named(case: str) -> None:
    call, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        call()


def test_ids_of_rows_that_do_not_count_may_be_anything() -> None:
    assert torch.equal(topk(teacher_ids=with_id(1, -100)), topk(teacher_ids=with_id(1, 7)))  # type: ignore[arg-type]


def test_numbers_of_numpy_and_pairs_from_a_file_are_taken() -> None:
    """np.float32 and np.int64 are numbers, and a pair in a YAML file is a list."""
    options: dict[str, Any] = {"temperature": np.float32(2), "logit_scale": [1.0, 0.5]}
    tensors = kl_tensors()
    given = leaf_ext.dual_kl(*tensors, **options, logit_softcap=[30.0, None])  # type: ignore[arg-type]
    plain = leaf_ext.dual_kl(
        *tensors, temperature=2.0, logit_scale=(1.0, 0.5), logit_softcap=(30.0, None)
    )
    assert torch.equal(given, plain)
    options = {
        "threshold": np.float32(0.5),
        "student_weight": np.int64(1),
        "join_gap": np.int64(3),
        "min_length": np.int32(2),
    }
    saliencies = span_tensors()
    found = leaf_ext.detect_spans(*saliencies, **options).tolist()
    assert (
        found
        == leaf_ext.detect_spans(*saliencies, threshold=0.5, join_gap=3, min_length=2).tolist()
    )
    live = torch.ones(3, dtype=torch.bool)
    rows: Any = np.int64(8)
    assert leaf_ext.row_weights(live, live, n_cd=rows).tolist() == [1 / 8] * 3
