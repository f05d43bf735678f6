"""The program's side: runs untrusted code, and answers requests with values as data."""

from __future__ import annotations

import builtins
import os
import sys
from collections import deque
from collections.abc import Callable
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any

from .channel import Channel, Gone, TooLong
from .values import Encoder, NotData, decode

MUTABLE = (list, dict, set, deque, bytearray)
SHOWN = 300  # characters of an error


def run_script(job: dict[str, Any]) -> None:
    """Run a whole script, which reads the standard input and prints."""
    module = _module("__main__")
    try:
        _execute(job["setup"], "<setup>", module)
        _execute(job["program"], "<program>", module)
    except SystemExit:
        raise
    except BaseException as error:
        os.write(2, describe(error)["text"].encode(errors="replace"))
        sys.exit(1)


def serve(job: dict[str, Any], channel: Channel) -> None:
    """Load a program, say what it defines, and do what the judge asks until that ends."""
    module = _module("program")
    channel.get()  # the judge is confined
    try:
        _execute(job["setup"], "<setup>", module)
        before = dict(vars(module))
        _execute(job["program"], "<program>", module)
        server = _Server(vars(module), before, job["entry_point"])
        ready = {
            "names": server.names(),
            "imported": server.imported(),
            "entry": server.has_entry(),
        }
    except BaseException as error:
        ready = {"error": describe(error)}
    try:
        channel.put(ready)
        while "error" not in ready:
            reply = server.reply(channel.get())
            try:
                channel.put(reply)
            except TooLong as refusal:
                channel.put({"refused": str(refusal)})
    except Gone:
        return


def _module(name: str) -> ModuleType:
    module = ModuleType(name)
    sys.modules[name] = module
    return module


def _execute(source: str, name: str, module: ModuleType) -> None:
    exec(compile(source, name, "exec", dont_inherit=True), vars(module))


def describe(error: BaseException) -> dict[str, Any]:
    """Return an exception as data: the names of its built-in types, its own, and its text."""
    kinds = [
        kind.__name__ for kind in type(error).__mro__ if vars(builtins).get(kind.__name__) is kind
    ]
    try:
        message = str(error)
    except BaseException:
        message = ""
    line, trace = 0, error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == "<program>":
            line = trace.tb_lineno
        trace = trace.tb_next
    if isinstance(error, SyntaxError):
        line = 0  # its text has it
    place = f" (line {line} of the program)" if line else ""
    name = type(error).__name__
    text = f"{name}: {message[:SHOWN]}{place}" if message else f"{name}{place}"
    plain = all(type(one) in (str, int, float, bool, type(None)) for one in error.args)
    arguments = [one[:SHOWN] if isinstance(one, str) else one for one in error.args]
    return {
        "kinds": kinds[:-1],
        "name": name,
        "text": text,
        "arguments": arguments if plain and len(arguments) < SHOWN else [message[:SHOWN]],
    }


class _Server:
    """Holds the program's names, and the values of it that cannot be sent."""

    def __init__(self, space: dict[str, Any], before: dict[str, Any], entry_point: str) -> None:
        self._space, self._before, self._entry_point = space, before, entry_point
        # A program may define the classes of the setup anew; models often repeat them.
        self._classes = {
            name: space[name] if isinstance(space.get(name), type) else value
            for name, value in before.items()
            if isinstance(value, type) and value.__module__ == "program"
        }
        self._kept: list[Any] = []
        self._number: dict[int, int] = {}
        self._entry: Any = None
        self._encoder = Encoder(self._classes, self._keep)

    def names(self) -> list[str]:
        """Return what the program itself defined."""
        return [name for name, value in self._new() if _module_of(value) is None]

    def imported(self) -> dict[str, str]:
        """Return the names that it imported, each with its module."""
        return {name: found for name, value in self._new() if (found := _module_of(value))}

    def _new(self) -> list[tuple[str, Any]]:
        return [
            (name, value)
            for name, value in self._space.items()
            if not name.startswith("__") and self._before.get(name, self) is not value
        ]

    def has_entry(self) -> bool:
        """Find the entry point, a function or a method of a class that needs no arguments."""
        if not self._entry_point:
            return False
        first, _, method = self._entry_point.partition("().")
        if method or first not in self._space:
            owner = first if method else "Solution"
            self._entry = getattr(self._space.get(owner, lambda: None)(), method or first, None)
        else:
            self._entry = self._space[first]
        return callable(self._entry)

    def _keep(self, value: Any) -> Any:
        # The same value has the same number, so that the judge knows it again.
        number = self._number.setdefault(id(value), len(self._kept))
        if number == len(self._kept):
            self._kept.append(value)
        compare: Any = type(value).__eq__
        return [number, type(value).__name__, compare is object.__eq__]

    def reply(self, request: dict[str, Any]) -> dict[str, Any]:
        """Return {"value": ...}, {"error": ...}, {"stop": True} or {"refused": a sentence}."""
        try:
            return self._do(request)
        except NotData as refusal:
            return {"refused": str(refusal)}
        except BaseException as error:
            if isinstance(error, StopIteration) and request["do"] == "next":
                return {"stop": True}
            return {"error": describe(error)}

    def _do(self, request: dict[str, Any]) -> dict[str, Any]:
        value = self._find(request["of"])
        if request["do"] != "call":
            return {"value": self._encoder.encode(_DONE[request["do"]](value, request))}
        given = request["arguments"]
        positional, named = decode(given, self._classes, self._held)
        result = {"value": self._encoder.encode(value(*positional, **named))}
        kinds = (*MUTABLE, *self._classes.values())
        if any(isinstance(one, kinds) for one in (*positional, *named.values())):
            after = self._encoder.encode([positional, named])
            if after != given:  # it changed its arguments
                result["arguments"] = after
        return result

    def _held(self, number: Any) -> Any:
        return self._kept[number[0]]

    def _find(self, reference: Any) -> Any:
        if reference == "entry":
            return self._entry
        return self._space[reference] if isinstance(reference, str) else self._kept[reference]


def _module_of(value: Any) -> str | None:
    """Return the module of what was imported: a module, or a function or class of one."""
    if isinstance(value, ModuleType):
        return str(value.__name__)
    found = getattr(value, "__module__", None) if callable(value) else None
    own = not isinstance(found, str) or found == "program"
    return None if own or not isinstance(value, _NAMED) else str(found)


_NAMED = (type, FunctionType, BuiltinFunctionType)

_DONE: dict[str, Callable[[Any, dict[str, Any]], Any]] = {
    "attribute": lambda value, request: getattr(value, request["name"]),
    "item": lambda value, request: value[decode(request["key"], {})],
    "iterator": lambda value, request: iter(value),
    "next": lambda value, request: next(value),
    "length": lambda value, request: len(value),
    "truth": lambda value, request: bool(value),
    "text": lambda value, request: str(value),
}
