"""Words, phrases, clauses and sentences of a text, and cuts that are widened to them."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from itertools import pairwise

from leaf_distill.data.example import Range
from leaf_distill.data.sentences import (
    ABBREVIATION,
    NO_BLANKS,
    NUMBER,
    border_after,
    is_grapheme_border,
    is_inside,
    is_mark,
    partition,
    protected,
    sentence_borders,
)
from leaf_distill.detection.config import Unit
from leaf_distill.detection.seams import tidy as tidy

CURRENCY = "$\u20ac\xa3\xa5\u20b9\u20a9\u20bd\u20ba\u20bf\u0e3f\uffe5\uffe1\uff04\xa2"
_CLAUSE_MARK = re.compile(
    r"(?P<after>[,;:](?=\s|$)|[\uff0c\uff1b\uff1a\u3001\u060c\u061b])"
    r"|(?P<before>\s*[\u2014\u2015]|\s+[-\u2013]+(?=\s))"
    r"|(?P<pair>\s*[(\uff08])"
)
_LINKS = frozenset(
    (
        *(
            "in",
            "at",
            "by",
            "on",
            "under",
            "with",
            "without",
            "during",
            "and",
            "but",
            "or",
            "so",
            "then",
            "which",
            "who",
            "whom",
        ),
        *("whose", "that", "where", "when", "while", "because", "although", "though", "since"),
        *("after", "before", "as", "until", "unless", "if"),
    )
)
_BEFORE_NOUNS = frozenset(
    (
        *("a", "an", "the", "to", "of", "in", "on", "at", "by", "for", "and", "or", "with", "from"),
        *("is", "are", "was", "were", "be", "been", "his", "her", "my", "its", "our", "your"),
        *("their", "some", "any", "no", "each", "all", "it", "he", "she", "they", "we", "i", "you"),
    )
)
"""No participle stands behind these: "the remaining", "is running"."""
_NOUNS = frozenset(
    (
        *("morning", "evening", "thing", "something", "nothing", "anything", "everything"),
        *("building", "clothing", "ceiling", "wedding", "string", "spring", "pudding", "earring"),
    )
)
"""Words in -ing that are no participle."""
_TWO_LETTERS = re.compile(r"[^\W\d_]{2}")
_WORD = re.compile(r"\w+")
_OPEN, _CLOSE = "(\uff08", ")\uff09"


def words(text: str, parts: Sequence[Range]) -> tuple[Range, ...]:
    """Return the words of a text, without the blanks and punctuation marks between them.

    A number with its sign, separators, percent or currency sign and unit ("-1,000.5", "$5",
    "5kg"), a LaTeX command, an abbreviation with its full stops, a URL and an e-mail address are
    one word each. Scripts without blanks between words (Chinese, Japanese, Thai, ...) have none.
    """
    return _within(text, parts, lambda part: [match.span() for match in _word().finditer(part)])


def clauses(text: str, parts: Sequence[Range]) -> tuple[Range, ...]:
    """Return the clauses of a text: the parts of its sentences, which cover it.

    A clause ends behind a comma, semicolon or colon, before a dash and around parentheses; never
    inside parentheses, formulas, code, or numbers. The blank between two clauses belongs to the
    second, a line break to the first.
    """
    return _within(text, parts, _clauses)


def phrases(text: str, parts: Sequence[Range]) -> tuple[Range, ...]:
    """Return the phrases of a text: the parts of its clauses, which cover it.

    In English a clause is divided before prepositions (in, at, by, on, under, with, without,
    during), conjunctions, relative pronouns and participles in -ing, told by lists alone, into
    parts of at least two words. In other languages a phrase is a clause.
    """
    return _within(text, parts, _phrases)


def sentences(text: str, parts: Sequence[Range]) -> tuple[Range, ...]:
    """Return the sentences and lines of a text, which cover it (see `data.sentences`)."""
    return _within(text, parts, lambda part: partition(part, sentence_borders(part)))


UNITS: dict[Unit, Callable[[str, Sequence[Range]], tuple[Range, ...]]] = {
    "word": words,
    "phrase": phrases,
    "clause": clauses,
    "sentence": sentences,
}
"""The function that finds each unit."""


def widen(
    text: str, ranges: Iterable[Range], unit: Unit, parts: Sequence[Range]
) -> tuple[Range, ...]:
    """Widen ranges to whole units.

    Args:
        text: the text that the ranges count characters of.
        ranges: in any order. A range takes each unit of which it holds more than white space; one
            of white space, or in a script without word borders, stays as it is.
        unit: "token" leaves the ranges as they are; "word", "phrase", "clause", "sentence".
        parts: the ranges of the text that belong to one message each; no result crosses a border.

    Returns:
        Sorted, disjoint ranges; those of one part that touch are joined. But for "token", no
        character is cut in half: accents and joined emoji go with what they belong to.

    Raises:
        ValueError: the unit is unknown.
    """
    if unit != "token" and unit not in UNITS:
        raise ValueError(f"unit: must be one of token, {', '.join(UNITS)}, got {unit!r}")
    within = [
        (max(start, low), min(stop, high))
        for low, high in parts
        for start, stop in ranges
        if max(start, low) < min(stop, high)
    ]
    wide = tuple(one for part in parts for one in _joined(within, part))
    if unit == "token":
        return wide
    whole = UNITS[unit](text, parts)
    starts = [start for start, _ in whole]
    before: tuple[Range, ...] = ()
    while wide != before:  # a character that is taken whole may begin inside another unit
        before = wide
        within = [
            _whole_graphemes(text, taken, parts)
            for one in wide
            for taken in _touched(text, one, whole, starts)
        ]
        wide = tuple(one for part in parts for one in _joined(within, part))
    return wide


def _touched(
    text: str, one: Range, whole: Sequence[Range], starts: Sequence[int]
) -> Iterator[Range]:
    yield one
    for index in range(max(bisect_right(starts, one[0]) - 1, 0), len(whole)):
        start, stop = whole[index]
        if start >= one[1]:
            break
        if text[max(start, one[0]) : min(stop, one[1])].strip():
            yield start, stop


def _whole_graphemes(text: str, one: Range, parts: Sequence[Range]) -> Range:
    low, high = next(part for part in parts if part[0] <= one[0] < part[1])
    start, stop = one
    while start > low and not is_grapheme_border(text, start):
        start -= 1
    while stop < high and not is_grapheme_border(text, stop):
        stop += 1
    return start, stop


def _joined(ranges: Iterable[Range], part: Range) -> list[Range]:
    """Return the union of the ranges within one part; those that touch become one."""
    joined: list[Range] = []
    for start, stop in sorted(one for one in ranges if part[0] <= one[0] < part[1]):
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(stop, joined[-1][1]))
        else:
            joined.append((start, stop))
    return joined


def _within(
    text: str, parts: Sequence[Range], find: Callable[[str], list[Range]]
) -> tuple[Range, ...]:
    return tuple(
        (low + start, low + stop) for low, high in parts for start, stop in find(text[low:high])
    )


@cache
def _word() -> re.Pattern[str]:
    marks = "".join(_runs_of_marks())
    letter = rf"(?:(?![{NO_BLANKS}])\w|[{marks}\u200c\u200d])"
    first = rf"(?![{NO_BLANKS}])\w"
    money = re.escape(CURRENCY)
    return re.compile(
        r"(?:https?://|ftp://|www\.)[^\s<>\"'`\u3000-\u303f\uff00-\uff0f]+(?<![.,;:!?)\]}])"
        r"|[\w.+-]*[\w+-]@[\w-]+(?:\.[\w-]+)+"
        rf"|{ABBREVIATION}"
        # The sign of a number follows no number or word: "5-3" is a difference.
        rf"|(?:(?<![\w)\]}}.])[-+\u2212])?(?:\\?[{money}])?(?:(?<=[{money}])[-\u2212])?(?:{NUMBER}"
        rf"|\.\d+)(?:[/:]\d+(?!\d|[/:]))?(?:\\?[%\u2030\xb0\u2032\u2033\uff05]|[{money}])?"
        rf"(?:{letter}+|-(?={first}{letter}){letter}+)*"
        r"|\\(?:[A-Za-z]+\*?|[^\s\w])"
        rf"|{first}{letter}*(?:(?:['\u2019\u2010\u2011\xad]|(?<={letter}{letter})-"
        rf"|-(?={first}{letter})){letter}+)*"
    )


def _runs_of_marks() -> Iterator[str]:
    """Yield the accents and vowel signs as ranges of a character class, which \\w leaves out."""
    start = None
    for code in range(0x300, 0x1E950):
        if is_mark(chr(code)):
            start = code if start is None else start
        elif start is not None:
            yield f"{chr(start)}-{chr(code - 1)}"
            start = None


def _clauses(text: str) -> list[Range]:
    guarded = protected(text)
    found: list[Range] = []
    for start, stop in partition(text, sentence_borders(text, guarded)):
        borders = [
            at
            for at in _clause_borders(text, start, stop, guarded)
            if start < at < stop and not is_inside(guarded, at) and is_grapheme_border(text, at)
        ]
        found += _with_letters(text, [start, *borders, stop])
    return found


def _phrases(text: str) -> list[Range]:
    guarded = protected(text)
    found: list[Range] = []
    for start, stop in _clauses(text):
        words = list(_WORD.finditer(text, start, stop))
        edges, first = [start], 0
        for at in range(2, len(words) - 1):
            between = text[words[at - 1].end() : words[at].start()]
            border = words[at - 1].end() + len(between.rstrip())
            if (
                at - first > 1
                and border < words[at].start()
                and _begins_phrase(words[at - 1][0].lower(), words[at][0].lower())
                and not is_inside(guarded, border)
            ):
                edges.append(border)
                first = at
        found += pairwise([*edges, stop])
    return found


def _begins_phrase(before: str, word: str) -> bool:
    if word == "in" and before.isdecimal():  # a unit
        return False
    participle = len(word) > 4 and word.endswith("ing") and word not in _NOUNS
    return word in _LINKS or (participle and before not in _BEFORE_NOUNS)


def _clause_borders(text: str, start: int, stop: int, guarded: Sequence[Range]) -> list[int]:
    borders: set[int] = set()
    end_of_pair = start
    for match in _CLAUSE_MARK.finditer(text, start, stop):
        if match.start() < end_of_pair or is_inside(guarded, match.end() - 1):
            continue
        if match["after"]:
            borders.add(border_after(text, match.end()))
        elif match["pair"]:
            close = _closing(text, match.end() - 1, stop)
            end_of_pair = close or end_of_pair
            # Not the arguments of a function, nor a pair of numbers.
            apart = match[0] != "(" or not text[match.start() - 1 : match.start()].isalnum()
            if close and apart and _TWO_LETTERS.search(text, match.end(), close):
                borders.update((border_after(text, match.start()), close))
        else:
            borders.add(match.start())
    return sorted(borders)


def _closing(text: str, at: int, stop: int) -> int | None:
    """Return the position behind the parenthesis that closes the one at `at`."""
    depth = 0
    for index in range(at, stop):
        depth += (text[index] in _OPEN) - (text[index] in _CLOSE)
        if depth == 0:
            return index + 1
    return None


def _with_letters(text: str, edges: Sequence[int]) -> list[Range]:
    """Return the parts between edges; one without letter or digit joins the one before it."""
    parts: list[Range] = []
    for start, stop in pairwise(edges):
        bare = not any(char.isalnum() for char in text[start:stop])
        if parts and (bare or not any(char.isalnum() for char in text[slice(*parts[-1])])):
            parts[-1] = (parts[-1][0], stop)
        else:
            parts.append((start, stop))
    return parts
