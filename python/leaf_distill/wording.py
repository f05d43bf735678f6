"""Words for numbers."""

from __future__ import annotations


def counted(number: int, noun: str, plural: str | None = None) -> str:
    """Return a number with its noun: "1 pass", "2 passes".

    Args:
        number: how many.
        noun: of one.
        plural: of another number; the noun with an s if not given.
    """
    return f"{number} {noun if number == 1 else plural or f'{noun}s'}"
