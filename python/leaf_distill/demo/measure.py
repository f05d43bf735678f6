"""Measures of the demo: scores against planted sentences, and cuts without any training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Tokens:
    """The prompt tokens of one row that may be cut, with the truth and the scores.

    planted, number, flagged: bool [n]; suspicion: float64 [n] by method, high for a confounder.
    """

    planted: Mask
    number: Mask
    flagged: Mask
    suspicion: Mapping[str, Floats]


@dataclass(frozen=True)
class Detection:
    """One method against the planted truth; shares from 0 to 1, NaN where nothing is to count.

    precision: flagged tokens that are planted; token_recall: planted tokens that are flagged;
    clause_recall: planted sentences with a flagged token; top_1: rows with a planted sentence
    whose most suspicious token is planted; auc: of the suspicion over the tokens of all rows.
    """

    method: str
    precision: float
    clause_recall: float
    token_recall: float
    top_1: float
    auc: float
    auc_numbers: float


@dataclass(frozen=True)
class Pruning:
    """The effect of cutting alone on prompts that the student had failed, without any training."""

    method: str
    prompts: int
    cuts: int
    cuts_right: int  # cut prompts that the student answers correctly
    prompts_right: int  # prompts with at least one such cut
    cuts_kept: int  # cuts that passed the whole validation


def read_tokens(
    sample: Mapping[str, Any], planted: Sequence[Sequence[int]], suspicion: Mapping[str, Floats]
) -> Tokens:
    """Return the prunable tokens of a row of samples.parquet.

    Args:
        sample: the row.
        planted: characters [start, stop) of each planted sentence.
        suspicion: scores of other methods, one for each token of the row.
    """
    text: str = sample["text"]
    offsets: list[list[int]] = sample["offsets"]
    prunable = np.array(sample["prunable"], dtype=np.bool_)
    inside = [any(a < stop and start < b for start, stop in planted) for a, b in offsets]
    number = [text[a:b].strip().isdigit() for a, b in offsets]
    scores = {
        "LeaF": -np.array(sample["score"], dtype=np.float64),
        "student only": np.array(sample["student_saliency"], dtype=np.float64),
        **suspicion,
    }
    return Tokens(
        planted=np.array(inside)[prunable],
        number=np.array(number)[prunable],
        flagged=np.array(sample["confounder"], dtype=np.bool_)[prunable],
        suspicion={method: values[prunable] for method, values in scores.items()},
    )


def measure_detection(rows: Sequence[Tokens]) -> list[Detection]:
    """Measure every method against the truth.

    LeaF flags what it would cut; each other method flags as many tokens in each row, those that it
    finds the most suspicious.
    """
    if not rows:
        return []
    return [_measure(rows, method) for method in rows[0].suspicion]


def _measure(rows: Sequence[Tokens], method: str) -> Detection:
    flags = [
        row.flagged if method == "LeaF" else _top(row.suspicion[method], row.flagged.sum())
        for row in rows
    ]
    planted, flagged = np.concatenate([row.planted for row in rows]), np.concatenate(flags)
    suspicion = np.concatenate([row.suspicion[method] for row in rows])
    number = np.concatenate([row.number for row in rows])
    misled = [(row, flag) for row, flag in zip(rows, flags, strict=True) if row.planted.any()]
    return Detection(
        method=method,
        precision=_share(planted[flagged]),
        clause_recall=_share([bool((row.planted & flag).any()) for row, flag in misled]),
        token_recall=_share(flagged[planted]),
        top_1=_share([bool(row.planted[row.suspicion[method].argmax()]) for row, _ in misled]),
        auc=auc(suspicion, planted),
        auc_numbers=auc(suspicion[number], planted[number]),
    )


def auc(suspicion: Floats, truth: Mask) -> float:
    """Return the chance that a true item is more suspicious than a false one.

    Ties count half; without items of both kinds it is NaN.

    Args:
        suspicion: float64 [n].
        truth: bool [n].
    """
    positives = int(truth.sum())
    negatives = len(truth) - positives
    if not positives or not negatives:
        return float("nan")
    _, place, count = np.unique(suspicion, return_inverse=True, return_counts=True)
    rank = (np.cumsum(count) - (count - 1) / 2)[place]  # ties share the mean of their ranks
    wins = rank[truth].sum() - positives * (positives + 1) / 2
    return float(wins / (positives * negatives))


def measure_pruning(method: str, samples: Sequence[Mapping[str, Any]]) -> Pruning:
    """Count over the rows of samples.parquet, all of which the student had failed."""
    right = [
        [candidate["student_verdict"] == "right" for candidate in sample["candidates"]]
        for sample in samples
    ]
    return Pruning(
        method=method,
        prompts=len(samples),
        cuts=sum(len(row) for row in right),
        cuts_right=sum(sum(row) for row in right),
        prompts_right=sum(any(row) for row in right),
        cuts_kept=sum(candidate["kept"] for row in samples for candidate in row["candidates"]),
    )


def _top(suspicion: Floats, count: int) -> Mask:
    flagged = np.zeros(len(suspicion), dtype=np.bool_)
    flagged[np.argsort(-suspicion, kind="stable")[:count]] = True
    return flagged


def _share(hits: Sequence[bool] | Mask) -> float:
    return float(np.mean(hits)) if len(hits) else float("nan")
