"""JSON files of a known shape: another one gives a sentence that names the place."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from leaf_distill.io import read_json

_KINDS: dict[type, str] = {
    dict: "an object",
    list: "a list",
    str: "text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    type(None): "null",
}


@dataclass(frozen=True)
class Maybe:
    """A shape, or null."""

    shape: Any


def read_shaped(path: Path, shape: Any) -> dict[str, Any]:
    """Read a JSON object of a shape.

    Raises:
        ValueError: the file cannot be read, or has another shape.
    """
    value = read_json(path)
    check_shape(value, shape, f"{path}: ")
    return value


def check_shape(value: Any, shape: Any, place: str) -> None:
    """Check the shape of a JSON value.

    Args:
        value: what was read.
        shape: `str`, `int`, `float` (also a whole number) or `object` (anything); `[shape]`, a list
            of any length; `(shape, shape)`, a list of this length; `{"name": shape}`, an object
            with these names and perhaps others; `{str: shape}`, an object with any names; or Maybe.
        place: the start of the sentence: the file, and where in it the value stands.

    Raises:
        ValueError: the value has another shape.
    """
    if isinstance(shape, Maybe):
        if value is not None:
            check_shape(value, shape.shape, place)
    elif isinstance(shape, dict):
        _expect(isinstance(value, dict), "an object", value, place)
        parts = dict.fromkeys(value, shape[str]) if str in shape else shape
        for name, part in parts.items():
            if name not in value:
                raise _wrong(f"{place}{name}", "given", "nothing")
            check_shape(value[name], part, f"{place}{name}.")
    elif isinstance(shape, list):
        _expect(isinstance(value, list), "a list", value, place)
        for index, item in enumerate(value):
            check_shape(item, shape[0], f"{place}{index}.")
    elif isinstance(shape, tuple):
        wanted = f"a list of {len(shape)}"
        _expect(isinstance(value, list) and len(value) == len(shape), wanted, value, place)
        for index, (item, part) in enumerate(zip(value, shape, strict=True)):
            check_shape(item, part, f"{place}{index}.")
    elif type(value) is int and abs(value) >= 2**63:
        raise _wrong(place, "below 2^63", "a larger number")
    elif shape is not object:
        fits = type(value) is shape or (shape is float and type(value) is int)
        _expect(fits, _KINDS[shape], value, place)


def _expect(fits: bool, wanted: str, value: Any, place: str) -> None:
    if not fits:
        found = _KINDS[type(value)]
        raise _wrong(place, wanted, f"a list of {len(value)}" if found == "a list" else found)


def _wrong(place: str, wanted: str, found: str) -> ValueError:
    return ValueError(
        f"{place.rstrip('.: ')}: must be {wanted}, got {found}; run the command that made the file "
        "again"
    )
