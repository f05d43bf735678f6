"""Deletion and insertion curves: is a score right about what misleads, without a known truth?

The tokens of a row are ranked by a score. In the deletion curve the most suspect ones are deleted,
more and more of them; the loss of the completion should fall early. In the insertion curve the text
begins without any of its prunable tokens, and the most suspect come back first; the loss should
stay high for long. All scores delete the same number of tokens at each point: a score that deletes
more would look better than it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from leaf_distill.config import AnswerOptions
from leaf_distill.data.example import Example, Floats, Range, Rendering, Role, UnusableRow
from leaf_distill.detection.answers import PromptedModel
from leaf_distill.detection.cache import RowCache
from leaf_distill.detection.counterfactual import changed, merge
from leaf_distill.detection.scores import score_completions
from leaf_distill.detection.spans import characters
from leaf_distill.models.intervention import behind
from leaf_distill.statistics import bootstrap, paired_bootstrap

Kind = Literal["deletion", "insertion"]
KINDS: Final[tuple[Kind, ...]] = ("deletion", "insertion")
SHARES: Final = (0.0, 0.05, 0.1, 0.2, 0.3, 0.5)


@dataclass(frozen=True)
class Curve:
    """The loss of a row's completion while tokens are deleted from its prompt, or inserted again.

    Attributes:
        row_id: the row.
        score: the name of the score that ranks the tokens.
        role: the model.
        kind: "deletion" or "insertion".
        shares: of the prunable tokens that are deleted or inserted, from 0 on.
        nll: the mean negative log-likelihood (nats a label) at each share.
    """

    row_id: int
    score: str
    role: Role
    kind: Kind
    shares: tuple[float, ...]
    nll: tuple[float, ...]

    @property
    def area(self) -> float:
        """The mean of the curve over its shares, by the trapezoidal rule, in nats a label.

        The lower a deletion curve's and the higher an insertion curve's, the better the score.
        """
        widths = np.diff(self.shares)
        return float(np.dot(widths, np.add(self.nll[1:], self.nll[:-1])) / 2 / widths.sum())


def deletion_curves(
    scored: PromptedModel,
    examples: Sequence[Example],
    suspicion: Mapping[str, Sequence[Floats]],
    config: AnswerOptions,
    cache: RowCache,
    *,
    shares: Sequence[float] = SHARES,
) -> list[Curve]:
    """Return the two curves of each row and score for one model.

    Args:
        scored: the model.
        examples: aligned rows with a rendering of prompt and completion for the model's role.
        suspicion: for each score, float32 [d] for each row, high on the tokens to delete first;
            ties go to the earlier token.
        config, cache: settings of the batches, and where losses are kept.
        shares: increasing, at least two, within [0, 1]. The number of tokens is rounded to the
            nearest, and down at a half.

    Returns:
        The curves of all rows with one score, then with the next. A curve is left out where one of
        its prompts cannot be rendered, is too long, or has a loss that is not finite; the same rows
        are then missing for every score of this kind, so that means compare the same rows.

    Raises:
        ValueError: shares do not increase, or a score's values are not one for each token.
    """
    shares = tuple(shares)
    within = all(0 <= share <= 1 for share in shares)
    if len(shares) < 2 or not within or np.diff(shares).min() <= 0:
        raise ValueError(f"shares: must increase from 0 or more to at most 1, got {shares}")
    texts: list[tuple[tuple[Kind, str, int], list[Rendering] | None]] = []
    for kind in KINDS:
        for name, rows in suspicion.items():
            for at, (example, values) in enumerate(zip(examples, rows, strict=True)):
                kept = _renderings(scored, example, _order(example, values, name), shares, kind)
                texts.append(((kind, name, at), kept))
    flat = [one for _, renderings in texts for one in renderings or ()]
    losses = iter(score_completions(scored, flat, config, cache))
    found = {
        key: tuple(next(losses) for _ in renderings) for key, renderings in texts if renderings
    }
    usable = {
        (kind, at)
        for kind in KINDS
        for at in range(len(examples))
        if all(np.isfinite(found.get((kind, name, at), (np.nan,))).all() for name in suspicion)
    }
    return [
        Curve(examples[at].row_id, name, scored.role, kind, shares, nll)
        for (kind, name, at), nll in found.items()
        if (kind, at) in usable
    ]


def summarize_curves(
    curves: Sequence[Curve], *, reference: str | None = None
) -> list[dict[str, Any]]:
    """Return a line for each role, kind and score: the mean curve and area over the rows.

    Each line has `role`, `kind`, `score`, `rows`, `shares`, `nll` (the mean curve), `area` with its
    95 % bootstrap `interval` over the rows, and, if a reference score is given, `difference` of the
    area from the reference's on the same rows with `difference_interval` (None for the reference
    itself). Rows differ far more than scores do, so that the difference says more than the areas.

    Args:
        curves: those of any number of models.
        reference: the name of the score to compare with, such as a random ranking.
    """
    groups: dict[tuple[Role, Kind, str], list[Curve]] = {}
    for one in curves:
        groups.setdefault((one.role, one.kind, one.score), []).append(one)
    lines = []
    for (role, kind, score), group in groups.items():
        areas = _by_row(group, [one.area for one in group])
        mean, low, high = bootstrap([areas])
        line: dict[str, Any] = {
            "role": role,
            "kind": kind,
            "score": score,
            "rows": len(areas),
            "shares": list(group[0].shares),
            "nll": _by_row(group, [one.nll for one in group]).mean(axis=0).tolist(),
            "area": mean,
            "interval": [low, high],
        }
        if reference is not None:
            paired = groups[role, kind, reference]
            other = _by_row(paired, [one.area for one in paired])
            change = None if score == reference else paired_bootstrap(other, areas)
            line["difference"] = None if change is None else change[0]
            line["difference_interval"] = None if change is None else list(change[1:])
        lines.append(line)
    return lines


def _by_row(curves: Sequence[Curve], values: Sequence[Any]) -> NDArray[np.float64]:
    """Return the mean value of each row, float64 [rows, ...]; a row may have several views."""
    rows: dict[int, list[Any]] = {}
    for one, value in zip(curves, values, strict=True):
        rows.setdefault(one.row_id, []).append(value)
    return np.asarray([np.mean(found, axis=0) for found in rows.values()])


def _order(example: Example, values: Floats, name: str) -> list[int]:
    """Return the prunable tokens, the most suspect first."""
    assert example.prunable is not None
    if values.shape != example.prunable.shape:
        raise ValueError(
            f"suspicion[{name!r}]: must have one value for each of the {len(example.prunable)} "
            f"tokens of row {example.row_id}, got the shape {values.shape}"
        )
    pool: list[int] = np.flatnonzero(example.prunable).tolist()
    return sorted(pool, key=lambda at: (-values[at], at))


def _renderings(
    scored: PromptedModel,
    example: Example,
    order: Sequence[int],
    shares: Sequence[float],
    kind: Kind,
) -> list[Rendering] | None:
    """Return a rendering for each point of a curve; None if one of them does not work."""
    original, limit = example.renderings[scored.role], scored.model.max_positions
    renderings = []
    for share in shares:
        count = int(np.ceil(share * len(order) - 0.5))
        gone = order[:count] if kind == "deletion" else order[count:]
        if not gone:
            renderings.append(original)
            continue
        try:
            ids = scored.prompt(changed(example, _ranges(example, gone))).input_ids
        except UnusableRow:
            return None
        renderings.append(behind(ids, original))
        if limit is not None and len(renderings[-1]) > limit:
            return None
    return renderings


def _ranges(example: Example, tokens: Sequence[int]) -> tuple[Range, ...]:
    """Return the characters of tokens, none over a border of the example's parts."""
    joined = merge(characters(example, (at, at + 1)) for at in tokens)
    return tuple(
        (max(start, low), min(stop, high))
        for start, stop in joined
        for low, high in example.parts
        if max(start, low) < min(stop, high)
    )
