"""Logits of a batch at its label positions only."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Final

import torch

from leaf_distill.data.collator import pad
from leaf_distill.data.example import Rendering
from leaf_distill.models.checks import check_below, check_ids, without_mask_advice
from leaf_distill.models.lm_head import logit_rows

if TYPE_CHECKING:  # seconds to import
    from transformers import PreTrainedModel

_LOGITS: Final = "the number of the model's logits"


class LabelBatch:
    """Right-padded rows on a device, and their L labels.

    There is no attention mask: a causal model's tokens do not read the padding behind them. With
    one, attention would take slower kernels, and memory for the mask.
    """

    def __init__(self, rows: Sequence[Rendering], device: torch.device) -> None:
        padded = {name: tensor.to(device) for name, tensor in pad(rows).items()}
        self.row, self.position = padded.pop("loss_mask").nonzero(as_tuple=True)  # int64 [L]
        self.label = padded["input_ids"][self.row, self.position + 1]  # int64 [L]
        self.shape = padded["input_ids"].shape
        # The arguments of the forward.
        self.arguments: dict[str, Any] = {"input_ids": padded["input_ids"], "use_cache": False}

    def at_labels(self, states: torch.Tensor) -> torch.Tensor:
        """Return the states or logits [L, *] that predict the labels, of [B, T, *]."""
        return states[self.row.to(states.device), self.position.to(states.device)]


def logits_a_sum(device: str) -> int:
    """Return how many logits of a device's type have their powers summed up at a time."""
    # A CPU's caches hold few; a GPU takes as long to launch a sum as for millions of them.
    return 1 << 20 if device == "cpu" else 1 << 26


def batch_output(model: PreTrainedModel, batch: LabelBatch) -> Any:
    """Return a model's output for a batch."""
    with without_mask_advice():
        return model(**batch.arguments)


def check_label_ids(model: PreTrainedModel, rows: Sequence[Rendering]) -> None:
    """Raise ValueError for the first row with a token without an embedding or without a logit."""
    check_ids(model, [row.input_ids for row in rows], "renderings")
    limit = logit_rows(model)
    if limit is not None:
        for index, row in enumerate(rows):
            labels = row.input_ids[1:][row.loss_mask[1:]]
            check_below(labels, limit, f"renderings[{index}]", _LOGITS)


def label_output(model: PreTrainedModel, batch: LabelBatch) -> tuple[torch.Tensor, Any]:
    """Return the logits [L, V] of the model's forward, and its output.

    The head gets the label positions only. Scaling and softcapping come after the head and act on
    single logits, so the model itself applies them. A model that does not call its head as a module
    computes its full logits.
    """
    gathered = False

    def gather(states: torch.Tensor) -> torch.Tensor:
        nonlocal gathered
        gathered = True
        return batch.at_labels(states)[None]

    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    with nullcontext() if head is None else at_head(head, batch.shape, gather):
        output = batch_output(model, batch)
    logits: torch.Tensor = output.logits
    # Not logits[0], whose backward pass makes a tensor of zeros first.
    return logits.flatten(0, 1) if gathered else batch.at_labels(logits), output


def label_losses(logits: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    """Return negative log-likelihoods [L]; ValueError for a label without a logit."""
    check_below(label.cpu().numpy(), logits.shape[-1], "renderings", _LOGITS)
    loss: Any = _TokenLoss  # apply is untyped
    losses: torch.Tensor = loss.apply(widened(logits), label.to(logits.device))
    return losses


class _TokenLoss(torch.autograd.Function):
    """Cross entropy [L] whose gradient takes the place of the logits [L, V].

    torch's own keeps three tensors of the logits' size at a time, which is most of the memory of a
    small model's pass. If an earlier step of the model keeps the logits for its own gradient, torch
    notices their change and raises.
    """

    @staticmethod
    def forward(context: Any, logits: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        size = max(1, logits_a_sum(logits.device.type) // max(1, logits.shape[-1]))
        total = torch.cat([part.logsumexp(-1) for part in torch.split(logits, size)])
        context.save_for_backward(logits, label, total)
        return total - logits.gather(-1, label[:, None])[:, 0]

    @staticmethod
    def backward(context: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        logits, label, total = context.saved_tensors
        logits.sub_(total[:, None]).exp_()
        logits[torch.arange(len(label), device=label.device), label] -= 1
        return logits.mul_(gradients[0][:, None]), None


def widened(logits: torch.Tensor) -> torch.Tensor:
    """Return logits in float32, or as they are in float64."""
    return logits if logits.dtype == torch.float64 else logits.float()


@contextmanager
def at_head(
    head: torch.nn.Module, shape: torch.Size, change: Callable[[torch.Tensor], torch.Tensor]
) -> Iterator[None]:
    """Replace the head's first input of shape [B, T, H] by the result of `change` for it."""
    done = False

    def enter(module: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        nonlocal done
        if done or not args or args[0].dim() != 3 or args[0].shape[:2] != shape:
            return None
        done = True
        return (change(args[0]), *args[1:])

    handle = head.register_forward_pre_hook(enter)
    try:
        yield
    finally:
        handle.remove()
