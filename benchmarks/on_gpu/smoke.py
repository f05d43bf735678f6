"""Runs every kernel once on small inputs; waits for each call and compares its result.

    python -m on_gpu.smoke [--small | --hot] [--backend cuda] [--device cuda:0]

It prints a line before each call, so that a fault belongs to the last line. `--small` runs what
compute-sanitizer can check in a minute. `--hot` launches each kernel of training once at full size,
for a profiler, and compares nothing. The exit status is 1 if something failed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from checked import refuse_unless, relative
from torch import distributed

import leaf_ext
from leaf_ext.testing.cases import DTYPES, KLCase, LinearCase, NormCase, SpansCase, TopkCase

from . import FINISHED, STARTED
from .clock import Clock
from .topk import SUBJECTS

# Widths of float32 rows that are resident in a cluster of 1, 2, 4, 8 or 16 blocks on an H100, and
# of rows that are not. Twice as many 16-bit elements fit. Rows of an odd width start at all
# offsets modulo 16 bytes.
WIDTHS = (4_001, 15_001, 30_001, 60_001, 120_001, 262_145)
Line = tuple[str, Callable[[], object]]


def check(op: str, variant: str, clock: Clock, case: Any) -> None:
    subject = SUBJECTS[op](case, clock)
    subject.check(variant, subject.step(variant))


def kl_cases(small: bool) -> Iterator[tuple[KLCase, str]]:
    """Return cases in which every third row has weight 0 and contains NaN."""
    rows, widths = (3, WIDTHS[:2]) if small else (9, WIDTHS)
    for dtype in DTYPES:
        for width in widths:
            width = width * 4 // dtype.itemsize - (dtype.itemsize == 2)
            yield KLCase(f"{width}", rows, width, width, dtype), "inplace rows"
        # Both models' rows start at multiples of 16 bytes, or at different offsets.
        for other in (4001, 4008, 4003):
            for variant in ("inplace", "rows"):
                yield KLCase(f"4001_{other}", 9, 4001, other, dtype), variant
    for width in widths:  # the gradient is bfloat16
        yield KLCase(f"{width}", rows, width, width), "narrow rows"
        yield KLCase(f"{width}", rows, width, width - 6), "narrow"


def other_cases(small: bool) -> Iterator[tuple[str, Any, str]]:
    """Return cases of the other divergences, of hard labels, and of a teacher's top k."""
    rows, widths = (3, WIDTHS[:1]) if small else (9, WIDTHS)
    for dtype in DTYPES:
        for width in widths:
            width = width * 4 // dtype.itemsize - (dtype.itemsize == 2)
            for divergence in ("reverse_kl", "jsd", 0.1):
                logits = KLCase(f"{width}_{divergence}", rows, width, width, dtype)
                yield "dual_kl", replace(logits, divergence=divergence), "inplace rows"
            for k in (1, 64, 1024):
                logits = KLCase("", rows, width, width, dtype)
                yield "topk_kl", TopkCase(f"{width}_{k}", k, logits), "inplace rows"
        logits = KLCase("", 40, 1001, 1001, dtype)
        other = replace(logits, divergence="jsd")
        yield "linear_dual_kl", LinearCase("1001_jsd", other), "rows"
        yield "linear_dual_kl", LinearCase("1001_labels", logits, labels=True), "rows"
        yield "linear_topk_kl", LinearCase("1001_topk", logits, k=16), "rows"
    for width in widths:
        logits = KLCase(f"{width}_reverse_kl", rows, width, width, divergence="reverse_kl")
        yield "dual_kl", logits, "narrow rows"


def without_rows(clock: Clock, backend: str) -> None:
    for dtype in DTYPES:
        logits = torch.ones(0, 100, dtype=dtype, device=clock.device, requires_grad=True)
        loss = leaf_ext.dual_kl(
            logits, logits.detach(), logits[:, 0].float().detach(), backend=backend
        )
        loss.backward()
        assert loss.item() == 0 and leaf_ext.grad_norm(logits, backend=backend).shape == (0,)


def products(clock: Clock, dtype: torch.dtype) -> None:
    """Check the library's products of 16-bit factors into float32, which linear_dual_kl uses."""
    a, b = (torch.randn(64, 64, device=clock.device).to(dtype) for _ in range(2))
    out, exact = torch.ones(64, 64, device=a.device), a.double() @ b.double()
    added = torch.addmm(out, a, b, out_dtype=torch.float32, out=out)
    refuse_unless(relative(added, exact + 1), 1e-5, "addmm")
    refuse_unless(relative(torch.mm(a, b, out_dtype=torch.float32, out=out), exact), 1e-5, "mm")


def in_one_part(clock: Clock) -> None:
    """Compare `vocab_parallel_dual_kl` of a single rank with the reference."""
    store = distributed.HashStore()
    backend = "nccl" if clock.on_gpu else "gloo"
    distributed.init_process_group(backend, store=store, rank=0, world_size=1)
    try:
        shapes = ((9, 32), (1001, 32), (9, 48), (1001, 48))
        hidden, head, *teacher = (torch.randn(shape, device=clock.device) for shape in shapes)
        weight, leaves = torch.ones(9, device=clock.device), [hidden, head]
        found, exact = [], []
        for results, dtype in ((found, torch.float32), (exact, torch.float64)):
            given = [t.to(dtype).requires_grad_() for t in leaves] + [t.to(dtype) for t in teacher]
            if dtype == torch.float32:
                loss = leaf_ext.vocab_parallel_dual_kl(*given, weight)
            else:
                loss = leaf_ext.linear_dual_kl(*given, weight.double(), backend="reference")
            results += [loss.detach(), *torch.autograd.grad(loss, given[:2])]
        for what, ours, truth in zip(("loss", "hidden", "head"), found, exact, strict=True):
            refuse_unless(relative(ours, truth), 1e-4, what)
    finally:
        distributed.destroy_process_group()


def on_a_side_stream(clock: Clock) -> None:
    stream = torch.cuda.Stream(clock.device)
    stream.wait_stream(torch.cuda.current_stream(clock.device))
    with torch.cuda.stream(stream):
        check("dual_kl", "cuda rows", clock, KLCase("", 9, 30_000, 30_000))
        check("detect_spans", "cuda", clock, SpansCase("", 3, 300, hidden=(65, 33)))


def lines(clock: Clock, backend: str, small: bool) -> Iterator[Line]:
    def line(op: str, case: Any, how: str = "", where: Clock = clock) -> Line:
        variant = f"{backend} {how}".strip()
        return f"{op} {case} {how} on {where.device}", partial(check, op, variant, where, case)

    for case, how in kl_cases(small):
        yield line("dual_kl", case, how)
    for dtype in DTYPES:
        logits = KLCase("", 40, 1001, 1001, dtype)
        yield line("linear_dual_kl", LinearCase("1001", logits), "rows")
        for width in (1, 4099, 8192):
            yield line("grad_norm", NormCase(f"{width}", (3, 3, width), dtype))
    for op, case, how in other_cases(small):
        yield line(op, case, how)
    for length in (40, 4096, 20_001):
        yield line("detect_spans", SpansCase(f"{length}", 3, length))
        yield line("detect_spans", SpansCase(f"{length}_log", 3, length, scale="log"))
    yield line("detect_spans", SpansCase("of gradients", 3, 300, hidden=(65, 33)))
    yield "no rows", partial(without_rows, clock, backend)
    if not (small and clock.on_gpu):  # a sanitizer would look at NCCL's kernels
        yield "vocab_parallel_dual_kl in one part", partial(in_one_part, clock)
    if not clock.on_gpu:
        return print("left out on a CPU: wide products, streams, graphs, a second device")
    for dtype in DTYPES[1:]:
        yield f"{dtype} products into float32", partial(products, clock, dtype)
    yield "on a side stream", partial(on_a_side_stream, clock)
    if not small:  # a sanitizer needs separate allocations, which a graph cannot have
        yield line("dual_kl", KLCase("30000", 9, 30_000, 30_000), "narrow rows graph")
        yield line("grad_norm", NormCase("4099", (3, 3, 4099)), "graph")
        yield line("detect_spans", SpansCase("4096", 3, 4096), "graph")
    for index in range(1, torch.cuda.device_count()):
        other = Clock(torch.device("cuda", index))
        yield line("dual_kl", KLCase("30000", 9, 30_000, 30_000), "inplace", other)


def hot(clock: Clock, backend: str) -> Iterator[Line]:
    device, on_gpu = clock.device, clock.on_gpu

    def kl(dtype: torch.dtype, measures: bool) -> None:
        shape, narrow = ((2048, 128256), torch.bfloat16) if on_gpu else ((4, 999), None)
        both = [torch.randn(shape, device=device, dtype=dtype) for _ in range(2)]
        weight, neutral = torch.ones(shape[0], device=device), (1.0, 1.0, 1.0, 0.0, 0.0, 0.0)
        torch.ops.leaf_ext.dual_kl_(*both, weight, *neutral, True, measures, narrow)

    def detection() -> None:
        grad = torch.randn(4096 if on_gpu else 4, 8192, device=device).bfloat16()
        leaf_ext.grad_norm(grad, backend=backend)
        norms = [torch.rand(64, 4096, device=device) for _ in range(2)]
        leaf_ext.detect_spans(*norms, norms[0] < 0.9, backend=backend)

    yield "bfloat16 logits", partial(kl, torch.bfloat16, False)
    yield "float32 logits, rows, gradient in bfloat16", partial(kl, torch.float32, True)
    yield "norms and spans", detection


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backend", default="cuda")
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda:0"))
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--hot", action="store_true")
    arguments = parser.parse_args()
    clock, failed = Clock(arguments.device), 0
    print(STARTED, flush=True)
    given = (clock, arguments.backend)
    for name, run in hot(*given) if arguments.hot else lines(*given, arguments.small):
        print(name, end=": ", flush=True)
        try:
            run()
            if clock.on_gpu:
                torch.cuda.synchronize()
            print("ok", flush=True)
        except Exception as error:
            failed += 1
            print(f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}", flush=True)
    print(f"{FINISHED}, {failed} failed" if failed else FINISHED, flush=True)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
