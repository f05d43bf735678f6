"""Gradient norms of a prompt's tokens (Eq. 2), and the likelihood of every token."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.functional import cross_entropy

import leaf_ext
from leaf_distill.data.example import Rendering
from leaf_distill.models.checks import check_below, check_ids, eval_mode
from leaf_distill.models.lm_head import logit_rows, logit_transform
from leaf_distill.models.memory import with_smaller_batches

if TYPE_CHECKING:  # seconds to import
    from transformers import PreTrainedModel

FLOAT16_LOSS_SCALE: Final = 1024.0
"""A mean loss has gradients below float16's smallest number; a power of two rounds nothing."""
_LOGITS_A_CHUNK: Final = 1 << 24


@dataclass(frozen=True, eq=False)
class Saliency:
    """The mean negative log-likelihood (nats per label) and each token's gradient norm.

    norms: float32 [T], one for every position of prompt and completion. invalid: the loss or a norm
    is NaN or infinite, so that nothing may be concluded from this row.
    """

    nll: float
    norms: npt.NDArray[np.float32]
    invalid: bool


@dataclass(frozen=True)
class _Batch:
    input_ids: torch.Tensor  # int64 [B, T], right padded
    attention_mask: torch.Tensor  # int64 [B, T]
    row: torch.Tensor  # int64 [L], the row of each predicted token
    position: torch.Tensor  # int64 [L], the position that predicts it
    label: torch.Tensor  # int64 [L]

    @property
    def forward_arguments(self) -> dict[str, Any]:
        return {
            "input_ids": self.input_ids,
            "attention_mask": self.attention_mask,
            "use_cache": False,
        }


def saliency(model: PreTrainedModel, renderings: Sequence[Rendering]) -> list[Saliency]:
    """Return each row's loss and the L2 norms of its gradient at the input embedding (Eq. 2).

    The loss is the mean negative log-likelihood of the labels, in float32; the gradient is taken at
    the output of the input embedding, with frozen weights and in eval mode, and the LM head is
    applied at label positions only. The rows are one right-padded batch of any lengths, which runs
    in halves where the memory is not enough. The model's modes and flags are put back, also after
    an error.

    Raises:
        ValueError: a row has no label after its first token, a token is outside the model's
            vocabulary, or the model has no input embedding that is called once for each token.
    """
    _check_ids(model, renderings, [row.loss_mask for row in renderings])
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
    at a time, so that the logits of a whole batch never exist at once. A batch runs in halves where
    the memory is not enough.

    Returns:
        float32 [T] for each row, in nats; 0 for the first token, which nothing precedes.

    Raises:
        ValueError: a token is outside the model's vocabulary.
    """
    _check_ids(model, renderings, [np.ones(len(row), bool) for row in renderings])
    with eval_mode(model), torch.inference_mode():
        return with_smaller_batches(renderings, partial(_token_nll, model)) if renderings else []


def _check_ids(
    model: PreTrainedModel,
    rows: Sequence[Rendering],
    predicted: Sequence[npt.NDArray[np.bool_]],
) -> None:
    """Raise ValueError for the first row with a token without an embedding or without a logit."""
    check_ids(model, [row.input_ids for row in rows], "renderings")
    limit = logit_rows(model)
    if limit is not None:
        for index, (row, mask) in enumerate(zip(rows, predicted, strict=True)):
            labels, what = row.input_ids[1:][mask[1:]], "the number of the model's logits"
            check_below(labels, limit, f"renderings[{index}]", what)


def _saliency(model: PreTrainedModel, rows: Sequence[Rendering]) -> list[Saliency]:
    embedding = model.get_input_embeddings()
    batch = _collate(rows, [row.loss_mask for row in rows], next(embedding.parameters()).device)
    counts = torch.bincount(batch.row, minlength=len(rows)).float()
    with _leaf_at(embedding) as leaves, torch.enable_grad():
        logits = _label_logits(model, batch)
        _check_leaves(model, leaves, batch.input_ids.shape)
        tokens = _losses(logits, batch.label).to(batch.row.device)
        loss = torch.zeros_like(counts).index_add(0, batch.row, tokens) / counts
        scale = FLOAT16_LOSS_SCALE if leaves[0].dtype == torch.float16 else 1.0
        (gradient,) = torch.autograd.grad(loss.sum() * scale, leaves[0])
    norms = (leaf_ext.grad_norm(gradient) / scale).float().cpu().numpy()
    return [
        _finish(nll, norms[index, : len(row)].copy())
        for index, (row, nll) in enumerate(zip(rows, loss.tolist(), strict=True))
    ]


def _finish(nll: float, norms: npt.NDArray[np.float32]) -> Saliency:
    return Saliency(nll, norms, not (math.isfinite(nll) and bool(np.isfinite(norms).all())))


def _token_nll(model: PreTrainedModel, rows: Sequence[Rendering]) -> list[npt.NDArray[np.float32]]:
    device = next(model.get_input_embeddings().parameters()).device
    batch = _collate(rows, [np.ones(len(row), bool) for row in rows], device)
    found = _losses_from_states(model, batch)
    if found is None:  # the head is not called as a module, or the config does not describe it
        parts = [_collate([row], [np.ones(len(row), bool)], device) for row in rows]
        found = torch.cat([_losses(_label_logits(model, part), part.label).cpu() for part in parts])
    values = found.float().cpu().numpy()
    ends = np.cumsum([len(row) - 1 for row in rows])[:-1]
    return [np.concatenate([np.zeros(1, np.float32), part]) for part in np.split(values, ends)]


def _losses_from_states(model: PreTrainedModel, batch: _Batch) -> torch.Tensor | None:
    """Losses [L] from the states at the head, or None where they are not those of the model."""
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    if head is None or not len(batch.label):
        return None
    states: list[torch.Tensor] = []

    def take(given: torch.Tensor) -> torch.Tensor:
        states.append(_at(given, batch))
        return states[-1][None, :1]

    with _at_head(head, batch.input_ids.shape, take):
        own = model(**batch.forward_arguments).logits
    if len(states) != 1 or own.shape[:2] != (1, 1):
        return None
    scale, softcap = logit_transform(model.config)

    def logits(part: torch.Tensor) -> torch.Tensor:
        made = head(part).float() * scale
        return made if softcap is None else torch.tanh(made / softcap) * softcap

    first, own = logits(states[0][:1]), own[0].float()
    # In float16 and bfloat16 the model rounds after each step of its transform.
    tolerance = 4 * torch.finfo(states[0].dtype).eps
    if first.shape != own.shape or not torch.allclose(
        first, own, rtol=tolerance, atol=tolerance, equal_nan=True
    ):
        return None
    size = max(1, _LOGITS_A_CHUNK // first.shape[-1])
    pieces = zip(torch.split(states[0], size), torch.split(batch.label, size), strict=True)
    return torch.cat([_losses(logits(part), label) for part, label in pieces])


def _collate(
    rows: Sequence[Rendering], wanted: Sequence[npt.NDArray[np.bool_]], device: torch.device
) -> _Batch:
    """One batch, whose labels are the wanted tokens after the first of each row."""
    lengths = np.array([len(row) for row in rows])
    width = int(lengths.max())
    # A row is padded with a token of its own: another one's embedding could be NaN, and a NaN
    # passes through attention even where its weight is 0.
    ids = np.stack([np.pad(row.input_ids, (0, width - len(row)), mode="edge") for row in rows])
    labels = np.zeros(ids.shape, bool)
    for index, mask in enumerate(wanted):
        labels[index, 1 : len(mask)] = mask[1:]
    owner, at = labels.nonzero()

    def tensor(values: npt.NDArray[Any]) -> torch.Tensor:
        return torch.as_tensor(values.astype(np.int64), device=device)

    return _Batch(
        input_ids=tensor(ids),
        attention_mask=tensor(np.arange(width) < lengths[:, None]),
        row=tensor(owner),
        position=tensor(at - 1),
        label=tensor(ids[owner, at]),
    )


def _losses(logits: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihoods [L] in float32; ValueError for a label that has no logit."""
    what = "the number of the model's logits"
    check_below(label.cpu().numpy(), logits.shape[-1], "renderings", what)
    return cross_entropy(logits.float(), label.to(logits.device), reduction="none")


def _at(states: torch.Tensor, batch: _Batch) -> torch.Tensor:
    """The states or logits [L, *] that predict the labels, of [B, T, *]."""
    return states[batch.row.to(states.device), batch.position.to(states.device)]


def _label_logits(model: PreTrainedModel, batch: _Batch) -> torch.Tensor:
    """Logits [L, V] by the model's own forward, whose head is handed the label positions only.

    Scaling and softcapping come after the head and act on single logits, so the model itself
    applies them. A model that does not call its head as a module computes its full logits.
    """
    gathered: list[torch.Tensor] = []

    def gather(states: torch.Tensor) -> torch.Tensor:
        gathered.append(_at(states, batch))
        return gathered[-1][None]

    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    with ExitStack() as stack:
        if head is not None:
            stack.enter_context(_at_head(head, batch.input_ids.shape, gather))
        logits: torch.Tensor = model(**batch.forward_arguments).logits
    return logits[0] if gathered else _at(logits, batch)


@contextmanager
def _at_head(
    head: torch.nn.Module, shape: torch.Size, change: Callable[[torch.Tensor], torch.Tensor]
) -> Iterator[None]:
    """Replace the head's first input of shape [B, T, H] by what `change` returns for it."""
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
def _leaf_at(embedding: torch.nn.Module) -> Iterator[list[torch.Tensor]]:
    """Make the module's output the leaf of the graph, and collect it."""
    leaves: list[torch.Tensor] = []

    def cut(module: torch.nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        leaves.append(output.detach().requires_grad_(True))
        return leaves[-1].clone()  # a leaf must not change, and some models scale it in place

    handle = embedding.register_forward_hook(cut)
    try:
        yield leaves
    finally:
        handle.remove()


def _check_leaves(
    model: PreTrainedModel, leaves: Sequence[torch.Tensor], shape: torch.Size
) -> None:
    shapes = [tuple(leaf.shape[:2]) for leaf in leaves]
    if shapes != [tuple(shape)]:
        raise ValueError(
            "model: must call its input embedding once, with one vector for each of "
            f"{tuple(shape)} tokens, got {type(model).__name__}, which calls it for {shapes}; "
            "choose another architecture"
        )


@contextmanager
def _frozen(model: torch.nn.Module) -> Iterator[None]:
    """Eval mode and no gradient for any weight; both are put back as they were."""
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    with eval_mode(model):
        try:
            for weight in trained:
                weight.requires_grad_(False)
            yield
        finally:
            for weight in trained:
                weight.requires_grad_(True)
