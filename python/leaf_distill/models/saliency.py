"""Gradient norms of a prompt's tokens (Eq. 2), and the likelihood of every token."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt
import torch

import leaf_ext
from leaf_distill.data.example import Rendering
from leaf_distill.models.checks import eval_mode, input_device
from leaf_distill.models.label_logits import (
    LabelBatch,
    at_head,
    batch_output,
    check_label_ids,
    label_losses,
    label_output,
    widened,
)
from leaf_distill.models.lm_head import finish_logits, logit_transform
from leaf_distill.models.memory import with_smaller_batches
from leaf_distill.models.quantization import check_differentiable, light_backward
from leaf_distill.models.recompute import LeanProducts

if TYPE_CHECKING:  # seconds to import
    from transformers import PreTrainedModel

_LOSS_SCALE: Final = 1024.0
"""A mean loss has gradients below float16's smallest number; a power of two rounds nothing."""
_LOGITS_A_PRODUCT: Final = 1 << 24
"""Each product with the head reads all of its weights: with fewer logits it is slower."""


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


def saliency(model: PreTrainedModel, renderings: Sequence[Rendering]) -> list[Saliency]:
    """Return each row's loss and the L2 norms of its gradient at the input embedding (Eq. 2).

    The loss is the mean negative log-likelihood of the labels, in float32 (a float64 model's in
    float64; its norms are rounded at the end). The gradient is taken at the output of the input
    embedding, with frozen weights and in eval mode, and the LM head is applied at label positions
    only. The model's modes and flags are put back, also after an error.

    Args:
        model: a causal language model.
        renderings: rows of any lengths. They are one batch, which runs in halves if the memory is
            not enough.

    Returns:
        One result for each row.

    Raises:
        ValueError: a row has no label after its first token, a token is outside the model's
            vocabulary, or the model has no input embedding that is called once for each token, or
            no gradient in eval mode.
    """
    _check_labels(model, renderings)
    check_differentiable(model)
    with _frozen(model):
        try:
            return with_smaller_batches(renderings, partial(_saliency, model)) if renderings else []
        except AssertionError as error:  # so a reversible architecture says that it must train
            raise ValueError(
                "model: must be differentiable in eval mode, got "
                f"{type(model).__name__} ({error!s:.200}); choose another architecture"
            ) from error


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
    check_label_ids(model, rows)
    with eval_mode(model), torch.inference_mode():
        return with_smaller_batches(rows, partial(_token_nll, model)) if rows else []


def completion_nll(model: PreTrainedModel, renderings: Sequence[Rendering]) -> list[float]:
    """Return the mean negative log-likelihood of each row's labels, in nats per label.

    It is the loss of `saliency`, from a forward pass alone.

    Args:
        model, renderings: as for `saliency`.

    Raises:
        ValueError: a row has no label after its first token, or a token is outside the model's
            vocabulary.
    """
    _check_labels(model, renderings)
    with eval_mode(model), torch.inference_mode():
        run = partial(_completion_nll, model)
        return with_smaller_batches(renderings, run) if renderings else []


def _check_labels(model: PreTrainedModel, rows: Sequence[Rendering]) -> None:
    check_label_ids(model, rows)
    for index, row in enumerate(rows):
        if not row.loss_mask[1:].any():
            raise ValueError(
                f"renderings[{index}]: must have a label after its first token, got none; leave "
                "the row out"
            )


def _saliency(model: PreTrainedModel, rows: Sequence[Rendering]) -> list[Saliency]:
    on_host = input_device(model).type == "cpu"
    with leaf_ext.use_cpu_memory_pool() if on_host else nullcontext():
        return _gradient_norms(model, rows)


def _gradient_norms(model: PreTrainedModel, rows: Sequence[Rendering]) -> list[Saliency]:
    embedding = model.get_input_embeddings()
    batch = LabelBatch(rows, input_device(model))
    capture = leaf_ext.capture_embedding_grad(embedding)
    fetching, light = _fetched_twice(model), light_backward(model)
    with capture as captured, torch.enable_grad(), fetching, light, LeanProducts():
        loss = _mean_losses(model, batch, len(rows))
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


def _completion_nll(model: PreTrainedModel, rows: Sequence[Rendering]) -> list[float]:
    losses: list[float] = _mean_losses(
        model, LabelBatch(rows, input_device(model)), len(rows)
    ).tolist()
    return losses


def _mean_losses(model: PreTrainedModel, batch: LabelBatch, rows: int) -> torch.Tensor:
    """Return the mean loss of each row [B]."""
    losses = label_losses(label_output(model, batch)[0], batch.label).to(batch.row.device)
    counts = torch.bincount(batch.row, minlength=rows).to(losses.dtype)
    return torch.zeros_like(counts).index_add(0, batch.row, losses) / counts


def _token_nll(model: PreTrainedModel, rows: Sequence[Rendering]) -> list[npt.NDArray[np.float32]]:
    device = input_device(model)
    losses = _losses_from_states(model, LabelBatch(rows, device))
    if losses is None:  # the head is not called as a module, or the config does not describe it
        parts = [LabelBatch([row], device) for row in rows]
        losses = torch.cat(
            [label_losses(label_output(model, one)[0], one.label).cpu() for one in parts]
        )
    values = losses.float().cpu().numpy()
    ends = np.cumsum([len(row) - 1 for row in rows])[:-1]
    return [np.concatenate([np.zeros(1, np.float32), part]) for part in np.split(values, ends)]


def _losses_from_states(model: PreTrainedModel, batch: LabelBatch) -> torch.Tensor | None:
    """Return the losses [L] from the head's input, None where it does not give the model's."""
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    if head is None or not len(batch.label):
        return None
    captured: list[torch.Tensor] = []

    def take(states: torch.Tensor) -> torch.Tensor:
        captured.append(batch.at_labels(states))
        return captured[0][None, :1]

    def logits(states: torch.Tensor) -> torch.Tensor:
        return finish_logits(widened(head(states)), *logit_transform(model.config))

    with at_head(head, batch.shape, take):
        expected = batch_output(model, batch).logits
    if not captured or expected.shape[:2] != (1, 1):
        return None
    (states,) = captured
    first = logits(states[:1])
    expected = widened(expected[0]).to(first.device)  # several devices give it to the first
    # In float16 and bfloat16 the model rounds after each step of its transform.
    tolerance = 4 * torch.finfo(states.dtype).eps
    if first.shape != expected.shape or not torch.allclose(
        first, expected, rtol=tolerance, atol=tolerance, equal_nan=True
    ):
        return None
    size = max(1, _LOGITS_A_PRODUCT // first.shape[-1])
    chunks = zip(torch.split(states, size), torch.split(batch.label, size), strict=True)
    return torch.cat([label_losses(logits(chunk), label) for chunk, label in chunks])


def _fetched_twice(model: PreTrainedModel) -> AbstractContextManager[Any]:
    """Keep nothing on the GPU for the backward pass, if not all of the weights fit there.

    Else each weight that the forward pass fetches would stay until the backward pass needs it.
    """
    places = {str(place) for place in getattr(model, "hf_device_map", {}).values()}
    offloaded = len(places) > 1 and bool(places & {"cpu", "disk"})
    return torch.autograd.graph.save_on_cpu() if offloaded else nullcontext()


@contextmanager
def _frozen(model: torch.nn.Module) -> Iterator[None]:
    """Use eval mode and no gradient for any weight; both are put back as they were."""
    # An offloaded weight, which is replaced with each pass, is left as it is.
    stored = (weight for weight in model.parameters() if weight.device.type != "meta")
    trained = [weight for weight in stored if weight.requires_grad]
    with eval_mode(model):
        try:
            for weight in trained:
                weight.requires_grad_(False)
            yield
        finally:
            for weight in trained:
                weight.requires_grad_(True)
