"""The table of cases, by op. A case is data; `inputs.py` makes its tensors."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from leaf_ext.ops.logit_options import Divergence

# Triton's interpreter takes up to a second for so many elements or tokens. A larger case is marked
# slow for the interpreter only.
_INTERPRETED_ELEMENTS = 2**16
_INTERPRETED_TOKENS = 2**9

_SHORT = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
DTYPES = tuple(_SHORT)


@dataclass(frozen=True)
class NormCase:
    """Gradients of a shape, with entries of a magnitude."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    magnitude: float = 1.0
    strided: bool = False
    slow: bool = False

    def __str__(self) -> str:
        return f"{self.name}-{_SHORT[self.dtype]}"

    @property
    def slow_to_interpret(self) -> bool:
        return math.prod(self.shape) > _INTERPRETED_ELEMENTS


SpansKind = Literal["random", "constant", "identical", "proportional", "nan", "ties", "signed"]


@dataclass(frozen=True)
class SpansCase:
    """Saliencies of both models; `lengths` packs sequences, `hidden` gives gradients.

    Kind "signed" also has values that are negative, zero or tiny; with "proportional" the student's
    are the teacher's times 3.
    """

    name: str
    batch: int = 4
    length: int = 64
    lengths: tuple[int, ...] = ()
    hidden: tuple[int, int] | None = None
    dtype: torch.dtype = torch.float32
    kind: SpansKind = "random"
    scale: Literal["minmax", "log"] = "minmax"
    student_weight: float = 1.0
    threshold: float = 0.3
    rule: Literal["absolute", "quantile"] = "absolute"
    cap: float = 0.5
    teacher_max: float | None = None
    join_gap: int = 0
    min_length: int = 1
    prunable: bool = False
    in_domain: float = 0.9
    slow: bool = False

    def __str__(self) -> str:
        return f"{self.name}-{_SHORT[self.dtype]}"

    @property
    def options(self) -> dict[str, Any]:
        """The case's arguments of `detect_spans`."""
        return {
            "scale": self.scale,
            "student_weight": self.student_weight,
            "threshold": self.threshold,
            "rule": self.rule,
            "cap": self.cap,
            "teacher_max": self.teacher_max,
            "join_gap": self.join_gap,
            "min_length": self.min_length,
        }

    @property
    def slow_to_interpret(self) -> bool:
        return (sum(self.lengths) or self.batch * self.length) > _INTERPRETED_TOKENS


@dataclass(frozen=True)
class KLCase:
    """Logits of both models. With `noise` the student is the teacher plus so much noise."""

    name: str
    rows: int
    student_vocabulary: int
    teacher_vocabulary: int
    dtype: torch.dtype = torch.float32
    std: float = 3.0
    noise: float | None = None
    temperature: float = 1.0
    logit_scale: float | tuple[float, float] = 1.0
    logit_softcap: float | tuple[float | None, float | None] | None = None
    divergence: Divergence = "kl"
    live: float = 0.8
    minus_infinity: float = 0.0
    strided: bool = False
    slow: bool = False

    def __str__(self) -> str:
        return f"{self.name}-{_SHORT[self.dtype]}"

    @property
    def logit_options(self) -> dict[str, Any]:
        """The case's arguments of all losses."""
        return {
            "temperature": self.temperature,
            "logit_scale": self.logit_scale,
            "logit_softcap": self.logit_softcap,
        }

    @property
    def options(self) -> dict[str, Any]:
        """The case's arguments of `dual_kl` and `linear_dual_kl`."""
        return {**self.logit_options, "divergence": self.divergence}

    @property
    def slow_to_interpret(self) -> bool:
        vocabulary = max(self.student_vocabulary, self.teacher_vocabulary)
        return self.rows * vocabulary > _INTERPRETED_ELEMENTS


@dataclass(frozen=True)
class TopkCase:
    """A teacher of which k ids are known, around a `KLCase` with one vocabulary.

    The mass of all other ids is computed by the op, given, or 0: then the k probabilities sum to 1.
    """

    name: str
    k: int
    logits: KLCase
    tail: Literal["computed", "given", "none"] = "computed"
    slow: bool = False

    def __str__(self) -> str:
        return f"{self.name}-{_SHORT[self.logits.dtype]}"

    @property
    def slow_to_interpret(self) -> bool:
        return self.logits.slow_to_interpret


@dataclass(frozen=True)
class LinearCase:
    """Hidden states and heads of both models around a `KLCase`'s vocabularies and options.

    With `labels` the rows have labels, each third one with a weight of 0. With `k` the teacher is
    known by its k largest probabilities.
    """

    name: str
    logits: KLCase
    student_hidden: int = 32
    teacher_hidden: int = 48
    bias: bool = False
    chunk_size: int | None = None
    labels: bool = False
    k: int = 0
    slow: bool = False

    def __str__(self) -> str:
        return f"{self.name}-{_SHORT[self.logits.dtype]}"

    @property
    def slow_to_interpret(self) -> bool:
        return self.logits.slow_to_interpret


def _each_dtype(case: KLCase) -> list[KLCase]:
    return [replace(case, dtype=dtype) for dtype in DTYPES]


# JSD, once with a share of either model that nearly vanishes.
_OTHERS: tuple[Divergence, ...] = ("reverse_kl", "jsd", 0.1, 0.99)


def _each_divergence(case: KLCase) -> list[KLCase]:
    return [replace(case, name=f"{case.name}_{d}", divergence=d) for d in _OTHERS]


NORM_CASES = [
    *(NormCase("batch", (3, 7, 65), dtype) for dtype in DTYPES),
    *(NormCase("strided", (5, 33), dtype, strided=True) for dtype in DTYPES),
    NormCase("tiny_entries", (4, 129), magnitude=1e-30),
    NormCase("huge_entries", (4, 129), magnitude=1e30),
    NormCase("tiny_entries", (4, 129), torch.bfloat16, magnitude=1e-30),
    NormCase("huge_entries", (4, 129), torch.bfloat16, magnitude=1e30),
    NormCase("subnormal_entries", (4, 129), torch.float16, magnitude=1e-7),
    NormCase("one_row", (1, 2048)),
    NormCase("one_dimension", (77,)),
    NormCase("no_rows", (0, 16)),
    NormCase("no_width", (3, 0)),
    NormCase("width_one", (9, 1), torch.bfloat16),
]

SPANS_CASES = [
    SpansCase("padded"),
    SpansCase("long", batch=2, length=1500),
    SpansCase("two_blocks", 2, 6001, join_gap=1, min_length=2, in_domain=0.99),
    SpansCase("two_blocks_quantile", lengths=(20_001, 0, 4096), rule="quantile"),
    SpansCase("quantile", rule="quantile", threshold=0.2),
    SpansCase("quantile_capped", rule="quantile", threshold=0.9, cap=0.4),
    SpansCase("quantile_first", rule="quantile", threshold=0.0),
    SpansCase("quantile_all", rule="quantile", threshold=1.0, cap=1.0),
    SpansCase("everything", threshold=1.0),
    SpansCase("nothing_below", threshold=0.0),
    SpansCase("teacher_max", teacher_max=0.4, threshold=0.6),
    SpansCase("joined", join_gap=2, in_domain=0.97),
    SpansCase("joined_long", join_gap=1, min_length=4, threshold=0.5),
    SpansCase("prunable", prunable=True, join_gap=1, threshold=0.6),
    SpansCase("packed", lengths=(1, 0, 33, 7, 64, 2)),
    SpansCase("packed_quantile", lengths=(5, 90), rule="quantile", join_gap=1),
    SpansCase("constant", kind="constant"),
    SpansCase("identical", kind="identical"),
    SpansCase("nan", kind="nan"),
    SpansCase("nan_packed", kind="nan", lengths=(20, 30, 14)),
    SpansCase("ties", kind="ties", rule="quantile", threshold=0.3),
    SpansCase("empty_domain", in_domain=0.0),
    SpansCase("one_token", length=1, in_domain=1.0),
    SpansCase("no_tokens", length=0),
    SpansCase("no_sequences", batch=0),
    SpansCase("half_weight", student_weight=0.3, teacher_max=0.8),
    SpansCase("no_weight", student_weight=0.0, kind="signed"),
    SpansCase("weight_packed", lengths=(5, 90), rule="quantile", student_weight=1.7),
    SpansCase("weight_largest", student_weight=1e30),
    SpansCase("weight_gradients", 2, 24, hidden=(40, 24), student_weight=1.7),
    SpansCase("log", scale="log"),
    SpansCase("log_long", batch=2, length=1500, scale="log", student_weight=0.8, join_gap=1),
    SpansCase("log_two_blocks", 2, 6001, scale="log", in_domain=0.99, min_length=2),
    SpansCase("log_quantile", scale="log", rule="quantile", threshold=0.2),
    SpansCase("log_packed", scale="log", student_weight=0.3, lengths=(1, 0, 33, 7, 64, 2)),
    SpansCase("log_packed_quantile", scale="log", lengths=(5, 90), rule="quantile", join_gap=1),
    SpansCase("log_teacher_max", scale="log", teacher_max=0.4, threshold=0.6),
    SpansCase("log_prunable", scale="log", prunable=True, join_gap=1, threshold=0.6),
    SpansCase("log_no_weight", scale="log", student_weight=0.0),
    SpansCase("log_weight", scale="log", student_weight=2.5, rule="quantile"),
    SpansCase("log_weight_largest", scale="log", student_weight=1e30),
    SpansCase("log_signed", scale="log", kind="signed"),
    SpansCase("log_signed_weight", scale="log", kind="signed", student_weight=0.4),
    SpansCase("log_constant", scale="log", kind="constant"),
    SpansCase("log_identical", scale="log", kind="identical"),
    SpansCase("log_proportional", scale="log", kind="proportional"),
    SpansCase("log_nan", scale="log", kind="nan"),
    SpansCase("log_nan_packed", scale="log", kind="nan", lengths=(20, 30, 14)),
    SpansCase("log_ties", scale="log", kind="ties", rule="quantile"),
    SpansCase("log_empty_domain", scale="log", in_domain=0.0),
    SpansCase("log_one_token", scale="log", length=1, in_domain=1.0),
    SpansCase("log_no_tokens", scale="log", length=0),
    SpansCase("log_no_sequences", scale="log", batch=0),
    *(
        SpansCase("log_gradients", 2, 24, hidden=(40, 24), dtype=dtype, scale="log")
        for dtype in DTYPES
    ),
    SpansCase(
        "log_gradients_packed", hidden=(40, 24), lengths=(7, 20), scale="log", student_weight=0.6
    ),
    *(SpansCase("gradients", 2, 24, hidden=(40, 24), dtype=dtype) for dtype in DTYPES),
    SpansCase("gradients_packed", hidden=(40, 24), dtype=torch.bfloat16, lengths=(7, 20)),
    SpansCase("gradients_wide", 1, 8, hidden=(4097, 2049), dtype=torch.bfloat16),
]

KL_CASES = [
    *_each_dtype(KLCase("plain", 12, 1000, 1000)),
    *_each_dtype(KLCase("v50257", 3, 50257, 50257)),
    *_each_dtype(KLCase("v151936_152064", 2, 151936, 152064, live=1.0)),
    KLCase("v152064_151936", 2, 152064, 151936, torch.bfloat16, live=1.0),
    KLCase("v128256", 2, 128256, 128256, torch.bfloat16, live=1.0),
    *_each_dtype(KLCase("v_one", 5, 1, 1)),
    KLCase("v_two", 5, 2, 3),
    KLCase("v17", 9, 17, 23, torch.bfloat16, temperature=2.0),
    *(KLCase(f"v{v}", 12, v, v, torch.bfloat16) for v in (63, 64, 65, 4095, 4096, 4097)),
    KLCase("one_scaled", 3, 4099, 4100, torch.bfloat16, logit_scale=(1.0, 0.5)),
    KLCase("no_rows", 0, 100, 100),
    KLCase("three_blocks", 2, 9000, 9011, live=1.0),
    KLCase("one_row", 1, 4099, 4099, live=1.0),
    *_each_dtype(KLCase("all_dropped", 6, 300, 300, live=0.0)),
    *_each_dtype(KLCase("std_30", 16, 2000, 2000, std=30.0)),
    *_each_dtype(KLCase("temperature", 8, 1500, 1510, temperature=3.0)),
    *_each_dtype(KLCase("softcap", 8, 1500, 1500, std=20.0, logit_softcap=30.0)),
    KLCase(
        "pairs",
        8,
        1500,
        1400,
        logit_scale=(0.5, 1.5),
        logit_softcap=(30.0, None),
        temperature=0.7,
    ),
    KLCase("near", 16, 3000, 3000, noise=1.4e-3),
    KLCase("near_bf16", 16, 3000, 3000, torch.bfloat16, noise=2e-2),
    *_each_dtype(KLCase("minus_infinity", 8, 600, 610, minus_infinity=0.3)),
    # A softcap makes -inf finite, so that all of a row may be -inf.
    *_each_dtype(KLCase("capped_infinity", 17, 2, 1, minus_infinity=0.3, logit_softcap=30.0)),
    *_each_dtype(KLCase("strided", 8, 513, 517, strided=True)),
    *(c for case in _each_dtype(KLCase("plain", 12, 1000, 1000)) for c in _each_divergence(case)),
    *(c for v in (1, 2, 17) for c in _each_divergence(KLCase(f"v{v}", 5, v, v + v // 2))),
    *_each_divergence(KLCase("v4097", 6, 4097, 4096, torch.bfloat16)),
    *_each_divergence(KLCase("three_blocks", 2, 9000, 9011, torch.bfloat16, live=1.0)),
    *_each_divergence(KLCase("v151936_152064", 1, 151936, 152064, torch.bfloat16, live=1.0)),
    *_each_divergence(KLCase("no_rows", 0, 100, 100)),
    *_each_divergence(KLCase("all_dropped", 6, 300, 300, live=0.0)),
    *_each_divergence(KLCase("std_30", 16, 2000, 2000, std=30.0)),
    *_each_divergence(KLCase("std_30", 16, 2000, 2000, torch.float16, std=30.0)),
    *_each_divergence(KLCase("softcap", 8, 1500, 1500, std=20.0, logit_softcap=30.0)),
    *_each_divergence(
        KLCase(
            "pairs",
            8,
            1500,
            1400,
            logit_scale=(0.5, 1.5),
            logit_softcap=(30.0, None),
            temperature=0.7,
        )
    ),
    *_each_divergence(KLCase("near", 16, 3000, 3000, noise=1.4e-3)),
    *_each_divergence(KLCase("near_bf16", 16, 3000, 3000, torch.bfloat16, noise=2e-2)),
    *_each_divergence(KLCase("minus_infinity", 8, 600, 610, minus_infinity=0.3)),
    *_each_divergence(KLCase("strided", 8, 513, 517, torch.bfloat16, strided=True)),
    KLCase("above_2_31", 65_600, 32_768, 32_768, torch.bfloat16, live=1.0, slow=True),
]

LINEAR_CASES = [
    *(LinearCase("plain", case) for case in _each_dtype(KLCase("", 24, 500, 500))),
    *(
        LinearCase("chunks", case, chunk_size=5, bias=True)
        for case in _each_dtype(KLCase("", 33, 700, 720, temperature=2.0))
    ),
    LinearCase("one_a_chunk", KLCase("", 6, 130, 130), chunk_size=1),
    LinearCase("softcap", KLCase("", 12, 400, 400, logit_softcap=(8.0, None), logit_scale=1.5)),
    LinearCase("all_dropped", KLCase("", 9, 200, 200, live=0.0), bias=True),
    LinearCase("no_rows", KLCase("", 0, 200, 200)),
    *(
        LinearCase(f"{case.divergence}", case, chunk_size=7)
        for case in _each_divergence(KLCase("", 24, 500, 510, torch.bfloat16, temperature=2.0))
    ),
    LinearCase("reverse_kl", KLCase("", 24, 500, 510, torch.float16, divergence="reverse_kl")),
    LinearCase("v50257", KLCase("", 4, 50257, 50264), chunk_size=3),
]

LINEAR_LABEL_CASES = [
    *(LinearCase("labels", case, labels=True) for case in _each_dtype(KLCase("", 24, 500, 500))),
    *(
        LinearCase("label_chunks", case, chunk_size=5, bias=True, labels=True)
        for case in _each_dtype(KLCase("", 33, 700, 720, temperature=2.0, live=0.5))
    ),
    LinearCase(
        "label_softcap",
        KLCase("", 12, 400, 390, logit_softcap=(8.0, None), logit_scale=1.5),
        labels=True,
    ),
    # The teacher's NaN, in rows with a label alone, stand next to rows that count.
    LinearCase(
        "label_neighbours", KLCase("", 60, 18, 11, torch.bfloat16, live=0.5), 15, 80, labels=True
    ),
    LinearCase("labels_alone", KLCase("", 9, 200, 200, live=0.0), bias=True, labels=True),
    LinearCase("no_rows", KLCase("", 0, 200, 200), labels=True),
]

LINEAR_TOPK_CASES = [
    *(LinearCase("topk", case, k=16) for case in _each_dtype(KLCase("", 24, 500, 500))),
    *(
        LinearCase("topk_chunks", case, chunk_size=5, bias=True, k=3)
        for case in _each_dtype(KLCase("", 33, 700, 700, temperature=2.0))
    ),
    LinearCase("topk_softcap", KLCase("", 12, 400, 400, logit_softcap=8.0, logit_scale=1.5), k=9),
    LinearCase("topk_dropped", KLCase("", 9, 200, 200, live=0.0), bias=True, k=5),
    LinearCase("topk_no_rows", KLCase("", 0, 200, 200), k=5),
]


def _topk(name: str, k: int, rows: int, vocabulary: int, *dtypes: Any, **options: Any) -> list[Any]:
    """Return the case in each dtype; an option `tail` is the case's own."""
    own = {"tail": options.pop("tail")} if "tail" in options else {}
    return [
        TopkCase(name, k, KLCase(name, rows, vocabulary, vocabulary, dtype, **options), **own)
        for dtype in dtypes or (torch.float32,)
    ]


_HARD_LABELS = {"tail": "none"}  # of one id: all of the probability
TOPK_CASES = [
    *_topk("plain", 16, 12, 1000, *DTYPES),
    *_topk("given", 16, 12, 1000, *DTYPES, tail="given"),
    *_topk("hard_labels", 1, 12, 1000, *DTYPES, **_HARD_LABELS),
    *_topk("one_id", 1, 12, 300),
    *_topk("renormalized", 20, 8, 700, tail="none"),
    *_topk("all_ids", 300, 8, 300, *DTYPES),
    *_topk("all_ids_t2", 64, 8, 64, temperature=2.0),
    *_topk("all_but_one", 63, 8, 64),
    *_topk("k1024", 1024, 4, 4100, *DTYPES),
    *_topk("k1024_all", 1024, 3, 1024),
    *_topk("v_one", 1, 5, 1),
    *_topk("v_two", 1, 5, 2),
    *_topk("v151936", 64, 2, 151936, *DTYPES, live=1.0),
    *_topk("v50257", 100, 3, 50257, torch.float32, torch.bfloat16),
    *(_topk(f"v{v}", 7, 12, v, torch.bfloat16)[0] for v in (63, 64, 65, 4095, 4096, 4097)),
    *_topk("no_rows", 4, 0, 100),
    *_topk("one_row", 33, 1, 9011, live=1.0),
    *_topk("all_dropped", 5, 6, 300, *DTYPES, live=0.0),
    *_topk("std_30", 32, 16, 2000, *DTYPES, std=30.0),
    *_topk("std_30_given", 4, 16, 2000, std=30.0, tail="given"),
    *_topk("temperature", 20, 8, 1500, *DTYPES, temperature=3.0),
    *_topk("softcap", 20, 8, 1500, *DTYPES, std=20.0, logit_softcap=30.0),
    *_topk("everything", 20, 8, 5000, logit_softcap=9.0, logit_scale=0.5, temperature=0.7),
    *_topk("near", 50, 16, 3000, noise=1.4e-3, tail="given"),
    *_topk("near_bf16", 50, 16, 3000, torch.bfloat16, noise=2e-2),
    *_topk("minus_infinity", 40, 8, 600, *DTYPES, minus_infinity=0.3, tail="given"),
    *_topk("mostly_absent", 40, 8, 60, minus_infinity=0.9, tail="given"),
    *_topk("strided", 12, 8, 513, *DTYPES, strided=True),
    TopkCase(
        "above_2_31",
        8,
        KLCase("", 65_600, 32_768, 32_768, torch.bfloat16, live=1.0, slow=True),
        slow=True,
    ),
]

_WIDE = (torch.float32, torch.bfloat16)
_BENCH_SIZES = ((64, 128256), (256, 32000), (4096, 49152))  # the last exceeds every cache

# The cases of `make bench`.
BENCH_NORM_CASES = [NormCase("8x2048x2048", (8, 2048, 2048), dtype) for dtype in _WIDE]
BENCH_SPANS_CASES = [SpansCase("64x2048", batch=64, length=2048)]
BENCH_KL_CASES = [
    KLCase(f"{rows}x{vocabulary}", rows, vocabulary, vocabulary, dtype, live=1.0)
    for rows, vocabulary in _BENCH_SIZES
    for dtype in _WIDE
]
BENCH_TOPK_CASES = [
    TopkCase(f"{rows}x{vocabulary}x64", 64, case)
    for rows, vocabulary in _BENCH_SIZES
    for dtype in _WIDE
    for case in [KLCase("", rows, vocabulary, vocabulary, dtype, live=1.0)]
]
# Compared with the same case of KL, they show what another divergence costs.
BENCH_OTHER_CASES = [
    KLCase(f"256x32000_{d}", 256, 32000, 32000, dtype, live=1.0, divergence=d)
    for d in ("reverse_kl", "jsd")
    for dtype in _WIDE
]
# Compared with the same case with all rows live, it shows what dropped rows save.
BENCH_HALF_CASE = KLCase("4096x49152_half", 4096, 49152, 49152, torch.bfloat16, live=0.5)


def _bench_linear_case(rows: int, student: int, teacher: int, vocabulary: int) -> LinearCase:
    logits = KLCase("", rows, vocabulary, vocabulary, torch.bfloat16, live=1.0)
    return LinearCase(f"{rows}x{student}_{teacher}x{vocabulary}", logits, student, teacher)


BENCH_LINEAR_CASES = [_bench_linear_case(512, 576, 576, 49152)]
# Too large for all variants but ours, eager torch and the bare products.
BENCH_LARGE_LINEAR_CASES = [_bench_linear_case(512, 2048, 4096, 128256)]
# Compared with the first of them, it shows that memory does not grow with the rows.
BENCH_LONG_LINEAR_CASES = [_bench_linear_case(8192, 576, 576, 49152)]


# The cases of `make gpu`, the most important first. Its table of targets uses their names. All rows
# are live, because no peer can drop one.
def _gpu_kl_case(
    rows: int, vocabulary: int, dtype: torch.dtype = torch.bfloat16, padding: int = 0
) -> KLCase:
    """With padding, the rows of teacher and student start differently modulo 16 bytes."""
    name = f"{rows}x{vocabulary}" + (f"_{vocabulary + padding}" if padding else "")
    return KLCase(name, rows, vocabulary, vocabulary + padding, dtype, live=1.0)


def _gpu_linear_case(rows: int, student_hidden: int, teacher_hidden: int) -> LinearCase:
    name, logits = f"{rows}x128256_{student_hidden}_{teacher_hidden}", _gpu_kl_case(rows, 128256)
    return LinearCase(name, logits, student_hidden, teacher_hidden)


# Chunks of training: linear_dual_kl has float32 logits and bfloat16 gradients.
GPU_TRAINING_CASES = [
    _gpu_kl_case(rows, vocabulary, torch.float32)
    for rows, vocabulary in ((4096, 128256), (4096, 151936), (4096, 32000), (2048, 262144))
]
GPU_KL_CASES = [_gpu_kl_case(8192, vocabulary) for vocabulary in (128256, 32000, 151936)]
GPU_OTHER_KL_CASES = [
    _gpu_kl_case(8192, 50257),  # odd: consecutive rows start differently modulo 16 bytes
    _gpu_kl_case(8192, 50257, padding=7),
    _gpu_kl_case(8192, 262144),
    _gpu_kl_case(8192, 128256, torch.float16),
    _gpu_kl_case(8192, 128256, torch.float32),
    *(_gpu_kl_case(1024, vocabulary) for vocabulary in (128256, 32000)),
]
GPU_LINEAR_CASES = [_gpu_linear_case(8192, *h) for h in ((2048, 4096), (2048, 8192), (4096, 4096))]
# Compared with the first of those, they show that memory does not grow with the rows.
GPU_LONG_LINEAR_CASES = [_gpu_linear_case(rows, 2048, 4096) for rows in (32768, 2048)]
# The same sizes with another divergence, with labels, and with a teacher's top k.
GPU_DIVERGENCE_CASES = [
    replace(case, name=f"{case.name}_{d}", divergence=d)
    for case in GPU_KL_CASES[:1]
    for d in ("reverse_kl", "jsd")
]
GPU_TOPK_CASES = [
    TopkCase(f"{case.name}_64", 64, case) for case in (GPU_KL_CASES[0], GPU_KL_CASES[2])
]
GPU_LINEAR_LABEL_CASES = [
    replace(case, name=f"{case.name}_labels", labels=True) for case in GPU_LINEAR_CASES[:1]
]
GPU_LINEAR_OTHER_CASES = [
    replace(case, name=f"{case.name}_jsd", logits=replace(case.logits, divergence="jsd"))
    for case in GPU_LINEAR_CASES[:1]
]
GPU_LINEAR_TOPK_CASES = [
    replace(case, name=f"{case.name}_top64", k=64) for case in GPU_LINEAR_CASES[:1]
]
GPU_NORM_CASES = [
    NormCase(f"8x4096x{width}", (8, 4096, width), torch.bfloat16, magnitude=1e-3)
    for width in (8192, 2048)
]
GPU_SPANS_CASES = [
    SpansCase("64x4096", batch=64, length=4096),
    SpansCase("8x4096_8192_2048", 8, 4096, hidden=(8192, 2048), dtype=torch.bfloat16),
    SpansCase("8x131072", batch=8, length=131072),
]
