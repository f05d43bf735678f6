"""Classes of words that can be told without a tagger, for replacements that fit their place."""

from __future__ import annotations

import re
import unicodedata
from typing import NamedTuple

from leaf_distill.data.sentences import NUMBER
from leaf_distill.detection.units import CURRENCY

Class = tuple[str | int, ...]

_NUMBER = re.compile(
    rf"(?P<before>[-+\u2212]?(?:\\?[{re.escape(CURRENCY)}])?[-\u2212]?)(?P<digits>{NUMBER}|\.\d+)"
    rf"(?P<after>\\?[%\u2030\xb0\u2032\u2033\uff05]|[{re.escape(CURRENCY)}]|-?[^\W\d].*|)",
    re.DOTALL,
)
_ORDINAL = re.compile(r"\d[\d,]*(?:st|nd|rd|th)", re.IGNORECASE)
_POINT = re.compile("[.\u066b\uff0e]|(?<!\\d),(?=\\d{1,2}$)")
_POSSESSIVE = re.compile(r"(?<=\w)['\u2019]s$")

_LISTS = {
    "number word": (
        "two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
        "sixteen seventeen eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety"
    ),
    "scale": "dozen hundred thousand million billion",
    "ordinal word": "first second third fourth fifth sixth seventh eighth ninth tenth last",
    "multiple": "half twice thrice double triple quarter",
    "day": "monday tuesday wednesday thursday friday saturday sunday",
    "month": ("january february march april june july august september october november december"),
    "article": "a an the this that these those each every another some any one",
    "possessive": "my your his her its our their",
    "pronoun": "i you he she it we they him them me us",
    "preposition": (
        "in on at by for from with of to into onto over under between among about after before "
        "during through against without within across behind beside near since until per than"
    ),
    "conjunction": "and or but so because if while when although though unless whereas as",
    "auxiliary": (
        "is are was were be been being am do does did has have had can could will would shall "
        "should may might must"
    ),
    "question": "what who whom whose which where why how",
}
_BY_WORD = {word: name for name, words in _LISTS.items() for word in words.split()}
_SUFFIXES = tuple("ing ed ly tion sion ment ness ity est er ous ful able al".split())  # noqa: SIM905


class Classified(NamedTuple):
    """A word: its class, what of it is drawn, and what stays around that."""

    kind: Class
    core: str
    before: str = ""
    after: str = ""


def classify(word: str, is_name: bool) -> Classified:
    """Return the class of a word; only words of one class replace each other.

    The classes are: numbers in digits (integer, decimal, percent, money) with so many digits before
    and behind the point, where 1500 to 2099 without separators are years; ordinals (3rd); other
    words with digits, by their form (3:30, 1/2); English number words, days, months and function
    words, by list; names; acronyms; single letters; LaTeX commands; addresses; identifiers;
    abbreviations, contractions and compounds; Latin words by their suffix (-ing, -ed, -ly, ...,
    -s); and all others by script.

    Args:
        word: one of `units.words`.
        is_name: whether it is known to be a name.
    """
    if any(char.isdigit() for char in word) and "@" not in word and "//" not in word:
        return _with_digits(word)
    if word.startswith("\\"):
        return Classified(("command",), word)
    if "@" in word or "://" in word or word.startswith("www."):
        return Classified(("address",), word)
    if "_" in word:
        return Classified(("identifier",), word)
    owner = _POSSESSIVE.search(word)
    core, after = (word[: owner.start()], owner[0]) if owner else (word, "")
    kind = _letters(core)
    if is_name and kind[0] in ("word", "other"):
        kind = ("name",)
    return Classified(kind, core, "", after)


def _letters(word: str) -> Class:
    lower = word.lower()
    if lower in _BY_WORD:
        return (_BY_WORD[lower],)
    if "-" in lower and all(_BY_WORD.get(one) in _NUMBER_WORDS for one in lower.split("-")):
        return ("number word",)
    if len(word) == 1:
        return ("letter", _script(word), word.isupper())
    if word.isupper():
        return ("acronym", _script(word))
    if _script(word) != "LATIN":
        return ("other", _script(word))
    if not word.isalpha():
        marks = {".": "abbreviation", "'": "contraction", "\u2019": "contraction", "-": "compound"}
        return (next((marks[char] for char in word if char in marks), "other"), "LATIN")
    for suffix in _SUFFIXES:
        if lower.endswith(suffix) and len(lower) >= len(suffix) + 3:
            return ("word", suffix)
    plural = lower.endswith("s") and not lower.endswith(("ss", "us", "is")) and len(lower) > 3
    return ("word", "s" if plural else "")


_NUMBER_WORDS = ("number word", "scale", "article", "conjunction")


def _with_digits(word: str) -> Classified:
    if _ORDINAL.fullmatch(word):
        return Classified(("ordinal",), word)
    match = _NUMBER.fullmatch(word)
    if match is None:
        form = "".join("0" if char.isdigit() else char for char in word)
        return Classified(("form", form), word)
    digits, before, after = match["digits"], match["before"], match["after"]
    point = _POINT.search(digits)
    whole = digits[: point.start()] if point else digits
    fraction = sum(char.isdigit() for char in digits) - sum(char.isdigit() for char in whole)
    size = sum(char.isdigit() for char in whole)
    kind = "decimal" if fraction else "integer"
    if any(char in CURRENCY for char in before + after):
        kind = "money"
    elif after[-1:] in ("%", "\u2030", "\uff05"):
        kind = "percent"
    elif kind == "integer" and whole.isdecimal() and size == 4 and 1500 <= int(whole) < 2100:
        kind = "year"
    return Classified((kind, size, fraction), plain_digits(digits), before, after)


def plain_digits(number: str) -> str:
    """Return the ASCII digits of a number, without point and separators."""
    return "".join(str(unicodedata.digit(char)) for char in number if char.isdigit())


def in_form(digits: str, form: str) -> str:
    """Write as many digits as a number has in its own form: point, separators and script.

    Example:
        `in_form("12345", "1,000.50")` is wrong (six digits); `in_form("123456", "1,000.50")` is
        "1,234.56".
    """
    left = iter(digits)
    return "".join(
        chr(ord(char) - unicodedata.digit(char) + int(next(left))) if char.isdigit() else char
        for char in form
    )


def _script(word: str) -> str:
    return unicodedata.name(word[0], "OTHER").split()[0]
