"""What is timed on a GPU, in the order of its importance."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from leaf_ext.testing import cases

from .detection import Norm, Spans
from .losses import KL, Linear
from .subject import Setting, Subject

COPY = "copy"
_KL = (
    *("cuda inplace", "cuda", "triton inplace", "triton", "liger KLDiv", "compiled", "eager"),
    *("quack cross entropy", "liger JSD", "reference"),
)
_OTHER_KL = ("cuda inplace", "cuda", "triton inplace", "triton", "eager")
_LINEAR = (
    *("cuda", "bare products", "triton", "liger chunked JSD", "liger fused JSD"),
    *("compiled", "eager", "reference"),
)
_LONG_LINEAR = ("cuda", "bare products", "triton")
_NORM = ("cuda", "triton", "compiled", "eager", "reference")
_SPANS = ("cuda graph", "cuda", "triton graph", "triton", "compiled", "eager", "reference")

_SUBJECTS = {"dual_kl": KL, "linear_dual_kl": Linear, "grad_norm": Norm, "detect_spans": Spans}
Case = cases.KLCase | cases.LinearCase | cases.NormCase | cases.SpansCase


@dataclass(frozen=True)
class Job:
    """One line of the table."""

    op: str
    case: str
    variant: str


@dataclass(frozen=True)
class _Group:
    """Jobs that share their inputs and the truth about them."""

    op: str
    case: Case
    variants: tuple[str, ...]


def _groups(tiny: bool) -> Iterator[_Group]:
    def each(op: str, table: Iterable[Case], variants: tuple[str, ...]) -> Iterator[_Group]:
        return (_Group(op, case, variants) for case in table)

    yield from each("dual_kl", cases.GPU_KL_CASES[:1], _KL)
    yield from each("detect_spans", cases.GPU_SPANS_CASES[:1], _SPANS)
    yield from each("grad_norm", cases.GPU_NORM_CASES, _NORM)
    yield from each("linear_dual_kl", cases.GPU_LINEAR_CASES[:1], _LINEAR)
    if not tiny:  # at other sizes the same again
        yield from each("dual_kl", cases.GPU_KL_CASES[1:], _KL)
        yield from each("linear_dual_kl", cases.GPU_LINEAR_CASES[1:], _LINEAR)
    yield from each("linear_dual_kl", cases.GPU_LONG_LINEAR_CASES, _LONG_LINEAR)
    yield from each("detect_spans", cases.GPU_SPANS_CASES[2 if tiny else 1 :], _SPANS)
    yield from each("dual_kl", cases.GPU_OTHER_KL_CASES[: 1 if tiny else None], _OTHER_KL)


def plan(tiny: bool) -> list[Job]:
    """The copy comes first: the share of its bandwidth is what most of the rest is measured by."""
    jobs = [Job(COPY, "device to device", COPY)]
    for group in _groups(tiny):
        jobs += [Job(group.op, str(group.case), variant) for variant in group.variants]
    return jobs


def subject(job: Job, setting: Setting) -> Subject:
    """The inputs of a job, and the truth about them."""
    groups = _groups(setting.tiny)
    case = next(g.case for g in groups if (g.op, str(g.case)) == (job.op, job.case))
    made: Subject = _SUBJECTS[job.op](case, setting)
    return made
