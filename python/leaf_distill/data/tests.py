"""The tests of a program: one record for all the ways in which datasets write them."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal, get_args

Kind = Literal["asserts", "check", "calls", "stdin"]
LISTS = ("code", "inputs", "outputs")


@dataclass(frozen=True)
class Tests:
    """The tests that a program must pass.

    Attributes:
        kind: "asserts": statements that must not raise. "check": code that defines
            `check(candidate)`. "calls": arguments of the entry point, with the values that it must
            return. "stdin": texts for the standard input, with what must be printed.
        entry_point: the function that "check" and "calls" call, as "name" or "Solution().name".
        setup: Python code that runs before the program and before the tests: imports, and the
            classes of arguments.
        code: "asserts": one statement or more a test; "check": one text.
        inputs: "calls": the Python source of a tuple of arguments for each test; "stdin": texts.
        outputs: "calls": the Python source of each value, or nothing where `reference` gives them;
            "stdin": texts.
        atol: absolute tolerance of floats, for "calls".
        matches: for "calls", a Python expression over `args`, `result` and `expected` that says
            whether a result is right; default: equal, floats within `atol`.
        reference: a program that is right. It gives the values of "calls" without outputs, and the
            time that a program may take.
        prefix: code that an answer without the entry point goes on from, as HumanEval's prompt.
    """

    __test__: ClassVar[bool] = False  # for pytest, which collects classes of such a name

    kind: Kind
    entry_point: str = ""
    setup: str = ""
    code: tuple[str, ...] = ()
    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    atol: float = 0.0
    matches: str = ""
    reference: str = ""
    prefix: str = ""

    def to_json(self) -> str:
        """Return the record as JSON, without the fields that are empty."""
        return json.dumps({name: value for name, value in asdict(self).items() if value})

    @classmethod
    def from_json(cls, text: str) -> Tests:
        """Return the record of `to_json`.

        Raises:
            ValueError: the text is something else.
        """
        values: Any = json.loads(text)
        fields = cls.__dataclass_fields__
        if not isinstance(values, dict) or not values.keys() <= fields.keys():
            raise ValueError(f"tests: must have the fields {list(fields)}, got {text!r:.60}")
        if values.get("kind") not in get_args(Kind):
            raise ValueError(f"tests: kind must be one of {get_args(Kind)}, got {text!r:.60}")
        for name, value in values.items():
            if name == "atol":
                fits = isinstance(value, int | float) and not isinstance(value, bool) and value >= 0
            elif name in LISTS:
                fits = isinstance(value, list) and all(isinstance(one, str) for one in value)
            else:
                fits = isinstance(value, str)
            if not fits:
                wanted = "texts" if name in LISTS else "a number" if name == "atol" else "text"
                raise ValueError(f"tests: {name} must be {wanted}, got {value!r:.60}")
        return cls(**{**values, **{name: tuple(values[name]) for name in LISTS if name in values}})

    @property
    def count(self) -> int:
        """The number of tests; a "check" is one."""
        return len(self.code or self.inputs)
