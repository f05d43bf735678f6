"""Renders examples for both models, and makes padded batches and forward passes of them."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import zip_longest
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
"""The prefixes of the keys of a batch that hold a model's tensors."""

FILLER = -1
"""Index of a row without labels, for a rank that has nothing left in the last step of an epoch."""


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
        renderers: one for each model; equal ones render the same prompt once.
        max_length: tokens of prompt and completion that both models take; nothing is cut off.
        embedding_rows: the number of token ids in each model's embedding.
    """
    alike = renderers["student"].fingerprint == renderers["teacher"].fingerprint
    for example in remaining(list(examples)):
        once = alike and example.teacher_messages is None
        roles: Iterable[Role] = ("student",) if once else PREFIXES
        try:
            for role in roles:
                example.renderings[role] = renderers[role].render(example.as_read_by(role))
            if once:
                example.renderings["teacher"] = example.renderings["student"]
            _check_tokens(example, renderers, max_length, embedding_rows)
            _check_labels(example, renderers)
        except UnusableRow as problem:
            example.renderings.clear()
            example.leave("distill", problem.reason, problem.detail)


def _check_tokens(
    example: Example,
    renderers: Mapping[Role, Renderer],
    max_length: int,
    embedding_rows: Mapping[Role, int],
) -> None:
    longest = max(map(len, example.renderings.values()))
    if longest > max_length:
        raise UnusableRow("too_long", f"must have at most {max_length} tokens, got {longest}")
    for role, rendering in example.renderings.items():
        largest = int(rendering.input_ids.max())
        if largest >= embedding_rows[role]:
            raise UnusableRow(
                "outside_vocabulary",
                f"token {_token(renderers[role], largest)} is beyond the {embedding_rows[role]} "
                f"embeddings of the {role}",
            )


def _check_labels(example: Example, renderers: Mapping[Role, Renderer]) -> None:
    """Refuse different labels: the KL compares the two models' distributions token by token."""
    labels = {role: one.input_ids[one.loss_mask] for role, one in example.renderings.items()}
    student, teacher = labels["student"].tolist(), labels["teacher"].tolist()
    if student == teacher:
        return
    pairs = enumerate(zip_longest(student, teacher))
    first, (ours, theirs) = next((at, pair) for at, pair in pairs if pair[0] != pair[1])
    raise UnusableRow(
        "different_labels",
        f"label {first} must be one token for both models, got "
        f"{_token(renderers['teacher'], theirs)} for the teacher and "
        f"{_token(renderers['student'], ours)} for the student; use one tokenizer and chat "
        "template, or chat_template none",
    )


def _token(renderer: Renderer, index: int | None) -> str:
    if index is None:
        return "none"
    return f"{renderer.tokenizer.convert_ids_to_tokens(index)!r} (id {index})"


def count_notes(examples: Iterable[Example]) -> dict[str, int]:
    """Return how many examples were altered in each way when they were read and rendered."""
    return dict(Counter(note for one in examples for note in set(one.notes)))


def count_reasons(examples: Iterable[Example]) -> dict[str, int]:
    """Return how many examples left for each reason."""
    return dict(Counter(one.outcome.reason for one in examples if one.outcome is not None))


class ExampleDataset(Dataset[Example]):
    """Rendered examples by index; `FILLER` gives the shortest one without its labels."""

    def __init__(self, examples: Sequence[Example]) -> None:
        self.examples = list(examples)
        self.shortest = min(self.examples, key=lambda one: len(one.renderings["student"]))
        without_labels = {
            role: replace(one, loss_mask=np.zeros_like(one.loss_mask))
            for role, one in self.shortest.renderings.items()
        }
        self._filler = replace(self.shortest, candidate_id=-1, renderings=without_labels)

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Example:
        return self._filler if index == FILLER else self.examples[index]

    @property
    def originals(self) -> list[int]:
        """The indices of the originals."""
        return [i for i, one in enumerate(self.examples) if one.branch == "original"]

    @property
    def failed(self) -> list[int]:
        """The indices of the originals that the student fails, as the rows say."""
        return [i for i in self.originals if self.examples[i].failed]

    @property
    def counterfactuals(self) -> list[int]:
        """The indices of the counterfactuals, those of the branch "cross" among them."""
        return [i for i, one in enumerate(self.examples) if one.branch != "original"]

    @property
    def label_tokens(self) -> int:
        """The number of label tokens of all examples."""
        return sum(int(one.renderings["student"].loss_mask.sum()) for one in self.examples)


def prepare_dataset(
    rows: Any,
    renderers: Mapping[Role, Renderer],
    *,
    max_length: int,
    embedding_rows: Mapping[Role, int],
    name: str,
    span_weighting: str = "span",
) -> tuple[ExampleDataset, list[Example]]:
    """Read and render a dataset.

    Args:
        rows: a source that `load_examples` takes, or a list of Examples.
        renderers, max_length, embedding_rows: as for `render_examples`.
        name: the name of the dataset in messages.
        span_weighting: how the label tokens of counterfactuals count: "span", each the same; or
            "sample", each 1 / k, where k counterfactuals of its row_id are trained on.

    Returns:
        The examples to train on, and those that left.

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
    return ExampleDataset(_weigh(kept) if span_weighting == "sample" else kept), left


def _weigh(examples: Sequence[Example]) -> list[Example]:
    """Return the examples, of counterfactuals a copy with the weight 1 / k."""
    cuts = Counter(one.row_id for one in examples if one.branch != "original")
    return [
        one if one.branch == "original" else replace(one, weight=1 / cuts[one.row_id])
        for one in examples
    ]


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items())


def collate(examples: Sequence[Example]) -> Batch:
    """Pad rendered examples on the right.

    Args:
        examples: B examples with the renderings of both models.

    Returns:
        The tensors of `pad` for the student, those for the teacher with the prefix `teacher_` (of
        another T), `counterfactual` bool [B] (of any branch but "original"), `row_id` int64 [B] and
        `row_weight` float64 [B], the weight of each label token of a row within its term of the
        loss. Row by row, both `loss_mask` mark the same labels in order.
    """
    batch: Batch = {}
    for role, prefix in PREFIXES.items():
        tensors = pad([one.renderings[role] for one in examples])
        batch |= {f"{prefix}{name}": tensor for name, tensor in tensors.items()}
    batch["counterfactual"] = torch.tensor([one.branch != "original" for one in examples])
    batch["row_id"] = torch.tensor([one.row_id for one in examples])
    batch["row_weight"] = torch.tensor([one.weight for one in examples], dtype=torch.float64)
    return batch


def pad(rows: Sequence[Rendering]) -> Batch:
    """Pad renderings on the right.

    Args:
        rows: B renderings of at most T tokens.

    Returns:
        `input_ids` and `attention_mask`, int64 [B, T], and `loss_mask`, bool [B, T], which is True
        where the NEXT token is a label: at the position whose hidden state predicts it.
    """
    lengths = torch.tensor([len(row) for row in rows])
    shape = len(rows), int(lengths.max())
    ids, labels = np.empty(shape, dtype=np.int64), np.zeros(shape, dtype=np.bool_)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = row.input_ids
        # Padded with its last token: the embedding of a pad token could be missing or NaN, and a
        # NaN passes through attention even where its weight is 0.
        ids[i, len(row) :] = row.input_ids[-1]
        labels[i, : len(row) - 1] = row.loss_mask[1:]
    return {
        "input_ids": torch.from_numpy(ids),
        "attention_mask": (torch.arange(shape[1]) < lengths[:, None]).long(),
        "loss_mask": torch.from_numpy(labels),
    }


def plan_batches(
    lengths: Sequence[int], *, max_tokens: int, packed: bool = False
) -> list[list[int]]:
    """Group rows into batches of like length, longest first.

    The longest come first so that a batch too large for the memory fails at once.

    Args:
        lengths: tokens of each row.
        max_tokens: most tokens of a batch, padding included; a longer row stands alone.
        packed: whether rows follow one another, and there is no padding.

    Returns:
        The positions of each batch's rows.

    Raises:
        ValueError: `max_tokens` is less than 1.
    """
    if max_tokens < 1:
        raise ValueError(f"max_tokens: must be at least 1, got {max_tokens}")
    batches: list[list[int]] = []
    width = taken = 0
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        taken += lengths[index] if packed else width
        if not batches or taken > max_tokens:
            batches.append([])
            width = taken = lengths[index]
        batches[-1].append(index)
    return batches


def split_batch(
    batch: Batch, max_tokens: int, *, at_least: int = 1, packed: bool = False
) -> list[Batch]:
    """Split a batch into forward passes.

    Args:
        batch: a batch of `collate`.
        max_tokens: most tokens of a pass for either model, padding included; a longer row stands
            alone.
        at_least: fewest passes, for ranks that must run in step; passes without labels are added.
        packed: whether neither model computes padding, which then does not count.

    Returns:
        The passes, each a batch, the longest row last: gradients are reduced after a pass with
        labels.
    """
    widths = [batch[f"{prefix}attention_mask"].sum(dim=1) for prefix in PREFIXES.values()]
    lengths = torch.stack(widths).amax(dim=0).tolist()
    passes = plan_batches(lengths, max_tokens=max_tokens, packed=packed)[::-1]
    parts = [batch] if len(passes) == 1 else [_rows(batch, rows) for rows in passes]
    if len(parts) < at_least:
        empty = _rows(batch, passes[0][-1:])
        for prefix in PREFIXES.values():
            empty[f"{prefix}loss_mask"] = torch.zeros_like(empty[f"{prefix}loss_mask"])
        parts = [empty] * (at_least - len(parts)) + parts
    return parts


def _rows(batch: Batch, rows: list[int]) -> Batch:
    """Return some rows of a batch, without the columns that are padding in all of them."""
    part = {name: tensor[rows] for name, tensor in batch.items()}
    for prefix in PREFIXES.values():
        used = part[f"{prefix}attention_mask"].any(dim=0)  # a user's collator may pad in front
        for name in ("input_ids", "attention_mask", "loss_mask"):
            part[prefix + name] = part[prefix + name][:, used]
    return part
