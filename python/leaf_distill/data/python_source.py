"""Python source that stands in a dataset: whether it compiles, and values written as source."""

from __future__ import annotations

import ast
import keyword
import math
import re
import warnings
from typing import Any

ENTRY_POINT = re.compile(r"(\w+\(\)\.)?\w+")


def parsed(source: str) -> ast.Module | None:
    """Return the syntax tree of a program, or None where it does not compile."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of invalid escapes, which are no errors
        try:
            return ast.parse(source)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return None


def is_entry_point(text: str) -> bool:
    """Whether a text is `name` or `Name().name`."""
    names = text.replace("().", " ").split(" ")
    return ENTRY_POINT.fullmatch(text) is not None and all(
        name.isidentifier() and not keyword.iskeyword(name) for name in names
    )


def definition(source: str, name: str) -> ast.FunctionDef | None:
    """Return the last definition of a function at the top level of a program, if there is one."""
    tree = parsed(source)
    functions = (one for one in (tree.body if tree else ()) if isinstance(one, ast.FunctionDef))
    return next((one for one in reversed(list(functions)) if one.name == name), None)


def before(source: str, name: str) -> str:
    """Return what a program has before its definition of `name`, such as imports and helpers."""
    function = definition(source, name)
    if function is None:
        return ""
    first = min([function.lineno, *(one.lineno for one in function.decorator_list)])
    return "".join(source.splitlines(keepends=True)[: first - 1]).rstrip()


def fenced(program: str) -> str:
    """Return a program as an answer: in a Markdown fence, unless it has one."""
    return program if "```" in program else f"```python\n{program.strip(chr(10))}\n```"


def source_of(value: Any) -> str:
    """Return the Python source of a value made of Python's literals.

    It gives the same text in every process, and can also be read where a float is infinite or no
    number, or a part of a complex number is a negative zero.

    Raises:
        ValueError: an integer has more digits than Python writes.
    """
    if isinstance(value, float) and not math.isfinite(value):
        return f'float("{value}")'
    if isinstance(value, complex):
        return f"complex({source_of(value.real)}, {source_of(value.imag)})"
    if isinstance(value, dict):
        pairs = (f"{source_of(key)}: {source_of(one)}" for key, one in value.items())
        return f"{{{', '.join(pairs)}}}"
    if not isinstance(value, list | tuple | set):
        return repr(value)
    parts = [source_of(one) for one in value]
    if isinstance(value, list):
        return f"[{', '.join(parts)}]"
    if isinstance(value, set):
        return f"{{{', '.join(sorted(parts))}}}" if parts else "set()"
    return f"({parts[0]},)" if len(parts) == 1 else f"({', '.join(parts)})"
