"""From examples to padded batches: each is rendered once for the student, once for the teacher."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from leaf_distill.data.dataset import load_examples
from leaf_distill.data.example import Example, Rendering, Role, UnusableRow, remaining
from leaf_distill.data.prompt import Renderer

logger = logging.getLogger(__name__)

Batch = dict[str, Tensor]
PREFIXES: Mapping[Role, str] = {"student": "", "teacher": "teacher_"}
"""How the keys of a batch begin that hold a model's tensors."""

FILLER = -1
"""Index of a row without labels, for a rank that has nothing left in the last step of an epoch."""

# Any id serves as padding: no label position attends to it. Every embedding has this one, which is
# not true of a tokenizer's pad token.
_PADDING_ID = 0


def render_examples(
    examples: Sequence[Example],
    renderers: Mapping[Role, Renderer],
    *,
    max_length: int,
    embedding_rows: Mapping[Role, int],
) -> None:
    """Fill in `renderings` of both models; a row that cannot be trained on leaves, with a reason.

    Args:
        examples: those that have left already are passed over.
        renderers: one for each model; equal ones render once.
        max_length: tokens of prompt and completion that both models take; nothing is cut off.
        embedding_rows: for each model, how many token ids its embedding has.
    """
    roles: Iterable[Role] = PREFIXES
    if renderers["student"].fingerprint == renderers["teacher"].fingerprint:
        roles = ("student",)
    for example in remaining(list(examples)):
        try:
            for role in roles:
                example.renderings[role] = renderers[role].render(example)
            example.renderings.setdefault("teacher", example.renderings["student"])
            _check_length(example, max_length)
            _check_ids(example, renderers, embedding_rows)
            _check_labels(example, renderers)
        except UnusableRow as problem:
            example.renderings.clear()
            example.leave("distill", problem.reason, problem.detail)


def _check_length(example: Example, max_length: int) -> None:
    longest = max(map(len, example.renderings.values()))
    if longest > max_length:
        raise UnusableRow("too_long", f"must have at most {max_length} tokens, got {longest}")


def _check_ids(
    example: Example, renderers: Mapping[Role, Renderer], embedding_rows: Mapping[Role, int]
) -> None:
    for role, rendering in example.renderings.items():
        largest = int(rendering.input_ids.max())
        if largest >= embedding_rows[role]:
            raise UnusableRow(
                "outside_vocabulary",
                f"token {_token(renderers[role], largest)} is beyond the {embedding_rows[role]} "
                f"embeddings of the {role}",
            )


def _check_labels(example: Example, renderers: Mapping[Role, Renderer]) -> None:
    """The KL compares distributions token by token, so both models need the very same labels."""
    student, teacher = (
        one.input_ids[one.loss_mask]
        for one in (example.renderings["student"], example.renderings["teacher"])
    )
    if np.array_equal(student, teacher):
        return
    common = min(len(student), len(teacher))
    differs = (student[:common] != teacher[:common]).nonzero()[0]
    first = int(differs[0]) if len(differs) else common
    ours, theirs = (
        _token(renderer, int(labels[first])) if first < len(labels) else "none"
        for renderer, labels in (
            (renderers["student"], student),
            (renderers["teacher"], teacher),
        )
    )
    raise UnusableRow(
        "different_labels",
        f"label {first} must be one token for both models, got {theirs} for the teacher and {ours} "
        "for the student; use one tokenizer and chat template, or chat_template none",
    )


def _token(renderer: Renderer, index: int) -> str:
    return f"{renderer.tokenizer.convert_ids_to_tokens(index)!r} (id {index})"


def count_notes(examples: Iterable[Example]) -> dict[str, int]:
    """How many examples were altered in each way when they were read and rendered."""
    return dict(Counter(note for one in examples for note in set(one.notes)))


def count_reasons(examples: Iterable[Example]) -> dict[str, int]:
    """How many examples left for each reason."""
    return dict(Counter(one.outcome.reason for one in examples if one.outcome is not None))


class ExampleDataset(Dataset[Example]):
    """Rendered examples by index; `FILLER` is the shortest one with its labels taken away."""

    def __init__(self, examples: Sequence[Example]) -> None:
        self.examples = list(examples)
        self.shortest = min(self.examples, key=lambda one: len(one.renderings["student"]))
        self._filler = replace(
            self.shortest,
            candidate_id=-1,
            renderings={
                role: _without_labels(one) for role, one in self.shortest.renderings.items()
            },
        )

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Example:
        return self._filler if index == FILLER else self.examples[index]

    @property
    def originals(self) -> list[int]:
        """The indices of the originals."""
        return [i for i, one in enumerate(self.examples) if one.branch == "original"]

    @property
    def counterfactuals(self) -> list[int]:
        """The indices of the counterfactuals."""
        return [i for i, one in enumerate(self.examples) if one.branch == "counterfactual"]

    @property
    def label_tokens(self) -> int:
        """Label tokens of all examples together."""
        return sum(int(one.renderings["student"].loss_mask.sum()) for one in self.examples)


def prepare_dataset(
    rows: Any,
    renderers: Mapping[Role, Renderer],
    *,
    max_length: int,
    embedding_rows: Mapping[Role, int],
    name: str,
) -> tuple[ExampleDataset, list[Example]]:
    """Read and render a dataset: the examples to train on, and those that left.

    Args:
        rows: what `load_examples` takes, or a list of Examples.
        renderers, max_length, embedding_rows: as for `render_examples`.
        name: how messages call the dataset.

    Raises:
        ValueError: the rows cannot be read, or none is left.
    """
    given = isinstance(rows, list) and all(isinstance(row, Example) for row in rows)
    examples: list[Example] = rows if given else load_examples(rows)
    render_examples(examples, renderers, max_length=max_length, embedding_rows=embedding_rows)
    kept = list(remaining(examples))
    left = [one for one in examples if one.outcome is not None]
    reasons = _listed(count_reasons(left))
    if not kept:
        outcome = left[0].outcome if left else None
        first = f" (row {left[0].row_id}: {outcome.detail})" if outcome else ""
        raise ValueError(f"{name}: must have a row to train on, got {reasons or 'none'}{first}")
    if left:
        logger.warning("%s: %d of %d rows left out: %s", name, len(left), len(examples), reasons)
    if notes := count_notes(kept):
        logger.warning("%s: rows altered: %s", name, _listed(notes))
    return ExampleDataset(kept), left


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items())


def _without_labels(rendering: Rendering) -> Rendering:
    return replace(rendering, loss_mask=np.zeros_like(rendering.loss_mask))


def collate(examples: Sequence[Example]) -> Batch:
    """Pad rendered examples on the right.

    Returns:
        `input_ids`, `attention_mask` int64 [B, T] and `loss_mask` bool [B, T] for the student, the
        same with the prefix `teacher_` for the teacher (its own T), `counterfactual` bool [B] and
        `row_id` int64 [B]. `loss_mask` is True where the NEXT token is a label: at the position
        whose hidden state predicts it. Row by row, both masks mark the same labels in order.
    """
    batch: Batch = {}
    for role, prefix in PREFIXES.items():
        batch |= _pad([one.renderings[role] for one in examples], prefix)
    batch["counterfactual"] = torch.tensor([one.branch == "counterfactual" for one in examples])
    batch["row_id"] = torch.tensor([one.row_id for one in examples])
    return batch


def _pad(rows: Sequence[Rendering], prefix: str) -> Batch:
    shape = (len(rows), max(map(len, rows)))
    input_ids = torch.full(shape, _PADDING_ID)
    attention_mask = torch.zeros(shape, dtype=torch.int64)
    loss_mask = torch.zeros(shape, dtype=torch.bool)
    for i, row in enumerate(rows):
        input_ids[i, : len(row)] = torch.from_numpy(row.input_ids)
        attention_mask[i, : len(row)] = 1
        loss_mask[i, : len(row) - 1] = torch.from_numpy(row.loss_mask[1:])
    return {
        f"{prefix}input_ids": input_ids,
        f"{prefix}attention_mask": attention_mask,
        f"{prefix}loss_mask": loss_mask,
    }


def split_batch(batch: Batch, max_tokens: int, *, at_least: int = 1) -> list[Batch]:
    """Cut a batch into forward passes of at most `max_tokens` padded tokens for either model.

    Rows of like length share a pass. A row that is longer than `max_tokens` has a pass of its own.
    Passes without labels are added up to `at_least`, for ranks that must run in step.
    """
    widths = [batch[f"{prefix}attention_mask"].sum(dim=1) for prefix in PREFIXES.values()]
    lengths: list[int] = torch.stack(widths).amax(dim=0).tolist()
    passes: list[list[int]] = []
    if len(lengths) * max(lengths) <= max_tokens:
        passes = [list(range(len(lengths)))]
    else:
        for row in sorted(range(len(lengths)), key=lengths.__getitem__):
            if passes and (len(passes[-1]) + 1) * lengths[row] <= max_tokens:
                passes[-1].append(row)
            else:
                passes.append([row])
    parts = [batch] if len(passes) == 1 else [_rows(batch, rows) for rows in passes]
    if len(parts) < at_least:
        empty = _rows(batch, passes[0][:1])
        for prefix in PREFIXES.values():
            empty[f"{prefix}loss_mask"] = torch.zeros_like(empty[f"{prefix}loss_mask"])
        # The last pass is the one that a wrapper reduces gradients after: it stays a real one.
        parts = [empty] * (at_least - len(parts)) + parts
    return parts


def _rows(batch: Batch, rows: list[int]) -> Batch:
    """Some rows of a batch, without the columns that are padding in all of them."""
    part = {name: tensor[rows] for name, tensor in batch.items()}
    for prefix in PREFIXES.values():
        width = int(part[f"{prefix}attention_mask"].any(dim=0).nonzero()[-1]) + 1
        for name in ("input_ids", "attention_mask", "loss_mask"):
            part[prefix + name] = part[prefix + name][:, :width]
    return part
