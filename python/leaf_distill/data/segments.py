"""The segments of a response: about equal parts that end where a sentence or a line does."""

from __future__ import annotations

import re
from collections.abc import Sequence

from leaf_distill.data.sentences import is_inside, protected, sentence_borders

_CODE_LINE = re.compile(
    r"(?:def|class|async def|import|from \S+ import|return|if|elif|else|for|while|with|try|except|"
    r"raise|yield|assert|print|public|private|static|void|int|function|const|let|var|fn|package|"
    r"using|struct|template|#include|@)\b.*[:;{},)\]\w]$|.*[;{}]$|[\w.\[\], ]+ ?[-+*/|&]?= ?\S.*|"
    r"[\w.]+\(.*\)$|#.*|//.*|[)\]}]+[,;]?$"
)
_CONTINUES = re.compile(r"[)\]}]|(?:else|elif|except|finally|catch|case|default)\b")
_TEXT_IN_QUOTES = re.compile(r"(\"\"\"|''').*?(?:\1|\Z)", re.DOTALL)


def split_response(text: str, n: int) -> list[int]:
    """Split a response into parts of about equal length, at sentence or line borders.

    A border never stands inside a formula, a code block, a number, an abbreviation, a URL or an
    e-mail address. In code without a fence it stands at a blank line where one is near, else at a
    line of the least indentation that gives enough borders. White space that holds a line break
    stays with the earlier part, and blanks go with the later one, so that tokens are not split.

    Args:
        text: the response.
        n: the number of parts.

    Returns:
        At most n - 1 positions within the text, strictly increasing. They are fewer where the text
        has fewer borders; each part holds something beside white space.

    Raises:
        ValueError: n is below 1.
    """
    if n < 1:
        raise ValueError(f"n: must be at least 1, got {n}: it is the number of parts")
    if n == 1 or not text.strip():
        return []
    guarded = protected(text)
    if _is_code(text, guarded):
        borders, extra = _code_borders(text, n)
    else:
        borders, extra = sentence_borders(text, guarded), {}
    return _spread(_not_blank(text, borders), extra, len(text), n)


def _is_code(text: str, guarded: Sequence[tuple[int, int]]) -> bool:
    """Whether most lines outside formulas and fences look like code."""
    if any(text.startswith(("```", "~~~"), start) for start, _ in guarded):
        return False
    lines = [line for line in text.splitlines() if line.strip()]
    code = sum(
        line[0] in " \t" or _CODE_LINE.fullmatch(line) is not None
        for line in (line.rstrip() for line in lines)
    )
    return len(lines) > 1 and code > 0.7 * len(lines) and not re.search(r"\\[a-z]+\{|\$", text)


def _code_borders(text: str, n: int) -> tuple[list[int], dict[int, float]]:
    """Return the borders of code, and how much further away each counts as being."""
    quoted = [match.span() for match in _TEXT_IN_QUOTES.finditer(text)]
    after_blank, depth = set(), {}
    for match in re.finditer(r"\n(?:[ \t]*\n)*(?=([ \t]*)([^\s]))", text):
        at = match.end()
        if is_inside(quoted, at) or _CONTINUES.match(text, match.start(2)):
            continue
        depth[at] = len(match[1].expandtabs(4))
        if match[0].count("\n") > 1:
            after_blank.add(at)
    allowed: set[int] = set()
    for level in sorted(set(depth.values())):
        allowed = after_blank | {at for at in depth if depth[at] <= level}
        if len(allowed) >= n - 1:
            break
    return sorted(allowed), {at: len(text) / (4 * n) for at in allowed - after_blank}


def _not_blank(text: str, borders: Sequence[int]) -> list[int]:
    """Return the borders between which something beside white space stands."""
    kept: list[int] = []
    end = len(text.rstrip())
    for at in borders:
        if at < end and text[kept[-1] if kept else 0 : at].strip():
            kept.append(at)
    return kept


def _spread(borders: Sequence[int], extra: dict[int, float], length: int, n: int) -> list[int]:
    """Choose n - 1 borders, as near to the ends of n equal parts as they can be together."""
    if len(borders) <= n - 1:
        return list(borders)
    best = [0.0] * len(borders)
    chosen: list[list[int]] = []
    for part in range(1, n):
        target = part * length / n
        row, came_from = [float("inf")] * len(borders), [-1] * len(borders)
        before, at_before = (0.0, -1) if part == 1 else (float("inf"), -1)
        for index, at in enumerate(borders):
            row[index] = before + (abs(at - target) + extra.get(at, 0.0)) ** 2
            came_from[index] = at_before
            if part > 1 and best[index] < before:
                before, at_before = best[index], index
        best = row
        chosen.append(came_from)
    index = min(range(len(borders)), key=lambda one: best[one])
    picked = []
    for came_from in reversed(chosen):
        picked.append(borders[index])
        index = came_from[index]
    return picked[::-1]
