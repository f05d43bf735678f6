"""The loss of one batch: `linear_dual_kl` of both models' hidden states at label positions."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import torch
from torch import Tensor, nn

from leaf_distill.data.collator import Batch
from leaf_distill.models.lm_head import LMHeadHook
from leaf_ext import DualKLRows, linear_dual_kl, row_weights

logger = logging.getLogger(__name__)

KEYS: Final = (
    *("input_ids", "attention_mask", "loss_mask"),
    *("teacher_input_ids", "teacher_attention_mask", "teacher_loss_mask"),
    *("counterfactual", "row_id"),
)
"""The keys of a batch, as `leaf_distill.data.collator.collate` makes them."""

SUMS: Final = (
    *("kd_kl", "cd_kl", "kd_tokens", "cd_tokens"),
    *("student_entropy", "teacher_entropy", "agreement", "cf_rows", "skipped_rows"),
)
"""Sums over a batch, in this order; those of several batches can be added."""

MEASURES: Final = ("loss", "kd_loss", "cd_loss", *SUMS[4:])
"""The measures of an evaluation: the loss, and the entries of `metrics`."""

CURE: Final = (
    "Lower learning_rate and run the same command again: it goes on from the newest checkpoint, or "
    "from an older one that resume_from_checkpoint names (false: from the start)"
)
"""The advice for a student whose numbers are not finite any more."""


def count_labels(batch: Batch) -> Tensor:
    """Return the label tokens of a batch's originals and of its counterfactuals, int64 [2]."""
    labels, counterfactual = batch["loss_mask"].sum(dim=1), batch["counterfactual"]
    return torch.stack([labels[~counterfactual].sum(), labels[counterfactual].sum()])


def metrics(sums: Tensor) -> dict[str, float]:
    """Return means per label token, and counts of rows, from `SUMS` (float64 [len(SUMS)]).

    A branch without tokens has no loss.
    """
    total = dict(zip(SUMS, sums.tolist(), strict=True))
    kd, cd = total["kd_tokens"], total["cd_tokens"]
    parts = {"kd_loss": (total["kd_kl"], kd), "cd_loss": (total["cd_kl"], cd)}
    parts |= {name: (total[name], kd + cd) for name in SUMS[4:7]}
    means = {name: value / tokens for name, (value, tokens) in parts.items() if tokens}
    return {**means, "cf_rows": total["cf_rows"], "skipped_rows": total["skipped_rows"]}


def mean_loss(history: Sequence[Mapping[str, Any]]) -> float:
    """Return the mean loss of all optimizer steps from the logs, each a mean since the last one."""
    total, reached = 0.0, 0
    for log in history:
        if "loss" in log:
            total += log["loss"] * (log["step"] - reached)
            reached = log["step"]
    return total / max(reached, 1)


@dataclass(frozen=True)
class Objective:
    """L = lambda L_kd + (1 - lambda) L_cd of one batch, with the denominators of its step.

    `teacher` is the unwrapped teacher, frozen and in eval mode.
    """

    student: LMHeadHook
    teacher: LMHeadHook
    kd_weight: float | Literal["pool"]
    temperature: float
    backend: Any  # leaf_ext checks the name

    def __call__(
        self, module: nn.Module, batch: Batch, denominators: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Measure one batch.

        Args:
            module: the student, or what wraps it for training.
            batch: as `collate` makes it, on the student's device.
            denominators: (n_kd, n_cd), the label tokens of the whole optimizer step, [2].

        Returns:
            The loss with its graph, and the batch's `SUMS`, float64 [len(SUMS)] on the CPU.

        Raises:
            RuntimeError: the student's loss is NaN; the sentence names the rows.
        """
        at = batch["loss_mask"]
        sequence = at.nonzero()[:, 0]  # the row of the batch that each label token belongs to
        counterfactual = batch["counterfactual"][sequence]
        with torch.no_grad():
            teacher_hidden = self.teacher.run(
                self.teacher.model,
                batch["teacher_input_ids"],
                batch["teacher_attention_mask"],
                batch["teacher_loss_mask"],
                lambda hidden, weight, bias: hidden,
            )
        live = torch.ones_like(batch["counterfactual"])
        measured: list[DualKLRows] = []

        def weights() -> Tensor:
            n_kd, n_cd = denominators
            return row_weights(
                counterfactual, live[sequence], kd_weight=self.kd_weight, n_kd=n_kd, n_cd=n_cd
            )

        def at_head(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            loss, rows = self._loss((hidden, weight, bias), teacher_hidden, weights())
            faulty = rows.teacher_entropy.isnan()
            # One bad position makes the teacher's whole row worthless. The row is skipped: its
            # tokens get weight 0, which keeps NaN out of the sums. They stay in the denominators,
            # which were counted before any forward pass.
            if faulty.any():
                live[sequence[faulty]] = False
                loss, rows = self._loss((hidden, weight, bias), teacher_hidden, weights())
            measured.append(rows)
            return loss

        loss = self.student.run(module, batch["input_ids"], batch["attention_mask"], at, at_head)
        rows = measured[0]
        sums, invalid = _sums(rows, weights(), counterfactual, live, batch)
        row_id = batch["row_id"]
        if invalid:
            bad = sorted(set(row_id[sequence[rows.kl.isnan()]].tolist()))
            raise RuntimeError(
                f"the loss is NaN on the rows with row_id {bad}: the student's output is not "
                f"finite there. {CURE}"
            )
        if sums[SUMS.index("skipped_rows")]:
            logger.warning(
                "skipped row_id %s: the teacher's output is not finite", row_id[~live].tolist()
            )
        return loss, sums

    def check(self, batch: Batch) -> None:
        """Compare both models' heads with their own logits on a batch; these are formed in full.

        Raises:
            ValueError: a key is missing in the batch, or a head does not give its model's logits.
        """
        if lacking := [key for key in KEYS if key not in batch]:
            raise ValueError(
                f"data_collator: must return the keys {', '.join(KEYS)}, got none of "
                f"{', '.join(lacking)}"
            )
        self.student.check(*(batch[key] for key in KEYS[:3]))
        self.teacher.check(*(batch[key] for key in KEYS[3:6]))

    def from_sums(self, sums: Tensor) -> float:
        """Return the loss of a whole dataset from its `SUMS`."""
        kd_kl, cd_kl, n_kd, n_cd = sums[:4].tolist()
        if self.kd_weight == "pool" or not n_kd or not n_cd:
            mean = (kd_kl + cd_kl) / max(n_kd + n_cd, 1)
        else:
            mean = self.kd_weight * kd_kl / n_kd + (1 - self.kd_weight) * cd_kl / n_cd
        return float(mean * self.temperature**2)

    def _loss(
        self, student: tuple[Tensor, Tensor, Tensor | None], teacher_hidden: Tensor, weights: Tensor
    ) -> tuple[Tensor, DualKLRows]:
        hidden, weight, bias = student
        head, rows = self.teacher.head, self.teacher.vocab_size
        return linear_dual_kl(
            hidden,
            weight,
            teacher_hidden,
            head.weight[:rows],
            weights.to(torch.float64 if hidden.dtype == torch.float64 else torch.float32),
            student_bias=bias,
            teacher_bias=None if head.bias is None else head.bias[:rows],
            temperature=self.temperature,
            logit_scale=(self.student.scale, self.teacher.scale),
            logit_softcap=(self.student.softcap, self.teacher.softcap),
            return_rows=True,
            backend=self.backend,
        )


def _sums(
    rows: DualKLRows,
    weights: Tensor,
    counterfactual: Tensor,
    live: Tensor,
    batch: Batch,
) -> tuple[Tensor, bool]:
    """Return the batch's `SUMS`, and whether a KL is NaN, by one transfer from the device."""
    counts = weights > 0
    kd, cd = counts & ~counterfactual, counts & counterfactual
    cf_rows = batch["counterfactual"] & batch["loss_mask"].any(dim=1)
    parts = [
        rows.kl[kd].sum(),
        rows.kl[cd].sum(),
        kd.sum(),
        cd.sum(),
        rows.student_entropy.sum(),
        rows.teacher_entropy.sum(),
        rows.agreement.sum(),
        cf_rows.sum(),
        (~live).sum(),
        rows.kl.isnan().any(),
    ]
    values = torch.stack([part.to(rows.kl.dtype) for part in parts]).cpu().double()
    return values[:-1], bool(values[-1])
