"""Whether a value is the wanted one, by evalplus's rules."""

from __future__ import annotations

import math
from typing import Any

RELATIVE = 1e-7
LEAST = 1e-6  # the tolerance of floats for which none is given


def same(value: Any, wanted: Any, atol: float) -> bool:
    """Return whether a value equals the wanted one, floats within a tolerance.

    Args:
        value, wanted: plain data.
        atol: absolute tolerance of numbers; 0 compares exactly, but floats, alone or in a list,
            within 1e-6. A relative 1e-7 is allowed in addition.
    """
    if value == wanted:
        return True
    if not atol and _is_floats(wanted):
        atol = LEAST
    try:
        return bool(atol) and type(value) is type(wanted) and _close(value, wanted, atol)
    except OverflowError:  # an integer that no float can hold
        return False


def _is_floats(value: Any) -> bool:
    if isinstance(value, list | tuple) and value:
        return all(isinstance(part, float) for part in value)
    return isinstance(value, float)


def _close(value: Any, wanted: Any, atol: float) -> bool:
    if isinstance(wanted, list | tuple):
        return (
            type(value) is type(wanted)
            and len(value) == len(wanted)
            and all(_close(one, other, atol) for one, other in zip(value, wanted, strict=True))
        )
    if isinstance(wanted, float) and isinstance(value, float):
        if math.isnan(wanted):
            return math.isnan(value)
        return value == wanted or abs(value - wanted) <= atol + RELATIVE * abs(wanted)
    if isinstance(wanted, int | complex | float) and isinstance(value, int | complex | float):
        return value == wanted or abs(value - wanted) <= atol + RELATIVE * abs(wanted)
    return bool(value == wanted)
