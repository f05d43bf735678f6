"""The KL of single tokens before and after a training, of a few rows, in a file to look at.

Each rank runs the same rows one by one, so that a sharded student gathers in step. That is at most
`ROWS` passes of both models before the first step and after the last, without gradients; they draw
no random number and change no weight.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from transformers import TrainerCallback

from leaf_distill.data.example import Example
from leaf_distill.data.sequence import label_texts
from leaf_distill.io import write_bytes

if TYPE_CHECKING:
    from leaf_distill.training.trainer import LeafTrainer

logger = logging.getLogger(__name__)

FILE: Final = "token_kl.jsonl"
ROWS: Final = 16
CUTS: Final = 2  # of one row at most, so that several rows are there


class TokenKL(TrainerCallback):
    """Writes `FILE`: a line for each row, with the KL of each label of its completion.

    A line has row_id, candidate_id and branch of the row; `completion`, its text with the name of
    the end token; `tokens`, the characters [start, stop) of each label in it; `kl_before` and
    `kl_after`, KL(teacher, student) of each label in nats, null where it is not finite;
    `temperature`, at which both distributions are taken; and `stored`, the signal of the teacher
    cache, hidden or topk, null of a teacher in memory. What is known before the training is written
    before the first step, so that a run that goes on from a checkpoint has it.

    Args:
        trainer: it must be the one that calls.
        directory: the output directory.
    """

    def __init__(self, trainer: LeafTrainer, directory: Path) -> None:
        dataset = trainer.train_dataset
        assert dataset is not None
        self.trainer, self.path = trainer, directory / FILE
        self.rows = choose(dataset.examples) if trainer.args.ce_weight < 1 else []
        self._ended = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.rows and not state.global_step:
            self._write([self._line(row) for row in self.rows], "kl_before")

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._ended = True
        if self.rows:
            self._after()

    def finish(self) -> None:
        """Measure what a training did that had ended before, and was only read again."""
        if not self.rows:
            logger.info("no %s: the training asks no teacher", FILE)
        elif not self._ended and self.trainer.is_sharded_over_ranks:
            self._leave_out("a sharded student was read back from its last checkpoint")
        elif not self._ended:
            self._after()

    def _after(self) -> None:
        lines = self._begun()
        if lines is None and self.trainer.is_world_process_zero():
            self._leave_out("the training began without it")
        # On all ranks, since only the first one knows the file.
        self._write(lines or [], "kl_after")

    def _write(self, lines: list[dict[str, Any]], name: str) -> None:
        """Measure all rows on all ranks; the first one writes them into the lines."""
        measured = self.trainer.token_kl(self.rows)
        if not lines or not self.trainer.is_world_process_zero():
            return
        for line, values in zip(lines, measured, strict=True):
            # The labels of earlier turns come first, and are not shown.
            line[name] = [_rounded(value) for value in values[-len(line["tokens"]) :]]
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        write_bytes(self.path, text.encode(errors="replace"))

    def _line(self, row: Example) -> dict[str, Any]:
        text, tokens = label_texts(self.trainer.student_renderer, row.as_read_by("student"))
        cache = self.trainer.teacher_cache
        return {
            **_name(row),
            "branch": row.branch,
            "completion": text,
            "tokens": tokens,
            "kl_before": None,
            "kl_after": None,
            "temperature": self.trainer.args.temperature,
            "stored": None if cache is None else cache.manifest["signal"],
        }

    def _begun(self) -> list[dict[str, Any]] | None:
        """Return the lines that were written before the first step, if they are of these rows."""
        try:
            lines = read_lines(self.path)
            fits = [
                {name: line[name] for name in _name(row)} == _name(row) and line["kl_before"]
                for line, row in zip(lines, self.rows, strict=True)
            ]
        except (OSError, ValueError, TypeError, KeyError):
            return None
        return lines if all(fits) else None

    def _leave_out(self, reason: str) -> None:
        if self.trainer.is_world_process_zero():
            self.path.unlink(missing_ok=True)
            logger.warning("no %s, with the KL of single tokens: %s", FILE, reason)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the lines of `FILE`, which may hold line separators of Unicode within strings."""
    text = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text.split("\n") if line]


def choose(examples: Sequence[Example], count: int = ROWS) -> list[Example]:
    """Return the rows to measure: originals with counterfactuals, each followed by them, first."""
    cuts: dict[int, list[Example]] = {}
    for one in examples:
        if one.branch != "original":
            cuts.setdefault(one.row_id, []).append(one)
    originals = [one for one in examples if one.branch == "original"]
    rows: list[Example] = []
    for one in sorted(originals, key=lambda one: one.row_id not in cuts):
        rows += [one, *cuts.get(one.row_id, [])[:CUTS]]
        if len(rows) >= count:
            break
    return rows[:count]


def _name(row: Example) -> dict[str, int]:
    return {"row_id": row.row_id, "candidate_id": row.candidate_id}


def _rounded(value: float) -> float | None:
    """Return a value as JSON can hold it, with the digits that float32 has."""
    return float(f"{value:.6g}") if math.isfinite(value) else None
