"""Where a text may be split: sentences and lines, and the places that no border may cut."""

from __future__ import annotations

import re
import unicodedata
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import pairwise

Range = tuple[int, int]

# Scripts that set no blank between words, so that a word has no borders that a rule could see:
# Thai, Lao, Myanmar, Khmer, kana and the Han characters.
NO_BLANKS = (
    "\u0e01-\u0e4f\u0e81-\u0ecf\u1000-\u103f\u1050-\u108f\u1780-\u17dd\u2e80-\u2fdf\u3005-\u3007"
    "\u3040-\u30fa\u30fc-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
    "\uff66-\uff9f\U00020000-\U0003ffff"
)
LATIN_ENDS = ".!?\u2026"
OTHER_ENDS = (
    "\u3002\uff01\uff1f\uff61\uff0e"  # Chinese and Japanese
    "\u0964\u0965\u061f\u06d4"  # danda, double danda, Arabic question mark, Urdu full stop
    "\u1362\u1367\u0589\u104b\u17d4\u17d5"  # Ethiopic, Armenian, Myanmar, Khmer
)
CLOSERS = "\"'\u201d\u2019\u00bb)]\uff09\u300d\u300f\u300b\u3011*_"
LINE_BREAKS = "\n\r\u2028\u2029\x0b\x0c\x85"

_END = re.compile(
    rf"[{LATIN_ENDS}]+[{re.escape(CLOSERS)}]*(?=\s|$|<[</A-Za-z]|[{NO_BLANKS}])"
    rf"|[{OTHER_ENDS}]+[{OTHER_ENDS}{LATIN_ENDS}]*[{re.escape(CLOSERS)}]*"
    rf"|\s*[{LINE_BREAKS}]\s*"
    r"|\.\s*(?:\\\]|\$\$)"  # a displayed formula that ends a sentence
)
_URL = r"(?:https?://|ftp://|www\.)[^\s<>\"'`\u3000-\u303f\uff00-\uff0f]+(?<![.,;:!?)\]}])"
_EMAIL = r"[\w.+-]*[\w+-]@[\w-]+(?:\.[\w-]+)+"
_BLOCKS = re.compile(
    r"^[ \t]*(?P<fence>```+|~~~+)[^\n]*(?:\n|\Z)"
    r"(?:(?:.*?\n)??[ \t]*(?P=fence)[ \t]*(?:\n|\Z)|.*\Z)"
    r"|\$\$.+?\$\$|\\\[.+?\\\]|\\\(.+?\\\)|\[asy\].*?\[/asy\]"
    r"|\\begin\{(?P<name>[^{}\n]+)\}.*?\\end\{(?P=name)\}"
    # A dollar that opens a formula stands before its text, one that closes it after its text,
    # and no digit follows: so "$5 and $6" is money.
    r"|(?<![\\$])\$(?=[^\s$])(?:\\.|[^$\\\n]|\n(?!\s*\n))*?(?<!\s)\$(?![\d$])"
    rf"|`[^`\n]+`|{_URL}|{_EMAIL}",
    re.DOTALL | re.MULTILINE,
)
_INDENTED_LINES = r"(?:(?: {4}|\t)[^\n]*(?:\n|\Z))+"
_INDENTED = re.compile(rf"(?:\A|(?<=\n\n)){_INDENTED_LINES}(?:(?:[ \t]*\n)+{_INDENTED_LINES})*")
NUMBER = (
    r"(?:\d{1,3}(?:[,\u066c\u00a0\u202f'\u2019]\d{3})+(?!\d)|\d{1,2}(?:,\d{2})+,\d{3}(?!\d)"
    r"|(?<![(\[{,\d])\d+,\d{1,2}(?![\d,)\]}])|\d+)(?:[.\u066b\uff0e]\d+)*(?:[eE][+-]?\d+)?"
)
"""Digits with their separators: 1,000 and 12,34,567 and 3.14 and 2,5, but not the list 3,5,7."""

# An abbreviation that never ends a sentence, one that may (a capital tells), and one that stands
# before a number.
_TITLE = (
    r"dr|mr|mrs|ms|mx|prof|st|gen|col|sgt|capt|lt|rev|hon|gov|sen|rep|mt|vs|cf|viz|e\.g|i\.e|eg|ie|"
    r"approx|resp"
)
_MAY_END = (
    r"etc|al|jr|sr|inc|ltd|co|corp|bros|dept|est|ave|blvd|rd|[ap]\.m|u\.[skn]|e\.u|ph\.d|m\.d|"
    r"b\.[ac]|m\.a|a\.d|jan|feb|mar|apr|jun|jul|aug|sept?|oct|nov|dec|min|max|sec|hrs?|in|ft|lbs?|oz"
)
_BEFORE_NUMBER = r"nos?|figs?|eqs?|vol|ch|pp?|ex|thm"
_LAST_WORD = re.compile(r"(?:[^\W\d_]+\.)*[^\W\d_]+\Z")
_ITEM = re.compile(r"[ \t]*(?:[(]?(?:\d{1,3}|[A-Za-z]|[ivxIVX]{1,5}))\Z")
ABBREVIATION = rf"(?:(?<![^\W\d_])(?:[^\W\d_]\.){{2,}}|(?i:(?<!\w)(?:{_TITLE})\.)(?=\s))"


def protected(text: str) -> list[Range]:
    """Return what no border may cut: formulas, code, URLs and e-mail addresses.

    Returns:
        Sorted, disjoint ranges of characters. A formula is `$...$`, `$$...$$`, `\\(...\\)`,
        `\\[...\\]` or an environment; code is what stands in a fence, between backticks, or after a
        blank line with an indentation of four blanks. A fence that is not closed goes to the end.
    """
    found = [match.span() for match in _BLOCKS.finditer(text)]
    if "\n    " in text or "\n\t" in text or text[:1] in " \t":
        found += [match.span() for match in _INDENTED.finditer(text)]
    return _union(found)


def _union(ranges: Sequence[Range]) -> list[Range]:
    joined: list[Range] = []
    for start, stop in sorted(ranges):
        if joined and start < joined[-1][1]:
            joined[-1] = (joined[-1][0], max(stop, joined[-1][1]))
        else:
            joined.append((start, stop))
    return joined


def is_inside(ranges: Sequence[Range], at: int) -> bool:
    """Whether a border at this position would cut one of the sorted, disjoint ranges."""
    index = bisect_left(ranges, (at, -1)) - 1
    return index >= 0 and at < ranges[index][1]


def border_after(text: str, at: int) -> int:
    """Return the border for a unit that ends at `at`.

    White space up to its last line break stays with the unit before, blanks go with the unit after,
    as the tokens of most vocabularies do.
    """
    stop = at
    while stop < len(text) and text[stop].isspace():
        stop += 1
    breaks = [text.rfind(mark, at, stop) for mark in LINE_BREAKS]
    return max(breaks) + 1 if max(breaks) >= 0 else at


def sentence_borders(text: str, guarded: Sequence[Range] | None = None) -> list[int]:
    """Return the positions within a text, sorted, at which a sentence or a line ends.

    A part between two borders may be blank, as an empty line at the beginning is.

    Args:
        text: of any script. The full stops of Latin, Chinese, Japanese, Hindi, Arabic, Urdu,
            Amharic, Armenian, Burmese and Khmer end a sentence; in Thai lines do.
        guarded: the ranges that no border may cut; None: `protected(text)`.
    """
    guarded = protected(text) if guarded is None else guarded
    found = set()
    for match in _END.finditer(text):
        if match[0].isspace():
            at = border_after(text, match.start())
        elif _ends_sentence(text, match):
            at = border_after(text, match.end())
        else:
            continue
        if 0 < at < len(text) and not is_inside(guarded, at):
            found.add(at)
    return sorted(at for at in found if is_grapheme_border(text, at))


def _ends_sentence(text: str, match: re.Match[str]) -> bool:
    mark, start = match[0], match.start()
    if mark[-2:] in ("\\]", "$$"):
        return True
    if mark[0] in OTHER_ENDS:
        return not (mark == "\uff0e" and text[match.end() : match.end() + 1].isdigit())
    rest = text[match.end() : match.end() + 40].lstrip()
    ends = mark.rstrip(CLOSERS)
    if (len(ends) < len(mark) or ends in ("...", "\u2026")) and rest[:1].islower():
        return False  # '"Why?" she asked' and 'well... yes'
    if ends != ".":
        return True
    line = text[max(text.rfind(one, 0, start) for one in LINE_BREAKS) + 1 : start]
    if _ITEM.match(line):
        return False  # "1. First"
    line = line[-40:]
    word = _LAST_WORD.search(line)
    return word is None or not _is_abbreviation(word[0], line[: word.start()].rstrip(), rest)


def _is_abbreviation(word: str, before: str, rest: str) -> bool:
    """Whether the full stop after `word` belongs to it, and does not end the sentence too."""
    lower = word.lower()
    if re.fullmatch(_TITLE, lower):
        return bool(rest)
    if re.fullmatch(_MAY_END, lower):
        return rest[:1].islower() or rest[:1].isdigit()
    if re.fullmatch(_BEFORE_NUMBER, lower):
        return rest[:1].isdigit() or rest[:1] in ("(", "$", "\\")
    if len(word) == 1 and word.isupper() and rest[:1].isupper():
        # An initial follows a name, another initial, or nothing: "George W. Bush".
        last = before.split()[-1] if before else ""
        name = last[:1].isupper() and last not in ("I", "A")
        return not last or name or last[-1] in ".!?" or re.match(r"[^\W\d_]\.", rest) is not None
    return False


def sentences(text: str) -> list[Range]:
    """Return the sentences and lines of a text, which cover it; each holds more than blanks."""
    return partition(text, sentence_borders(text))


def partition(text: str, borders: Sequence[int]) -> list[Range]:
    """Return the parts between borders; a blank part joins the one before, else the one after."""
    parts: list[Range] = []
    for start, stop in _pairs(borders, len(text)):
        if parts and (not text[start:stop].strip() or not text[slice(*parts[-1])].strip()):
            parts[-1] = (parts[-1][0], stop)
        else:
            parts.append((start, stop))
    return parts


def _pairs(borders: Sequence[int], end: int) -> Iterator[Range]:
    edges = [0, *borders, end]
    return ((a, b) for a, b in pairwise(edges) if a < b)


@cache
def _joins_before(char: str) -> bool:
    """Whether a character belongs to the one before it."""
    return (
        unicodedata.category(char) in ("Mn", "Mc", "Me")
        or char in "\u200c\u200d\u0e33\u0eb3"
        or "\U0001f3fb" <= char <= "\U0001f3ff"  # skin tones
        or "\U000e0020" <= char <= "\U000e007f"  # the tags of a region's flag
        or "\u1160" <= char <= "\u11ff"  # vowels and finals of a Korean syllable in parts
    )


@cache
def is_mark(char: str) -> bool:
    """Whether a character only alters the one before it: an accent or a vowel sign."""
    return unicodedata.category(char) in ("Mn", "Mc", "Me")


def is_grapheme_border(text: str, at: int) -> bool:
    """Whether a text may be cut at a position without cutting what a reader sees as one character.

    Accents, vowel signs, conjuncts of the Indic scripts, Korean syllables in parts, emoji that are
    joined or modified, flags, and a line break of two characters stay whole.
    """
    if not 0 < at < len(text):
        return True
    before, after = text[at - 1], text[at]
    if before < "\u0300" and after < "\u0300":  # nearly every text
        return not (before == "\r" and after == "\n")
    if _joins_before(after):
        return before.isspace()
    if before == "\u200d":
        return after.isalnum() or after.isspace()
    if "\u1100" <= before <= "\u115f" and "\u1100" <= after <= "\u115f":
        return False
    if unicodedata.combining(before) == 9 and after.isalpha() and after > "\u0900":
        return False
    if _is_flag_half(after):
        start = at
        while start and _is_flag_half(text[start - 1]):
            start -= 1
        return (at - start) % 2 == 0
    return True


def _is_flag_half(char: str) -> bool:
    return "\U0001f1e6" <= char <= "\U0001f1ff"
