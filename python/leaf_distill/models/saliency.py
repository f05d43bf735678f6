"""How strongly a model's loss reacts to each token of a prompt (Eq. 2)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import PreTrainedModel

import leaf_ext
from leaf_distill.data.prompt import Rendering

FLOAT16_LOSS_SCALE = 1024.0
"""A mean loss has gradients below float16's smallest number; a power of two rounds nothing."""


@dataclass(frozen=True)
class SaliencyRow:
    """The mean negative log-likelihood (nats per label) and each token's gradient norm.

    norms: float32 [n], one for every position of prompt and completion. invalid: the loss or a norm
    is NaN or infinite, so that nothing may be concluded from this row.
    """

    nll: float
    norms: npt.NDArray[np.float32]
    invalid: bool


@dataclass(frozen=True)
class _Batch:
    input_ids: torch.Tensor  # int64 [B, T], right padded
    attention_mask: torch.Tensor  # int64 [B, T]
    row: torch.Tensor  # int64 [L], the row of each label
    position: torch.Tensor  # int64 [L], the position that predicts it
    label: torch.Tensor  # int64 [L]
    per_row: torch.Tensor  # float32 [B], labels of each row


def saliency(model: PreTrainedModel, rows: Sequence[Rendering]) -> list[SaliencyRow]:
    """Return each row's loss and the L2 norms of its gradient at the input embedding (Eq. 2).

    The loss is the mean negative log-likelihood of the labels, in float32; the gradient is taken at
    the output of the input embedding, with frozen weights and in eval mode, and the LM head is
    applied at label positions only. One batch of any lengths; the model's modes and flags are put
    back, also after an error. ValueError for a row that has no label after its first token.
    """
    if not rows:
        return []
    embedding = model.get_input_embeddings()
    batch = _collate(rows, next(embedding.parameters()).device)
    with _frozen(model), _leaf_at(embedding) as leaves, torch.enable_grad():
        logits = _label_logits(model, batch)
        if len(leaves) != 1:
            raise RuntimeError(
                f"{type(model).__name__} called its input embedding {len(leaves)} times in one "
                "forward pass; saliency needs exactly one call"
            )
        tokens = torch.nn.functional.cross_entropy(
            logits.float(), batch.label.to(logits.device), reduction="none"
        ).to(batch.row.device)
        loss = torch.zeros_like(batch.per_row).index_add(0, batch.row, tokens) / batch.per_row
        scale = FLOAT16_LOSS_SCALE if leaves[0].dtype == torch.float16 else 1.0
        (gradient,) = torch.autograd.grad(loss.sum() * scale, leaves[0])
    norms = (leaf_ext.grad_norm(gradient) / scale).float().cpu().numpy()
    return [
        _finish(nll, norms[index, : len(row.input_ids)].copy())
        for index, (row, nll) in enumerate(zip(rows, loss.tolist(), strict=True))
    ]


def _finish(nll: float, norms: npt.NDArray[np.float32]) -> SaliencyRow:
    return SaliencyRow(nll, norms, not (math.isfinite(nll) and bool(np.isfinite(norms).all())))


def _collate(rows: Sequence[Rendering], device: torch.device) -> _Batch:
    length = max(len(row.input_ids) for row in rows)
    ids, mask, labels = [], [], []
    for index, row in enumerate(rows):
        found = [at for at, is_label in enumerate(row.label_mask) if is_label and at > 0]
        if not found:
            raise ValueError(f"rows[{index}]: needs a label after its first token, has none")
        padding = length - len(row.input_ids)
        # A row is padded with a token of its own: another one's embedding could be NaN, and a NaN
        # passes through attention even where its weight is 0.
        ids.append([*row.input_ids, *[row.input_ids[-1]] * padding])
        mask.append([1] * len(row.input_ids) + [0] * padding)
        labels += [(index, at - 1, row.input_ids[at]) for at in found]
    owner, position, label = torch.tensor(labels, device=device).unbind(1)
    return _Batch(
        torch.tensor(ids, device=device),
        torch.tensor(mask, device=device),
        owner,
        position,
        label,
        per_row=torch.bincount(owner, minlength=len(rows)).float(),
    )


def _label_logits(model: PreTrainedModel, batch: _Batch) -> torch.Tensor:
    """Logits [L, V] by the model's own forward, whose head is handed the label positions only.

    Scaling and softcapping come after the head and act on single logits, so they stay the model's
    own business. A model that does not call its head as a module gets its full logits computed.
    """

    def gather(states: torch.Tensor) -> torch.Tensor:
        return states[batch.row.to(states.device), batch.position.to(states.device)]

    shape = batch.input_ids.shape
    gathered = False

    def pick(module: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        nonlocal gathered
        if gathered or not args or args[0].shape[:2] != shape:
            return None
        gathered = True
        return (gather(args[0])[None], *args[1:])

    with ExitStack() as stack:
        head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
        if head is not None:
            stack.callback(head.register_forward_pre_hook(pick).remove)
        logits: torch.Tensor = model(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False
        ).logits
    return logits[0] if gathered else gather(logits)


@contextmanager
def _leaf_at(embedding: torch.nn.Module) -> Iterator[list[torch.Tensor]]:
    """Make the module's output the leaf of the graph, and collect it."""
    leaves: list[torch.Tensor] = []

    def cut(module: torch.nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        leaves.append(output.detach().requires_grad_(True))
        return leaves[-1]

    handle = embedding.register_forward_hook(cut)
    try:
        yield leaves
    finally:
        handle.remove()


@contextmanager
def _frozen(model: torch.nn.Module) -> Iterator[None]:
    """Eval mode and no gradient for any weight; both are put back as they were."""
    modes = [(module, module.training) for module in model.modules()]
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    try:
        model.eval()
        for weight in trained:
            weight.requires_grad_(False)
        yield
    finally:
        for weight in trained:
            weight.requires_grad_(True)
        for module, training in modes:
            module.training = training
