"""Checks of the losses' temperature, scale and softcap."""

from __future__ import annotations

from leaf_ext.ops.checks import require, require_number
from leaf_ext.schema import LogitScalars, StudentScalars

Pair = tuple[float, float]
PairOfCaps = tuple[float | None, float | None]


def logit_options(
    op: str,
    temperature: float,
    logit_scale: float | Pair,
    logit_softcap: float | PairOfCaps | None,
) -> LogitScalars:
    """Return the checked scalars. A scale or softcap is one number for both models, or a pair."""
    scales = _pair(op, "logit_scale", logit_scale)
    caps = _pair(op, "logit_softcap", logit_softcap)
    return LogitScalars(
        _positive(op, "temperature", temperature),
        *(_positive(op, "logit_scale", scale) for scale in scales),
        *(0.0 if cap is None else _positive(op, "logit_softcap", cap) for cap in caps),
    )


def student_options(
    op: str, temperature: float, logit_scale: float, logit_softcap: float | None
) -> StudentScalars:
    """Return the checked scalars of the student's logits alone."""
    return StudentScalars(
        _positive(op, "temperature", temperature),
        _positive(op, "logit_scale", logit_scale),
        0.0 if logit_softcap is None else _positive(op, "logit_softcap", logit_softcap),
    )


def _positive(op: str, argument: str, value: object) -> float:
    return require_number(op, argument, value, 0, float("inf"), strict=True)


def _pair(op: str, argument: str, value: object) -> tuple[object, object]:
    if not isinstance(value, (tuple, list)):  # a pair in a YAML file is a list
        return value, value
    require(len(value) == 2, op, argument, "a number or a pair (student, teacher)", repr(value))
    return value[0], value[1]
