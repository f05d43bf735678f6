"""Candidates: prompts, or beginnings of responses, that lack or change some of their characters."""

from __future__ import annotations

import random
from bisect import bisect_left, bisect_right
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any, Final, NamedTuple

import numpy as np

from leaf_distill.data.example import Example, Floats, Range
from leaf_distill.detection.config import LONG_UNITS, DetectConfig
from leaf_distill.detection.distractors import Distractors
from leaf_distill.detection.spans import characters
from leaf_distill.detection.substitution import Vocabulary
from leaf_distill.detection.units import UNITS, tidy, widen

Change = tuple[tuple[Range, ...], tuple[str, ...], float | None]
"""Ranges, the texts in their place (none: they are deleted), and the mean score of the tokens."""

WITHOUT_SPANS: Final = ("cumulative", "search", "distractors")
"""The strategies that do not begin with the spans that detection found."""


class RankedUnit(NamedTuple):
    """A phrase, clause or sentence: its characters, its prunable tokens and their mean score."""

    range: Range
    tokens: tuple[int, ...]
    score: float


def propose(
    example: Example,
    config: DetectConfig,
    *,
    perplexity: Floats | None = None,
    vocabulary: Vocabulary | None = None,
    distractors: Distractors | None = None,
    first_id: int = 0,
) -> None:
    """Set the example's candidates; it leaves where it has no span, or a perplexity is not finite.

    Args:
        example: a row with spans; "cumulative" needs scores alone, "distractors" not even these. A
            candidate that leaves nothing but whitespace, changes nothing, or repeats an earlier one
            is kept with an outcome.
        config: `strategy` "span" takes one detected span at a time, "collective" all of them
            together (the paper's two). The others are controls that take as many tokens:
            "random_tokens" draws prunable tokens and takes them together (the paper's control);
            "random_spans" draws one run for each span, as long, disjoint where there is room;
            "student_saliency" and "perplexity" take the tokens with the highest value,
            "teacher_saliency" those with the lowest, one run at a time. What is taken is widened to
            whole units (`widen`), and deleted or replaced (`edit`). "cumulative" takes the most
            suspect phrase (or longer unit, see `ranked_units`), the two most suspect together, and
            so on up to `max_cuts`. "distractors" takes nothing: it inserts one sentence of another
            row. With the row_id and the segment `seed` decides the draws, which no other row
            changes.
        perplexity: float32 [d], needed for the strategy of that name.
        vocabulary: the words that replacements are drawn from, needed for edit "substitute".
        distractors: the sentences that are inserted, needed for the strategy of that name.
        first_id: the candidate_id of the first.
    """
    if not example.spans and config.strategy not in WITHOUT_SPANS:
        example.leave("prune", "no_span", "no confounder was found")
        return
    if perplexity is not None and not np.isfinite(perplexity).all():
        detail = "the student's log-probability of a token is NaN or infinite"
        example.leave("prune", "student_not_finite", detail)
        return
    view = f"/{example.segment}" if example.segment else ""
    draw = random.Random(f"{config.seed}/{example.row_id}{view}")
    seen: set[str] = set()
    if distractors is not None:
        found = distractors.insert(example, draw)
        changes: Iterable[Change] = [((found[0],), (found[1],), None)] if found else []
    elif config.strategy == "cumulative":
        changes = _cumulative(example, config)
    else:
        changes = _changes(example, config, draw, perplexity, vocabulary)
    for change in changes:
        candidate = make_candidate(example, change, config, seen)
        candidate.candidate_id = first_id + len(example.candidates)
        seen.add(candidate.text)
        example.candidates.append(candidate)
    if not example.candidates and distractors is not None:
        detail = "no other prompt has a sentence that asks nothing and is not in this one"
        example.leave("prune", "no_distractor", detail)
    elif not example.candidates and config.strategy in WITHOUT_SPANS:
        example.leave("prune", "no_span", "no score tells one part of the text from another")
    elif not example.candidates:
        detail = "no word of the spans has another one of its class in the dataset"
        example.leave("prune", "no_replacement", detail)


def make_candidate(
    example: Example, change: Change, config: DetectConfig, seen: Collection[str]
) -> Example:
    """Return a candidate; it has an outcome where its text cannot be used, or is in `seen`."""
    cut, inserted, score = change
    candidate = changed(example, cut, inserted)
    candidate.cut, candidate.inserted = cut, inserted
    candidate.strategy, candidate.cut_score = config.strategy, score
    if any(_inside_word(example.text, at) for one in cut for at in one):
        candidate.notes.append("cut_inside_word")
    _check(candidate, example, seen)
    return candidate


def ranked_units(example: Example, config: DetectConfig) -> list[RankedUnit]:
    """Return the units of a scored row by the mean score of their prunable tokens, lowest first.

    With score "random" their order is drawn: the mean of many drawn tokens lies near the middle, so
    that short units would come first.

    A token belongs to the unit with most of its letters and digits, the earlier of two. A unit
    without a prunable token is left out; of units with equal scores the earlier one comes first.

    Args:
        example: a row with scores.
        config: units are those of `widen`, or phrases in place of shorter ones: what is cut has to
            make sense by itself.
    """
    assert example.offsets is not None and example.prunable is not None
    assert example.score is not None
    known = example.score[np.isfinite(example.score)]
    if not len(known) or known.min() == known.max():
        return []
    unit = config.widen if config.widen in LONG_UNITS else "phrase"
    units = UNITS[unit](example.text, example.parts)
    starts = [start for start, _ in units]
    tokens: list[list[int]] = [[] for _ in units]
    for at in np.flatnonzero(example.prunable).tolist():
        start, stop = example.offsets[at].tolist()
        near = range(max(bisect_right(starts, start) - 1, 0), bisect_left(starts, stop))
        shares = {
            index: sum(
                char.isalnum()
                for char in example.text[max(start, units[index][0]) : min(stop, units[index][1])]
            )
            for index in near
        }
        if any(shares.values()):
            tokens[max(near, key=lambda index: (shares[index], -index))].append(at)
    found = [
        RankedUnit(one, tuple(own), float(example.score[own].mean(dtype=np.float64)))
        for one, own in zip(units, tokens, strict=True)
        if own
    ]
    if config.score == "random":
        random.Random(f"{config.seed}/{example.row_id}/{example.segment}/units").shuffle(found)
        return found
    return sorted(found, key=lambda one: (one.score, one.range))


def cut_units(example: Example, units: Sequence[RankedUnit]) -> Change:
    """Return the change that takes units out of a row, with the mean score of their tokens."""
    assert example.score is not None
    tokens = [at for one in units for at in one.tokens]
    score = float(example.score[tokens].mean(dtype=np.float64))
    return tidied(example, merge(one.range for one in units)), (), score


def _cumulative(example: Example, config: DetectConfig) -> Iterator[Change]:
    """Yield the cut of the most suspect unit, of the first two, and so on."""
    ranked = ranked_units(example, config)
    for count in range(1, min(config.max_cuts, len(ranked)) + 1):
        yield cut_units(example, ranked[:count])


def _changes(
    example: Example,
    config: DetectConfig,
    draw: random.Random,
    perplexity: Floats | None,
    vocabulary: Vocabulary | None,
) -> Iterator[Change]:
    """Yield what each candidate takes out of the text."""
    for spans in _choose(example, config, draw, perplexity):
        chosen = merge(characters(example, span) for span in spans)
        ranges = widen(example.text, chosen, config.widen, example.parts)
        for cut, inserted in _edits(example, ranges, config, draw, vocabulary):
            yield cut, inserted, _mean_score(example, spans)


def changed(example: Example, ranges: Sequence[Range], inserted: Sequence[str] = ()) -> Example:
    """Return a new Example whose analyzed text lacks ranges, or has other texts in their place.

    Args:
        example: a row.
        ranges: sorted, disjoint characters of its text, none over a border of `parts`.
        inserted: one text for each range; none: the ranges are deleted.
    """
    texts = inserted or [""] * len(ranges)
    contents = []
    for first, last in example.parts:
        inside = [
            (start - first, stop - first, text)
            for (start, stop), text in zip(ranges, texts, strict=True)
            if first <= start < last
        ]
        contents.append(_replaced(example.text[first:last], inside))
    if example.segment:
        return example.derived(prefix=contents[0])
    messages = list(example.messages)
    for place, content in zip(example.places, contents, strict=True):
        messages[place] = {**messages[place], "content": content}
    return example.derived(messages=tuple(messages))


def _replaced(text: str, edits: Sequence[tuple[int, int, str]]) -> str:
    kept, end = [], 0
    for start, stop, inserted in edits:
        kept += [text[end:start], inserted]
        end = stop
    return "".join(kept) + text[end:]


def replacement(
    example: Example,
    one: Range,
    vocabulary: Vocabulary,
    draw: random.Random,
    *,
    clause: bool = False,
) -> str | None:
    """Draw a text of the same class for a range of one message (see `Vocabulary.replace`)."""
    first, last = next(part for part in example.parts if part[0] <= one[0] < part[1])
    span = (one[0] - first, one[1] - first)
    return vocabulary.replace(example.text[first:last], span, draw, clause=clause)


def merge(ranges: Iterable[Range]) -> tuple[Range, ...]:
    """Return the union of ranges, sorted; ranges that overlap or touch become one."""
    merged: list[Range] = []
    for start, stop in sorted(ranges):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
        else:
            merged.append((start, stop))
    return tuple(merged)


def tidied(example: Example, ranges: Sequence[Range]) -> tuple[Range, ...]:
    """Return sorted, disjoint ranges of a row's text, tidied in each message (see `tidy`)."""
    found: list[Range] = []
    for first, last in example.parts:
        inside = [(start - first, stop - first) for start, stop in ranges if first <= start < last]
        cut = tidy(example.text[first:last], inside) if inside else ()
        found += [(start + first, stop + first) for start, stop in cut]
    return tuple(found)


def _edits(
    example: Example,
    ranges: tuple[Range, ...],
    config: DetectConfig,
    draw: random.Random,
    vocabulary: Vocabulary | None,
) -> Iterator[tuple[tuple[Range, ...], tuple[str, ...]]]:
    """Yield what to delete, or each draw of what to put in its place."""
    if config.edit == "delete":
        yield tidied(example, ranges), ()
        return
    assert vocabulary is not None
    clause = config.widen in ("clause", "sentence")
    for _ in range(config.draws):
        found = [
            (one, text)
            for one in ranges
            if (text := replacement(example, one, vocabulary, draw, clause=clause)) is not None
        ]
        if found:
            kept, inserted = zip(*found, strict=True)
            yield tuple(kept), tuple(inserted)


def _mean_score(example: Example, spans: Sequence[Range]) -> float:
    assert example.score is not None
    values = np.concatenate([example.score[start:stop] for start, stop in spans])
    return float(values.mean(dtype=np.float64))


def _check(candidate: Example, example: Example, seen: Collection[str]) -> None:
    text = candidate.text
    if not all(text[first:last].strip() for first, last in candidate.parts):
        candidate.leave("prune", "empty_after_cut", "the cut leaves nothing of a turn")
    elif "".join(text.split()) == "".join(example.text.split()):
        # A full stop that is cut alone is given back, and only the blank before it is gone.
        candidate.leave("prune", "unchanged", "the cut changes white space only")
    elif text in seen:
        candidate.leave("prune", "duplicate", "another cut of this row leaves the same text")


def _inside_word(text: str, at: int) -> bool:
    """Whether a border between two characters splits a word or a number."""
    return 0 < at < len(text) and text[at - 1].isalnum() and text[at].isalnum()


def _choose(
    example: Example, config: DetectConfig, draw: random.Random, perplexity: Floats | None
) -> list[list[Range]]:
    """Return the token spans of each candidate."""
    spans, strategy = list(example.spans), config.strategy
    count = sum(stop - start for start, stop in spans)
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
    value: Any = {
        "student_saliency": example.norms.get("student"),
        "teacher_saliency": -example.norms["teacher"],
        "perplexity": perplexity,
    }[strategy]
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
