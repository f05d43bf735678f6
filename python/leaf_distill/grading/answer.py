"""Finds the final answer of a text, and the mathematics in it."""

from __future__ import annotations

import re
from typing import Literal, NamedTuple

from leaf_distill.grading.quantity import FUNCTIONS, MULTIPLES, TEXT, UNITS

TAIL = 4000  # characters: the end of a text that may hold its answer, and an answer's length
Place = Literal["box", "mark", "phrase", "whole"]

# Characters that mean the same. A full stop of Chinese or Japanese ends a sentence too.
CHARACTERS = str.maketrans(
    dict(zip("\u2212\uff0d\u00a0\u202f\uff0c\u3001", "--  ,,", strict=True))
    | dict(zip("\uff1a\uff05\uff08\uff09\u00f7", ":%()/", strict=True))
    | {"\u00d7": "\\times ", "\u00b7": "\\cdot ", "\u00b1": "\\pm ", "\u03c0": "\\pi "}
    | {"\u2264": "\\le ", "\u2265": "\\ge ", "\u221e": "\\infty ", "\u222a": "\\cup "}
    | {"\u00b0": "^\\circ", "\u00b2": "^2", "\u00b3": "^3", "\u3002": ". "}
)
ROOT = re.compile(r"(?:\u221a|(?<![\\A-Za-z])sqrt(?=\s*\())\s*(?:\(([^()]*)\)|(\w+))")
BRACE = re.compile(r"\\(?:boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)
JOINT = re.compile(r"\s*\$*\s*(?:,?\s*(?:\\text\{)?\s*\b(?:and|or)\b\s*\}?|,)\s*\$*\s*")
MARK = re.compile(r"^[ \t]*####[ \t]*(\S.*)$", re.MULTILINE)
PHRASE = re.compile(
    r"(?:\bfinal[ _]?answer\W{1,4}(?=[\d\\$(-])"
    r"|\banswers?\b(?:[^.,:=\n]{0,60}?\b(?:is|are|was)\b|[^\w\n.]{0,4}[:=]|[*#_: \t]{0,4}\n)"
    r"|\u7b54\u6848\s*(?:\u662f|\u4e3a|\u70ba|:))(?!\s*(?:correct|right|wrong|not)\b)[\s*_:=]*",
    re.IGNORECASE,
)
BLOCK = re.compile(r"\$\$.+?\$\$|\\\[.+?\\\]", re.DOTALL)
SENTENCE_END = re.compile(r"(?<!\\)[.!?][*_\"')]*(?:\s|$)|\n|</\w|<\|")
# A dollar before a digit may be money: a span neither ends in a space nor is followed by a digit.
SPAN = re.compile(
    r"\$\$(.+?)\$\$|\\\[(.+?)\\\]|\\\((.+?)\\\)"
    r"|(?<!\\)\$(?![\s$])((?:\\.|[^\\$\n])+)(?<!\s)\$(?![0-9$])",
    re.DOTALL,
)
NOT_PROSE = re.compile(
    r"\\(?:begin|end|text|mbox|mathrm|textrm|textbf|operatorname)\s*\{[^{}]*\}|\\[A-Za-z]+"
)
WORD = re.compile(
    r"[^\W\d_]{3,}|(?i:(?<!\S)(?:it|is|so|he|we|be|of|to|on|if|my|no)(?![^\s,.:;]))"
    r"|[\u3040-\u30ff\u4e00-\u9fff\uac00-\ud7af]"
)
OPEN = r"(?:[-+(\[$\u20ac\u00a3\u00a5]|\\\$)*"
DIGITS = r"[0-9.]*[0-9](?:[0-9.,/*^()\[\]!]|[-+](?=[0-9(])|\\[!,])*[A-Za-z%^]*"
TERM = rf"(?:(?<!\S)[^\s\\^]*[\\^]\S*|(?<![A-Za-z0-9_.^*/]){OPEN}{DIGITS})"
LETTER = r"(?<![\w\\'])[A-Za-z](?![\w'])"
MORE = rf"(?:(?:\s+[-+*/^=]\s+|\s*=\s*)(?:{TERM}|{LETTER}))"
AFTER = "|".join(sorted((re.escape(name) for name in [*UNITS, *MULTIPLES]), key=len, reverse=True))
LIST = rf"{TERM}(?:,\s+{TERM})*,?\s+(?:and|or)\s+{TERM}"
TERMS = re.compile(
    rf"(?:{LIST}|{TERM}{MORE}*|{LETTER}{MORE}+)(?:\s?(?:{AFTER})(?![A-Za-z]))*", re.IGNORECASE
)


class Answer(NamedTuple):
    """A final answer as it is written, and the place where it was found.

    Attributes:
        text: the answer.
        place: "box" (the last `\\boxed{}`), "mark" (after `####`), "phrase" (after "the answer is")
            or "whole" (the text has none of these).
    """

    text: str
    place: Place


def find_answer(text: str) -> Answer:
    """Return the final answer of a text; a thought before `</think>` does not count."""
    text = text.rpartition("</think>")[2]
    marked = marked_answer(text)
    if marked is not None:
        return Answer(readable(marked.text).strip(), marked.place)
    text = readable(text[-TAIL:])
    phrase = last_match(PHRASE, text)
    if phrase and text[phrase.end() :].strip():
        rest = text[phrase.end() :]
        block = BLOCK.match(rest)
        return Answer((block[0] if block else SENTENCE_END.split(rest, 1)[0]).strip(), "phrase")
    return Answer(text.strip(), "whole")


def marked_answer(text: str) -> Answer | None:
    """Return the content of the last box, or else the line after the last `####`, or None."""
    boxes = _boxes(text)
    if boxes:
        start, _, content = boxes.pop()
        while boxes and JOINT.fullmatch(text[boxes[-1][1] : start]):
            start, _, before = boxes.pop()
            content = f"{before}, {content}"
        return Answer(content.strip(), "box")
    mark = last_match(MARK, text)
    # A heading of the fourth level starts with the same mark; more text follows it.
    if mark and (not text[mark.end() :].strip() or not is_prose(mark[1])):
        return Answer(mark[1].strip(), "mark")
    return None


def readable(text: str) -> str:
    """Write Unicode's and Python's mathematics as LaTeX, and drop Markdown's emphasis."""
    text = ROOT.sub(lambda found: rf"\sqrt{{{found[1] or found[2]}}}", text.translate(CHARACTERS))
    text = re.sub(r"(?<![\\A-Za-z])pi(?![A-Za-z])", r"\\pi ", text)
    return re.sub(r"(?<![\w)\]])\*\*|\*\*(?![\w(])", " ", text)  # emphasis, no power


def last_match(pattern: re.Pattern[str], text: str) -> re.Match[str] | None:
    """Return the last of a pattern's matches in a text."""
    found = None
    for found in pattern.finditer(text):  # noqa: B007
        pass
    return found


def is_prose(text: str) -> bool:
    """Tell whether a text has plain words, not only symbols and functions."""
    words = WORD.findall(NOT_PROSE.sub(" ", text))
    return any(word not in FUNCTIONS for word in words)


def expression(text: str, *, first: bool) -> str:
    """Return the mathematics of an answer; an empty text says that there is none.

    Args:
        text: an answer.
        first: in prose, return the first expression; otherwise the last.
    """
    words = re.fullmatch(rf"{TEXT}\{{([^{{}}]*)\}}", text)
    text = (words[1] if words else text)[:TAIL]
    outside = SPAN.sub(lambda found: " " * len(found[0]), text)
    if not is_prose(outside):
        return without_delimiters(text)
    spans = [(found.start(), found.end(), found[0]) for found in SPAN.finditer(text)]
    runs: list[tuple[int, int, str]] = []
    for start, end, span in spans:
        if runs and JOINT.fullmatch(text[runs[-1][1] : start]):
            start, _, before = runs.pop()
            span = f"{before}, {span}"
        runs.append((start, end, span))
    terms = [(found.start(), found.end(), found[0]) for found in TERMS.finditer(outside)]
    if not runs and not terms:
        return ""
    chosen = min(runs + terms) if first else max(runs + terms)
    if chosen in runs:
        return without_delimiters(chosen[2])
    return re.split(r"=\s*", chosen[2].strip().rstrip(".,:;-"))[-1]


def without_delimiters(text: str) -> str:
    """Return mathematics without its dollars and brackets, and without a full stop at its end."""
    text = re.sub(r"\\[()\[\]]", " ", text)
    if text.count("$") == 1:
        text = re.sub(r"(?<!\\)\$(?=\s*[0-9.])", r"\\$", text)  # money
    text = re.sub(r"(?<!\\)\$", "", text).strip(" \n\t*_`\"'")
    text = re.sub(r"^=\s*|\s*[.,;:]$", "", text)
    extra = "}" * (text.count("}") - text.count("{"))
    return text.removesuffix(extra)


def _boxes(text: str) -> list[tuple[int, int, str]]:
    """Return start, end and content of the closed boxes of a text."""
    found: list[tuple[int, int, str]] = []
    opened: list[re.Match[str] | None] = []
    for token in BRACE.finditer(text):
        if token[0] == "{":
            opened.append(None)
        elif token[0].startswith(("\\boxed", "\\fbox")):
            opened.append(token)
        elif token[0] == "}" and opened:
            start = opened.pop()
            content = text[start.end() : token.start()] if start else ""
            if start and content.strip():
                found.append((start.start(), token.end(), content))
    return found
