"""Reads the tests of a program from the columns of a row, in the layouts of known datasets."""

from __future__ import annotations

import ast
import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NoReturn

from leaf_distill.data.evalplus import read_evalplus
from leaf_distill.data.example import UnusableRow
from leaf_distill.data.python_source import (
    before,
    definition,
    is_entry_point,
    parsed,
    source_of,
)
from leaf_distill.data.tests import Tests
from leaf_distill.data.unpack import unpacked

ASSERTS = ("test_cases", "test_list", "assertions")
"""Columns of assert statements, as in AceCode-87K and MBPP."""

TEST_FIELDS = (
    *("tests", "test", *ASSERTS, "base_input", "plus_input", "assertion", "atol"),
    *("public_test_cases", "private_test_cases", "metadata", "input_output", "starter_code"),
    *("entry_point", "test_setup_code", "test_imports", "canonical_solution", "code"),
)
"""Columns that are read for the tests, beside `prompt`, `query` and `completion`."""


def read_tests(fields: Mapping[str, Any]) -> Tests | None:
    """Read the tests of a row, or return None where it has none.

    Layouts, in this order: `tests` (the JSON of `Tests`, assert statements as a list or one text,
    code with `def check(`, or inputs and outputs); HumanEval+ and MBPP+ (`base_input`); `test`
    with `def check(` (HumanEval, LeetCodeDataset), or as a script beside `test_list`;
    `test_cases`, `test_list` or `assertions`; LiveCodeBench (`public_test_cases`,
    `private_test_cases`); APPS and TACO (`input_output`).

    `test_setup_code` and `test_imports` run before the tests of any layout.

    Args:
        fields: the row's columns by their known names.

    Raises:
        UnusableRow: the tests are malformed ("bad_tests").
    """
    blank: tuple[Any, ...] = (None, "", [], {})
    given = {
        name: value
        for name, value in fields.items()
        if (value.strip() if isinstance(value, str) else value) not in blank
    }
    try:
        tests = _read(given)
        return None if tests is None else _checked(_with_setup(tests, given))
    except RecursionError as error:
        raise UnusableRow("bad_tests", "the tests nest values too deeply") from error


def _bad(sentence: str) -> NoReturn:
    raise UnusableRow("bad_tests", sentence)


def _read(given: Mapping[str, Any]) -> Tests | None:
    if "tests" in given:
        return _of_any("tests", given)
    if "base_input" in given or "plus_input" in given:
        return _evalplus(given)
    test = given.get("test")
    if isinstance(test, str) and ("def check(" in test or "test_list" in given):
        return _of_check(test, given) if "def check(" in test else _asserts([test], given)
    for column in ASSERTS:
        if column in given:
            return _of_any(column, given)
    if "public_test_cases" in given or "private_test_cases" in given:
        return _livecodebench(given)
    if "input_output" in given:
        return _of_any("input_output", given)
    return None


def _of_any(column: str, given: Mapping[str, Any]) -> Tests:
    """Read a column that may hold tests in several ways, also as JSON text."""
    value = _decoded(given[column])
    if isinstance(value, str):
        return _of_check(value, given) if "def check(" in value else _script(value, given)
    if isinstance(value, Mapping):
        return _own(value) if "kind" in value else _of_dict(column, value, given)
    if isinstance(value, list | tuple) and value:
        if all(isinstance(one, str) for one in value):
            return _asserts(value, given)
        if all(isinstance(one, Mapping) and {"input", "output"} <= one.keys() for one in value):
            return _of_cases(value, given)
    _bad(f"{column}: must be assert statements, or inputs and outputs, got {value!r:.60}")


def _decoded(value: Any) -> Any:
    """Return the list or dict of a JSON text, and any other value as it is."""
    if isinstance(value, str) and value.lstrip().startswith(("[", "{", '"')):
        with contextlib.suppress(ValueError):
            return json.loads(value)
    return value


def _own(value: Mapping[str, Any]) -> Tests:
    """Read the dict of `Tests.to_json`; a table gives it all fields, some of them None."""
    fields = {name: one for name, one in value.items() if one is not None}
    try:
        return Tests.from_json(json.dumps(fields))
    except (TypeError, ValueError) as error:
        _bad(str(error))


def _asserts(code: Sequence[str], given: Mapping[str, Any]) -> Tests:
    reference = given.get("canonical_solution") or given.get("code")
    return Tests("asserts", code=tuple(code), reference=_program(reference))


def _script(text: str, given: Mapping[str, Any]) -> Tests:
    """Split a text into its assert statements.

    Statements between them go before each later one, since a test may stand alone. A text that
    asserts within functions only is one test.
    """
    tree = parsed(text)
    if tree is None:
        _bad(f"tests: must be Python, got {text!r:.60}")
    if not any(isinstance(node, ast.Assert) for node in ast.walk(tree)):
        _bad(f"tests: must assert something, got {text!r:.60}")
    passive = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    between: list[str] = []
    code = []
    for statement in tree.body:
        inside = ast.walk(statement) if not isinstance(statement, passive) else ()
        source = ast.get_source_segment(text, statement) or ""
        if isinstance(statement, passive) and statement.decorator_list:
            source = ast.unparse(statement)  # a segment lacks the decorators
        if any(isinstance(node, ast.Assert) for node in inside):
            code.append("\n".join([*between, source]))
        else:
            between.append(source)
    return _asserts(code or [text], given)


def _of_check(test: str, given: Mapping[str, Any]) -> Tests:
    """Read HumanEval's or LeetCodeDataset's test, which calls `check(candidate)`.

    LeetCodeDataset's `prompt` is imports and classes. HumanEval's is the head of the function, with
    imports and helpers before it: an answer may repeat the function alone.
    """
    name, prompt = str(given.get("entry_point", "")), given.get("prompt")
    prompt = prompt if isinstance(prompt, str) else ""
    if "query" in given or "starter_code" in given:
        setup = prompt if parsed(prompt) else ""
        reference = _program(given.get("completion"))
        return Tests("check", entry_point=name, setup=setup, code=(test,), reference=reference)
    begun = definition(prompt, name) is not None
    solution = given.get("canonical_solution")
    return Tests(
        "check",
        entry_point=name,
        setup=before(prompt, name),
        code=(test,),
        reference=_program(f"{prompt}{solution}" if begun and solution else solution),
        prefix=prompt if begun else "",
    )


def _program(text: Any) -> str:
    """Return a right program where there is one in Python 3, without its Markdown fence."""
    if not isinstance(text, str):
        return ""
    if text.strip().startswith("```") and text.strip().endswith("```"):
        text = text.strip().partition("\n")[2].rpartition("```")[0]
    return text if text.strip() and parsed(text) else ""


def _evalplus(given: Mapping[str, Any]) -> Tests:
    base, plus = (_decoded(given.get(name, [])) for name in ("base_input", "plus_input"))
    for name, inputs in (("base_input", base), ("plus_input", plus)):
        if not isinstance(inputs, list) or not all(isinstance(one, list) for one in inputs):
            _bad(f"{name}: must be lists of arguments, got {inputs!r:.60}")
    try:
        tests = read_evalplus(given, base, plus)
    except ValueError as error:
        _bad(f"base_input, plus_input: must be values that Python can write ({error})")
    if definition(tests.reference, tests.entry_point) is None:
        _bad(
            f"canonical_solution: must define {tests.entry_point!r} after the prompt, got "
            f"{tests.reference[-60:]!r}"
        )
    return tests


def _livecodebench(given: Mapping[str, Any]) -> Tests:
    cases: list[Any] = []
    for column in ("public_test_cases", "private_test_cases"):
        found = _decoded(given.get(column, []))
        if isinstance(found, str):
            try:
                found = _decoded(unpacked(found))
            except ValueError as error:
                _bad(f"{column}: {error}")
        if not isinstance(found, list) or not all(isinstance(one, Mapping) for one in found):
            _bad(f"{column}: must be a list of tests, got {found!r:.60}")
        cases += found
    return _of_cases(cases, given)


def _of_cases(cases: Sequence[Any], given: Mapping[str, Any]) -> Tests:
    """Read tests of one input and one output each, with LiveCodeBench's `testtype`."""
    if not all({"input", "output"} <= one.keys() for one in cases):
        _bad(f"tests: must each have an input and an output, got {cases!r:.60}")
    kinds = {one.get("testtype") for one in cases} - {None}
    if len(kinds) > 1:
        _bad(f"testtype: must be the same for all tests of a row, got {sorted(map(str, kinds))}")
    inputs, outputs = [one["input"] for one in cases], [one["output"] for one in cases]
    if kinds != {"functional"}:
        name = "" if kinds == {"stdin"} else str(given.get("entry_point", ""))
        return _of_pairs(inputs, outputs, name)
    metadata = _decoded(given.get("metadata"))
    told = metadata.get("func_name") if isinstance(metadata, Mapping) else None
    name = str(told or given.get("entry_point", ""))
    name = name if "." in name else f"Solution().{name}"
    try:
        lines = [[line for line in text.split("\n") if line.strip()] for text in inputs]
        arguments = [[json.loads(line) for line in several] for several in lines]
        values = [json.loads(text) for text in outputs]
    except (AttributeError, TypeError, ValueError) as error:
        _bad(f"tests: must hold JSON values where testtype is functional ({error})")
    return _of_pairs(arguments, values, name)


def _of_dict(column: str, value: Mapping[str, Any], given: Mapping[str, Any]) -> Tests:
    """Read `inputs` and `outputs`, with an entry point as `fn_name` where there is one.

    APPS and TACO wrap the value of a call in a list, in all tests of a row or in none.
    """
    inputs, outputs = value.get("inputs"), value.get("outputs")
    if not isinstance(inputs, list) or not isinstance(outputs, list):
        _bad(f"{column}: must have the lists inputs and outputs, got {value!r:.60}")
    name = value.get("fn_name") or value.get("entry_point") or given.get("entry_point") or ""
    name = str(name)
    if name and column == "input_output":
        if "class Solution" in str(given.get("starter_code")) and "." not in name:
            name = f"Solution().{name}"
        if all(isinstance(one, list) and len(one) == 1 for one in outputs):
            outputs = [one[0] for one in outputs]
    return _of_pairs(inputs, outputs, name)


def _of_pairs(inputs: Sequence[Any], outputs: Sequence[Any], name: str) -> Tests:
    if len(inputs) != len(outputs):
        _bad(f"tests: must have as many outputs as inputs, got {len(outputs)} and {len(inputs)}")
    if not name:
        for one in inputs:
            if not all(isinstance(line, str) for line in (one if isinstance(one, list) else [one])):
                _bad(f"entry_point: must be given for inputs that are no text, got {one!r:.60}")
        return Tests("stdin", inputs=tuple(map(_text, inputs)), outputs=tuple(map(_text, outputs)))
    lists = [one if isinstance(one, list | tuple) else [one] for one in inputs]
    try:
        return Tests(
            "calls",
            entry_point=name,
            inputs=tuple(source_of(tuple(one)) for one in lists),
            outputs=tuple(source_of(one) for one in outputs),
        )
    except ValueError as error:
        _bad(f"tests: must be values that Python can write ({error})")


def _text(value: Any) -> str:
    """Return what stands on the standard input or output; a list has one line an item."""
    if isinstance(value, list | tuple):
        return "\n".join(map(_text, value))
    if not isinstance(value, str | int | float):
        _bad(f"tests: must be text where no function is named, got {value!r:.60}")
    return str(value)


def _with_setup(tests: Tests, given: Mapping[str, Any]) -> Tests:
    """Add `test_setup_code` and `test_imports` to what runs before the program."""
    imports = _decoded(given.get("test_imports", []))
    parts = [
        *(imports if isinstance(imports, list | tuple) else [imports]),
        given.get("test_setup_code", ""),
        tests.setup,
    ]
    if not all(isinstance(part, str) for part in parts):
        _bad(f"test_setup_code, test_imports: must be text, got {parts[:-1]!r:.60}")
    return replace(tests, setup="\n".join(part for part in parts if part.strip()))


def _asserts_something(code: str) -> bool:
    """Return whether code has an assertion, or a call as `assertEqual` or `assert_allclose`."""
    tree = parsed(code)
    return tree is not None and any(
        isinstance(node, ast.Assert | ast.Raise)
        or (isinstance(node, ast.Attribute) and node.attr.startswith("assert"))
        for node in ast.walk(tree)
    )


def _checked(tests: Tests) -> Tests:
    """Refuse tests that could judge no program."""
    by_code = tests.kind in ("asserts", "check")
    if not (tests.code if by_code else tests.inputs):
        _bad(f"tests: must have at least one test ({tests.kind}), got none")
    if tests.kind in ("calls", "check") and not is_entry_point(tests.entry_point):
        _bad(
            "entry_point: must be the name of a function, or Name().name of a method, got "
            f"{tests.entry_point!r}"
        )
    told = bool(tests.kind == "calls" and not tests.outputs and tests.reference)
    if not by_code and len(tests.outputs) != len(tests.inputs) and not told:
        _bad(
            "tests: must have as many outputs as inputs, or a reference that gives them, got "
            f"{len(tests.outputs)} for {len(tests.inputs)}"
        )
    values = (*tests.inputs, *tests.outputs) if tests.kind == "calls" else ()
    for code in (tests.setup, *tests.code, *values):
        if parsed(code) is None:
            _bad(f"tests: must be Python that compiles, got {code!r:.60}")
    if not all(code.strip() for code in (*tests.code, *values)):
        _bad("tests: must be Python, got a blank text")
    for code in tests.code:
        if not _asserts_something(code):
            _bad(f"tests: must assert something, got {code!r:.60}")
    return tests
