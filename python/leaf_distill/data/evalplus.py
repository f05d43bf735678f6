"""Reads the tests of HumanEval+ and MBPP+: inputs in JSON, whose outputs a right program gives.

JSON has no tuples, sets, complex numbers, or keys that are no text. Where a row also has assertions
(MBPP+), the literals in them tell what each argument was.
"""

from __future__ import annotations

import ast
import contextlib
import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from leaf_distill.data.python_source import before, definition, parsed, source_of
from leaf_distill.data.tests import Tests

_AS_SETS = "set(result) == set(expected)"
_PADDED = "[str(one).zfill(max(map(len, map(str, args)))) for one in args]"
_SURFACE = "round(args[0] ** 2 + 2 * args[0] * ((args[0] / 2) ** 2 + args[1] ** 2) ** 0.5)"
MATCHES = {
    "find_zero": "abs(poly(args[0], result)) <= 1e-4",  # any zero of several
    "similar_elements": _AS_SETS,
    "find_char_long": _AS_SETS,
    "common_in_nested_lists": _AS_SETS,
    "extract_singly": _AS_SETS,
    "larg_nnum": _AS_SETS,
    "intersection_array": _AS_SETS,
    "find_dissimilar": _AS_SETS,
    "Diff": _AS_SETS,
    "are_equivalent": "True",  # the problem does not say what is wanted
    "sum_div": "result == expected or result == 0",
    "surface_Area": f"result in (expected, {_SURFACE})",  # the height may be the pyramid's
    "digit_distance_nums": (
        f"result in (expected, sum(abs(int(one) - int(other)) for one, other in zip(*{_PADDED})))"
    ),
}
"""The problems that evalplus 0.3.1 does not judge by equality: what a result must satisfy."""

Samples = Sequence[Any]
"""The literals that stand at one place of the arguments."""


def read_evalplus(
    fields: Mapping[str, Any], base: Sequence[Sequence[Any]], plus: Sequence[Sequence[Any]]
) -> Tests:
    """Return the tests of a row, as calls whose outputs the reference gives.

    Args:
        fields: the row's `prompt`, `canonical_solution`, `entry_point`, `atol` and, where it has
            one, `assertion`.
        base, plus: lists of arguments, as JSON has them.

    Raises:
        ValueError: an input cannot be written as Python source.
    """
    prompt, name = str(fields.get("prompt", "")), str(fields.get("entry_point", ""))
    calls = _literal_calls(str(fields.get("assertion", "")), name)
    inputs = []
    for at, arguments in enumerate(base):
        # The assertions are the base inputs, so that each has its own literals.
        samples = [calls[at]] if len(calls) == len(base) else calls
        inputs.append(_arguments(arguments, samples))
    inputs += [_arguments(arguments, calls) for arguments in plus]
    return Tests(
        "calls",
        entry_point=name,
        setup=before(prompt, name),
        inputs=tuple(inputs),
        atol=float(fields.get("atol") or 0),
        matches=MATCHES.get(name, ""),
        reference=prompt + str(fields.get("canonical_solution", "")),
        prefix=prompt if definition(prompt, name) else "",
    )


def _literal_calls(assertion: str, name: str) -> list[list[Samples]]:
    """Return the arguments of each call of a function, each as a list of its literal or nothing."""
    tree = parsed(assertion)
    calls = []
    for node in ast.walk(tree) if tree else ():
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == name:
            arguments: list[Samples] = []
            for argument in node.args:
                try:
                    arguments.append([ast.literal_eval(argument)])
                except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
                    arguments.append([])  # an expression
            calls.append(arguments)
    return calls


def _arguments(arguments: Sequence[Any], calls: Sequence[Sequence[Samples]]) -> str:
    """Return the Python source of the tuple of arguments."""
    typed = []
    for at, value in enumerate(arguments):
        found = (call[at] for call in calls if at < len(call))
        typed.append(_typed(value, list(itertools.chain.from_iterable(found)), ()))
    return source_of(tuple(typed))


def _typed(value: Any, samples: Samples, deeper: Samples) -> Any:
    """Return a JSON value with the types that literals have at its place.

    Args:
        value: what JSON has made of a literal.
        samples: the literals at this place.
        deeper: those that hold where the value is nested deeper than any literal: the literals of
            an enclosing place, if they nest their own kind.
    """
    if isinstance(value, str):
        return _number(value, samples)
    if not isinstance(value, list | dict):
        return value
    kinds: tuple[type, ...] = (dict,) if isinstance(value, dict) else (list, tuple, set)
    alike: list[Any] = [one for one in samples if isinstance(one, kinds)]
    alike = alike or [one for one in deeper if isinstance(one, kinds)]
    if not alike and not deeper and not samples:
        return value  # nothing is known here
    if isinstance(value, dict):
        within = [item for one in alike for item in one.values()]
    else:
        within = [item for one in alike for item in one]
    deeper = alike if any(isinstance(item, kinds) for item in within) else deeper
    if isinstance(value, dict):
        keys = [key for one in alike for key in one]
        return {
            _key(key, keys): _typed(item, _at_key(key, alike) or within, deeper)
            for key, item in value.items()
        }
    kind = Counter(map(type, alike)).most_common(1)[0][0] if alike else list
    # A tuple may have another type at each position.
    records = kind is tuple and {(type(one), len(one)) for one in alike} == {(tuple, len(value))}
    items = [
        _typed(item, [one[at] for one in alike] if records else within, deeper)
        for at, item in enumerate(value)
    ]
    try:
        return kind(items)
    except TypeError:  # a set of lists
        return items


def _at_key(key: str, alike: Samples) -> Samples:
    return [one[key] for one in alike if key in one]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | complex) and not isinstance(value, bool)


def _number(text: str, samples: Samples) -> Any:
    """Return the number that JSON had to write as text, where the literals are all numbers."""
    if not samples or not all(map(_is_number, samples)):
        return text
    kinds: tuple[type, ...] = (int, float, complex)
    if all(isinstance(one, complex) for one in samples):
        kinds = (complex,)
    for kind in kinds:
        with contextlib.suppress(ValueError):
            return kind(text)
    return text


def _key(text: str, keys: Samples) -> Any:
    """Return a key as what the literals have as keys."""
    if all(isinstance(one, str) for one in keys):
        return text
    try:
        key = {"true": True, "false": False, "null": None}.get(text, ...)
        key = ast.literal_eval(text) if key is ... else key
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text
    known = any(type(one) is type(key) or (_is_number(one) and _is_number(key)) for one in keys)
    return key if known else text
