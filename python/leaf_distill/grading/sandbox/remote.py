"""Stand-ins for a program that lives in another process.

What comes back from it is data, or another stand-in. A comparison is never left to the program.
"""

from __future__ import annotations

import builtins
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from .channel import Channel, Gone, TooLong, Unreadable
from .values import Encoder, NotData, decode

SHOWN = 300  # characters of a value or a line
OPAQUE = object()
"""Stands for a value of the program that is no data, where it is not asked for anything."""


class Refused(BaseException):
    """A test needs what cannot be judged outside of the program's process."""


class ProgramError(Exception):
    """An exception of the program; it is also of the built-in type that it had there."""

    described: Mapping[str, Any] = {}


class Missing(Exception):
    """The program does not define what the tests call."""


class Program:
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
            raise Missing(f"no code defines {entry_point}")
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
        except (Gone, Unreadable, TooLong, Refused) as error:
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

    def __init__(self, program: Program, reference: Any, name: Any, identity: Any) -> None:
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
