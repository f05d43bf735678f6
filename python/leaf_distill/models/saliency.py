"""Gradient norms of a prompt's tokens (Eq. 2), and the likelihood of every token."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt
import torch

import leaf_ext
from leaf_distill.data.collator import pad
from leaf_distill.data.example import Rendering
from leaf_distill.models.checks import check_below, check_ids, eval_mode
from leaf_distill.models.lm_head import finish_logits, logit_rows, logit_transform
from leaf_distill.models.memory import with_smaller_batches

if TYPE_CHECKING:  # seconds to import
    from transformers import PreTrainedModel

_LOSS_SCALE: Final = 1024.0
"""A mean loss has gradients below float16's smallest number; a power of two rounds nothing."""
_LOGITS_A_CHUNK: Final = 1 << 22
_LOGITS: Final = "the number of the model's logits"


@dataclass(frozen=True, eq=False)
class Saliency:
    """The loss of one row, and the gradient norm of each of its tokens.

    Attributes:
        nll: the mean negative log-likelihood, in nats per label.
        norms: float32 [T], one for every position of prompt and completion.
        invalid: whether the loss or a norm is NaN or infinite, so that the row means nothing.
    """

    nll: float
    norms: npt.NDArray[np.float32]
    invalid: bool


class _Batch:
    """Right-padded rows on a device, and their L labels."""

    def __init__(self, rows: Sequence[Rendering], device: torch.device) -> None:
        padded = {name: tensor.to(device) for name, tensor in pad(rows).items()}
        self.row, self.position = padded.pop("loss_mask").nonzero(as_tuple=True)  # int64 [L]
        self.label = padded["input_ids"][self.row, self.position + 1]  # int64 [L]
        self.shape = padded["input_ids"].shape
        self.arguments: dict[str, Any] = {**padded, "use_cache": False}  # of the forward

    def at_labels(self, states: torch.Tensor) -> torch.Tensor:
        """Return the states or logits [L, *] that predict the labels, of [B, T, *]."""
        return states[self.row.to(states.device), self.position.to(states.device)]


def saliency(model: PreTrainedModel, renderings: Sequence[Rendering]) -> list[Saliency]:
    """Return each row's loss and the L2 norms of its gradient at the input embedding (Eq. 2).

    The loss is the mean negative log-likelihood of the labels, in float32. The gradient is taken at
    the output of the input embedding, with frozen weights and in eval mode, and the LM head is
    applied at label positions only. The model's modes and flags are put back, also after an error.

    Args:
        model: a causal language model.
        renderings: rows of any lengths. They are one batch, which runs in halves if the memory is
            not enough.

    Returns:
        One result for each row.

    Raises:
        ValueError: a row has no label after its first token, a token is outside the model's
            vocabulary, or the model has no input embedding that is called once for each token.
    """
    _check_ids(model, renderings)
    for index, row in enumerate(renderings):
        if not row.loss_mask[1:].any():
            raise ValueError(
                f"renderings[{index}]: must have a label after its first token, got none; leave "
                "the row out"
            )
    with _frozen(model):
        return with_smaller_batches(renderings, partial(_saliency, model)) if renderings else []


def token_nll(
    model: PreTrainedModel, renderings: Sequence[Rendering]
) -> list[npt.NDArray[np.float32]]:
    """Return the negative log-likelihood of every token, given all tokens before it.

    One forward pass in eval mode, without gradients. The head is applied to a part of the positions
    at a time, so that all logits of a batch never exist at once.

    Args:
        model, renderings: as for `saliency`; every token counts as a label.

    Returns:
        float32 [T] for each row, in nats; 0 for the first token, which nothing precedes.

    Raises:
        ValueError: a token is outside the model's vocabulary.
    """
    rows = [replace(row, loss_mask=np.ones(len(row), bool)) for row in renderings]
    _check_ids(model, rows)
    with eval_mode(model), torch.inference_mode():
        return with_smaller_batches(rows, partial(_token_nll, model)) if rows else []


def _check_ids(model: PreTrainedModel, rows: Sequence[Rendering]) -> None:
    """Raise ValueError for the first row with a token without an embedding or without a logit."""
    check_ids(model, [row.input_ids for row in rows], "renderings")
    limit = logit_rows(model)
    if limit is not None:
        for index, row in enumerate(rows):
            labels = row.input_ids[1:][row.loss_mask[1:]]
            check_below(labels, limit, f"renderings[{index}]", _LOGITS)


def _saliency(model: PreTrainedModel, rows: Sequence[Rendering]) -> list[Saliency]:
    embedding = model.get_input_embeddings()
    batch = _Batch(rows, next(embedding.parameters()).device)
    counts = torch.bincount(batch.row, minlength=len(rows)).float()
    with leaf_ext.capture_embedding_grad(embedding) as captured, torch.enable_grad():
        losses = _losses(_label_logits(model, batch), batch.label).to(batch.row.device)
        loss = torch.zeros_like(counts).index_add(0, batch.row, losses) / counts
        scaled = loss.sum() * _LOSS_SCALE
    try:
        gradient = captured.grad(scaled)
        if gradient.shape[:2] != batch.shape:
            raise ValueError(f"a gradient of the shape {tuple(gradient.shape)}")
    except ValueError as error:
        raise ValueError(
            "model: must call its input embedding once, with one vector for each of "
            f"{tuple(batch.shape)} tokens, got {type(model).__name__} ({error}); choose another "
            "architecture"
        ) from error
    norms = (leaf_ext.grad_norm(gradient) / _LOSS_SCALE).float().cpu().numpy()
    results = []
    for nll, row, padded in zip(loss.tolist(), rows, norms, strict=True):
        kept = padded[: len(row)].copy()
        results.append(Saliency(nll, kept, not (math.isfinite(nll) and np.isfinite(kept).all())))
    return results


def _token_nll(model: PreTrainedModel, rows: Sequence[Rendering]) -> list[npt.NDArray[np.float32]]:
    device = next(model.get_input_embeddings().parameters()).device
    losses = _losses_from_states(model, _Batch(rows, device))
    if losses is None:  # the head is not called as a module, or the config does not describe it
        parts = [_Batch([row], device) for row in rows]
        losses = torch.cat([_losses(_label_logits(model, one), one.label).cpu() for one in parts])
    values = losses.float().cpu().numpy()
    ends = np.cumsum([len(row) - 1 for row in rows])[:-1]
    return [np.concatenate([np.zeros(1, np.float32), part]) for part in np.split(values, ends)]


def _losses_from_states(model: PreTrainedModel, batch: _Batch) -> torch.Tensor | None:
    """Return the losses [L] from the head's input, None where it does not give the model's."""
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    if head is None or not len(batch.label):
        return None
    captured: list[torch.Tensor] = []

    def take(states: torch.Tensor) -> torch.Tensor:
        captured.append(batch.at_labels(states))
        return captured[0][None, :1]

    def logits(states: torch.Tensor) -> torch.Tensor:
        return finish_logits(head(states).float(), *logit_transform(model.config))

    with _at_head(head, batch.shape, take):
        expected = model(**batch.arguments).logits
    if not captured or expected.shape[:2] != (1, 1):
        return None
    (states,) = captured
    first, expected = logits(states[:1]), expected[0].float()
    # In float16 and bfloat16 the model rounds after each step of its transform.
    tolerance = 4 * torch.finfo(states.dtype).eps
    if first.shape != expected.shape or not torch.allclose(
        first, expected, rtol=tolerance, atol=tolerance, equal_nan=True
    ):
        return None
    size = max(1, _LOGITS_A_CHUNK // first.shape[-1])
    chunks = zip(torch.split(states, size), torch.split(batch.label, size), strict=True)
    return torch.cat([_losses(logits(chunk), label) for chunk, label in chunks])


def _label_logits(model: PreTrainedModel, batch: _Batch) -> torch.Tensor:
    """Return the logits [L, V] of the model's forward, whose head gets the label positions only.

    Scaling and softcapping come after the head and act on single logits, so the model itself
    applies them. A model that does not call its head as a module computes its full logits.
    """
    gathered = False

    def gather(states: torch.Tensor) -> torch.Tensor:
        nonlocal gathered
        gathered = True
        return batch.at_labels(states)[None]

    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    with nullcontext() if head is None else _at_head(head, batch.shape, gather):
        logits: torch.Tensor = model(**batch.arguments).logits
    return logits[0] if gathered else batch.at_labels(logits)


def _losses(logits: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    """Return negative log-likelihoods [L] in float32; ValueError for a label without a logit."""
    check_below(label.cpu().numpy(), logits.shape[-1], "renderings", _LOGITS)
    loss: Any = _TokenLoss  # apply is untyped
    losses: torch.Tensor = loss.apply(logits.float(), label.to(logits.device))
    return losses


class _TokenLoss(torch.autograd.Function):
    """Cross entropy [L] whose gradient takes the place of the logits [L, V].

    torch's own keeps three tensors of the logits' size at a time, which is most of the memory of a
    small model's pass. If an earlier step of the model keeps the logits for its own gradient, torch
    notices their change and raises.
    """

    @staticmethod
    def forward(context: Any, logits: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        size = max(1, _LOGITS_A_CHUNK // max(1, logits.shape[-1]))
        total = torch.cat([part.logsumexp(-1) for part in torch.split(logits, size)])
        context.save_for_backward(logits, label, total)
        return total - logits.gather(-1, label[:, None])[:, 0]

    @staticmethod
    def backward(context: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        logits, label, total = context.saved_tensors
        logits.sub_(total[:, None]).exp_()
        logits[torch.arange(len(label), device=label.device), label] -= 1
        return logits.mul_(gradients[0][:, None]), None


@contextmanager
def _at_head(
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


@contextmanager
def _frozen(model: torch.nn.Module) -> Iterator[None]:
    """Use eval mode and no gradient for any weight; both are put back as they were."""
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    with eval_mode(model):
        try:
            for weight in trained:
                weight.requires_grad_(False)
            yield
        finally:
            for weight in trained:
                weight.requires_grad_(True)
