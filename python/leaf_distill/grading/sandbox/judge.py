"""The judge's side: runs the tests against a program that lives in another process.

The tests see the program through stand-ins that send each call over. What comes back is data, and
is compared here, by Python's own types, so that nothing that a program does in its own process can
make a test pass that its values do not pass.
"""

from __future__ import annotations

import binascii
import builtins
import importlib
import sys
import zlib
from collections.abc import Sequence
from types import CodeType, FunctionType, ModuleType
from typing import Any

from .channel import Channel, Gone, TooLong, Unreadable
from .compare import same
from .remote import OPAQUE, SHOWN, Missing, Program, ProgramError, Refused
from .values import Encoder, decode

# Names that tests use without importing them, where the program does.
WELL_KNOWN = {
    **{name: f"collections:{name}" for name in ("Counter", "OrderedDict", "defaultdict", "deque")},
    **{name: f"math:{name}" for name in ("isclose", "isnan", "isinf", "inf", "nan", "pi", "sqrt")},
    **{"np": "numpy", "deepcopy": "copy:deepcopy"},
}


class BadTests(Exception):
    """The tests themselves do not work."""


def judge(job: dict[str, Any], channel: Channel) -> dict[str, Any]:
    """Run the tests of a job and return a verdict.

    Returns:
        `verdict`: right, wrong, error, memory, refused, no_program; "bad_tests"; or "gone" where
        the program's process ended. `detail`: the first failing test, and how. With `record`, the
        entry point's values as `values`, instead of a comparison.
    """
    tests = _Tests(job)
    try:
        tests.prepare()
        if job["dry"]:
            return {"verdict": "right", "detail": ""}
        channel.put("confined")
        program = Program(channel, tests.classes, job["entry_point"])
        tests.bind(program)
        found = tests.run(program)
        if program.broken is not None:  # which a test has caught
            raise program.broken
        if not program.calls:
            raise Refused("the tests call nothing of the program")
        return {"verdict": "right", "detail": "", **found}
    except BadTests as error:
        return {"verdict": "bad_tests", "detail": str(error)}
    except Gone:
        return {"verdict": "gone", "detail": tests.current[:SHOWN]}
    except (Refused, Unreadable, TooLong) as refusal:
        return {"verdict": "refused", "detail": tests.failed(str(refusal))}
    except ProgramError as error:
        return {"verdict": _verdict(error), "detail": tests.failed(error.described["text"])}
    except Missing as missing:
        return {"verdict": "no_program", "detail": str(missing)}
    except AssertionError as error:
        return {"verdict": "wrong", "detail": tests.failed(tests.seen(error))}
    except BaseException as error:
        text = f"{type(error).__name__}: {str(error)[:SHOWN]}"
        return {"verdict": "error", "detail": tests.failed(f"the test fails with {text}")}


def _verdict(error: ProgramError) -> str:
    if isinstance(error, MemoryError):
        return "memory"
    return "refused" if isinstance(error, PermissionError) else "error"


class _Tests:
    """The tests, and how far they have come."""

    def __init__(self, job: dict[str, Any]) -> None:
        self.job = job
        self.module = ModuleType("tests")
        self.space = vars(self.module)
        self.classes: dict[str, type] = {}
        self.current = ""
        self.last: list[Any] = []  # what the program returned last

    def prepare(self) -> None:
        """Run the setup and compile everything; BadTests where that fails."""
        sys.modules["tests"] = self.module
        try:
            exec(compile(self.job["setup"], "<setup>", "exec", dont_inherit=True), self.space)
            self.classes = {
                name: value
                for name, value in self.space.items()
                if isinstance(value, type) and value.__module__ == "tests"
            }
            self.code = [
                compile(text, "<tests>", "exec", dont_inherit=True) for text in self.job["code"]
            ]
            self.arguments = [self._evaluate(text) for text in self.job["inputs"]]
            self.outputs = [self._evaluate(text) for text in self.job["outputs"]]
            self.matches = compile(self.job["matches"] or "None", "<matches>", "eval")
        except BaseException as error:
            text = f"{type(error).__name__}: {str(error)[:SHOWN]}"
            raise BadTests(f"the tests cannot run: {text}") from error

    def _evaluate(self, text: str) -> Any:
        return eval(text, self.space)

    def bind(self, program: Program) -> None:
        """Give the tests the names that they use and do not define.

        They are the program's, but for those that Python and its library have too: a program with
        an `abs` or a `Counter` of its own must not decide what the tests compute. Only where the
        tests use nothing else of the program is such a name what they test.
        """
        used = {name for code in self.code for name in _names(code)} - self.space.keys()
        own = used.intersection(program.names)
        known = {name for name in own if hasattr(builtins, name) or self._library(name)}
        for name in (own - known or known) | ({self.job["entry_point"]} & set(program.names)):
            self.space[name] = program.remote(name, name, True)
        for name in used - self.space.keys():
            module = program.imported.get(name, "")
            found = self._library(name) or self._library(module) or None
            if found is not None and module and found.__name__ != name and hasattr(found, name):
                found = getattr(found, name)
            if found is not None:
                self.space[name] = found

    def _library(self, name: str) -> Any:
        """Return a module or a well-known name of the libraries; None where there is none."""
        module, _, attribute = WELL_KNOWN.get(name, name).partition(":")
        first = module.split(".")[0]
        if first not in sys.stdlib_module_names and first not in self.job["packages"]:
            return None
        try:
            found = importlib.import_module(module)
        except ImportError:
            return None
        return getattr(found, attribute) if attribute else found

    def run(self, program: Program) -> dict[str, Any]:
        """Run the tests in their order; what fails raises."""
        program.last = self.last
        kind = self.job["kind"]
        if kind == "asserts":
            for text, code in zip(self.job["code"], self.code, strict=True):
                self.current = text.strip()
                before = {name: self.space.get(name) for name in _names(code)}
                exec(code, self.space)
                for name in before:  # pytest would call them
                    defined = self.space.get(name)
                    if defined is before[name] or not isinstance(defined, FunctionType):
                        continue
                    if name.startswith("test"):
                        defined()
        elif kind == "check":
            self.current = "check(candidate)"
            exec(self.code[0], self.space)
            self.space["check"](program.entry)
        elif self.job["record"]:
            return {"values": self._record(program)}
        else:
            self._compare(program)
        return {}

    def _call(self, program: Program, arguments: Sequence[Any]) -> Any:
        self.current = f"{self.job['entry_point']}({_shown(arguments)[1:-1].removesuffix(',')})"
        return program.entry(*arguments)

    def _record(self, program: Program) -> list[str]:
        """Return the reference's values; an empty text for one that is too large to be sent."""
        encoder = Encoder(self.classes, lambda value: None)
        values = []
        for arguments in self.arguments:
            try:
                text = encoder.encode(self._call(program, arguments))
                one, other = (decode(text, self.classes, lambda _: OPAQUE) for _ in range(2))
                # A value that does not equal itself, as an object of the setup, is no use.
                values.append(_packed(text) if same(one, other, self.job["atol"]) else "")
            except (Refused, ProgramError) as error:
                if not isinstance(error, Refused | MemoryError):
                    raise
                values.append("")
                program.broken = None  # the other values are still good
        if not any(values):
            raise BadTests("the reference has no value that could be sent")
        return values

    def _compare(self, program: Program) -> None:
        wanted = self.outputs or [
            decode(_unpacked(text), self.classes, lambda number: OPAQUE) if text else UNKNOWN
            for text in self.job["values"]
        ]
        # Where the reference returns no data, as a match of `re`, only whether it is None counts.
        opaque = any(value is OPAQUE for value in wanted)
        for arguments, expected in zip(self.arguments, wanted, strict=True):
            if expected is UNKNOWN:
                continue
            # A program may change its arguments, and the condition may need them as they were.
            text = self.job["matches"] and Encoder(self.classes).encode(arguments)
            result = self._call(program, arguments)
            if self.job["matches"]:
                names = {"args": decode(text, self.classes), "result": result, "expected": expected}
                right = eval(self.matches, {**self.space, **names})
            elif opaque:
                right = _given(result) == _given(expected)
            else:
                right = same(result, expected, self.job["atol"])
            if not right:
                raise AssertionError(f"it must return {_shown(expected)}")

    def failed(self, how: str) -> str:
        """Name the test at which the run ended, and how."""
        return f"{self.current[:SHOWN]}: {how[:SHOWN]}" if self.current else how[:SHOWN]

    def seen(self, error: AssertionError) -> str:
        """Say what the program returned last, and at which line of a `check` the test failed."""
        line, trace = 0, error.__traceback__
        while trace is not None:
            if trace.tb_frame.f_code.co_filename == "<tests>":
                line = trace.tb_lineno
            trace = trace.tb_next
        if line and self.job["kind"] == "check":
            self.current = self.job["code"][0].splitlines()[line - 1].strip()
        parts = [str(error)[:SHOWN]] if str(error) else []
        parts += [f"it returned {_shown(self.last[-1])}"] if self.last else []
        return ", ".join(parts) or "it does not hold"


UNKNOWN = object()


def _packed(text: str) -> str:
    """Return a text that is shorter where the text is long: some solutions return megabytes."""
    return binascii.b2a_base64(zlib.compress(text.encode(), 1), newline=False).decode()


def _unpacked(text: str) -> str:
    return zlib.decompress(binascii.a2b_base64(text)).decode()


def _given(value: Any) -> bool:
    return value if isinstance(value, bool) else value is not None


def _names(code: CodeType) -> set[str]:
    """Return the names that code uses, also within the functions that it defines."""
    inner = [one for one in code.co_consts if isinstance(one, CodeType)]
    return {*code.co_names, *(name for one in inner for name in _names(one))}


def _shown(value: Any) -> str:
    digits = getattr(sys, "set_int_max_str_digits", lambda most: None)
    digits(1000)  # writing a long number takes longer than any test
    try:
        text = repr(value)
    except BaseException:
        text = f"a {type(value).__name__}"
    finally:
        digits(0)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
