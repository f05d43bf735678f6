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
from collections import deque
from collections.abc import Mapping, Sequence
from types import CodeType, FunctionType, ModuleType
from typing import Any

from .channel import Channel, Gone, TooLong, Unreadable
from .compare import same
from .values import Encoder, NotData, decode

SHOWN = 300  # characters of a value or a line

# Names that tests use without importing them, where the program does.
WELL_KNOWN = {
    **{name: f"collections:{name}" for name in ("Counter", "OrderedDict", "defaultdict", "deque")},
    **{name: f"math:{name}" for name in ("isclose", "isnan", "isinf", "inf", "nan", "pi", "sqrt")},
    **{"np": "numpy", "deepcopy": "copy:deepcopy"},
}


class Refused(BaseException):
    """A test needs what cannot be judged outside of the program's process."""


class ProgramError(Exception):
    """An exception of the program; it is also of the built-in type that it had there."""

    described: Mapping[str, Any] = {}


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
        program = _Program(channel, tests.classes, job["entry_point"])
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
    except _Missing as missing:
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


class _Missing(Exception):
    """The program does not define what the tests call."""


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

    def bind(self, program: _Program) -> None:
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

    def run(self, program: _Program) -> dict[str, Any]:
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

    def _call(self, program: _Program, arguments: Sequence[Any]) -> Any:
        self.current = f"{self.job['entry_point']}({_shown(arguments)[1:-1].removesuffix(',')})"
        return program.entry(*arguments)

    def _record(self, program: _Program) -> list[str]:
        """Return the reference's values; an empty text for one that is too large to be sent."""
        encoder = Encoder(self.classes, lambda value: None)
        values = []
        for arguments in self.arguments:
            try:
                text = encoder.encode(self._call(program, arguments))
                one, other = (decode(text, self.classes, lambda _: OPAQUE) for _ in range(2))
                # What does not equal itself, as an object of the setup, cannot be compared.
                values.append(_packed(text) if same(one, other, self.job["atol"]) else "")
            except (Refused, ProgramError) as error:
                if not isinstance(error, Refused | MemoryError):
                    raise
                values.append("")
        if not any(values):
            raise BadTests("the reference has no value that could be sent")
        return values

    def _compare(self, program: _Program) -> None:
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


OPAQUE = object()
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


class _Program:
    """The program at the other end."""

    def __init__(self, channel: Channel, classes: Mapping[str, type], entry_point: str) -> None:
        self._channel, self._classes = channel, classes
        self._encoder = Encoder(classes, self._number, exact=True)
        self._remotes: dict[Any, Remote] = {}
        self.calls = 0
        self.broken: BaseException | None = None
        self.last: list[Any] = []
        self.changed: Any = None  # the arguments after a call that changes them
        ready = channel.get()
        if "error" in ready:
            raise _error(ready["error"])
        if entry_point and not ready["entry"]:
            raise _Missing(f"no code defines {entry_point}")
        self.names: list[str] = [str(name) for name in ready["names"]]
        self.imported = {str(name): str(value) for name, value in ready["imported"].items()}
        self.entry = self.remote("entry", entry_point, True)

    def remote(self, reference: Any, name: Any, identity: Any) -> Remote:
        """Return the one stand-in of a value of the program."""
        if reference not in self._remotes:
            self._remotes[reference] = Remote(self, reference, name, identity)
        return self._remotes[reference]

    def _number(self, value: Any) -> Any:
        if isinstance(value, Remote):
            return [value._reference]
        raise NotData(f"an argument of type {type(value).__name__} cannot be sent to the program")

    def ask(self, do: str, of: Any, **more: Any) -> Any:
        """Send a request and return the value that comes back."""
        self.calls += 1
        if self.broken is not None:
            raise self.broken
        try:
            return self._ask({"do": do, "of": of, **more})
        except (Gone, Unreadable, Refused) as error:
            self.broken = error  # whatever the test does with it
            raise

    def _ask(self, request: dict[str, Any]) -> Any:
        self._channel.put(request)
        reply = self._channel.get()
        try:
            if "error" in reply:
                raise _error(reply["error"])
            if "refused" in reply:
                raise Refused(str(reply["refused"]))
            if "stop" in reply:
                raise StopIteration
            value = decode(reply["value"], self._classes, lambda one: self.remote(*one))
            if "arguments" in reply:
                self.changed = decode(reply["arguments"], self._classes, lambda one: OPAQUE)
        except ProgramError:
            raise  # also where it is of a type below
        except (NotData, TypeError, LookupError) as error:
            raise Refused(f"its value cannot be read: {error}") from error
        self.last[:] = [value]
        return value

    def call(self, of: Any, positional: Sequence[Any], named: Mapping[str, Any]) -> Any:
        """Call a function of the program; arguments that it changes are changed here too."""
        try:
            text = self._encoder.encode([list(positional), dict(named)])
        except NotData as error:
            raise Refused(str(error)) from error
        self.changed = None
        value = self.ask("call", of, arguments=text)
        if self.changed is not None:
            _update(list(positional), named, self.changed)
        return value


def _update(positional: Sequence[Any], named: Mapping[str, Any], changed: Any) -> None:
    """Give mutable arguments the content that they have after the call."""
    before = [*positional, *named.values()]
    after = [*changed[0], *(changed[1][name] for name in named)]
    for old, new in zip(before, after, strict=True):
        if type(old) is not type(new):
            continue
        if isinstance(old, list | bytearray):
            old[:] = new
        elif isinstance(old, dict | set):
            old.clear()
            old.update(new)
        elif isinstance(old, deque):
            old.clear()
            old.extend(new)
        elif hasattr(old, "__dict__") and not isinstance(old, Remote):
            vars(old).clear()
            vars(old).update(vars(new))


def _error(described: Mapping[str, Any]) -> ProgramError:
    """Return an exception of the program's built-in type, which the tests may expect."""
    for name in described["kinds"]:
        kind = vars(builtins).get(name)
        if isinstance(kind, type) and issubclass(kind, Exception) and kind is not StopIteration:
            try:
                error: Any = type(str(described["name"]), (ProgramError, kind), {})()
                break
            except TypeError:  # a type that needs arguments, or cannot be combined
                continue
    else:
        error = ProgramError()
    error.described = {"text": str(described["text"])[:SHOWN]}
    error.args = tuple(described["arguments"])
    return error  # type: ignore[no-any-return]


class Remote:
    """Stands for a function, class or object of the program."""

    __slots__ = ("_identity", "_name", "_program", "_reference")

    def __init__(self, program: _Program, reference: Any, name: Any, identity: Any) -> None:
        self._program, self._reference = program, reference
        self._name, self._identity = str(name), identity is True

    def __call__(self, *positional: Any, **named: Any) -> Any:
        return self._program.call(self._reference, positional, named)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._program.ask("attribute", self._reference, name=name)

    def __getitem__(self, key: Any) -> Any:
        return self._program.ask("item", self._reference, key=Encoder({}).encode(key))

    def __iter__(self) -> Any:
        return self._program.ask("iterator", self._reference)

    def __next__(self) -> Any:
        return self._program.ask("next", self._reference)

    def __len__(self) -> int:
        return int(self._program.ask("length", self._reference))

    def __bool__(self) -> bool:
        return self._program.ask("truth", self._reference) is True

    def __str__(self) -> str:
        return str(self._program.ask("text", self._reference))

    def __repr__(self) -> str:
        return f"the program's {self._name}"

    def __eq__(self, other: object) -> bool:
        if self._identity or other is None:
            return self is other
        # An `__eq__` of the program could say anything.
        raise Refused(f"the program's {self._name} cannot be compared outside of it")

    __hash__ = object.__hash__

    def _refuse(self, *others: object) -> Any:
        raise Refused(f"the program's {self._name} can only be used inside of it")

    __lt__ = __le__ = __gt__ = __ge__ = __contains__ = __instancecheck__ = __enter__ = _refuse
