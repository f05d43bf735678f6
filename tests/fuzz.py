"""Random cases against the reference, for as long as one likes.

    .venv/bin/python tests/fuzz.py [--minutes 5] [--seed 0] [--backend cpu]

Shapes, strides, misaligned rows, dtypes and options are drawn at random, and each case is checked
as those of the table are, with a larger budget: in some of so many small cases torch in float32 is
exact by luck, also where all that is left of terms of order 1 is 1e-28. What fails is printed as a
case: it belongs in `leaf_ext/testing/cases.py`.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import test_ops
import torch
from backends import BACKENDS, device_of
from fuzz_ranks import MOST, PartsCase, check_parts
from torch import Tensor

from leaf_ext.ops.logit_options import Divergence
from leaf_ext.ops.topk_kl import MOST_IDS
from leaf_ext.schema import OPS, Budget
from leaf_ext.testing import budget
from leaf_ext.testing.cases import DTYPES, KLCase, LinearCase, NormCase, SpansCase, TopkCase

BUDGET = Budget(factor=16.0, roundings=4.0)
# An error of torch in float32 that is always granted.
NEGLIGIBLE = 1e-25


def size(draw: random.Random, largest: int) -> int:
    """Small ones often, and those around a power of two."""
    near = 2 ** draw.randrange(largest.bit_length()) + draw.randint(-1, 1)
    return max(1, min(largest, draw.choice((near, draw.randint(1, 20), draw.randint(1, largest)))))


def norm_case(draw: random.Random, name: str) -> NormCase:
    shape = [size(draw, 40) for _ in range(draw.randint(0, 2))] + [size(draw, 5000)]
    dtype = draw.choice(DTYPES)
    magnitudes = (1e-30, 1e-3, 1.0, 1e3, 1e30) if dtype != DTYPES[1] else (1e-3, 1.0, 1e3)
    magnitude = draw.choice(magnitudes)
    return NormCase(name, tuple(shape), dtype, magnitude, strided=draw.random() < 0.5)


def spans_case(draw: random.Random, name: str) -> SpansCase:
    lengths = tuple(draw.choice((0, size(draw, 300))) for _ in range(draw.randint(1, 6)))
    packed = draw.random() < 0.5 and sum(lengths) > 0
    return SpansCase(
        name,
        batch=draw.randint(1, 5),
        length=size(draw, 3000),
        lengths=lengths if packed else (),
        hidden=draw.choice((None, None, (size(draw, 300), size(draw, 300)))) if packed else None,
        dtype=draw.choice(DTYPES),
        kind=draw.choice(("random", "random", "ties", "constant", "identical", "signed")),
        scale=draw.choice(("minmax", "log")),
        student_weight=draw.choice((1.0, 1.0, 0.0, 0.5, draw.uniform(0.0, 3.0))),
        threshold=draw.choice((0.0, 0.1, draw.random(), 1.0)),
        rule=draw.choice(("absolute", "quantile")),
        cap=draw.random(),
        teacher_max=draw.choice((None, draw.random())),
        join_gap=draw.choice((0, 0, 1, 3, 100)),
        min_length=draw.choice((1, 1, 2, 5)),
        prunable=draw.random() < 0.3,
        in_domain=draw.choice((0.0, 0.5, 0.95, 1.0)),
    )


def divergence_of(draw: random.Random) -> Divergence:
    other = draw.choice((0.1, 0.99, draw.uniform(0.01, 0.99)))
    return draw.choice(("kl", "kl", "reverse_kl", "jsd", other))


def kl_case(draw: random.Random, name: str, vocabulary: int = 40_000) -> KLCase:
    width = size(draw, vocabulary)
    teacher = draw.choice((width, width, max(1, width + draw.randint(-20, 20))))
    return KLCase(
        name,
        size(draw, max(1, min(64, 200_000 // width))),
        width,
        teacher,
        draw.choice(DTYPES),
        std=draw.choice((0.1, 3.0, 30.0)),
        noise=draw.choice((None, None, 0.05)) if width == teacher else None,
        temperature=draw.choice((1.0, 1.0, 0.5, 3.0)),
        logit_scale=draw.choice((1.0, 1.0, 0.3, (2.0, 0.5))),
        logit_softcap=draw.choice((None, None, 30.0, (None, 10.0))),
        divergence=divergence_of(draw),
        live=draw.choice((0.0, 0.5, 1.0)),
        minus_infinity=draw.choice((0.0, 0.0, 0.3)),
        strided=draw.random() < 0.5,
    )


def topk_logits(draw: random.Random, name: str, vocabulary: int = 40_000) -> KLCase:
    """One vocabulary, the student's options, and KL."""
    case = kl_case(draw, name, vocabulary)
    return replace(
        case,
        teacher_vocabulary=case.student_vocabulary,
        divergence="kl",
        logit_scale=draw.choice((1.0, 1.0, 0.3)),
        logit_softcap=draw.choice((None, None, 30.0)),
    )


def topk_case(draw: random.Random, name: str) -> TopkCase:
    logits = topk_logits(draw, name)
    k = size(draw, min(MOST_IDS, logits.student_vocabulary))
    tail = draw.choice(("computed", "computed", "given", "none"))
    # A remainder that is computed is not exactly 0 where both models exclude all other ids, and in
    # a small vocabulary all may be excluded.
    if tail != "given" or logits.student_vocabulary < 50:
        logits = replace(logits, minus_infinity=0.0)
    return TopkCase(name, k, logits, tail)


def linear_case(draw: random.Random, name: str) -> LinearCase:
    widths = size(draw, 80), size(draw, 80)
    return LinearCase(
        name,
        kl_case(draw, "", vocabulary=2000),
        *widths,
        bias=draw.random() < 0.4,
        chunk_size=draw.choice((None, size(draw, 40))),
        labels=draw.random() < 0.4,
    )


def linear_topk_case(draw: random.Random, name: str) -> LinearCase:
    case = linear_case(draw, name)
    logits = topk_logits(draw, "", vocabulary=2000)
    k = size(draw, min(MOST_IDS, logits.student_vocabulary))
    return replace(case, logits=logits, labels=False, k=k)


def parts_case(draw: random.Random, name: str) -> PartsCase:
    vocabulary = size(draw, 300)
    count = draw.randint(1, min(MOST, vocabulary))
    padding = draw.randint(0, 5)
    return PartsCase(
        name,
        rows=size(draw, 30),
        vocabulary=vocabulary,
        cuts=tuple(sorted(draw.sample(range(1, vocabulary), count - 1))),
        widths=(size(draw, 20), size(draw, 20)),
        std=draw.choice((0.1, 3.0, 30.0)),
        bias=draw.random() < 0.4,
        padding=draw.choice(((0, 0), (padding, 0), (0, padding))),
        frozen=draw.choice(((), (), ("student_head",), ("student_hidden",))),
        options={
            "temperature": draw.choice((1.0, 0.5, 3.0)),
            "logit_scale": draw.choice((1.0, 0.3, (2.0, 0.5))),
            "logit_softcap": draw.choice((None, 30.0, (None, 10.0))),
            "chunk_size": draw.choice((None, size(draw, 40))),
        },
    )


def assert_within_budget(
    op: str, what: str, result: Tensor, oracle: Tensor, baseline_error: float
) -> None:
    budget.assert_within_budget(op, what, result, oracle, baseline_error + NEGLIGIBLE)


Check = Callable[[str], None]


def checks(draw: random.Random, name: str) -> tuple[object, Check]:
    """One case of a random op, and how it is checked."""
    kinds = ("norm", "spans", "kl", "kl", "linear", "topk", "topk", "linear_topk", "parts")
    kind, inplace = draw.choice(kinds), draw.random() < 0.5
    case: Any
    if kind == "norm":
        case = norm_case(draw, name)
        return case, lambda backend: test_ops.test_grad_norm(case, backend)
    if kind == "spans":
        case = spans_case(draw, name)
        return case, lambda backend: test_ops.test_detect_spans(case, backend)
    if kind == "linear":
        case = linear_case(draw, name)
        return case, lambda backend: test_ops.test_linear_dual_kl(case, backend)
    if kind == "topk":
        case = topk_case(draw, name)
        return case, lambda backend: test_ops.test_topk_kl(case, backend, inplace)
    if kind == "linear_topk":
        case = linear_topk_case(draw, name)
        return case, lambda backend: test_ops.test_linear_topk_kl(case, backend)
    if kind == "parts":
        case = parts_case(draw, name)
        return case, lambda _: check_parts(case)
    case = kl_case(draw, name)
    return case, lambda backend: test_ops.test_dual_kl(case, backend, inplace)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--backend", default="cpu", choices=BACKENDS)
    arguments = parser.parse_args()
    torch.set_default_device(device_of(arguments.backend))
    OPS.update({name: replace(op, budget=BUDGET) for name, op in OPS.items()})
    test_ops.assert_within_budget = assert_within_budget
    end = time.monotonic() + 60 * arguments.minutes
    tried = failed = 0
    while time.monotonic() < end:
        name = f"fuzz_{arguments.seed}_{tried}"
        case, check = checks(random.Random(name), name)
        tried += 1
        try:
            check(arguments.backend)
        except Exception:
            failed += 1
            print(f"{case!r}\n{traceback.format_exc(limit=-1)}", flush=True)
    print(f"{tried} cases, {failed} failed")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
