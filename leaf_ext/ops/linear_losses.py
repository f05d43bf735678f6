"""The linear losses of a namespace: `run_chunks` around its ops on logits."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from leaf_ext.ops.linear_chunks import Gradients, Head, Needs, PieceLoss, Products, run_chunks
from leaf_ext.reference.dual_kl import float16_scale
from leaf_ext.schema import LogitScalars, StudentScalars, gradient_rows, slope_bound


def make_linear_dual_kl(namespace: str) -> Callable[..., Gradients]:
    """Return the op of a namespace, which calls that namespace's `dual_kl` and `dual_kl_`."""
    ops = getattr(torch.ops, namespace)

    def linear_dual_kl(
        student_hidden: Tensor,
        student_head: Tensor,
        teacher_hidden: Tensor,
        teacher_head: Tensor,
        row_weight: Tensor,
        student_bias: Tensor | None,
        teacher_bias: Tensor | None,
        labels: Tensor | None,
        label_weight: Tensor | None,
        *options: Any,
    ) -> Gradients:
        scalars = LogitScalars(*options[: len(LogitScalars._fields)])
        needs = Needs(*options[len(scalars) :])

        def piece_loss(size: int) -> PieceLoss:
            teacher = Head.of(teacher_head, teacher_bias, Products.of(teacher_hidden), size)

            def loss_of(z_s: Tensor, index: Tensor, dtype: torch.dtype | None) -> Any:
                weight = row_weight.index_select(0, index)
                hidden = teacher.rows_of(teacher_hidden, index)
                if label_weight is not None:
                    # Rows that count for their label alone. A CPU's bfloat16 products multiply
                    # what stands behind a row by 0, so that a NaN there would spread.
                    hidden.masked_fill_((weight == 0)[:, None], 0.0)
                z_t = teacher.logits(hidden)
                return _overwritten(ops, "dual_kl", (z_s, z_t, weight, *scalars), needs, dtype)

            if labels is None:
                return loss_of
            vocabulary = min(student_head.shape[0], teacher_head.shape[0])
            hard = _Labels(ops, labels, label_weight, vocabulary, scalars, needs.rows)
            return functools.partial(hard.add_to, loss_of, row_weight)

        live = row_weight != 0
        if label_weight is not None:
            live = live | (label_weight != 0)
        return run_chunks(
            "linear_dual_kl",
            (student_hidden, student_head, student_bias),
            live.nonzero().squeeze(1),
            max(student_head.shape[0], teacher_head.shape[0]),
            4 if labels is None else 5,
            needs,
            piece_loss,
        )

    return linear_dual_kl


def make_linear_topk_kl(namespace: str) -> Callable[..., Gradients]:
    """Return the op of a namespace, which calls that namespace's `topk_kl` and `topk_kl_`."""
    ops = getattr(torch.ops, namespace)

    def linear_topk_kl(
        student_hidden: Tensor,
        student_head: Tensor,
        teacher_ids: Tensor,
        teacher_logprobs: Tensor,
        teacher_tail: Tensor,
        row_weight: Tensor,
        student_bias: Tensor | None,
        *options: Any,
    ) -> Gradients:
        scalars = options[: len(StudentScalars._fields)]
        needs = Needs(*options[len(scalars) :])
        given = teacher_ids, teacher_logprobs, teacher_tail, row_weight

        def loss_of(z: Tensor, index: Tensor, dtype: torch.dtype | None) -> Any:
            of_piece = (tensor.index_select(0, index) for tensor in given)
            return _overwritten(ops, "topk_kl", (z, *of_piece, *scalars), needs, dtype)

        return run_chunks(
            "linear_topk_kl",
            (student_hidden, student_head, student_bias),
            row_weight.nonzero().squeeze(1),
            student_head.shape[0],
            4,
            needs,
            lambda size: loss_of,
        )

    return linear_topk_kl


@dataclass(frozen=True)
class _Labels:
    """Hard labels: the teacher of `topk_kl` whose one id has all the probability."""

    ops: Any
    labels: Tensor  # [N]; negative: no label
    weight: Tensor | None  # [N]; None: the cross-entropy is only measured
    vocabulary: int
    scalars: LogitScalars
    need_rows: bool

    def add_to(
        self,
        loss_of: PieceLoss,
        row_weight: Tensor,
        z: Tensor,
        index: Tensor,
        dtype: torch.dtype | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Add the cross-entropy of the labels to another loss of the piece and to its gradient."""
        label = self.labels.index_select(0, index)
        weight = torch.zeros_like(row_weight[: label.shape[0]])
        if self.weight is not None:
            weight = torch.where(label >= 0, self.weight.index_select(0, index), weight)
        # The logits are read before the other loss overwrites them.
        need_grad = dtype is not None and self.weight is not None
        hard, slope, found = self._cross_entropy(z, label, weight, need_grad)
        if self.need_rows:
            unread = ((label >= 0) & (weight == 0)).to(weight.dtype)
            found = found + self._cross_entropy(z, label, unread, False)[2]
        loss, scale, rows = loss_of(z, index, dtype)
        if dtype is not None and need_grad:
            gradient = gradient_rows(z, dtype)[:, : self.vocabulary]
            if dtype == torch.float16:
                # At half the scale of the larger one the sum is within the bound of one.
                bound = self.scalars.temperature * slope_bound(self.scalars.beta)
                both = torch.cat((row_weight[index] * bound, weight))
                common = float16_scale(both, self.scalars.student_scale) / 2
                gradient.mul_(common / scale)
                slope, scale = slope.mul_(common), common
            gradient.add_(slope)
        return loss.double() + hard, scale, torch.cat((rows, found[:1]))

    def _cross_entropy(
        self, z: Tensor, label: Tensor, weight: Tensor, need_grad: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        logits, ids = z[:, : self.vocabulary], label.clamp(min=0)[:, None]
        certain, nothing = weight.new_zeros(ids.shape), torch.full_like(weight, -torch.inf)
        options = StudentScalars(1.0, self.scalars.student_scale, self.scalars.student_softcap)
        loss, slope, _, rows = self.ops.topk_kl(
            logits, ids, certain, nothing, weight, *options, need_grad, self.need_rows
        )
        return loss, slope, rows


def _overwritten(
    ops: Any, op: str, arguments: tuple[Any, ...], needs: Needs, dtype: torch.dtype | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return loss, grad_scale and rows; overwrite the logits with a gradient of the dtype."""
    if dtype is not None:
        result: tuple[Tensor, Tensor, Tensor] = getattr(ops, f"{op}_")(
            *arguments, True, needs.rows, dtype
        )
        return result
    loss, _, scale, rows = getattr(ops, op)(*arguments, False, needs.rows)
    return loss, scale, rows
