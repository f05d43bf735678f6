"""Replacements of the same class for a span of a prompt, drawn from the dataset's own prompts."""

from __future__ import annotations

import random
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from itertools import accumulate

from leaf_distill.data.example import Range
from leaf_distill.data.sentences import sentences
from leaf_distill.detection.units import clauses, words
from leaf_distill.detection.word_classes import Class, Classified, classify, in_form

_NUMBERS = ("integer", "decimal", "percent", "money", "year")
_AS_WRITTEN = ("name", "acronym", "letter", "command", "address", "identifier", "form", "ordinal")
_MARKS = ".,;:!?\u2026\u3002\uff0c\uff1b\uff1a\uff01\uff1f\u3001\u0964\u061f\u060c\u061b"
_TRIES = 16


class Vocabulary:
    """The words, numbers and clauses of a dataset's prompts, by class, with their counts.

    Words are drawn as often as the prompts use them. Classes are told by lists, suffixes and forms
    (`word_classes.classify`), without a tagger, so a replacement fits its place mostly, not always.
    A word is a name where it is capitalised within sentences more often than it is written small.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        found: Counter[tuple[str, bool]] = Counter()
        parts: Counter[tuple[Class, str]] = Counter()
        for text in texts:
            found.update(_words_of(text))
            parts.update(
                (kind, core)
                for start, stop in clauses(text, [(0, len(text))])
                for kind, core, _, _ in [_clause(text[start:stop])]
                if core
            )
        small = Counter[str]()
        capital = Counter[str]()
        for (word, begins), count in found.items():
            bare = classify(word, True).core
            if bare[:1].islower():
                small[bare.lower()] += count
            elif not begins and _looks_like_a_name(bare):
                capital[bare] += count
        self._names = {word for word, count in capital.items() if count > small[word.lower()]}
        by_class: dict[Class, Counter[str]] = {}
        for (word, _), count in found.items():
            kind, core, _, _ = self._classify(word)
            by_class.setdefault(kind, Counter())[_stored(kind, core)] += count
        self._words = {kind: _Urn(counts) for kind, counts in by_class.items()}
        by_kind: dict[Class, Counter[str]] = {}
        for (kind, core), count in parts.items():
            by_kind.setdefault(kind, Counter())[core] += count
        self._clauses = {kind: _Urn(counts) for kind, counts in by_kind.items()}

    def replace(
        self, text: str, span: Range, draw: random.Random, *, clause: bool = False
    ) -> str | None:
        """Draw a text of the same class for a span.

        Args:
            text: the prompt that holds the span.
            span: characters [start, stop) of it, of whole words (see `units.widen`).
            draw: decides the result, together with the text and the vocabulary alone.
            clause: whether to take one clause of another prompt, which begins with the same case
                and ends with the same mark, in place of a word for each word.

        Returns:
            What to write in place of the span. White space and punctuation marks stay as they are;
            each word becomes another of its class, in its case. A number keeps its sign, currency,
            unit, separators and its number of digits before and behind the point; years stay years.
            None where a word has no other member of its class, where the span holds no whole word
            or splits one, or where no other prompt has such a clause.
        """
        if clause:
            return self._swap(text, text[span[0] : span[1]], draw)
        pieces, end = [], span[0]
        for start, stop in words(text, [(0, len(text))]):
            if stop <= span[0] or span[1] <= start:
                continue
            new = self._other(text[start:stop], draw)
            if new is None or start < span[0] or span[1] < stop:
                return None
            pieces += [text[end:start], new]
            end = stop
        return "".join(pieces) + text[end : span[1]] if pieces else None

    def _classify(self, word: str) -> Classified:
        return classify(word, classify(word, True).core in self._names)

    def _other(self, word: str, draw: random.Random) -> str | None:
        """Draw another word of the class of `word`, in the same form."""
        kind, core, before, after = self._classify(word)
        urn = self._words.get(kind)
        new = urn and urn.other_than(_stored(kind, core), draw)
        if not new:
            return None
        if kind[0] in _NUMBERS:
            return before + in_form(new, word[len(before) : len(word) - len(after)]) + after
        if kind[0] not in _AS_WRITTEN:
            new = _in_case(new, core)
        return before + new + after

    def _swap(self, text: str, clause: str, draw: random.Random) -> str | None:
        kind, core, head, tail = _clause(clause)
        urn = self._clauses.get(kind) if core else None
        if urn is None:
            return None
        for _ in range(_TRIES):
            new = urn.other_than(core, draw)
            if new is None or new not in text:
                break
        else:  # nearly all of them are in this prompt
            new = urn.without(text).other_than(core, draw)
        return None if new is None else head + new + tail


class _Urn:
    """Strings with counts, in an order that no hash decides."""

    def __init__(self, counts: Mapping[str, int]) -> None:
        self.counts = counts
        self.items = sorted(counts)
        self.ends = list(accumulate(counts[item] for item in self.items))

    def other_than(self, item: str, draw: random.Random) -> str | None:
        """Draw an item by its count among all but one; None where there is no other."""
        own = self.counts.get(item, 0)
        rest = (self.ends[-1] if self.ends else 0) - own
        if not rest:
            return None
        at = draw.randrange(rest)
        if own and at >= self.ends[bisect_right(self.items, item) - 1] - own:
            at += own
        return self.items[bisect_right(self.ends, at)]

    def without(self, text: str) -> _Urn:
        """Return the urn without the items that a text holds."""
        return _Urn({item: count for item, count in self.counts.items() if item not in text})


def _words_of(text: str) -> Iterator[tuple[str, bool]]:
    """Yield each word, and whether it begins a sentence."""
    borders = [start for start, _ in sentences(text)]
    last = -1
    for start, stop in words(text, [(0, len(text))]):
        sentence = bisect_right(borders, start)
        yield text[start:stop], sentence != last
        last = sentence


def _looks_like_a_name(word: str) -> bool:
    return len(word) > 1 and word[0].isupper() and word[1:].islower() and word.isalpha()


def _stored(kind: Class, core: str) -> str:
    return core if kind[0] in _AS_WRITTEN or kind[0] in _NUMBERS else core.lower()


def _in_case(word: str, like: str) -> str:
    if len(like) > 1 and like.isupper():
        return word.upper()
    return word[:1].upper() + word[1:] if like[:1].isupper() else word


def _clause(text: str) -> tuple[Class, str, str, str]:
    """Return a clause's class, its words, and what stands before and behind them."""
    core = text.strip()
    head = text[: len(text) - len(text.lstrip())]
    inner = core.rstrip(_MARKS)
    tail = text[len(head) + len(inner) :]
    first = next((char for char in inner if char.isalnum()), "")
    kind = ("clause", first.isupper(), core[len(inner) :][:1], inner[:1] in ("(", "\uff08"))
    return kind, inner if first else "", head, tail
