"""How a model's answer moves when its prompt changes: its divergence, or the loss of a label.

The changed prompts of a row have their beginning in common with the original prompt. Its keys and
values are computed once, with the original, and are reused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Final

import numpy as np
import torch

import leaf_ext
from leaf_distill.data.example import Floats, Ids, Rendering
from leaf_distill.models.checks import eval_mode
from leaf_distill.models.label_logits import check_label_ids
from leaf_distill.models.memory import CPU_BATCH_TOKENS, with_smaller_batches
from leaf_distill.models.prefix import Prefix, can_reuse, common_length, run_behind, run_row

if TYPE_CHECKING:  # seconds to import
    from transformers import PreTrainedModel

Value = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""A number made of a row's logits [L, V] behind the changed prompt and behind the original one."""

_WASTE: Final = 0.25
"""A prompt joins a batch of an earlier change if this share more of it is computed at most."""


def answer_kl(
    model: PreTrainedModel,
    rendering: Rendering,
    changed: Sequence[Ids],
    *,
    max_tokens: int = CPU_BATCH_TOKENS,
) -> Floats:
    """Return how far each change of the prompt moves the model's answer.

    The answer is the completion's tokens, which the model is given. At each of them the model's
    distribution of the next token is p behind the original prompt and q behind the changed one; the
    value is the mean over the labels of

        KL(p, q) = sum_v p_v (log p_v - log q_v)

    in nats, over the whole vocabulary. The original comes first, because the question is what the
    answer loses: the value is high where the change takes mass from tokens that the model expects,
    and hardly rises where it adds mass to unlikely ones.

    Args:
        model: a causal language model. Its modes are put back, also after an error.
        rendering: a prompt and its completion.
        changed: the token ids of each changed prompt, of any lengths of at least 1.
        max_tokens: most tokens of a batch, padding included, beside those that are reused; a batch
            for which the memory is not enough runs in halves.

    Returns:
        float32 [n]; 0 for a prompt that is the original.

    Raises:
        ValueError: the rendering has no prompt or no label, a changed prompt is empty, or a token
            is outside the model's vocabulary.
    """
    prompt = rendering.input_ids[~rendering.loss_mask]
    # An equal prompt is not computed: rounding in another batch would make it more than 0.
    moved = [at for at, ids in enumerate(changed) if not np.array_equal(ids, prompt)]
    result = np.zeros(len(changed), dtype=np.float32)
    result[moved] = _measure(model, rendering, [changed[at] for at in moved], max_tokens, _kl)
    return result


def answer_nll(
    model: PreTrainedModel,
    rendering: Rendering,
    changed: Sequence[Ids],
    *,
    max_tokens: int = CPU_BATCH_TOKENS,
) -> Floats:
    """Return the loss of the completion behind each changed prompt.

    It is the mean negative log-likelihood of the completion's tokens, in nats a label, as
    `completion_nll` computes it for whole rows.

    Args and errors are those of `answer_kl`.

    Returns:
        float32 [n].
    """
    labels = torch.from_numpy(rendering.input_ids[rendering.loss_mask]).long()

    def loss(logits: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(logits.float(), labels.to(logits.device))

    return _measure(model, rendering, changed, max_tokens, loss)


def _measure(
    model: PreTrainedModel,
    rendering: Rendering,
    changed: Sequence[Ids],
    max_tokens: int,
    value: Value,
) -> Floats:
    """Return a value of the answer behind each changed prompt, and check the arguments."""
    if max_tokens < 1:
        raise ValueError(f"max_tokens: must be at least 1, got {max_tokens}")
    rows = [behind(ids, rendering) for ids in changed]
    _check(model, rendering, rows)
    prompt = rendering.input_ids[~rendering.loss_mask]
    result = np.zeros(len(changed), dtype=np.float32)
    if not rows:
        return result
    with eval_mode(model), torch.inference_mode():
        keep = can_reuse(model)
        ((original, prefix),) = with_smaller_batches(
            [rendering], lambda rows: [run_row(model, rows[0], keep=keep)]
        )
        # The last token of a prompt is computed in any case: its state predicts the first label.
        starts = [min(common_length(prompt, ids), len(ids) - 1) if prefix else 0 for ids in changed]
        plan = _plan([(starts[at], len(row), at) for at, row in enumerate(rows)], max_tokens)
        for batch in plan:
            part = [(rows[at], starts[at]) for at in batch]
            result[batch] = with_smaller_batches(
                part, partial(_values, model, original, prefix, value)
            )
    return result


def behind(prompt: Ids, rendering: Rendering) -> Rendering:
    """Return another prompt with the labels of a rendering behind it; without offsets."""
    labels = rendering.input_ids[rendering.loss_mask]
    mask = np.arange(len(prompt) + len(labels)) >= len(prompt)
    ids = np.concatenate([np.asarray(prompt, dtype=np.int32), labels])
    return Rendering(ids, mask, np.full((len(ids), 2), -1, np.int32), np.zeros(len(ids), np.bool_))


def _check(model: PreTrainedModel, rendering: Rendering, rows: Sequence[Rendering]) -> None:
    if not rendering.loss_mask.any() or rendering.loss_mask[0]:
        raise ValueError(
            f"rendering: must have a prompt and a label behind it, got "
            f"{int(rendering.loss_mask.sum())} labels in {len(rendering)} tokens; leave the row out"
        )
    for index, row in enumerate(rows):
        if row.loss_mask[0]:
            raise ValueError(
                f"changed[{index}]: must have at least 1 token, got none; leave it out"
            )
    check_label_ids(model, [rendering, *rows])


def _plan(rows: Sequence[tuple[int, int, int]], max_tokens: int) -> list[list[int]]:
    """Group changed prompts whose first change is at about the same place.

    A batch reuses what all of its rows have in common, so the row with the earliest change decides
    how much of the others is computed again.

    Args:
        rows: tokens in common, length, and position of each.
        max_tokens: most tokens of a batch that are computed.
    """
    batches: list[list[int]] = []
    first = width = 0
    for common, length, at in sorted(rows):
        needed = max(width, length - first)
        near = common - first <= _WASTE * (length - common)
        if batches and near and (len(batches[-1]) + 1) * needed <= max_tokens:
            batches[-1].append(at)
            width = needed
        else:
            batches.append([at])
            first, width = common, length - common
    return batches


def _values(
    model: PreTrainedModel,
    original: torch.Tensor,
    prefix: Prefix | None,
    value: Value,
    changed: Sequence[tuple[Rendering, int]],
) -> list[float]:
    """Return the value of each row of one batch, of rows and their tokens in common."""
    start = min(common for _, common in changed)
    logits = run_behind(model, [row for row, _ in changed], prefix, start)
    found = [
        value(one, original.to(logits.device)) for one in logits.view(len(changed), *original.shape)
    ]
    values: list[float] = torch.stack(found).tolist()
    return values


def _kl(logits: torch.Tensor, original: torch.Tensor) -> torch.Tensor:
    """Return the mean divergence of a row's logits [L, V] from the original ones."""
    weight = torch.ones(len(original), device=logits.device)
    _, rows = leaf_ext.dual_kl(_narrow(logits), _narrow(original), weight, return_rows=True)
    return rows.kl.mean()


def _narrow(logits: torch.Tensor) -> torch.Tensor:
    """Return logits in float32 if they are float64, in which the op has no kernel."""
    return logits.float() if logits.dtype == torch.float64 else logits
