"""The loss of one batch, from the student's hidden states and the teacher's signal at labels."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import torch
from torch import Tensor, nn

from leaf_distill.data.collator import Batch
from leaf_distill.models.lm_head import LMHeadHook
from leaf_distill.training.selection import Selection
from leaf_distill.training.teacher import Head, Hidden, Signal, Teacher, TopK, signal_kl
from leaf_ext import DualKLRows, row_weights

logger = logging.getLogger(__name__)

KdWeight = float | Literal["pool"]
ALL: Final = Selection()

KEYS: Final = (
    *("input_ids", "attention_mask", "loss_mask"),
    *("teacher_input_ids", "teacher_attention_mask", "teacher_loss_mask"),
    *("counterfactual", "row_id"),
)
"""The keys that a batch must have, as `leaf_distill.data.collator.collate` makes them."""

_MEANS: Final = ("student_entropy", "teacher_entropy", "agreement", "nll")
"""`linear_dual_kl` measures these of each token besides the KL, and the log has their means."""

SUMS: Final = (
    *("kd_kl", "cd_kl", "kd_tokens", "cd_tokens", *_MEANS, "cf_rows", "skipped_rows"),
    "cd_nll",
)
"""Sums over a batch, in this order; those of several batches can be added.

All but the rows are sums over tokens, each times its weight within its term. Without a teacher the
sums that need one are NaN.
"""

_OF_TEACHER: Final = [
    SUMS.index(name) for name in ("kd_kl", "cd_kl", "teacher_entropy", "agreement")
]

MEASURES: Final = ("loss", "kd_loss", "cd_loss", *SUMS[4:-1])
"""The measures of an evaluation: the loss, and the entries of `metrics`."""

CURE: Final = (
    "Lower learning_rate and run the same command again: it goes on from the newest checkpoint, or "
    "from an older one that resume_from_checkpoint names (false: from the start)"
)
"""The advice for a student whose numbers are not finite any more."""


def count_labels(batch: Batch, selection: Selection = ALL) -> Tensor:
    """Return the denominators of a batch's originals and of its counterfactuals, float64 [2].

    Each is the number of the label tokens that are chosen, each times the weight of its row.
    """
    counted = selection.count(batch["loss_mask"].sum(dim=1)) * _row_weight(batch)
    counterfactual = batch["counterfactual"]
    return torch.stack([counted[~counterfactual].sum(), counted[counterfactual].sum()])


def count_tokens(batch: Batch) -> Tensor:
    """Return a batch's tokens and label tokens, int64 [2], without padding and `FILLER`."""
    labels = batch["loss_mask"].sum(dim=1)
    return torch.stack([(batch["attention_mask"].sum(dim=1) * (labels > 0)).sum(), labels.sum()])


def _row_weight(batch: Batch) -> Tensor:
    """Return the weight of each row's tokens within its term, float64 [B]; without any, 1."""
    alike = torch.ones_like(batch["counterfactual"], dtype=torch.float64)
    return batch.get("row_weight", alike).double()


def metrics(sums: Tensor) -> dict[str, float]:
    """Return means over label tokens, and counts of rows, from `SUMS` (float64 [len(SUMS)]).

    A branch without tokens has no loss. A teacher's stored top k gives no `nll`, and no teacher
    nothing that needs one.
    """
    total = dict(zip(SUMS, sums.tolist(), strict=True))
    kd, cd = total["kd_tokens"], total["cd_tokens"]
    parts = {"kd_loss": (total["kd_kl"], kd), "cd_loss": (total["cd_kl"], cd)}
    parts |= {name: (total[name], kd + cd) for name in _MEANS}
    means = {
        name: value / tokens
        for name, (value, tokens) in parts.items()
        if tokens and not math.isnan(value)
    }
    return {**means, "cf_rows": total["cf_rows"], "skipped_rows": total["skipped_rows"]}


def mean_loss(history: Sequence[Mapping[str, Any]]) -> float:
    """Return the mean loss of all optimizer steps from the logs, each a mean since the last one."""
    total, reached = 0.0, 0
    for log in history:
        if "loss" in log:
            total += log["loss"] * (log["step"] - reached)
            reached = log["step"]
    return total / max(reached, 1)


class BrokenLoss(RuntimeError):
    """A KL is NaN or infinite.

    Attributes:
        batch: the batch.
        kl: of each row of the batch, the KL of its label tokens.
    """

    def __init__(self, message: str, batch: Batch, kl: list[list[float]]) -> None:
        super().__init__(message)
        self.batch, self.kl = batch, kl


@dataclass
class _Tokens:
    """The N label tokens of a batch.

    Attributes:
        sequence: int64 [N], the row of the batch that each belongs to.
        label: int64 [N], their ids.
        counterfactual: bool [N].
        weight: float64 [N], how much each counts within its term; 0: it does not.
        live: bool [B], False: the row is skipped.
    """

    sequence: Tensor
    label: Tensor
    counterfactual: Tensor
    weight: Tensor
    live: Tensor

    @classmethod
    def of(cls, batch: Batch) -> _Tokens:
        sequence, position = batch["loss_mask"].nonzero().unbind(1)
        return cls(
            sequence,
            batch["input_ids"][sequence, position + 1],
            batch["counterfactual"][sequence],
            _row_weight(batch)[sequence],
            torch.ones_like(batch["counterfactual"]),
        )

    def signal(self, student: LMHeadHook) -> TopK:
        """Return the signal of a teacher that is sure of each label: its KL is the `nll`."""
        certain = torch.zeros_like(self.weight)
        tail = torch.full_like(certain, -torch.inf)
        return TopK(self.label[:, None], certain[:, None], tail, student.vocab_size)

    def skip_faulty(self, rows: DualKLRows) -> bool:
        """Give weight 0 to the rows where the teacher's output is not finite, if there are any.

        One bad position makes the teacher's whole row worthless, and weight 0 keeps NaN out of the
        sums. The tokens stay in the denominators, which were counted before any forward pass.
        """
        faulty = rows.teacher_entropy.isnan()
        if not faulty.any():
            return False
        self.live[self.sequence[faulty]] = False
        self.weight = self.weight * self.live[self.sequence]
        return True


@dataclass(frozen=True)
class Objective:
    """L = lambda L_kd + (1 - lambda) L_cd of one batch, with the denominators of its step.

    The loss of a token is (1 - ce_weight) temperature^2 KL(teacher, student) + ce_weight nll, the
    negative log-likelihood of the label. `teacher` gives the signal of a batch, unless ce_weight is
    1: see `leaf_distill.training.teacher`.
    """

    student: LMHeadHook
    teacher: Teacher
    temperature: float
    divergence: Any  # leaf_ext checks it
    backend: Any  # and the name
    ce_weight: float = 0.0

    def __call__(
        self,
        module: nn.Module,
        batch: Batch,
        denominators: Tensor,
        kd_weight: KdWeight,
        selection: Selection = ALL,
    ) -> tuple[Tensor, Tensor]:
        """Measure one batch.

        Args:
            module: the student, or what wraps it for training.
            batch: as `collate` makes it, on the student's device.
            denominators: (n_kd, n_cd), `count_labels` of the whole optimizer step, [2].
            kd_weight: lambda, or "pool".
            selection: the label tokens that count.

        Returns:
            The loss with its graph, and the batch's `SUMS`, float64 [len(SUMS)] on the CPU.

        Raises:
            BrokenLoss: a KL is NaN or infinite; the sentence names the rows.
        """
        tokens, at, row_id = _Tokens.of(batch), batch["loss_mask"], batch["row_id"]
        signal = tokens.signal(self.student) if self.ce_weight == 1 else self.teacher(batch)
        measured: list[DualKLRows] = []

        def weights() -> Tensor:
            n_kd, n_cd = denominators
            return row_weights(
                tokens.counterfactual, tokens.weight, kd_weight=kd_weight, n_kd=n_kd, n_cd=n_cd
            )

        def at_head(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            head = Head(weight, bias, self.student.scale, self.student.softcap)
            models, rows = (Hidden(hidden, head), signal), None
            if selection.measures:
                with torch.no_grad():
                    _, rows = self._loss(*models, torch.ones_like(tokens.weight), tokens.label)
                tokens.skip_faulty(rows)
            tokens.weight = tokens.weight * selection.choose(tokens.sequence, row_id, rows)
            loss, rows = self._loss(*models, weights(), tokens.label)
            if tokens.skip_faulty(rows):
                loss, rows = self._loss(*models, weights(), tokens.label)
            measured.append(rows)
            return loss

        loss = self.student.run(module, batch["input_ids"], batch["attention_mask"], at, at_head)
        sums, invalid = _sums(measured[0], weights(), tokens, batch, self.ce_weight)
        if invalid:
            rows = measured[0]
            faulty = _not_finite(rows, self.ce_weight)
            bad = sorted(set(row_id[tokens.sequence[faulty]].tolist()))
            what, reason = "NaN", "the student's output is not finite there"
            if not rows.kl.isnan().any():
                what, reason = "infinite", "the student rules out what the teacher does not"
                if self.ce_weight == 1 or rows.kl.isfinite().all():
                    reason = "the student rules out a label"
                elif self.divergence == "reverse_kl":
                    reason = (
                        "the teacher rules out what the student does not; use another divergence"
                    )
            raise BrokenLoss(
                f"the loss is {what} on the rows with row_id {bad}: {reason}. {CURE}",
                batch,
                [rows.kl[tokens.sequence == row].tolist() for row in range(len(row_id))],
            )
        if self.ce_weight == 1:
            sums[_OF_TEACHER] = torch.nan
        if sums[SUMS.index("skipped_rows")]:
            logger.warning(
                "skipped row_id %s: the teacher's output is not finite",
                row_id[~tokens.live].tolist(),
            )
        return loss, sums

    @torch.no_grad()
    def token_kl(self, module: nn.Module, batch: Batch) -> Tensor:
        """Return KL(teacher, student) of each label token in nats, row by row, [N].

        It depends neither on weights nor on the divergence that is trained with.
        """
        signal, measured = self.teacher(batch), []

        def at_head(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            head = Head(weight, bias, self.student.scale, self.student.softcap)
            each = torch.ones(len(hidden), device=hidden.device)
            models, temperature = (Hidden(hidden, head), signal), self.temperature
            loss, rows = signal_kl(*models, each, temperature=temperature, backend=self.backend)
            measured.append(rows.kl)
            return loss

        labels = batch["loss_mask"]
        self.student.run(module, batch["input_ids"], batch["attention_mask"], labels, at_head)
        return measured[0]

    def check(self, batch: Batch, *, weighted: bool = False) -> None:
        """Compare both models' heads with their own logits on a batch; these are formed in full.

        Args:
            batch: as `collate` makes it.
            weighted: whether it must have the key `row_weight`.

        Raises:
            ValueError: a key is missing in the batch, or a head does not give its model's logits.
        """
        keys = (*KEYS, "row_weight") if weighted else KEYS
        if lacking := [key for key in keys if key not in batch]:
            raise ValueError(
                f"data_collator: must return the keys {', '.join(keys)}, got none of "
                f"{', '.join(lacking)}"
            )
        self.student.check(*(batch[key] for key in KEYS[:3]))
        if self.ce_weight < 1:
            self.teacher.check(batch)

    def from_sums(self, sums: Tensor, kd_weight: KdWeight) -> float:
        """Return the loss of a whole dataset from its `SUMS`."""
        total = dict(zip(SUMS, sums.tolist(), strict=True))
        n_kd, n_cd = total["kd_tokens"], total["cd_tokens"]

        def mean(kd: float, cd: float) -> float:
            if kd_weight == "pool" or not n_kd or not n_cd:
                return (kd + cd) / (n_kd + n_cd or 1)
            return float(kd_weight * kd / n_kd + (1 - kd_weight) * cd / n_cd)

        loss = 0.0
        if self.ce_weight > 0:  # of what is not measured the sums are NaN
            loss = self.ce_weight * mean(total["nll"] - total["cd_nll"], total["cd_nll"])
        if self.ce_weight < 1:
            kl = mean(total["kd_kl"], total["cd_kl"])
            loss += (1 - self.ce_weight) * self.temperature**2 * kl
        return loss

    def _loss(
        self, student: Hidden, signal: Signal, weights: Tensor, labels: Tensor
    ) -> tuple[Tensor, DualKLRows]:
        if self.ce_weight == 1:
            loss, rows = signal_kl(student, signal, weights, temperature=1.0, backend=self.backend)
            return loss, rows._replace(nll=rows.kl)
        return signal_kl(
            student,
            signal,
            weights * (1 - self.ce_weight),
            labels=labels,
            label_weight=weights * self.ce_weight if self.ce_weight else None,
            temperature=self.temperature,
            divergence=self.divergence,
            backend=self.backend,
        )


def _not_finite(rows: DualKLRows, ce_weight: float) -> Tensor:
    """Return which tokens' part of the loss is NaN or infinite, bool [N]."""
    return ~(rows.kl.isfinite() & rows.nll.isfinite() if ce_weight else rows.kl.isfinite())


def _sums(
    rows: DualKLRows, weights: Tensor, tokens: _Tokens, batch: Batch, ce_weight: float
) -> tuple[Tensor, bool]:
    """Return the batch's `SUMS`, and whether a part of the loss is not finite, by one transfer."""
    counts, cd = tokens.weight * (weights > 0), tokens.counterfactual
    kl = counts * rows.kl
    cf_rows = batch["counterfactual"] & batch["loss_mask"].any(dim=1)
    parts = [
        kl.masked_fill(cd, 0).sum(),  # an infinite one times 0 would be NaN
        kl.masked_fill(~cd, 0).sum(),
        (counts * ~cd).sum(),
        (counts * cd).sum(),
        *((counts * getattr(rows, name)).sum() for name in _MEANS),
        cf_rows.sum(),
        (~tokens.live).sum(),
        (counts * cd * rows.nll).sum(),
        _not_finite(rows, ce_weight).any(),
    ]
    values = torch.stack([part.double() for part in parts]).cpu()
    return values[:-1], bool(values[-1])
