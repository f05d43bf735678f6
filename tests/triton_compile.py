"""Compiles the Triton kernels for a GPU that need not exist, and prints their resources.

    TRITON_INTERPRET=0 python tests/triton_compile.py 90 [--all] [--ones]

--all compiles every dtype and flag instead of the largest variant. With --ones every integer
argument is 1, which Triton turns into a constant.

`test_triton.py` runs it in a separate process, because Triton either interprets or compiles. It
prints a line of JSON for each kernel: registers a thread, spilled bytes, and shared bytes.
"""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from leaf_ext.triton import detect_spans, dual_kl, grad_norm, scale, topk_kl
from leaf_ext.triton.launch import options

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
DTYPES = ("fp32", "fp16", "bf16")


class Variant(NamedTuple):
    """A kernel, the types of its arguments other than 32-bit integers, and its constants."""

    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    warps: int
    registers: int | None = None  # the limit for a thread; by default the compiler chooses
    fused: bool = True  # whether a product and a sum may become one operation


def _named(type_: str, names: str) -> dict[str, str]:
    return dict.fromkeys(names.split(), type_)


def norm_variants(dtypes: tuple[str, ...]) -> Iterator[Variant]:
    block, warps = {"BLOCK": grad_norm._BLOCK}, grad_norm._WARPS
    for dtype in dtypes:
        one = _named(f"*{dtype}", "grad") | _named("*fp32", "norm")
        pair = _named(f"*{dtype}", "teacher student")
        pair |= _named("*fp32", "teacher_norm student_norm")
        yield Variant(grad_norm.norm_kernel, one, block, warps)
        yield Variant(grad_norm.norm_pair_kernel, pair, block, warps)


def kl_variants(dtypes: tuple[str, ...], flags: tuple[bool, ...]) -> Iterator[Variant]:
    names = ("NEED_GRAD", "NEED_ROWS", "STUDENT_CAPPED", "TEACHER_CAPPED")
    scalars = "temperature inv_temperature student_scale teacher_scale student_softcap"
    # The gradient has the logits' dtype, or is narrower in the memory of float32 logits.
    pairs = [(dtype, dtype) for dtype in dtypes]
    pairs += [("fp32", dtype) for dtype in dtypes if dtype != "fp32"]
    sizes = (dual_kl._LONG, 2 * dual_kl._LONG)
    betas = (0.0, 1.0, 0.5)
    for (dtype, grad), size, beta, *chosen in itertools.product(
        pairs, sizes, betas, *[flags] * len(names)
    ):
        types = _named(f"*{dtype}", "student teacher") | _named(f"*{grad}", "grad")
        types |= _named("*fp32", "row_weight grad_scale kl measures")
        types |= _named("fp32", scalars + " teacher_softcap beta rest")
        capped, is_kl = any(chosen[2:]), beta == 0
        itemsize = 4 if dtype == "fp32" else 2
        block, warps = dual_kl.block_of(size, itemsize, chosen[1], capped, lanes=32, is_kl=is_kl)
        constants = dict(zip(names, chosen, strict=True)) | {"BLOCK": block}
        constants |= {"DIVERGENCE": dual_kl.divergence_of(beta)}
        constants |= {"THREADS": 32 * warps, "NARROWED": grad != dtype}
        registers = dual_kl.REGISTERS if capped or not is_kl else None
        yield Variant(dual_kl.rows_kernel, types, constants, warps, registers)
    sum_block, warps = {"BLOCK": dual_kl._SUM_BLOCK}, dual_kl._SUM_WARPS
    sums = _named("*fp32", "row_weight kl loss") | {"temperature": "fp64"}
    yield Variant(dual_kl.loss_kernel, sums, sum_block, warps)
    scale = _named("*fp32", "row_weight grad_scale") | {"bound": "fp32"}
    yield Variant(dual_kl.scale_kernel, scale, sum_block, warps)


def topk_variants(dtypes: tuple[str, ...], flags: tuple[bool, ...]) -> Iterator[Variant]:
    names = ("NEED_GRAD", "NEED_ROWS", "CAPPED")
    pairs = [(dtype, dtype) for dtype in dtypes]
    pairs += [("fp32", dtype) for dtype in dtypes if dtype != "fp32"]
    ids = (1024, 1) if len(flags) > 1 else (1024,)
    for (dtype, grad), k, *chosen in itertools.product(pairs, ids, *[flags] * len(names)):
        types = _named(f"*{dtype}", "student") | _named(f"*{grad}", "grad")
        types |= {"teacher_ids": "*i64"}
        types |= _named("*fp32", "teacher_logprobs teacher_tail row_weight grad_scale kl measures")
        types |= _named("fp32", "temperature inv_temperature scale softcap")
        itemsize = 4 if dtype == "fp32" else 2
        block, warps = dual_kl.block_of(dual_kl._LONG, itemsize, chosen[1], chosen[2], lanes=32)
        constants = dict(zip(names, chosen, strict=True)) | {"BLOCK": block, "K": k}
        constants |= {"THREADS": 32 * warps, "NARROWED": grad != dtype}
        registers = dual_kl.REGISTERS if chosen[2] else None
        yield Variant(topk_kl.topk_rows_kernel, types, constants, warps, registers)


def scale_variants(dtypes: tuple[str, ...]) -> Iterator[Variant]:
    for source, target in itertools.product(dtypes, dtypes):
        types = _named(f"*{source}", "source") | _named(f"*{target}", "target")
        types |= _named("*fp32", "factor")
        for inplace in {False, source == target}:
            constants = {"INPLACE": inplace, "BLOCK": scale._BLOCK}
            yield Variant(scale.multiply_kernel, types, constants, scale._WARPS)


def spans_variants(flags: tuple[bool, ...]) -> Iterator[Variant]:
    types = _named("*fp32", "teacher student score") | _named("*u8", "domain prunable")
    types |= _named("*i64", "borders span count status") | {"confounder": "*i8", "share": "fp64"}
    types |= _named("fp32", "weight threshold cap teacher_max")
    names = ("PACKED", "PRUNABLE", "QUANTILE")
    for form, *chosen in itertools.product(range(3), *[flags] * len(names)):
        constants = dict(zip(names, chosen, strict=True)) | {"BLOCK": detect_spans._BLOCK}
        constants["SCALE"] = form
        warps = detect_spans._WARPS
        yield Variant(detect_spans.spans_kernel, types, constants, warps, fused=False)


def compiled(variant: Variant, architecture: int) -> dict[str, Any]:
    kernel, types, constants, warps, registers, fused = variant
    names = kernel.arg_names
    assert set(types) | set(constants) <= set(names), (set(types) | set(constants)) - set(names)
    signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in names}
    pointers = [i for i, n in enumerate(names) if signature[n].startswith("*")]
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i in pointers},
    )
    target = GPUTarget("cuda", architecture, 32)
    chosen = options(warps, fused=fused) | {"maxnreg": registers}
    binary = triton.compile(source, target=target, options=chosen)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        command = [str(CUOBJDUMP), "--dump-resource-usage", file.name]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    used = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", report)}
    return {
        "kernel": kernel.__name__,
        "types": sorted(set(types.values())),
        "constants": constants,
        "registers": used["REG"],
        "spilled": used["STACK"] + used["LOCAL"],
        "shared": binary.metadata.shared,
    }


def with_ones(variant: Variant) -> Variant:
    integers = set(variant.kernel.arg_names) - set(variant.types) - set(variant.constants)
    return variant._replace(constants=variant.constants | dict.fromkeys(integers, 1))


def main() -> None:
    architecture, everything = int(sys.argv[1]), "--all" in sys.argv
    dtypes, flags = (DTYPES, (False, True)) if everything else (("bf16",), (True,))
    for variants in (
        norm_variants(dtypes),
        kl_variants(dtypes, flags),
        topk_variants(dtypes, flags),
        scale_variants(dtypes),
        spans_variants(flags),
    ):
        for variant in variants:
            chosen = with_ones(variant) if "--ones" in sys.argv else variant
            print(json.dumps(compiled(chosen, architecture)), flush=True)


if __name__ == "__main__":
    main()
