"""`detect_spans` against a definition in plain Python, on random sequences."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import cast

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import leaf_ext
from leaf_ext.dispatch import Backend

SETTINGS = settings(
    max_examples=80,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@dataclass(frozen=True)
class Options:
    threshold: float
    rule: str
    cap: float
    teacher_max: float | None
    join_gap: int
    min_length: int
    scale: str = "minmax"
    student_weight: float = 1.0


@dataclass(frozen=True)
class Token:
    teacher: float
    student: float
    domain: bool
    prunable: bool


def normalized(values: list[float]) -> list[float]:
    low, high = min(values), max(values)
    return [(value - low) / (high - low) if high > low else 0.0 for value in values]


def logarithms(values: list[float]) -> list[float]:
    high = max(values)
    return [math.log(max(value, 1e-4 * high)) if high > 0 else 0.0 for value in values]


def margins(tokens: list[Token], options: Options) -> dict[int, float]:
    """Return how far below the limits each token of the domain is; none if there is no evidence."""
    inside = [i for i, token in enumerate(tokens) if token.domain]
    if not inside:
        return {}
    if not all(math.isfinite(tokens[i].teacher + tokens[i].student) for i in inside):
        return {}
    both = ([tokens[i].teacher for i in inside], [tokens[i].student for i in inside])
    teacher, student = map(logarithms if options.scale == "log" else normalized, both)
    gap = [a - options.student_weight * b for a, b in zip(teacher, student, strict=True)]
    if max(gap) - min(gap) < 1e-6:
        return {}
    score = normalized(gap)
    cut = options.threshold
    if options.rule == "quantile":
        rank = min(len(inside) - 1, math.floor(options.threshold * len(inside)))
        cut = min(options.cap, sorted(score)[rank])
    highest = math.inf if options.teacher_max is None else options.teacher_max
    return {
        position: min(cut - value, highest - saliency)
        for position, value, saliency in zip(inside, score, normalized(both[0]), strict=True)
    }


def confounders(tokens: list[Token], options: Options) -> list[int]:
    """Return the positions of confounding tokens, by the definition for single tokens."""
    return [i for i, far in margins(tokens, options).items() if tokens[i].prunable and far >= 0]


def spans(tokens: list[Token], positions: list[int], options: Options) -> list[tuple[int, int]]:
    """Return the runs of confounders, joined over short stretches of the domain."""
    found: list[list[int]] = []
    for position in positions:
        if found:
            between = tokens[found[-1][1] : position]
            if len(between) <= options.join_gap and all(token.domain for token in between):
                found[-1][1] = position + 1
                continue
        found.append([position, position + 1])
    return [(start, stop) for start, stop in found if stop - start >= options.min_length]


# Quarters are exact in binary. If both models' extremes are 0 and 1, every score is exact too.
quarters = st.integers(0, 4).map(lambda n: n / 4)
tokens = st.builds(
    Token,
    teacher=quarters,
    student=quarters,
    domain=st.sampled_from([True, True, True, False]),
    prunable=st.sampled_from([True, True, False]),
)
sometimes_broken = st.one_of(quarters, quarters, st.sampled_from([math.nan, math.inf]))
wild = st.builds(
    Token,
    teacher=sometimes_broken,
    student=sometimes_broken,
    domain=st.booleans(),
    prunable=st.booleans(),
)
options = st.builds(
    Options,
    threshold=st.sampled_from([0.0, 0.125, 0.25, 0.3, 0.5, 0.75, 1.0]),
    rule=st.sampled_from(["absolute", "quantile"]),
    cap=st.sampled_from([0.25, 0.5, 1.0]),
    teacher_max=st.sampled_from([None, 0.0, 0.5, 1.0]),
    join_gap=st.integers(0, 3),
    min_length=st.integers(1, 4),
)


# Norms as float32 holds them, some of them below the floor of a logarithm.
values = st.sampled_from([-1.0, 0.0, 2.0**-20, 2.0**-11, 0.125, 0.375, 0.5, 0.75, 1.0, 3.0])
norms = st.builds(
    Token,
    teacher=values,
    student=values,
    domain=st.sampled_from([True, True, True, False]),
    prunable=st.sampled_from([True, True, False]),
)
weighted_options = st.builds(
    Options,
    threshold=st.sampled_from([0.0, 0.125, 0.25, 0.3, 0.5, 0.75, 1.0]),
    rule=st.sampled_from(["absolute", "quantile"]),
    cap=st.sampled_from([0.25, 0.5, 1.0]),
    teacher_max=st.sampled_from([None, 0.3, 1.0]),
    join_gap=st.integers(0, 3),
    min_length=st.integers(1, 4),
    scale=st.sampled_from(["minmax", "log", "log"]),
    student_weight=st.sampled_from([0.0, 0.3, 0.5, 1.0, 1.0, 2.5]),
)
PADDING = Token(math.nan, math.inf, False, True)


def detect(
    sequences: list[list[Token]], options: Options, backend: str, *, packed: bool = True
) -> leaf_ext.Spans:
    """Detect in all sequences, packed or padded; in float64 with the reference."""
    lengths = [len(sequence) for sequence in sequences]
    longest = max(lengths, default=0)
    if not packed:
        sequences = [s + [PADDING] * (longest - len(s)) for s in sequences]
    flat = [token for sequence in sequences for token in sequence]
    shape = (len(flat),) if packed else (len(sequences), longest)
    dtype = torch.float64 if backend == "reference" else torch.float32
    return leaf_ext.detect_spans(
        torch.tensor([token.teacher for token in flat], dtype=dtype).view(shape),
        torch.tensor([token.student for token in flat], dtype=dtype).view(shape),
        torch.tensor([token.domain for token in flat], dtype=torch.bool).view(shape),
        prunable=torch.tensor([token.prunable for token in flat], dtype=torch.bool).view(shape),
        scale="log" if options.scale == "log" else "minmax",
        student_weight=options.student_weight,
        threshold=options.threshold,
        rule="quantile" if options.rule == "quantile" else "absolute",
        cap=options.cap,
        teacher_max=options.teacher_max,
        join_gap=options.join_gap,
        min_length=options.min_length,
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0) if packed else None,
        max_seqlen=longest if packed else None,
        backend=cast(Backend, backend),
    )


def anchored(sequence: list[Token]) -> list[Token]:
    """Add both models' extremes, with which float32 and exact arithmetic agree to the bit."""
    anchors = [Token(0.0, 1.0, True, False), Token(1.0, 0.0, True, False)]
    return [anchors[0], *sequence, anchors[1]]


@SETTINGS
@given(sequences=st.lists(st.lists(tokens, max_size=24).map(anchored), max_size=4), options=options)
def test_spans_are_the_definition(
    sequences: list[list[Token]], options: Options, backend: str
) -> None:
    expected = [spans(s, confounders(s, options), options) for s in sequences]
    for packed in (True, False):
        assert detect(sequences, options, backend, packed=packed).tolist() == expected


@SETTINGS
@given(
    sequences=st.lists(st.lists(norms, max_size=24), max_size=4),
    options=weighted_options,
    factor=st.sampled_from([2.0**-70, 1.0, 2.0**60]),
)
def test_scales_and_weights_are_the_definition(
    sequences: list[list[Token]], options: Options, factor: float, backend: str
) -> None:
    """Only for tokens that lie at the cut may rounding decide."""
    scaled = [[replace(t, teacher=t.teacher * factor) for t in tokens] for tokens in sequences]
    found = detect(scaled, options, backend)
    lengths = [len(tokens) for tokens in sequences]
    rows = found.confounder.split(lengths) if lengths else ()
    for tokens, row, runs in zip(sequences, rows, found.tolist(), strict=True):
        far = margins(tokens, options)
        marked = row.nonzero().flatten().tolist()
        assert runs == spans(tokens, marked, options)
        for i, token in enumerate(tokens):
            if i not in far or not token.prunable or abs(far[i]) > 1e-5:
                expected = i in far and token.prunable and far[i] > 0
                assert (i in marked) == expected


@SETTINGS
@given(
    sequences=st.lists(st.lists(wild, max_size=12), min_size=1, max_size=3),
    options=st.one_of(options, weighted_options),
)
def test_not_finite_sequences_are_flagged_and_have_no_span(
    sequences: list[list[Token]], options: Options, backend: str
) -> None:
    result = detect(sequences, options, backend)
    broken = [
        any(t.domain and not math.isfinite(t.teacher) for t in s)
        + 2 * any(t.domain and not math.isfinite(t.student) for t in s)
        for s in sequences
    ]
    assert result.status.tolist() == broken
    for flag, found in zip(broken, result.tolist(), strict=True):
        assert not (flag and found)


@SETTINGS
@given(sequences=st.lists(st.lists(tokens, max_size=24), max_size=4), options=options)
def test_spans_are_sorted_disjoint_and_inside_the_domain(
    sequences: list[list[Token]], options: Options, backend: str
) -> None:
    for sequence, found in zip(
        sequences, detect(sequences, options, backend).tolist(), strict=True
    ):
        assert all(left[1] < right[0] for left, right in pairwise(found))
        for start, stop in found:
            assert stop - start >= options.min_length
            assert all(token.domain for token in sequence[start:stop])
            assert sequence[start].prunable and sequence[stop - 1].prunable


@SETTINGS
@given(
    sequences=st.lists(st.lists(wild, max_size=24), max_size=3),
    options=st.one_of(options, weighted_options),
)
def test_padding_and_packing_agree(
    sequences: list[list[Token]], options: Options, backend: str
) -> None:
    packed = detect(sequences, options, backend)
    padded = detect(sequences, options, backend, packed=False)
    assert packed.tolist() == padded.tolist()
    assert torch.equal(packed.status, padded.status)
    real = [row[: len(s)] for row, s in zip(padded.score, sequences, strict=True)]
    score = torch.cat(real) if real else packed.score
    assert torch.equal(packed.score.nan_to_num(-1.0), score.nan_to_num(-1.0))
