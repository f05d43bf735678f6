"""The batch on which a run broke, in a file that a person can read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from leaf_distill.data.collator import PREFIXES, Batch
from leaf_distill.io import make_directory, write_json


def save_broken_batch(
    path: Path,
    reason: str,
    step: int,
    batches: Sequence[Batch],
    tokenizer: PreTrainedTokenizerBase,
    kl: Sequence[Sequence[float]] | None = None,
) -> None:
    """Write the rows of batches as JSON.

    Each row has `row_id`, `counterfactual` and for each model `input_ids`, their `tokens` and the
    positions that are `labels`; and `kl`, the KL in nats of each label token, if it is given.

    Args:
        path: the file.
        reason: the sentence of the error.
        step: optimizer steps that were finished before.
        batches: of `collate`.
        tokenizer: of the student.
        kl: of each row of the one batch, the KL of each of its label tokens.
    """
    rows = [row for batch in batches for row in _rows(batch, tokenizer)]
    for row, values in zip(rows, kl or (), strict=False):
        # JSON has no infinity and no NaN.
        row["kl"] = [value if math.isfinite(value) else str(value) for value in values]
    make_directory(path.parent)
    write_json(path, {"reason": reason, "after_step": step, "rows": rows})


def _rows(batch: Batch, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for at, (row_id, cf) in enumerate(zip(batch["row_id"], batch["counterfactual"], strict=True)):
        row: dict[str, Any] = {"row_id": int(row_id), "counterfactual": bool(cf)}
        for role, prefix in PREFIXES.items():
            tokens_of_row = batch[f"{prefix}attention_mask"][at].bool()
            ids = batch[f"{prefix}input_ids"][at, tokens_of_row].tolist()
            # The mask marks where the next token is a label.
            marks = batch[f"{prefix}loss_mask"][at, tokens_of_row]
            labels = (marks.nonzero()[:, 0] + 1).tolist()
            tokens = tokenizer.convert_ids_to_tokens(ids)
            row[role] = {"input_ids": ids, "tokens": tokens, "labels": labels}
        rows.append(row)
    return rows
