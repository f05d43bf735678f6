"""Compares expressions by their LaTeX, and else by math-verify, which runs in a worker."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import lru_cache
from itertools import accumulate
from typing import Any

from leaf_distill.grading.answer import JOINT, Answer, expression, find_answer
from leaf_distill.grading.quantity import Quantity, quantity, same_quantity, split_unit, units_agree
from leaf_distill.grading.text import Verdict, gold_expression

FORMS = [  # a pattern, and the one form that it is written in
    (re.compile(pattern), form)
    for pattern, form in [
        (r"\\\$", "$"),
        (r"\\(?:left|right|[bB]igg?[lr]?)(?![A-Za-z])\.?", ""),
        (r"\\(?:displaystyle|limits)(?![A-Za-z])", ""),
        (r",\s*\\!\s*|\{,\}|\\,(?=\d{3})", ","),
        (r"\\[,!;: ]|~|\\quad|\\qquad", " "),
        (r"\\[dtc]frac", r"\\frac"),
        (r"\\(?:mbox|textrm|mathrm|textbf)\s*(?=\{)", r"\\text"),
        (r"\\ge(?:q|qslant)?(?![A-Za-z])", r"\\ge"),
        (r"\\le(?:q|qslant)?(?![A-Za-z])", r"\\le"),
        (r"\^\s*\{\s*\\circ\s*\}", r"^\\circ"),
        (r"\\%", "%"),
        (r"\\lbrace|\\lbrack", r"\\{"),
        (r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}"),
        (r"\\sqrt\s*(\d)", r"\\sqrt{\1}"),
        (r"([\^_])\s*\{\s*(\w)\s*\}", r"\1\2"),
        (r"(?<![\d./])(\d+)\s+(\d+)\s*/\s*(\d+)(?!\d)", r"\1\\frac{\2}{\3}"),
        (r"\*\*", "^"),
        (r"\^(-?\d{2,})", r"^{\1}"),  # 2^10 is no 2^{1}0
        (r"(?<![\d,])\s+|\s+(?!\d)", ""),  # 1, 234 is no 1,234
    ]
]
MEMBER_OF = re.compile(r"^[A-Za-z]\\in(?![A-Za-z])")  # x \in [0, 1] is [0, 1]
THOUSANDS = re.compile(r"(?<=\d),\d{3}(?!\d)")
NEAR = 1e-5  # how far, relatively, a rounded decimal may be from the exact value


def judge(gold: str, prediction: str) -> Verdict:
    """Grade mathematics by the final answers' expressions.

    Args:
        gold: a gold answer in LaTeX or plain text, or a completion that ends in one.
        prediction: a model's text.

    Returns:
        "right", "wrong", or "no_answer" where the prediction has no expression.
    """
    verdict = judge_quickly(gold, prediction)
    if verdict is not None:
        return verdict
    wanted, found = _both(find_answer(gold), find_answer(prediction))
    return "right" if same(wanted, found) else "wrong"


def judge_quickly(gold: str, prediction: str) -> Verdict | None:
    """Return the verdict if text and plain numbers decide it, None if math-verify must."""
    answers = find_answer(gold), find_answer(prediction)
    wanted, found = _both(*answers)
    numbers = _number(wanted), _number(found, letters=True)
    if numbers[0] and numbers[1]:
        return "right" if same_quantity(numbers[0], numbers[1]) else "wrong"
    # The whole answer counts as well: "$f(x)=ax$, where $a$ is an integer".
    for one, other in ((wanted, found), (answers[0].text, answers[1].text)):
        if normal(one) == normal(other) != "":
            return "right"
    if not found:
        return "wrong" if answers[1].place in ("box", "mark") else "no_answer"
    return None


def _number(text: str, *, letters: bool = False) -> Quantity | None:
    return quantity(text, letters=letters) or quantity(normal(text, words=True), letters=letters)


def normal(latex: str, *, words: bool = False) -> str:
    """Write LaTeX that has many forms in one: `\\dfrac 12` becomes `\\frac{1}{2}`.

    Args:
        latex: an expression.
        words: whether to keep the spaces, which plain words need.
    """
    for pattern, form in FORMS[:-1] if words else FORMS:
        latex = pattern.sub(form, latex)
    return latex.strip() if words else latex.replace("$", "").strip(" .")


def same(gold: str, found: str) -> bool:
    """Tell whether two expressions, or two lists of them in any order, are equal."""
    wanted, given = items(gold), items(found)
    # Brackets around all of it may be left out or put in, but a pair keeps its order.
    if len(wanted) == 1 != len(given):
        brackets, wanted = members(wanted[0])
        return brackets == "()" and _same_in_order(wanted, given)
    if len(given) == 1 != len(wanted):
        given = members(given[0])[1]
    if len(wanted) != len(given):
        return False
    for item in wanted:
        at = next((at for at, other in enumerate(given) if same_item(item, other)), None)
        if at is None:
            return False
        given.pop(at)
    return True


def items(latex: str) -> list[str]:
    """Return the members of a list or set, `a \\pm b` as two of them."""
    if re.search(r"\b(?:and|or)\b", latex):
        latex = JOINT.sub(", ", latex)
    latex = normal(latex)
    inner = re.fullmatch(r"\\\{(.*)\\\}", latex)
    parts = [latex] if quantity(latex) else _split(inner[1] if inner else latex)
    return [
        MEMBER_OF.sub("", part).replace(r"\pm", sign).replace(r"\mp", "-" if sign == "+" else "+")
        for part in parts
        for sign in ("+-" if r"\pm" in part else "+")
    ]


def members(latex: str) -> tuple[str, list[str]]:
    """Return the brackets of a tuple or interval and what they hold, nothing of anything else."""
    inside = latex[1:-1]
    if not re.fullmatch(r"[(\[].*[)\]]", latex) or min(_depths(inside), default=0) < 0:
        return "", []
    return latex[0] + latex[-1], _split(inside, thousands=False)


def _split(latex: str, *, thousands: bool = True) -> list[str]:
    """Split a list at its commas; with `thousands`, the comma of 1,234 is none of them."""
    parts, start = [], 0
    for at, depth in enumerate(_depths(latex)):
        if latex[at] in ",;" and not depth and not (thousands and THOUSANDS.match(latex, at)):
            parts.append(latex[start:at].strip())
            start = at + 1
    return [*parts, latex[start:].strip()]


def _depths(latex: str) -> list[int]:
    """Return how many brackets are open after each character."""
    return list(accumulate((char in "([{") - (char in ")]}") for char in latex))


def same_item(gold: str, found: str) -> bool:
    """Tell whether two expressions are equal, with their units and brackets."""
    if normal(gold) == normal(found):
        return True
    numbers = quantity(gold), quantity(found)
    if numbers[0] and numbers[1]:
        return same_quantity(numbers[0], numbers[1])
    (brackets, wanted), (others, given) = members(gold), members(found)
    if len(wanted) == len(given) > 1:
        return brackets == others and _same_in_order(wanted, given)
    (gold, unit), (found, other) = split_unit(gold), split_unit(found)
    if "%" not in (unit, other) or unit == other:
        return units_agree(unit, other) and equal(gold, found)
    if unit and other:
        return False
    if unit:
        return equal(rf"\frac{{{gold}}}{{100}}", found)
    return equal(gold, found) or equal(gold, rf"\frac{{{found}}}{{100}}")


def _same_in_order(wanted: list[str], given: list[str]) -> bool:
    return len(wanted) == len(given) and all(map(same_item, wanted, given))


def equal(gold: str, found: str) -> bool:
    """Tell whether math-verify finds two expressions equal; the gold answer comes first."""
    from math_verify import verify

    wanted, given = _parsed(gold), _parsed(found)
    if wanted is None or given is None or not verify(wanted, given, timeout_seconds=None):
        return False
    # math-verify rounds to six places, which makes all small numbers equal.
    try:
        exact, near = complex(wanted), complex(given)
    except (TypeError, ValueError, OverflowError):
        return True
    return abs(exact - near) <= NEAR * abs(exact)


@lru_cache(maxsize=256)
def _parsed(latex: str) -> Any:
    from math_verify import LatexExtractionConfig, parse

    # Units have been split off; math-verify would take the m of 6m for metres.
    config = LatexExtractionConfig()
    config = replace(config, normalization_config=replace(config.normalization_config, units=False))
    found = parse(f"${latex}$", [config], fallback_mode="no_fallback", parsing_timeout=None)
    return found[0] if found else None


def _both(gold: Answer, prediction: Answer) -> tuple[str, str]:
    """Return the expressions of two final answers."""
    first = prediction.place != "whole"
    return gold_expression(gold), expression(prediction.text, first=first)
