"""Times `linear_dual_kl` in bfloat16 on a CPU beside bare products and two other losses, in turn.

    python benchmarks/linear_peers.py [--rows 512,4096] [--width 576] [--vocabulary 49152]
        [--threads 2] [--rounds 7] [--without-bf16 | --without-amx] [--pool]

bare: the four products that the mathematics needs, each of all rows at once, in memory that stays.
trl: TRL's chunked divergence, where TRL is installed (in this repository: `make .venv/.trl`, then
    .venv/trl/bin/python). Both losses are the KL of the same rows.
cross-entropy: torch's `F.linear_cross_entropy`, which has no teacher and three products.

A time is that of a forward and a backward pass, of which the one before was of the same loss: the
process has the memory that a training would find. It is also shown by product, of which a KL needs
four and a cross-entropy three, as a share of ours. The gradients of KLs are compared with those of
a float64 reference; the error is the largest norm of a difference over the norm.

--without-bf16: as on a processor without bfloat16 instructions: oneDNN uses AVX-512 without them,
    and `linear_dual_kl` takes the path that it takes there. --without-amx: with them, and without
    the AMX products of this package.
--pool: all run in `leaf_ext.use_cpu_memory_pool`, as LeafTrainer does.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

sys.path += [str(Path(__file__).resolve().parents[1])]

Backward = Callable[[], Any]


def contenders(n: int, width: int, vocabulary: int) -> tuple[dict[str, Backward], Any, Any]:
    """Return what is timed by name, and the float64 gradients of the KL."""
    import torch
    from bench_ops import bare_products
    from checked import exact_linear
    from torch.nn.functional import linear_cross_entropy

    import leaf_ext

    torch.manual_seed(0)
    hidden, teacher_hidden = (torch.randn(n, width).bfloat16() for _ in range(2))
    head, teacher_head = (
        torch.randn(vocabulary, width).div(width**0.5).bfloat16() for _ in range(2)
    )
    weight = torch.full((n,), 1 / n)
    labels = torch.randint(vocabulary, (n,))
    tensors = hidden, head, teacher_hidden, teacher_head, weight
    trained = hidden.clone().requires_grad_(), head.clone().requires_grad_()

    def backward(loss: Callable[[], Any]) -> Backward:
        def run() -> None:
            for one in trained:
                one.grad = None
            loss().backward()

        return run

    found = {
        "ours": backward(lambda: leaf_ext.linear_dual_kl(*trained, *tensors[2:])),
        "bare": bare_products(*tensors),
        "cross-entropy": backward(lambda: linear_cross_entropy(*trained, labels)),
    }
    if importlib.util.find_spec("trl") is not None:
        from trl.kernels.chunked_divergence import ChunkedDivergenceFunction as Chunked

        found["trl"] = backward(
            lambda: Chunked.apply(*trained, None, teacher_hidden, teacher_head, None, 0.0)[0].mean()
        )
    return found, trained, exact_linear(tensors, at_once=64)[1]


def compare(arguments: argparse.Namespace, n: int) -> list[str]:
    """Return the lines of one number of rows."""
    from checked import relative

    import leaf_ext

    runs, trained, exact = contenders(n, arguments.width, arguments.vocabulary)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    errors = {}
    with leaf_ext.use_cpu_memory_pool() if arguments.pool else nullcontext():
        for _ in range(arguments.rounds):
            for name, run in runs.items():
                run()
                started = time.perf_counter()
                run()
                seconds[name].append(time.perf_counter() - started)
                if name in ("ours", "trl"):
                    pairs = zip(trained, exact, strict=True)
                    errors[name] = max(relative(one.grad, truth) for one, truth in pairs)
    lines = []
    for name, times in seconds.items():
        ratio = median(a / b for a, b in zip(times, seconds["ours"], strict=True))
        products = 3 if name == "cross-entropy" else 4
        error = f"{errors[name]:.1e}" if name in errors else "-"
        lines.append(
            f"| {n} x {arguments.width} x {arguments.vocabulary} | {name} | "
            f"{median(times) * 1e3:.0f} | {ratio:.2f} | {ratio * 4 / products:.2f} | {error} |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", default="512,4096")
    parser.add_argument("--width", type=int, default=576)
    parser.add_argument("--vocabulary", type=int, default=49152)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=7)
    lacks = parser.add_mutually_exclusive_group()
    lacks.add_argument("--without-bf16", action="store_true")
    lacks.add_argument("--without-amx", action="store_true")
    parser.add_argument("--pool", action="store_true")
    arguments = parser.parse_args()
    if arguments.without_bf16:
        os.environ["ONEDNN_MAX_CPU_ISA"] = "AVX512_CORE"
    import torch
    from stage1 import cpu_name

    from leaf_ext.ops import linear_chunks

    if arguments.without_bf16:
        linear_chunks._multiplies_bfloat16 = lambda: False
    if arguments.without_amx:
        linear_chunks.has_amx = lambda: False
    torch.set_num_threads(arguments.threads)
    named = ", ".join(f"{name} {version(name)}" for name in ("torch", "trl") if _installed(name))
    print(f"- {time.strftime('%Y-%m-%d')}, {cpu_name()}, {arguments.threads} threads, {named}")
    print(f"- command: `python benchmarks/linear_peers.py {' '.join(sys.argv[1:])}`\n")
    print("| rows x width x vocabulary | | ms | / ours | by product / ours | gradient error |")
    print("|---|---|---:|---:|---:|---:|")
    for n in arguments.rows.split(","):
        print("\n".join(compare(arguments, int(n))), flush=True)


def _installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


if __name__ == "__main__":
    main()
