"""What the kernels are to reach on an H100, as ratios within one run, and whether they did."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from leaf_ext.testing import cases

from .results import Results


@dataclass(frozen=True)
class Target:
    """`measured` has one entry a case, None where there is no number."""

    what: str
    limit: float
    at_least: bool
    measured: dict[str, float | None]
    unit: str

    @property
    def reached(self) -> str:
        found = [value for value in self.measured.values() if value is not None]
        if any((v < self.limit) if self.at_least else (v > self.limit) for v in found):
            return "no"
        if len(found) == len(self.measured):
            return "yes"
        return "not all measured" if found else "not measured"

    def cells(self) -> tuple[str, str, str, str]:
        wanted = f"{'at least' if self.at_least else 'at most'} {self._write(self.limit)}"
        values = (f"{case}: {self._write(value)}" for case, value in self.measured.items())
        return self.what, wanted, self.reached, "; ".join(values)

    def _write(self, value: float | None) -> str:
        if value is None:
            return "-"
        return f"{value:.0%}" if self.unit == "%" else f"{value:.3g} {self.unit}"


def targets(results: Results) -> list[Target]:
    return [*_logits(results), *_linear(results), *_detection(results)]


def _each(
    table: Iterable[object], value: Callable[[object], float | None]
) -> dict[str, float | None]:
    return {str(case): value(case) for case in table}


def _logits(results: Results) -> Iterator[Target]:
    table = [case for case in cases.GPU_KL_CASES if case.student_vocabulary <= 152_000]
    for variant, share in (("cuda inplace", 0.9), ("triton inplace", 0.55)):
        measured = _each(table, lambda case, v=variant: results.share_of_copy("dual_kl", case, v))
        yield Target(f"`dual_kl` {variant}, share of copy", share, True, measured, "%")
    for than, factor in (("liger KLDiv", 6.0), ("compiled", 3.0)):
        measured = _each(
            table,
            lambda case, t=than: results.times_faster("dual_kl", case, "cuda inplace", t),
        )
        yield Target(f"`dual_kl` cuda inplace, speed of {than}", factor, True, measured, "x")


def _linear(results: Results) -> Iterator[Target]:
    op, table = "linear_dual_kl", cases.GPU_LINEAR_CASES

    def products(case: object) -> float | None:
        speed = results.times_faster(op, case, "cuda", "bare products")
        return None if speed is None else 1 / speed

    def extra(case: object) -> float | None:
        row = results.timed(op, case, "cuda")
        found = row and row.get("extra_bytes")
        return None if found is None else found / 1e9

    yield Target(f"`{op}` cuda, time of the bare products", 1.3, False, _each(table, products), "x")
    chunked = _each(table, lambda case: results.times_faster(op, case, "cuda", "liger chunked JSD"))
    yield Target(f"`{op}` cuda, speed of liger chunked JSD", 1.5, True, chunked, "x")
    for case, limit in zip(table, (3.3, 3.3, 4.4), strict=True):
        what = f"`{op}` cuda, memory beyond the returned gradients"
        yield Target(what, limit, False, _each([case], extra), "GB")
    first = extra(table[0])
    growth = _each(
        cases.GPU_LONG_LINEAR_CASES,
        lambda case: None if not (found := extra(case)) or not first else found / first,
    )
    yield Target(f"`{op}` cuda, that memory over that of {table[0]}", 1.1, False, growth, "x")


def _detection(results: Results) -> Iterator[Target]:
    share = _each(
        cases.GPU_NORM_CASES, lambda case: results.share_of_copy("grad_norm", case, "cuda")
    )
    both = _each(
        cases.GPU_SPANS_CASES[2:], lambda case: results.share_of_copy("detect_spans", case, "cuda")
    )
    yield Target("`grad_norm` cuda, share of copy", 0.9, True, share, "%")
    yield Target("both models in `detect_spans` cuda, share of copy", 0.9, True, both, "%")

    def microseconds(case: object) -> float | None:
        row = results.timed("detect_spans", case, "cuda graph")
        return row["seconds"] * 1e6 if row else None

    time = _each(cases.GPU_SPANS_CASES[:1], microseconds)
    yield Target("`detect_spans` cuda graph, on the device", 25, False, time, "us")
