"""`bfloat16_matmul`, the AMX products of linear heads on a CPU, beside products in float64."""

from __future__ import annotations

import ctypes
import itertools
import platform
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from leaf_ext.native import build_info, has_amx

needs_amx = pytest.mark.skipif(not has_amx(), reason="this machine, or the build, has no AMX")

# Sizes around those of tiles and of pairs of tiles; none, one, and odd numbers of them.
SIZES = (0, 1, 2, 15, 16, 17, 31, 32, 33, 64, 70)


def multiply(out: Tensor, a: Tensor, b: Tensor, add: bool = False) -> None:
    torch.ops.leaf_ext.bfloat16_matmul(out, a, b, add)


def factor(rows: int, columns: int, transposed: bool, padding: int) -> Tensor:
    """Return a [rows, columns] view of a larger matrix, whose other elements are NaN."""
    shape = (columns, rows) if transposed else (rows, columns)
    whole = torch.full((shape[0], shape[1] + padding), torch.nan, dtype=torch.bfloat16)
    view = whole[:, : shape[1]]
    view.copy_(torch.randn(shape))
    return view.T if transposed else view


def check(m: int, n: int, k: int, a_transposed: bool, b_transposed: bool, padding: int) -> None:
    a, b = factor(m, k, a_transposed, padding), factor(k, n, b_transposed, padding)
    exact, scale = a.double() @ b.double(), a.double().abs() @ b.double().abs()
    around = torch.full((m, n + padding), 7.0)
    wide, narrow = around.clone()[:, :n], around.bfloat16()[:, :n]
    multiply(wide, a, b)
    # Sums of k products, each with a rounding of float32; how they are grouped is left open.
    assert bool(((wide - exact).abs() <= k * 2**-24 * scale).all())
    kept = wide.clone()
    multiply(wide, a, b, add=True)
    assert bool(((wide - 2 * exact).abs() <= (k + 1) * 2**-23 * scale).all())
    multiply(narrow, a, b)
    assert torch.equal(narrow, kept.bfloat16())
    for result in (wide, narrow):
        beside = result.as_strided((m, padding), (n + padding, 1), n) if m and padding else around
        assert bool((beside == 7).all())


@needs_amx
@pytest.mark.parametrize("b_transposed", [False, True])
@pytest.mark.parametrize("a_transposed", [False, True])
def test_products_of_all_orders_and_sizes(a_transposed: bool, b_transposed: bool) -> None:
    for m, n, k in itertools.product(SIZES, repeat=3):
        check(m, n, k, a_transposed, b_transposed, padding=(m + n + k) % 3)


@needs_amx
@pytest.mark.parametrize(
    ("m", "n", "k"),
    [
        # A factor above 2^24 elements is packed block by block.
        (90, 24000, 700),  # as for logits: b is, and k is in two steps
        (1100, 17000, 1000),  # and a is in two blocks
        (24000, 90, 700),  # as for the gradient of a head: a is
        (17000, 1100, 1000),
        (40, 70, 1 << 19),  # as for the gradient of hidden states: both are
        (600, 330, 60000),  # in several blocks
        (1100, 1030, 33),  # neither is
    ],
)
@pytest.mark.parametrize("orders", [(False, True), (False, False), (True, False)], ids=str)
def test_products_that_are_made_in_blocks(
    m: int, n: int, k: int, orders: tuple[bool, bool]
) -> None:
    a, b = factor(m, k, orders[0], 1), factor(k, n, orders[1], 1)
    exact = a.double() @ b.double()
    found, narrow = torch.empty(m, n), torch.empty(m, n, dtype=torch.bfloat16)
    multiply(found, a, b)
    # Errors add up like a walk of k steps; a wrong sum is wrong by far more than any of them.
    error, size = (found - exact).abs(), exact.norm() / (m * n) ** 0.5
    assert float(error.norm() / exact.norm()) < 2**-24 * max(4, k**0.5)
    assert float(error.max() / size) < 2**-24 * 16 * max(4, k**0.5)
    multiply(narrow, a, b)
    assert torch.equal(narrow, found.bfloat16())
    multiply(found, a, b, add=True)
    assert float((found - 2 * exact).abs().max() / size) < 2**-23 * 16 * max(4, k**0.5)


@needs_amx
@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize(("m", "n", "k"), [(130, 300, 60000), (40, 720, 640), (720, 50, 1300)])
def test_a_product_does_not_depend_on_the_number_of_threads(
    m: int, n: int, k: int, add: bool
) -> None:
    threads = torch.get_num_threads()
    a, b, before = factor(m, k, False, 0), factor(k, n, False, 0), torch.randn(m, n)
    found = []
    try:
        for count in (1, 2, 3, 8, 16):
            torch.set_num_threads(count)
            found.append(before.clone())
            multiply(found[-1], a, b, add)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one, found[0]) for one in found)


@needs_amx
def test_what_is_not_finite_stays_in_its_row_and_column() -> None:
    a, b = factor(40, 50, False, 0), factor(50, 60, False, 0)
    a[3, 4], b[5, 6] = torch.nan, torch.inf
    for dtype in (torch.float32, torch.bfloat16):
        found = torch.empty(40, 60, dtype=dtype)
        multiply(found, a, b)
        finite = found.isfinite()
        assert bool(found[3].isnan().all()) and not bool(finite[:, 6].any())
        finite[3], finite[:, 6] = True, True
        assert bool(finite.all())


@needs_amx
@pytest.mark.parametrize(
    ("out", "a", "b", "add", "sentence"),
    [
        ((4, 5), (4, 6), (7, 5), False, r"b must be \[6, 5\], got \[7, 5\]"),
        ((4, 5), (3, 6), (6, 5), False, r"a must be \[4, 6\], got \[3, 6\]"),
        ((4, 5), (4, 6), (6, 5), True, "out must be float32, .* got bfloat16"),
    ],
)
def test_factors_that_do_not_fit_are_refused(
    out: tuple[int, int], a: tuple[int, int], b: tuple[int, int], add: bool, sentence: str
) -> None:
    zeros = (torch.zeros(shape, dtype=torch.bfloat16) for shape in (out, a, b))
    with pytest.raises(RuntimeError, match=f"^bfloat16_matmul: {sentence}"):
        multiply(*zeros, add=add)


@needs_amx
def test_other_dtypes_and_strides_are_refused() -> None:
    out, a, b = torch.zeros(4, 4), torch.zeros(4, 8).bfloat16(), torch.zeros(4, 4).bfloat16()
    with pytest.raises(RuntimeError, match=r"^bfloat16_matmul: a must have contiguous rows or col"):
        multiply(out, a.as_strided((4, 4), (8, 2)), b)
    with pytest.raises(RuntimeError, match=r"^bfloat16_matmul: b must be bfloat16, got float32"):
        multiply(out, b, b.float())
    for wrong in (out.T, out[:1].expand(4, 4)):
        with pytest.raises(RuntimeError, match=r"^bfloat16_matmul: out must have contiguous rows"):
            multiply(wrong, b, b)


@pytest.mark.skipif(
    platform.machine() != "x86_64" or not Path("/proc/cpuinfo").exists(),
    reason="Linux describes the processor",
)
def test_amx_is_used_where_the_processor_and_the_system_have_it() -> None:
    flags = set(re.findall(r"\w+", Path("/proc/cpuinfo").read_text()))
    there = {"amx_tile", "amx_bf16", "avx512bw", "avx512vl", "avx512_bf16", "bmi2"} <= flags
    arch_prctl, request, tiles = 158, 0x1023, 18
    compiler, number = build_info()["compiler"].split()
    built = compiler == "GNU" and int(number.split(".")[0]) >= 12
    granted = there and ctypes.CDLL(None).syscall(arch_prctl, request, tiles) == 0
    assert has_amx() == (built and granted)
