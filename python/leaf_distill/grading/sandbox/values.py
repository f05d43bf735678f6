"""Values as data: what may pass between a program and its tests, as JSON.

A value is rebuilt from plain data on the other side, by the other side's own types, so that nothing
of a program takes part in a comparison: no class, no method, no pickle.
"""

from __future__ import annotations

import datetime
import json
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Mapping
from decimal import Decimal
from fractions import Fraction
from typing import Any

DEEPEST = 200  # nested containers; objects that refer to others may be as many as memory allows
SMALL = 1 << 62  # integers below are numbers in JSON


class NotData(Exception):
    """A value that cannot be sent as data."""


class Encoder:
    """Encodes values.

    Args:
        classes: names of the classes whose instances are data: those of the tests' setup.
        handle: returns the number under which this side keeps a value that is no data; None refuses
            such values.
        exact: refuses numpy's values, which otherwise come back as numbers and lists.
    """

    def __init__(
        self,
        classes: Mapping[str, type],
        handle: Callable[[Any], Any] | None = None,
        *,
        exact: bool = False,
    ) -> None:
        self.exact = exact
        self.classes = set(classes)
        self.handle = handle

    def encode(self, value: Any) -> str:
        """Return the JSON text of a value.

        Raises:
            NotData: the value, or a part of it, is no data, or is nested too deeply.
        """
        self._objects: list[Any] = []
        self._number: dict[int, int] = {}
        encoded = self._value(value, 0)
        described = []
        for one in self._objects:  # grows meanwhile
            fields = {str(name): self._value(part, 0) for name, part in _fields(one).items()}
            described.append([type(one).__name__, fields])
        return json.dumps({"value": encoded, "objects": described})

    def _value(self, value: Any, depth: int) -> Any:
        kind = type(value)
        if value is None or kind in (bool, str, float):
            return value
        if kind is int:
            return value if -SMALL < value < SMALL else {"": "int", "v": hex(value)}
        if depth > DEEPEST:
            raise NotData("a value is nested too deeply")
        if kind is list:
            return [self._value(part, depth + 1) for part in value]
        for name, (base, take) in _TAKEN.items():
            if kind is base:
                parts = take(value)
                if isinstance(parts, list):
                    parts = [self._value(part, depth + 1) for part in parts]
                return {"": name, "v": parts}
        if kind.__name__ in self.classes and hasattr(value, "__dict__"):
            if id(value) not in self._number:
                self._number[id(value)] = len(self._objects)
                self._objects.append(value)
            return {"": "object", "v": self._number[id(value)]}
        if kind.__module__.split(".")[0] == "numpy" and hasattr(value, "tolist"):
            if self.exact:
                raise NotData("an array cannot be sent")
            return self._value(value.tolist(), depth + 1)
        for base in (bool, int, float, str, list, tuple, dict, set, frozenset, bytes):
            if isinstance(value, base):  # of a subclass, the data
                return self._value(_PLAIN.get(base, base)(value), depth + 1)
        if self.handle is None:
            raise NotData(f"{kind.__name__} is no plain data")
        return {"": "handle", "v": self.handle(value)}


def _fields(value: Any) -> dict[str, Any]:
    fields: dict[str, Any] = object.__getattribute__(value, "__dict__")
    return fields


_FACTORY: dict[Any, Any] = {kind.__name__: kind for kind in (int, float, str, list, dict, set)}
_FACTORIES = {kind: name for name, kind in _FACTORY.items()}
_PLAIN: dict[type, Callable[[Any], Any]] = {str: str.__str__}

# How each type is taken apart; a list holds values.
_TAKEN: dict[str, tuple[type, Callable[[Any], Any]]] = {
    "tuple": (tuple, list),
    "set": (set, list),
    "frozenset": (frozenset, list),
    "dict": (dict, lambda value: [part for item in value.items() for part in item]),
    "Counter": (Counter, lambda value: [part for item in value.items() for part in item]),
    "OrderedDict": (OrderedDict, lambda value: [part for item in value.items() for part in item]),
    "defaultdict": (
        defaultdict,
        lambda value: [
            _FACTORIES.get(value.default_factory),
            *(part for item in value.items() for part in item),
        ],
    ),
    "deque": (deque, list),
    "range": (range, lambda value: [value.start, value.stop, value.step]),
    "bytes": (bytes, bytes.hex),
    "bytearray": (bytearray, bytearray.hex),
    "complex": (complex, lambda value: [value.real, value.imag]),
    "Fraction": (Fraction, lambda value: [value.numerator, value.denominator]),
    "Decimal": (Decimal, str),
    "date": (datetime.date, datetime.date.isoformat),
    "time": (datetime.time, datetime.time.isoformat),
    "datetime": (datetime.datetime, datetime.datetime.isoformat),
    "timedelta": (
        datetime.timedelta,
        lambda value: [value.days, value.seconds, value.microseconds],
    ),
}


def _pairs(parts: list[Any]) -> list[tuple[Any, Any]]:
    return list(zip(parts[::2], parts[1::2], strict=True))


_BUILT: dict[str, Callable[[Any], Any]] = {
    "int": lambda text: int(text, 16),
    "tuple": tuple,
    "set": set,
    "frozenset": frozenset,
    "dict": lambda parts: dict(_pairs(parts)),
    "Counter": lambda parts: Counter(dict(_pairs(parts))),
    "OrderedDict": lambda parts: OrderedDict(_pairs(parts)),
    "defaultdict": lambda parts: defaultdict(_FACTORY.get(parts[0]), _pairs(parts[1:])),
    "deque": deque,
    "range": lambda parts: range(*parts),
    "bytes": bytes.fromhex,
    "bytearray": bytearray.fromhex,
    "complex": lambda parts: complex(*parts),
    "Fraction": lambda parts: Fraction(*parts),
    "Decimal": Decimal,
    "date": datetime.date.fromisoformat,
    "time": datetime.time.fromisoformat,
    "datetime": datetime.datetime.fromisoformat,
    "timedelta": lambda parts: datetime.timedelta(*parts),
}


def decode(
    text: str, classes: Mapping[str, type], handle: Callable[[Any], Any] | None = None
) -> Any:
    """Return the value of a text that `Encoder.encode` made.

    Args:
        text: the JSON text.
        classes: this side's classes for the instances in it.
        handle: returns this side's stand-in for a value that the other side keeps.

    Raises:
        NotData: the text is something else.
    """
    try:
        document = json.loads(text)
        described = document["objects"]
        objects: list[Any] = [object.__new__(classes[name]) for name, _ in described]

        def build(part: Any, handle: Callable[[Any], Any] | None = handle) -> Any:
            if isinstance(part, list):
                return [build(item, handle) for item in part]
            if not isinstance(part, dict):
                return part
            name, inner = part[""], part["v"]
            if name == "object":
                return objects[inner]
            if name == "handle":
                if handle is None:
                    raise NotData("the value is no plain data")
                return handle(inner)
            return _BUILT[name](build(inner, handle) if isinstance(inner, list) else inner)

        for one, (_, fields) in zip(objects, described, strict=True):
            for name, part in fields.items():
                # A field must not stand before a method of the class, nor bring one.
                if callable(getattr(type(one), name, None)) or name.startswith("__"):
                    raise NotData(f"the field {name} hides a method")
                _fields(one)[name] = build(part, None)
        return build(document["value"])
    except NotData:
        raise
    except (ValueError, TypeError, LookupError, ArithmeticError, RecursionError) as error:
        raise NotData(f"the value cannot be rebuilt ({type(error).__name__})") from error
