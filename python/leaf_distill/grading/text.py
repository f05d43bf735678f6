"""Grades answers that are no mathematics: a number, a choice's letter, a word, a text."""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Literal

from leaf_distill.grading.answer import (
    SENTENCE_END,
    Answer,
    expression,
    find_answer,
    is_prose,
    last_match,
    marked_answer,
)
from leaf_distill.grading.quantity import TEXT, last_number, quantity

Verdict = Literal["right", "wrong", "no_answer", "timeout"]
Kind = Literal["math", "number", "choice", "word", "text"]

WRAPPED = re.compile(rf"(?:{TEXT}|\\textbf\s*)\{{\s*((?:[^{{}}\\]|\\[ ,;])*?)\s*\}}")
CHOICE = re.compile(r"\(([A-Ja-j])\)|([A-J])[.)]?")
# An "A" before a small word is an article, and "I" a person.
LETTER = re.compile(
    r"(?:(?:option|choice)\s+)?(?:\(([A-Za-z])\)|([B-HJ])(?![\w'^_/*+=-])"
    r"|([AI])(?![\w'^_/*+=-])(?!\s+(?!because|since|as\b|and\b)[a-z]))",
    re.IGNORECASE,
)
LETTER_IN_SENTENCE = re.compile(
    r"(?:\b(?:[Oo]ption|[Cc]hoice)\s+\(?([A-J])\b|\(([A-J])\)|\b([B-HJ])(?=\s+is\s+(?:the\s+)?"
    r"(?:correct|right|answer)))"
)
ANOTHER = re.compile(r"\W*(?:,|/|and|or)\W*[A-J]\b")
FAMILIES = (("yes", "no"), ("true", "false"))
COPULA = re.compile(r".*\b(?:is|it's|are|was|were|be|equals)\b\s*:?\s*(\S.*)", re.DOTALL)
CLAUSE_END = re.compile(r"[,.;:!?(\u2014]|\s-\s|\b(?:because|since|as)\b")


def gold_kind(gold: str) -> Kind:
    """Return the kind of a gold answer, which decides how it is compared.

    Args:
        gold: a gold answer, or a completion that ends in one.

    Returns:
        "number" (with or without a unit), "math" (any other mathematics), "choice" (A to J),
        "word" (at most three words, "yes" and "True" among them) or "text" (other words).
    """
    answer = find_answer(gold)
    plain = unwrapped(answer.text)
    if CHOICE.fullmatch(plain):
        return "choice"
    if (not re.search(r"[\d\\$=^]", plain) and is_prose(plain)) or plain.lower() == "no":
        return "word" if len(plain.split()) <= 3 else "text"
    found = gold_expression(answer)
    if not found:
        return "text"
    return "number" if quantity(found) else "math"


def gold_expression(answer: Answer) -> str:
    """Return a gold answer's mathematics, an empty text if it is words with a number inside."""
    text = answer.text
    if answer.place == "whole" and is_prose(text) and not text.startswith("$"):
        # A completion's last number counts, a label's does not: "July 4, 1776".
        sentence = re.search(r"=|\n|[.!?]$", text) or len(text.split()) >= 8
        if not sentence and not quantity(text):
            return ""
    return expression(text, first=answer.place != "whole" or text.startswith("$"))


def grade_exact(gold: str, prediction: str) -> Verdict:
    """Compare two texts, or the answers that they have in a box or after `####`."""
    same = _marked(gold) in (prediction.strip(), _marked(prediction))
    return "right" if same else "wrong"


def grade_number(gold: str, prediction: str) -> Verdict:
    """Compare the last numbers of two texts, or of their answers in a box or after `####`."""
    wanted, found = map(_final_number, (gold, prediction))
    if wanted is None:
        return grade_words(gold, prediction)
    if found is None:
        return "no_answer"
    return "right" if wanted == found else "wrong"


def has_number(gold: str) -> bool:
    """Return whether `grade_number` finds a number in a gold answer."""
    return _final_number(gold) is not None


def grade_words(gold: str, prediction: str) -> Verdict:
    """Compare a letter, a word or a text with a prediction's final answer."""
    answer, wanted = find_answer(prediction), unwrapped(find_answer(gold).text)
    if _plain(wanted) == _plain(answer.text):
        return "right"
    if CHOICE.fullmatch(wanted):
        letter = _letter(answer)
        if letter is None:
            return "no_answer" if answer.place in ("whole", "phrase") else "wrong"
        return "right" if letter == wanted.strip("().").upper() else "wrong"
    family = next((names for names in FAMILIES if wanted.lower() in names), ())
    claims = _claims(answer, family)
    if not claims:
        return "no_answer"
    return "right" if _plain(wanted) in claims else "wrong"


def unwrapped(text: str) -> str:
    """Return a text without `\\text{}`, dollars, emphasis and quotes around it."""
    return WRAPPED.sub(r"\1", text.strip()).strip("$*_`\"' \n").removesuffix(".").strip()


def _marked(text: str) -> str:
    answer = marked_answer(text)
    return answer.text if answer else text.strip()


def _final_number(text: str) -> Decimal | None:
    return last_number(_joined(_marked(text)))


def _joined(text: str) -> str:
    return text.replace("{,}", ",").replace("\\!", "")


def _plain(text: str) -> str:
    words = re.sub(r"\\[ ,;]|[*_`\"'$]|\s+", " ", unwrapped(text)).strip(" .!").casefold()
    return re.sub(r"^(?:the|an?) (?=\S)", "", " ".join(words.split()))


def _letter(answer: Answer) -> str | None:
    text = unwrapped(answer.text)
    if re.fullmatch("[A-Za-z]", text):
        return text.upper()
    if answer.place == "whole":
        said = COPULA.fullmatch(_sentences(text)[-1])
        letter = CHOICE.fullmatch(unwrapped(said[1])) if said else None
        # At the start of a text, a letter must be closed as a list's letter is: "B) Paris".
        found = letter or re.match(r"\(([A-J])\)|([A-J])(?=[.):])", text)
    else:
        found = LETTER.match(text)
        if found and ANOTHER.match(text, found.end()):
            return None
    if found is None and answer.place in ("whole", "phrase"):
        found = last_match(LETTER_IN_SENTENCE, text)
    return next(filter(None, found.groups())).upper() if found else None


def _sentences(text: str) -> list[str]:
    return [part for part in SENTENCE_END.split(text) if part.strip()] or [text]


def _claims(answer: Answer, family: tuple[str, ...]) -> set[str]:
    """Return the forms of a prediction's answer that a word may be compared with."""
    sentences = _sentences(answer.text)
    if family:
        said = [re.findall(r"\w+", part.casefold()) for part in (sentences[-1], sentences[0])]
        if "not" in said[0]:
            return set()
        edges = [word for words in said if words for word in (words[0], words[-1])]
        return set([word for word in edges if word in family][:1])
    text = answer.text
    if answer.place == "whole":
        found = COPULA.match(sentences[-1])
        if not found:
            return {_plain(text)} if len(text.split()) <= 3 else set()
        text = found[1]
    return {_plain(text), _plain(CLAUSE_END.split(unwrapped(text), 1)[0])}
