"""Finds the program in an answer, as people and models write it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from leaf_distill.data.tests import Tests

FENCE = re.compile(
    r"^[ \t]*(```+|~~~+)[ \t]*([\w+#.-]*)[^\n]*\n(.*?)(?:^[ \t]*\1[ \t]*$|\Z)",
    re.MULTILINE | re.DOTALL,
)
PYTHON = ("", "python", "python3", "py", "py3", "python2", "pypy", "pypy3")
THOUGHT = re.compile(r".*</think(?:ing)?>", re.DOTALL)
READS = re.compile(r"\binput\s*\(|\bsys\.stdin\b|\bopen\(\s*(?:0|['\"]/dev/stdin)|\bfileinput\b")
CALLED = re.compile(r"(?<![\w.])([A-Za-z_]\w*)\s*\(")
# A line that begins a program in the middle of prose, and one that may stand in it.
BEGINS = re.compile(
    r"(?:#|for\s.+\sin\s.+:|(?:while|with|if)\s.+:\s*$|try\s*:|import\s+\w"
    r"|from\s+[\w.]+\s+import\b|(?:async\s+)?def\s+\w+\s*\(|class\s+\w+\s*[:(]|@\w"
    r"|if\s+__name__|[A-Za-z_][\w, ]*=[^=]|print\s*\(|#!)"
)
STANDS = re.compile(
    r"\s|$|[#@)\]}\"']|(?:if|elif|else|for|while|try|except|finally|with|match|case)\b.*:"
    r"|(?:assert|raise|return|del|global|pass|yield|break|continue)\b|(?:async\s+)?(?:def|class)\s"
    r"|import\s|from\s+[\w.]+\s+import\b|[A-Za-z_][\w.\[\]\"', ]*\s*(?:=|[-+*/%|&^]=)[^=]"
    r"|[A-Za-z_][\w.]*\(.*"
)


def find_program(answer: str, tests: Tests) -> str | None:
    """Return the program in an answer; None where there is none that the tests could call.

    It is the last fenced block of Python that defines the entry point (or what assertions call, or
    that reads the standard input); without such a block, the lines of the text that are code. Where
    the tests have a `prefix`, indented code that defines nothing goes on from it.

    Args:
        answer: the whole answer, with prose, or nothing but code.
        tests: the tests that the program is for.
    """
    text = THOUGHT.sub("", answer.replace("\r\n", "\n"), count=1)
    blocks = [(match[2].lower(), match[3]) for match in FENCE.finditer(text)]
    python = [block for language, block in blocks if language in PYTHON]
    raw = python or [block for _, block in blocks]
    candidates = [_plain(block) for block in raw] or [_code_lines(text)]
    fitting = [one for one in reversed(candidates) if one.strip() and _fits(one, tests)]
    if tests.kind == "stdin":  # what does not read is an example, unless nothing reads
        fitting = [one for one in fitting if READS.search(one)] or fitting
    if fitting:
        return fitting[0]
    if tests.prefix and (body := _body(raw[-1] if raw else text)):
        return f"{tests.prefix.rstrip()}\n{body}"
    # A name may be defined in ways that cannot be seen here: by `exec`, or an import of all.
    hidden = tests.entry_point and re.search(r"\bexec\(|\bglobals\(|import\s+\*", candidates[-1])
    return candidates[-1] if hidden else None


def _plain(block: str) -> str:
    """Return a block without the indent that all its lines share, as within a list."""
    lines = block.expandtabs(4).split("\n") if "\t" in block else block.split("\n")
    first = next((line for line in lines if line.strip()), "")
    indent = len(first) - len(first.lstrip())
    if not indent or not BEGINS.match(first.lstrip()):
        return block
    return "\n".join(line[indent:] if not line[:indent].strip() else line for line in lines)


def _fits(program: str, tests: Tests) -> bool:
    if tests.kind == "stdin":
        return bool(READS.search(program)) or _is_code(program)
    names = _wanted(tests)
    return not names or any(_defines(program, name) for name in names)


def _wanted(tests: Tests) -> Sequence[str]:
    """Return names of which a program must define one."""
    if tests.entry_point:
        owner, _, method = tests.entry_point.partition("().")
        return [owner] if method else [owner, "Solution"]
    return list(dict.fromkeys(name for text in tests.code for name in CALLED.findall(text)))


def _defines(program: str, name: str) -> bool:
    name = re.escape(name)
    pattern = (
        rf"^[ \t]*(?:(?:async\s+)?def|class)\s+{name}\b|^[ \t]*{name}\s*(?::[^=\n]+)?="
        rf"|^(?:from\s+\S+\s+)?import\b.*\b{name}\b"
    )
    return re.search(pattern, program, re.MULTILINE) is not None


def _is_code(program: str) -> bool:
    return any(BEGINS.match(line) for line in program.split("\n"))


def _code_lines(text: str) -> str:
    """Return the lines of a text without fences that are code, from the first that begins it."""
    return "\n".join(_lines(text.split("\n")))


def _lines(lines: Sequence[str]) -> Iterator[str]:
    begun, quoted = False, False
    for line in lines:
        begun = begun or bool(BEGINS.match(line))
        if not begun:
            continue
        if not quoted and not STANDS.match(line) and not BEGINS.match(line):
            begun = False  # prose; code may come again after it
            continue
        yield line
        if line.count('"""') % 2 or line.count("'''") % 2:
            quoted = not quoted


def _body(text: str) -> str:
    """Return the indented lines with which a text begins: the rest of a function."""
    lines = text.split("\n")
    while lines and not lines[0].strip():
        lines.pop(0)
    body = []
    for line in lines:
        if line.strip() and not line[0].isspace():
            break
        body.append(line)
    return "\n".join(body).rstrip()
