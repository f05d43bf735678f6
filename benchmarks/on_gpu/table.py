"""The table of jobs that are timed on a GPU, the most important first."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

from leaf_ext.testing import cases

# A variant is a backend or another project, with its options. `narrow`: the bfloat16 gradient
# overwrites float32 logits, as in linear_dual_kl in training.
_TRAINING = ("cuda narrow rows", "cuda narrow", "triton narrow rows")
_OURS = ("cuda inplace", "cuda inplace rows", "cuda", "triton inplace")
_PEERS = ("liger KLDiv", "orda")
_LINEAR = (
    *("cuda", "cuda rows", "bare products", "triton"),
    *("liger chunked JSD", "liger fused JSD", "orda"),
)
_NORM = ("cuda", "triton")
_SPANS = ("cuda graph", "cuda", "triton graph")
# torch.compile takes up to a minute for a shape, so it gets one static shape of each op.
_TORCH = ("compiled", "eager")

# Other divergences, labels, and a teacher's top k.
_OTHERS = ("cuda inplace", "triton inplace")
_TOPK = ("cuda inplace", "cuda inplace rows", "triton inplace", "eager")

Case = cases.KLCase | cases.TopkCase | cases.LinearCase | cases.NormCase | cases.SpansCase | str


class Job(NamedTuple):
    """One line of the table."""

    op: str
    case: str
    variant: str


class Group(NamedTuple):
    """Jobs that share inputs and expected results. `late` jobs run after all other steps."""

    op: str
    case: Case
    variants: tuple[str, ...]
    late: bool = False


def groups(tiny: bool) -> Iterator[Group]:
    """Return the groups; if tiny, some of them, at a thousandth of the size or less."""
    training, kl, linear = cases.GPU_TRAINING_CASES, cases.GPU_KL_CASES, cases.GPU_LINEAR_CASES
    norms, spans, others = cases.GPU_NORM_CASES, cases.GPU_SPANS_CASES, cases.GPU_OTHER_KL_CASES
    found = [
        Group("copy", "1 GiB", ("copy",)),
        Group("dual_kl", training[0], _TRAINING),
        Group("dual_kl", kl[0], (*_OURS, *_PEERS, *_TORCH)),
        Group("linear_dual_kl", linear[0], (*_LINEAR, *_TORCH)),
        Group("grad_norm", norms[0], (*_NORM, *_TORCH)),
        Group("detect_spans", spans[0], (*_SPANS, *_TORCH)),
        Group("detect_spans", spans[1], ("cuda graph", "cuda", "triton")),
        *others_of_training(),
        *(Group("dual_kl", case, (*_OURS, *_PEERS)) for case in kl[1:]),
        *(Group("linear_dual_kl", case, ("cuda",)) for case in cases.GPU_LONG_LINEAR_CASES),
        *(Group("linear_dual_kl", case, _LINEAR) for case in linear[1:]),
        *(Group("dual_kl", case, _TRAINING, late=True) for case in training[1:]),
        *(Group("grad_norm", case, _NORM, late=True) for case in norms[1:]),
        *(Group("detect_spans", case, _SPANS, late=True) for case in spans[2:]),
        *(Group("dual_kl", case, _OURS[:3], late=True) for case in others),
    ]
    if not tiny:
        return iter(found)
    first = found[: 7 + len(others_of_training())]
    return (group._replace(case=shrunk(group.case)) for group in (*first, found[-1]))


def others_of_training() -> list[Group]:
    """Return the groups of what training takes with its other settings."""
    linear = (*cases.GPU_LINEAR_LABEL_CASES, *cases.GPU_LINEAR_OTHER_CASES)
    return [
        *(Group("dual_kl", case, _OTHERS) for case in cases.GPU_DIVERGENCE_CASES),
        *(Group("topk_kl", case, _TOPK) for case in cases.GPU_TOPK_CASES[:1]),
        *(Group("linear_dual_kl", case, ("cuda rows",)) for case in linear),
        *(Group("linear_topk_kl", case, ("cuda rows",)) for case in cases.GPU_LINEAR_TOPK_CASES),
        *(Group("topk_kl", case, _TOPK[:1], late=True) for case in cases.GPU_TOPK_CASES[1:]),
    ]


def shrunk(case: Case) -> Case:
    """Return a smaller case of the same name, for a rehearsal."""
    if isinstance(case, cases.KLCase):
        padding = case.teacher_vocabulary - case.student_vocabulary
        return replace(case, rows=8, student_vocabulary=129, teacher_vocabulary=129 + padding)
    if isinstance(case, cases.TopkCase):
        return replace(case, logits=shrunk(case.logits))
    if isinstance(case, cases.LinearCase):
        return replace(case, logits=shrunk(case.logits), student_hidden=20, teacher_hidden=40)
    if isinstance(case, cases.NormCase):
        return replace(case, shape=(2, 8, 81))
    if isinstance(case, cases.SpansCase):
        return replace(case, batch=2, length=40, hidden=case.hidden and (81, 20))
    return case


def jobs(group: Group) -> list[Job]:
    return [Job(group.op, str(group.case), variant) for variant in group.variants]


COPY = Job("copy", "1 GiB", "copy")
