"""The teacher's part of a batch: its hidden states from a model, wherever that runs, and its head.

Another source gives the same, or another signal: see `leaf_distill.training.teacher_cache`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Final, Protocol

import torch
from accelerate.utils import align_module_device
from torch import Tensor

from leaf_distill.data.collator import Batch
from leaf_distill.models.checks import input_device
from leaf_distill.models.lm_head import LMHeadHook
from leaf_distill.models.replicas import depends_on_earlier_rows, replicate, run_each
from leaf_distill.training.cache_columns import row_key
from leaf_ext import DualKLRows, linear_dual_kl, linear_topk_kl

TENSORS: Final = ("input_ids", "attention_mask", "loss_mask")
KEPT_BYTES: Final = 1 << 28  # of hidden states, for rows that come again

Row = tuple[Tensor, Tensor, Tensor]
"""ids and attention mask, int64, and label positions, bool, [1, T] each."""


@dataclass(frozen=True)
class Head:
    """A linear head on the student's device: weight [V, H], bias [V] or None.

    scale, softcap: what the model applies to its logits.
    """

    weight: Tensor
    bias: Tensor | None
    scale: float = 1.0
    softcap: float | None = None


@dataclass(frozen=True)
class Hidden:
    """The teacher's hidden states [N, H] at the N label positions of a batch, and its head."""

    states: Tensor
    head: Head


@dataclass(frozen=True)
class TopK:
    """The teacher's k largest log-probabilities at each of the N label positions of a batch.

    Attributes:
        ids: int64 [N, k].
        logprobs: float64 [N, k], at the temperature of the training; not quite of sum 1.
        tail_logprob: float64 [N], of all other tokens together.
        vocab_size: how many tokens the probabilities are over; others do not take part.
    """

    ids: Tensor
    logprobs: Tensor
    tail_logprob: Tensor
    vocab_size: int


Signal = Hidden | TopK


def signal_kl(
    student: Hidden,
    signal: Signal,
    row_weight: Tensor,
    *,
    temperature: float,
    divergence: Any = "kl",
    labels: Tensor | None = None,
    label_weight: Tensor | None = None,
    backend: Any = "auto",
) -> tuple[Tensor, DualKLRows]:
    """Return the weighted divergence over N label positions, and its rows.

    Args:
        student: hidden states [N, H] and the head, with their graph.
        signal: the teacher's, at the same positions.
        row_weight: [N].
        temperature, divergence, labels, label_weight, backend: as for `linear_dual_kl`. A top k has
            the divergence "kl" only (`TeacherCache.check_training`) and takes no labels: the `nll`
            of its rows is NaN.
    """
    hidden, head = student.states, student.head
    weights = row_weight.to(torch.float64 if hidden.dtype == torch.float64 else torch.float32)
    options: dict[str, Any] = {"temperature": temperature, "backend": backend}
    if isinstance(signal, TopK):
        rows, bias = signal.vocab_size, head.bias
        loss, measured = linear_topk_kl(
            hidden,
            head.weight[:rows],
            signal.ids,
            signal.logprobs.to(weights.dtype),
            weights,
            teacher_tail_logprob=signal.tail_logprob.to(weights.dtype),
            student_bias=None if bias is None else bias[:rows],
            logit_scale=head.scale,
            logit_softcap=head.softcap,
            return_rows=True,
            **options,
        )
        return loss, measured._replace(nll=torch.full_like(measured.kl, torch.nan))
    theirs = signal.head
    return linear_dual_kl(
        hidden,
        head.weight,
        signal.states,
        theirs.weight,
        weights,
        student_bias=head.bias,
        teacher_bias=theirs.bias,
        labels=labels,
        label_weight=None if label_weight is None else label_weight.to(weights.dtype),
        divergence=divergence,
        logit_scale=(head.scale, theirs.scale),
        logit_softcap=(head.softcap, theirs.softcap),
        return_rows=True,
        **options,
    )


class Teacher(Protocol):
    """Where the signal of a batch comes from.

    Attributes:
        packs: whether no padding is computed.
    """

    @property
    def packs(self) -> bool: ...

    def packing(self) -> AbstractContextManager[None]:
        """Let rows run without padding, where that can be; see `LMHeadHook.packing`."""

    def keeping(self) -> AbstractContextManager[None]:
        """Keep the signal of rows that come again, where that changes no value."""

    def __call__(self, batch: Batch) -> Signal:
        """Return the teacher's signal at the label positions of a batch, row by row in order."""

    def check(self, batch: Batch) -> None:
        """Raise ValueError where the signal of a batch is not that of the teacher."""


class LiveTeacher:
    """A model that reads each batch.

    On a CPU it reads each row alone, several at a time (`leaf_distill.models.replicas`). Its hidden
    states then depend on the row only, to the last bit; in a padded batch they depend on the rows
    beside it, and padding costs as much as tokens. Weights that are offloaded are fetched for each
    pass, and so read the batch as one.

    Such a row is read once in `keeping`, the first ones up to `KEPT_BYTES` of hidden states.

    Args:
        model: frozen, in eval mode, on any device.
        device: the student's. Hidden states are brought there, and the head once.

    Raises:
        ValueError: the model has no plain linear head.
    """

    def __init__(self, model: Any, device: torch.device) -> None:
        self.model, self.input_device = model, input_device(model)
        places = {weight.device.type for weight in model.parameters()}
        self.rows_alone = places == {"cpu"}
        models = replicate(model) if self.rows_alone else [model]
        self.hooks = [LMHeadHook(one, "teacher") for one in models]
        self.hook, self.device = self.hooks[0], device
        self.head = _head(self.hook, device)
        self._kept: dict[Any, Tensor] | None = None
        self._bytes = 0

    @property
    def packs(self) -> bool:
        return self.rows_alone or self.hook.packs

    def packing(self) -> AbstractContextManager[None]:
        return nullcontext() if self.rows_alone else self.hook.packing()

    @contextmanager
    def keeping(self) -> Iterator[None]:
        if self._kept is not None or not self.rows_alone or depends_on_earlier_rows(self.model):
            yield
            return
        self._kept, self._bytes = {}, 0
        try:
            yield
        finally:
            self._kept = None

    def __call__(self, batch: Batch) -> Hidden:
        ids, mask, at = (batch[f"teacher_{name}"] for name in TENSORS)
        return Hidden(self.hidden(ids, mask, at), self.head)

    @torch.no_grad()
    def hidden(self, ids: Tensor, attention_mask: Tensor, at: Tensor) -> Tensor:
        """Return the head's input at some positions.

        Args:
            ids, attention_mask: int64 [B, T], on any device.
            at: bool [B, T], the N positions, taken in row-major order.

        Returns:
            Hidden states [N, H] on the student's device.
        """
        ids, attention_mask, at = (one.to(self.input_device) for one in (ids, attention_mask, at))
        if self.rows_alone:
            rows = [
                (row[None], torch.ones_like(row[None]), where[None])
                for row, where in teacher_rows(ids, attention_mask, at)
                if where.any()
            ]
            made = self._read(rows)
            states = torch.cat(made) if made else self.head.weight[:0]
        else:
            states = _head_input(self.hook, (ids, attention_mask, at))
        return states.to(self.device)

    def _read(self, rows: Sequence[Row]) -> list[Tensor]:
        """Return the hidden states of rows; the model runs for those that are not kept."""
        if self._kept is None:
            return run_each(_head_input, self.hooks, rows)
        rounding = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
        keys = [(row_key(ids[0].numpy(), at[0].numpy()), rounding) for ids, _, at in rows]
        new = {key: row for key, row in zip(keys, rows, strict=True) if key not in self._kept}
        made = dict(zip(new, run_each(_head_input, self.hooks, [*new.values()]), strict=True))
        found = [made[key] if key in made else self._kept[key] for key in keys]
        for key, states in made.items():
            if self._bytes + states.nbytes <= KEPT_BYTES:
                self._kept[key] = states
                self._bytes += states.nbytes
        return found

    def check(self, batch: Batch) -> None:
        """Compare the head with the model's own logits on a batch; see `LMHeadHook.check`."""
        self.hook.check(*(batch[f"teacher_{name}"].to(self.input_device) for name in TENSORS))


def _head_input(hook: LMHeadHook, batch: Row) -> Tensor:
    ids, attention_mask, at = batch
    return hook.run(hook.model, ids, attention_mask, at, lambda hidden, weight, bias: hidden)


def teacher_rows(
    ids: Tensor, attention_mask: Tensor, at: Tensor
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield ids [T] and label positions, bool [T], of each row of a batch, without its padding."""
    for row, mask, where in zip(ids, attention_mask.bool(), at, strict=True):
        yield row[mask], where[mask]


def _head(hook: LMHeadHook, device: torch.device) -> Head:
    with align_module_device(hook.head):  # an offloaded weight is fetched, and kept here
        weight, bias = hook.head.weight.detach(), hook.head.bias
        rows = hook.vocab_size
        return Head(
            weight[:rows].to(device),
            None if bias is None else bias.detach()[:rows].to(device),
            hook.scale,
            hook.softcap,
        )
