"""Which characters a counterfactual leaves out of the user's text."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from leaf_distill.config import Strategy
from leaf_distill.data.dataset import Rejection
from leaf_distill.detection.spans import Detection, token_range

CharacterRange = tuple[int, int]


@dataclass(frozen=True)
class Candidate:
    """One cut prompt: cut holds sorted, disjoint [start, stop) characters of the user's text."""

    row_id: int
    candidate_id: int
    cut: tuple[CharacterRange, ...]
    text: str


def cut(text: str, ranges: Sequence[CharacterRange]) -> str:
    """Return text without exactly the characters of ranges; nothing else is touched.

    What a token owns goes with it, which for most tokenizers is the space before a word; where the
    space is no token's own, two spaces stay side by side. ValueError unless the ranges are sorted,
    disjoint and inside the text.
    """
    kept, end = [], 0
    for start, stop in ranges:
        if not end <= start < stop <= len(text):
            raise ValueError(
                f"ranges: needs sorted, disjoint, non-empty ranges within {len(text)} characters, "
                f"came {list(ranges)}"
            )
        kept.append(text[end:start])
        end = stop
    return "".join(kept) + text[end:]


def merge(ranges: Iterable[CharacterRange]) -> tuple[CharacterRange, ...]:
    """Return the union of ranges, sorted; ranges that overlap or touch become one."""
    merged: list[CharacterRange] = []
    for start, stop in sorted(ranges):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
        else:
            merged.append((start, stop))
    return tuple(merged)


def candidates(
    text: str, detection: Detection, *, strategy: Strategy, seed: int = 0
) -> tuple[list[Candidate], list[Rejection]]:
    """Return the counterfactuals of one row, and those that came to nothing with the reason.

    span cuts one detected span at a time, collective all of them together (the paper's two);
    random_tokens cuts as many tokens as were detected, together, drawn from the prunable ones (the
    paper's control); random_spans cuts one run at a time, as many and as long as those detected,
    disjoint where there is room. The draw depends on seed and row_id only, never on other rows. A
    cut that leaves nothing but whitespace, changes nothing, or repeats an earlier one is left out.
    """
    if not detection.spans:
        return [], [Rejection(detection.row_id, -1, "prune", "no_span", "no confounder was found")]
    chosen = _choose(detection, strategy, random.Random(f"{seed}/{detection.row_id}"))
    found: list[Candidate] = []
    left: list[Rejection] = []
    seen: set[str] = set()
    for candidate_id, spans in enumerate(chosen):
        ranges = merge(token_range(detection.offsets, span) for span in spans)
        shorter = cut(text, ranges)
        reason = _obstacle(text, shorter, seen)
        if reason:
            left.append(Rejection(detection.row_id, candidate_id, "prune", *reason))
            continue
        seen.add(shorter)
        found.append(Candidate(detection.row_id, candidate_id, ranges, shorter))
    return found, left


def _obstacle(text: str, shorter: str, seen: set[str]) -> tuple[str, str] | None:
    if not shorter.strip():
        return "empty_after_cut", "the cut would leave nothing of the prompt"
    if shorter.strip() == text.strip():
        return "unchanged", "the cut would change nothing but whitespace at the ends"
    if shorter in seen:
        return "duplicate", "another cut of this row leaves the same text"
    return None


def _choose(
    detection: Detection, strategy: Strategy, draw: random.Random
) -> list[list[tuple[int, int]]]:
    """Return the token spans of each candidate."""
    spans = list(detection.spans)
    if strategy == "span":
        return [[span] for span in spans]
    if strategy == "collective":
        return [spans]
    if strategy == "random_tokens":
        pool = [index for index, prunable in enumerate(detection.prunable) if prunable]
        count = min(len(pool), sum(stop - start for start, stop in spans))
        return [[(index, index + 1) for index in sorted(draw.sample(pool, count))]]
    return [[span] for span in _random_spans(detection, draw)]


def _random_spans(detection: Detection, draw: random.Random) -> list[tuple[int, int]]:
    """Draw a run for each detected span, the longest first, since it is the hardest to place."""
    lengths = sorted((stop - start for start, stop in detection.spans), reverse=True)
    taken: list[tuple[int, int]] = []
    for length in lengths:
        windows = _windows(detection, length)
        free = [
            (start, stop)
            for start, stop in windows
            if all(stop <= other[0] or other[1] <= start for other in taken)
        ]
        taken.append(draw.choice(free or windows))
    return sorted(taken)


def _windows(detection: Detection, length: int) -> list[tuple[int, int]]:
    """Return the runs of tokens side by side, all prunable where there is such a run.

    There always is one of either kind, since a span of this length was found in the same row.
    """
    slot, count = detection.slot, len(detection.slot)
    runs = [
        (start, start + length)
        for start in range(count - length + 1)
        if slot[start + length - 1] - slot[start] == length - 1
    ]
    return [run for run in runs if detection.prunable[run[0] : run[1]].all()] or runs
