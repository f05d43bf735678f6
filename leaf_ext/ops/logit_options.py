"""Checks of the losses' temperature, scale, softcap and divergence."""

from __future__ import annotations

from typing import Literal

from leaf_ext.ops.checks import require, require_number
from leaf_ext.schema import LogitScalars, StudentScalars

Pair = tuple[float, float]
PairOfCaps = tuple[float | None, float | None]
Divergence = Literal["kl", "reverse_kl", "jsd"] | float

_BETA: dict[object, float] = {"kl": 0.0, "reverse_kl": 1.0, "jsd": 0.5}
# The least distance of beta from 0 and 1, where float32 still tells 1 - beta from 1.
_LEAST = 1e-6


def logit_options(
    op: str,
    temperature: float,
    logit_scale: float | Pair,
    logit_softcap: float | PairOfCaps | None,
    divergence: Divergence = "kl",
) -> LogitScalars:
    """Return the checked scalars. A scale or softcap is one number for both models, or a pair."""
    scale_s, scale_t = _pair(op, "logit_scale", logit_scale)
    softcap_s, softcap_t = _pair(op, "logit_softcap", logit_softcap)
    return LogitScalars(
        _positive(op, "temperature", temperature),
        _positive(op, "logit_scale", scale_s),
        _positive(op, "logit_scale", scale_t),
        _softcap(op, softcap_s),
        _softcap(op, softcap_t),
        _beta(op, divergence),
    )


def student_options(
    op: str, temperature: float, logit_scale: float, logit_softcap: float | None
) -> StudentScalars:
    """Return the checked scalars of the student's logits alone."""
    return StudentScalars(
        _positive(op, "temperature", temperature),
        _positive(op, "logit_scale", logit_scale),
        _softcap(op, logit_softcap),
    )


def _beta(op: str, divergence: object) -> float:
    if isinstance(divergence, str):
        names = "'kl', 'reverse_kl', 'jsd' or a number between 0 and 1"
        require(divergence in _BETA, op, "divergence", names, repr(divergence))
        return _BETA[divergence]
    return require_number(op, "divergence", divergence, _LEAST, 1 - _LEAST)


def _positive(op: str, argument: str, value: object) -> float:
    return require_number(op, argument, value, 0, float("inf"), strict=True)


def _softcap(op: str, value: object) -> float:
    return 0.0 if value is None else _positive(op, "logit_softcap", value)


def _pair(op: str, argument: str, value: object) -> tuple[object, object]:
    if not isinstance(value, (tuple, list)):  # a pair in a YAML file is a list
        return value, value
    require(len(value) == 2, op, argument, "a number or a pair (student, teacher)", repr(value))
    return value[0], value[1]
