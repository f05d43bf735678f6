"""Random cases against the reference, for as long as one likes.

    .venv/bin/python tests/fuzz.py [--minutes 5] [--seed 0] [--backend cpu]

Shapes, strides, misaligned rows, dtypes and options are drawn at random, and each case is checked
as those of the table are, with a larger budget: in some of so many small cases torch in float32 is
exact by luck. What fails is printed as a case: it belongs in `leaf_ext/testing/cases.py`.
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

from leaf_ext.schema import OPS, Budget
from leaf_ext.testing.cases import DTYPES, KLCase, LinearCase, NormCase, SpansCase

BUDGET = Budget(factor=16.0, roundings=4.0)


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
        kind=draw.choice(("random", "random", "ties", "constant", "identical")),
        threshold=draw.choice((0.0, 0.1, draw.random(), 1.0)),
        rule=draw.choice(("absolute", "quantile")),
        cap=draw.random(),
        teacher_max=draw.choice((None, draw.random())),
        join_gap=draw.choice((0, 0, 1, 3, 100)),
        min_length=draw.choice((1, 1, 2, 5)),
        prunable=draw.random() < 0.3,
        in_domain=draw.choice((0.0, 0.5, 0.95, 1.0)),
    )


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
        live=draw.choice((0.0, 0.5, 1.0)),
        minus_infinity=draw.choice((0.0, 0.0, 0.3)),
        strided=draw.random() < 0.5,
    )


def linear_case(draw: random.Random, name: str) -> LinearCase:
    widths = size(draw, 80), size(draw, 80)
    chunk_size = draw.choice((None, size(draw, 40)))
    logits = kl_case(draw, "", vocabulary=2000)
    return LinearCase(name, logits, *widths, chunk_size=chunk_size, bias=draw.random() < 0.4)


Check = Callable[[str], None]


def checks(draw: random.Random, name: str) -> tuple[object, Check]:
    """One case of a random op, and how it is checked."""
    kind = draw.choice(("norm", "spans", "kl", "kl", "linear"))
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
    case, inplace = kl_case(draw, name), draw.random() < 0.5
    return case, lambda backend: test_ops.test_dual_kl(case, backend, inplace)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--backend", default="cpu", choices=BACKENDS)
    arguments = parser.parse_args()
    torch.set_default_device(device_of(arguments.backend))
    OPS.update({name: replace(op, budget=BUDGET) for name, op in OPS.items()})
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
