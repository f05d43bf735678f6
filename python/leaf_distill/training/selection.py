"""Position-selective distillation: the label tokens of each row that count."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from leaf_ext import DualKLRows

SELECTIONS = ("all", "entropy", "tip", "random")


@dataclass(frozen=True)
class Selection:
    """Chooses m = ceil(share * n) of the n label tokens of a row, ties by position.

    - "all": all n of them, whatever the share.
    - "entropy": those with the highest student entropy (SE-KD, arXiv:2602.01395).
    - "tip": ceil(m / 2) with the highest student entropy; and of the floor(n / 2) with the lowest,
      the floor(m / 2) with the highest KL(teacher, student) (after TIP, arXiv:2604.14084).
    - "random": any, drawn anew for each row_id and each value of `seed`.

    A choice depends on the row alone, so that it is the same however a step is split.
    """

    rule: str = "all"
    share: float = 1.0
    seed: tuple[int, ...] = ()

    @property
    def measures(self) -> bool:
        """Whether the choice depends on what the models predict."""
        return self.rule in ("entropy", "tip")

    def count(self, labels: Tensor) -> Tensor:
        """Return how many tokens of each row are chosen, of the shape of its label tokens."""
        if self.rule == "all":
            return labels
        # The product may be above an integer by rounding: 0.07 * 100 is.
        return torch.ceil(labels.double() * self.share - 1e-9).to(labels.dtype)

    def choose(self, sequence: Tensor, row_id: Tensor, rows: DualKLRows | None) -> Tensor:
        """Choose among the N label tokens of a batch.

        Args:
            sequence: int64 [N], the row of the batch that each token belongs to, ascending.
            row_id: int64 [B].
            rows: the measures of the tokens, each [N]; None unless `measures`.

        Returns:
            bool [N].
        """
        if self.rule == "all":
            return torch.ones_like(sequence, dtype=torch.bool)
        labels = torch.bincount(sequence, minlength=len(row_id))
        wanted = self.count(labels)[sequence]
        if rows is None:
            return _ranks(self._draw(labels, row_id).to(sequence.device), sequence) < wanted
        by_entropy = _ranks(rows.student_entropy, sequence)
        if self.rule == "entropy":
            return by_entropy < wanted
        low = by_entropy >= (labels - labels // 2)[sequence]
        by_kl = _ranks(rows.kl.masked_fill(~low, -torch.inf), sequence)
        return (by_entropy < wanted - wanted // 2) | (low & (by_kl < wanted // 2))

    def _draw(self, labels: Tensor, row_id: Tensor) -> Tensor:
        """Return a random number for each token, float64 [N] on the CPU."""
        drawn = [
            np.random.default_rng((*self.seed, one)).random(count)
            for one, count in zip(row_id.tolist(), labels.tolist(), strict=True)
        ]
        return torch.from_numpy(np.concatenate(drawn))


def _ranks(score: Tensor, sequence: Tensor) -> Tensor:
    """Return each token's place within its row by falling score, from 0; NaN comes first.

    Args:
        score: [N].
        sequence: int64 [N], ascending.
    """
    order = score.argsort(descending=True, stable=True)
    order = order[sequence[order].argsort(stable=True)]  # row by row, in each by falling score
    places = torch.arange(len(order), device=order.device)
    places = places - torch.searchsorted(sequence, sequence)  # from the first token of the row
    return torch.empty_like(order).scatter_(0, order, places)
