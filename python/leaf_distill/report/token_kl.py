"""The KL of single tokens before and after a distillation, as colored text."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from leaf_distill.io import reading
from leaf_distill.report.heat import LEVELS
from leaf_distill.training.token_kl import FILE, read_lines

TIMES = ("before", "after")


def read_token_kl(directory: Path) -> dict[str, Any] | None:
    """Read what `leaf distill` measured of single tokens, if it did.

    Returns:
        `top`, the strongest finite KL in nats, at the end of the scale; `means` of all labels and
        of each branch, before and after; `rows`, each with its name, `means` and `cells`, which
        have a text, a title, and the color steps before and after; `temperature`, of both models'
        distributions; and `stored`, the signal of a teacher cache or None.

    Raises:
        ValueError: the file cannot be read or has another shape.
    """
    path = directory / FILE
    if not path.is_file():
        return None
    with reading(path):
        lines = read_lines(path)
        for line in lines:
            for time in TIMES:
                line[time] = _values(line, time)
        values = [one for line in lines for time in TIMES for one in line[time] if one is not None]
        if not values:
            return None
        top = max((abs(one) for one in values if math.isfinite(one)), default=0.0) or 1.0
        branches = dict.fromkeys(str(line["branch"]) for line in lines)
        means = {"all": _means(lines)}
        if len(branches) > 1:
            means |= {name: _means([x for x in lines if x["branch"] == name]) for name in branches}
        return {
            "top": top,
            "means": means,
            "rows": [_row(line, top) for line in lines],
            "temperature": float(lines[0]["temperature"]),
            "stored": lines[0].get("stored"),
        }


def kl_level(value: float | None, top: float) -> int | None:
    """Return the color step of a KL: its root, since a few tokens have most of it."""
    return None if value is None else round(LEVELS * math.sqrt(min(max(value, 0.0) / top, 1.0)))


def _values(line: dict[str, Any], time: str) -> list[float | None]:
    """Return the KL of each label, infinity where JSON has null; all None if not measured."""
    tokens, given = line["tokens"], line[f"kl_{time}"]
    if given is None:
        return [None] * len(tokens)
    if len(given) != len(tokens):
        raise ValueError(f"{len(given)} values of {len(tokens)} tokens")
    return [math.inf if value is None else float(value) for value in given]


def _means(lines: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any] | None]:
    return {time: _mean(one for line in lines for one in line[time]) for time in TIMES}


def _mean(values: Iterable[float | None]) -> dict[str, Any] | None:
    """Return the mean of the finite values and how many are not finite; None: not measured."""
    known = [value for value in values if value is not None]
    finite = [value for value in known if math.isfinite(value)]
    mean = sum(finite) / len(finite) if finite else None
    return {"finite": mean, "others": len(known) - len(finite)} if known else None


def _row(line: dict[str, Any], top: float) -> dict[str, Any]:
    text = str(line["completion"])
    cells: list[dict[str, Any]] = []
    end = 0
    for (start, stop), *values in zip(line["tokens"], line["before"], line["after"], strict=True):
        start, stop = max(int(start), end), min(int(stop), len(text))
        levels = [kl_level(value, top) for value in values]
        title = " · ".join(
            f"{time} {_number(value)}" for time, value in zip(TIMES, values, strict=True)
        )
        if start >= stop and cells:  # of the bytes of one character the strongest is shown
            last = cells[-1]
            last["title"] += f"\n{title}"
            for time, level in zip(TIMES, levels, strict=True):
                last[time] = max((x for x in (last[time], level) if x is not None), default=None)
            continue
        if end < start:
            cells.append(_uncolored(text[end:start]))
        one = {"text": text[start:stop], "title": title}
        cells.append(one | dict(zip(TIMES, levels, strict=True)))
        end = max(end, stop)
    if end < len(text):
        cells.append(_uncolored(text[end:]))
    return {
        "row_id": int(line["row_id"]),
        "candidate_id": int(line["candidate_id"]),
        "branch": str(line["branch"]),
        "means": _means([line]),
        "cells": cells,
        "long": len(text) > 1500,
    }


def _uncolored(text: str) -> dict[str, Any]:
    """Return a piece that no token covers."""
    return {"text": text, "title": "", **dict.fromkeys(TIMES)}


def _number(value: float | None) -> str:
    if value is None:
        return "not measured"
    return f"{value:.4f} nats" if math.isfinite(value) else "not finite"
