"""Candidates: prompts without some characters of the user's text."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence

import numpy as np

from leaf_distill.config import Strategy
from leaf_distill.data.example import Example, Floats, Range
from leaf_distill.detection.spans import characters


def propose(
    example: Example, *, strategy: Strategy, seed: int = 0, perplexity: Floats | None = None
) -> None:
    """Set the example's candidates; it leaves where it has no span.

    Args:
        example: a row with spans. A candidate that leaves nothing but whitespace, changes nothing,
            or repeats an earlier one is kept with an outcome.
        strategy: "span" cuts one detected span at a time, "collective" all of them together (the
            paper's two). The others are controls that cut as many tokens: "random_tokens" draws
            prunable tokens and cuts them together (the paper's control); "random_spans" draws one
            run for each span, as long, disjoint where there is room; "student_saliency" and
            "perplexity" take the tokens with the highest value, and cut one run at a time.
        seed: with the row_id alone it decides the draw, which no other row changes.
        perplexity: float32 [d], needed for the strategy of that name.
    """
    if not example.spans:
        example.leave("prune", "no_span", "no confounder was found")
        return
    text = example.text
    seen: set[str] = set()
    for candidate_id, spans in enumerate(_choose(example, strategy, seed, perplexity)):
        ranges = merge(characters(example, span) for span in spans)
        shorter = cut(text, ranges)
        message = {**example.messages[-1], "content": shorter}
        candidate = Example(
            row_id=example.row_id,
            messages=(*example.messages[:-1], message),
            completion=example.completion,
            answer=example.answer,
            reply=example.reply,
            template_kwargs=example.template_kwargs,
            tests=example.tests,
            source=example.source,
            candidate_id=candidate_id,
            cut=ranges,
            strategy=strategy,
        )
        if any(_inside_word(text, at) for one in ranges for at in one):
            candidate.notes.append("cut_inside_word")
        _check(candidate, text, seen)
        seen.add(shorter)
        example.candidates.append(candidate)


def cut(text: str, ranges: Sequence[Range]) -> str:
    """Return text without exactly the characters of ranges.

    The characters of a token include, for most tokenizers, the space before its word; where the
    space belongs to no token, two spaces stay side by side.

    Raises:
        ValueError: the ranges are not sorted, disjoint and inside the text.
    """
    kept, end = [], 0
    for start, stop in ranges:
        if not end <= start < stop <= len(text):
            raise ValueError(
                f"ranges: must be sorted, disjoint, non-empty and within {len(text)} characters, "
                f"got {list(ranges)}"
            )
        kept.append(text[end:start])
        end = stop
    return "".join(kept) + text[end:]


def merge(ranges: Iterable[Range]) -> tuple[Range, ...]:
    """Return the union of ranges, sorted; ranges that overlap or touch become one."""
    merged: list[Range] = []
    for start, stop in sorted(ranges):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
        else:
            merged.append((start, stop))
    return tuple(merged)


def _check(candidate: Example, text: str, seen: set[str]) -> None:
    shorter = candidate.text
    if not shorter.strip():
        candidate.leave("prune", "empty_after_cut", "the cut leaves nothing of the prompt")
    elif shorter.strip() == text.strip():
        candidate.leave("prune", "unchanged", "the cut changes whitespace at the ends only")
    elif shorter in seen:
        candidate.leave("prune", "duplicate", "another cut of this row leaves the same text")


def _inside_word(text: str, at: int) -> bool:
    """Whether a border between two characters splits a word or a number."""
    return 0 < at < len(text) and text[at - 1].isalnum() and text[at].isalnum()


def _choose(
    example: Example, strategy: Strategy, seed: int, perplexity: Floats | None
) -> list[list[Range]]:
    """Return the token spans of each candidate."""
    spans = list(example.spans)
    count = sum(stop - start for start, stop in spans)
    draw = random.Random(f"{seed}/{example.row_id}")
    if strategy == "span":
        return [[span] for span in spans]
    if strategy == "collective":
        return [spans]
    if strategy == "random_spans":
        return [[span] for span in _random_spans(example, draw)]
    assert example.prunable is not None
    pool = np.flatnonzero(example.prunable).tolist()
    if strategy == "random_tokens":
        return [[(at, at + 1) for at in sorted(draw.sample(pool, min(len(pool), count)))]]
    value = example.saliency["student"] if strategy == "student_saliency" else perplexity
    assert value is not None
    highest = sorted(pool, key=lambda at: (-value[at], at))[:count]
    return [[span] for span in _runs(example, sorted(highest))]


def _runs(example: Example, tokens: Sequence[int]) -> list[Range]:
    """Return maximal runs of tokens that stand side by side, from sorted indices."""
    assert example.slot is not None
    runs: list[Range] = []
    for at in tokens:
        if runs and runs[-1][1] == at and example.slot[at] - example.slot[at - 1] == 1:
            runs[-1] = (runs[-1][0], at + 1)
        else:
            runs.append((at, at + 1))
    return runs


def _random_spans(example: Example, draw: random.Random) -> list[Range]:
    """Draw a run for each detected span, the longest first, since it is the hardest to place."""
    lengths = sorted((stop - start for start, stop in example.spans), reverse=True)
    taken: list[Range] = []
    for length in lengths:
        windows = _windows(example, length)
        free = [
            (start, stop)
            for start, stop in windows
            if all(stop <= other[0] or other[1] <= start for other in taken)
        ]
        taken.append(draw.choice(free or windows))
    return sorted(taken)


def _windows(example: Example, length: int) -> list[Range]:
    """Return the runs of `length` tokens side by side, all prunable where there is such a run.

    There is always one of either kind, since a span of this length was found in the row.
    """
    assert example.slot is not None and example.prunable is not None
    slot, prunable = example.slot, example.prunable
    runs = [
        (start, start + length)
        for start in range(len(slot) - length + 1)
        if slot[start + length - 1] - slot[start] == length - 1
    ]
    return [run for run in runs if prunable[run[0] : run[1]].all()] or runs
