"""Counts what samples.parquet holds: scores, lengths of spans, and the strings that were cut."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from leaf_distill.io import reading
from leaf_distill.wording import counted

BINS = 40
"""Bars of the histogram of scores, from 0 to 1."""

LONGEST, FEWEST = 12, 6
"""Bars of the histogram of span lengths: longer spans share one more, and there are so many."""

STRINGS, CHARACTERS = 15, 80
"""Lines of the table of cut strings, and what is shown of a long one."""

LEVELS = ("prompts", "responses")
"""The texts that are searched, in words: segment 0, and the beginnings of responses."""

Limits = Mapping[str, tuple[str, float]]

COLUMNS = ("row_id", "segment", "text", "offsets", "prunable", "score", "confounder", "spans")


@dataclass(frozen=True)
class Bar:
    """A bar of a histogram: the range that it counts, and how many of these are marked."""

    name: str
    count: int
    marked: int = 0


@dataclass(frozen=True)
class Histogram:
    """A histogram with its axis: places are percent of its width.

    Attributes:
        title: above it.
        unit: what the bars count, in the plural.
        marked: what the marked part of a bar counts; empty: nothing is marked.
        axis: the name of the horizontal axis, with its unit.
        bars: from the left.
        ticks: place and number on the axis.
        lines: place and name of the vertical lines.
        note: below it, in words.
    """

    title: str
    unit: str
    axis: str
    bars: Sequence[Bar]
    ticks: Sequence[tuple[float, str]]
    lines: Sequence[tuple[float, str]] = ()
    note: str = ""
    marked: str = ""

    @property
    def top(self) -> int:
        return max(bar.count for bar in self.bars)


@dataclass(frozen=True)
class CutString:
    """A string that candidates lack, with single blanks, and how often it was cut and kept cut."""

    text: str
    cut: int
    kept: int


@dataclass(frozen=True)
class Measured:
    """The counts of an arm.

    Attributes:
        histograms: of scores and of span lengths, for each level that was searched.
        spanned: rows with a span, or None where the strategy needs none.
        strings: the most often cut ones.
        different: how many different strings were cut.
        cuts: how many ranges were cut, of all candidates.
    """

    histograms: Sequence[Histogram]
    spanned: int | None
    strings: Sequence[CutString]
    different: int
    cuts: int


def read_measured(arm: Path, limits: Limits, *, spans: bool) -> Measured:
    """Count what samples.parquet of an arm holds.

    Args:
        arm: its directory.
        limits: of each level of `LEVELS`, the name and value of the line in the scores.
        spans: whether the strategy cuts the spans that detection found.

    Raises:
        ValueError: the file cannot be read or has another shape.
    """
    path = arm / "samples.parquet"
    with reading(path):
        table = pq.read_table(
            path, columns=[*COLUMNS, "candidates"], page_checksum_verification=True
        )
        histograms: list[Histogram] = []
        segments = table["segment"].to_numpy()
        for name, level in zip(LEVELS, (segments == 0, segments > 0), strict=True):
            if level.any():
                part = table.filter(pa.array(level))
                histograms += _histograms(part, name, limits.get(name), spans=spans)
        counts = _strings(table)
        found = {row for row, own in zip(*_lists(table, "row_id", "spans"), strict=True) if own}
    order = sorted(counts.items(), key=lambda one: (-one[1][0], -one[1][1], one[0]))
    return Measured(
        histograms=histograms,
        spanned=len(found) if spans else None,
        strings=[CutString(_short(text), cut, kept) for text, (cut, kept) in order[:STRINGS]],
        different=len(counts),
        cuts=sum(cut for cut, _ in counts.values()),
    )


def _lists(table: pa.Table, *names: str) -> Iterator[list[Any]]:
    return (table[name].to_pylist() for name in names)


def _histograms(
    table: pa.Table, level: str, limit: tuple[str, float] | None, *, spans: bool
) -> Iterator[Histogram]:
    prunable = _flat(table["prunable"]).astype(bool)
    scores = _flat(table["score"]).astype(float)
    shown = prunable & np.isfinite(scores)
    if shown.any():
        flagged = _flat(table["confounder"]).astype(bool)[shown]
        yield _score_histogram(scores[shown], flagged, level, limit)
    if lengths := list(_span_lengths(table)) if spans else []:
        yield _length_histogram(lengths, level)


def _flat(column: pa.ChunkedArray) -> npt.NDArray[Any]:
    values: npt.NDArray[Any] = pc.list_flatten(column).to_numpy()
    return values


def _score_histogram(
    scores: npt.NDArray[Any],
    flagged: npt.NDArray[np.bool_],
    level: str,
    limit: tuple[str, float] | None,
) -> Histogram:
    if not limit:
        flagged = np.zeros_like(flagged)
    edges = np.linspace(0, 1, BINS + 1)
    counts, marked = (np.histogram(some, edges)[0] for some in (scores, scores[flagged]))
    number, tokens = int(flagged.sum()), counted(len(scores), "prunable token")
    return Histogram(
        title=f"Scores of the tokens in {level}",
        unit="tokens",
        axis="score (Eq. 5): low is suspect",
        bars=[
            Bar(f"{low:.3f} to {high:.3f}", int(count), int(part))
            for count, part, (low, high) in zip(counts, marked, pairwise(edges), strict=True)
        ],
        ticks=[(25.0 * at, f"{at / 4:g}") for at in range(5)],
        lines=[(100 * limit[1], f"{limit[0]} {limit[1]:g}")] if limit else [],
        note=f"{number:,} of {tokens} ({number / len(scores):.1%}) were flagged as confounders "
        "(orange)."
        if limit
        else f"{tokens}. The strategy has no threshold.",
        marked="flagged" if limit else "",
    )


def _span_lengths(table: pa.Table) -> Iterator[tuple[int, int]]:
    """Yield the tokens and the characters of each span."""
    offsets = pc.list_flatten(pc.list_flatten(table["offsets"])).to_numpy().reshape(-1, 2)
    ends = np.cumsum(pc.list_value_length(table["offsets"]).to_numpy())
    for spans, own in zip(table["spans"].to_pylist(), np.split(offsets, ends[:-1]), strict=True):
        starts, stops = own.T
        for start, stop in spans:
            inside = (starts < stop) & (start < stops) & (starts < stops)
            yield int(inside.sum()), stop - start


def _length_histogram(lengths: Sequence[tuple[int, int]], level: str) -> Histogram:
    tokens, characters = zip(*lengths, strict=True)
    counts = Counter(min(one, LONGEST + 1) for one in tokens)
    last = max(*counts, FEWEST)
    names = [str(one) for one in range(1, last + 1)]
    if last > LONGEST:
        names[-1] = f"{last}+"
    return Histogram(
        title=f"Lengths of the spans in {level}",
        unit="spans",
        axis="tokens of the student in a span",
        bars=[Bar(name, counts[at]) for at, name in enumerate(names, 1)],
        ticks=[(100 * (at + 0.5) / last, name) for at, name in enumerate(names)],
        note=f"{counted(len(lengths), 'span')}; the median has "
        f"{counted(statistics.median(tokens), 'token')} and "
        f"{counted(statistics.median(characters), 'character')}.",
    )


def _strings(table: pa.Table) -> dict[str, tuple[int, int]]:
    """Return how often each string was cut, and in how many of these the candidate was kept."""
    counts: dict[str, tuple[int, int]] = {}
    for text, candidates in zip(*_lists(table, "text", "candidates"), strict=True):
        for candidate in candidates:
            for start, stop in candidate["cut"]:
                if string := " ".join(text[start:stop].split()):
                    cut, kept = counts.get(string, (0, 0))
                    counts[string] = (cut + 1, kept + bool(candidate["kept"]))
    return counts


def _short(text: str) -> str:
    return text if len(text) <= CHARACTERS else f"{text[: CHARACTERS - 1].rstrip()}…"
