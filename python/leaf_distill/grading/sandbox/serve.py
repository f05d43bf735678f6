"""The program's side: runs untrusted code, and answers requests with values as data."""

from __future__ import annotations

import builtins
import os
import sys
import threading
from collections import deque
from collections.abc import Callable
from types import ModuleType
from typing import Any

from .channel import Channel, Gone, TooLong
from .values import Encoder, NotData, decode

MUTABLE = (list, dict, set, deque, bytearray)
SHOWN = 300  # characters of an error


def run_script(job: dict[str, Any]) -> None:
    """Run a whole script, which reads the standard input and prints."""
    module = _module("__main__")
    status = 0
    try:
        _execute(job["setup"], "<setup>", module)
        _execute(job["program"], "<program>", module)
    except SystemExit as stop:
        status = 0 if stop.code in (None, 0) else 1
    except BaseException as error:
        status = 1
        os.write(2, describe(error)["text"].encode(errors="replace"))
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()
    try:
        sys.stdout.flush()
    except BaseException:
        status = 1
    os._exit(status)


def serve(job: dict[str, Any], channel: Channel) -> None:
    """Load a program, say what it defines, and do what the judge asks until that ends."""
    module = _module("program")
    try:
        _execute(job["setup"], "<setup>", module)
        before = dict(vars(module))
        _execute(job["program"], "<program>", module)
        server = _Server(vars(module), before, job["entry_point"])
        ready = {"names": server.names(), "modules": server.modules(), "entry": server.has_entry()}
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
    if isinstance(error, SyntaxError) and error.lineno:
        line = error.lineno
    place = f" (line {line} of the program)" if line else ""
    name = type(error).__name__
    text = f"{name}: {message[:SHOWN]}{place}" if message else f"{name}{place}"
    return {"kinds": kinds[:-1], "name": name, "text": text}


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
        self._entry: Any = None
        self._encoder = Encoder(self._classes, self._keep)

    def names(self) -> list[str]:
        """Return what the program itself defined."""
        return [
            name
            for name, value in self._space.items()
            if not name.startswith("__")
            and not isinstance(value, ModuleType)
            and self._before.get(name, self) is not value
        ]

    def modules(self) -> dict[str, str]:
        """Return the names under which it imported modules."""
        found = {name: one for name, one in self._space.items() if isinstance(one, ModuleType)}
        return {name: str(one.__name__) for name, one in found.items()}

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
        self._kept.append(value)
        compare: Any = type(value).__eq__
        return [len(self._kept) - 1, type(value).__name__, compare is object.__eq__]

    def reply(self, request: dict[str, Any]) -> dict[str, Any]:
        """Return {"value": ...}, {"error": ...}, {"stop": True} or {"refused": a sentence}."""
        try:
            return self._do(request)
        except NotData as refusal:
            return {"refused": str(refusal)}
        except StopIteration:
            return {"stop": True}
        except BaseException as error:
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


_DONE: dict[str, Callable[[Any, dict[str, Any]], Any]] = {
    "value": lambda value, request: value,
    "attribute": lambda value, request: getattr(value, request["name"]),
    "item": lambda value, request: value[decode(request["key"], {})],
    "iterator": lambda value, request: iter(value),
    "next": lambda value, request: next(value),
    "length": lambda value, request: len(value),
    "truth": lambda value, request: bool(value),
    "text": lambda value, request: str(value),
}
