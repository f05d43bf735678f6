"""The KL of single tokens before and after a distillation, as colored text."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from leaf_distill.io import reading
from leaf_distill.report.heat import LEVELS
from leaf_distill.training.token_kl import FILE

TIMES = ("before", "after")


def read_token_kl(directory: Path) -> dict[str, Any] | None:
    """Read what `leaf distill` measured of single tokens, if it did.

    Returns:
        `top`, the strongest KL in nats, at the end of the scale; `means` of all labels and of each
        branch, before and after; and `rows`, each with its name, `means` and `cells`, which have a
        text, a title, and the color steps before and after.

    Raises:
        ValueError: the file cannot be read or has another shape.
    """
    path = directory / FILE
    if not path.is_file():
        return None
    with reading(path):
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        for line in lines:
            for time in TIMES:
                line[time] = _values(line, time)
        values = [abs(one) for line in lines for time in TIMES for one in _known(line[time])]
        if not values:
            return None
        top = max(values) or 1.0
        branches = dict.fromkeys(str(line["branch"]) for line in lines)
        means = {"all": _means(lines)}
        if len(branches) > 1:
            means |= {name: _means([x for x in lines if x["branch"] == name]) for name in branches}
        return {"top": top, "means": means, "rows": [_row(line, top) for line in lines]}


def kl_level(value: float | None, top: float) -> int | None:
    """Return the color step of a KL: its root, since a few tokens have most of it."""
    return None if value is None else round(LEVELS * math.sqrt(min(max(value, 0.0) / top, 1.0)))


def _values(line: dict[str, Any], time: str) -> list[float | None]:
    """Return the KL of each label; none is known after a training that was not measured."""
    tokens, given = line["tokens"], line[f"kl_{time}"]
    if given is None:
        given = [None] * len(tokens)
    if len(given) != len(tokens):
        raise ValueError(f"{len(given)} values of {len(tokens)} tokens")
    return [None if value is None else float(value) for value in given]


def _known(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def _means(lines: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    found = {time: _known(one for line in lines for one in line[time]) for time in TIMES}
    return {time: sum(one) / len(one) if one else None for time, one in found.items()}


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
    return "not measured" if value is None else f"{value:.4f} nats"
