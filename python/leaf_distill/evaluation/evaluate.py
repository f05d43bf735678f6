"""`leaf evaluate`: a model's greedy answers on a dataset, graded, with what the count is worth."""

from __future__ import annotations

import logging
import math
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import pyarrow as pa
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel

from leaf_distill.config import EvaluateConfig
from leaf_distill.data.dataset import Row, load_rows
from leaf_distill.data.prompt import Renderer
from leaf_distill.detection.steps import grade_answers
from leaf_distill.io import Stage, claim_run_directory, content, digest, write_json, write_table
from leaf_distill.models.generation import generate, plan_batches
from leaf_distill.models.loading import load_model, load_tokenizer, model_fingerprint

logger = logging.getLogger(__name__)

_ANSWERS = pa.schema(
    [
        ("row_id", pa.int64()),
        ("answer", pa.string()),
        ("n_tokens", pa.int32()),
        ("failure", pa.string()),  # a verdict that needs no grader
    ]
)

VERDICTS = (
    *("right", "wrong", "no_answer", "timeout"),
    *("cut_off", "not_finite", "too_long", "not_renderable"),
)
"""The grader's verdicts; cut_off by the length limit; logits not_finite; a prompt too_long, or
not_renderable: refused by the chat template."""


@dataclass(frozen=True)
class EvaluateResult:
    """Accuracy over all rows, its 95 % interval, the count of each verdict, and the answers."""

    accuracy: float
    interval: tuple[float, float]
    counts: dict[str, int]
    answers: Path


def evaluate(config: EvaluateConfig) -> EvaluateResult:
    """Answer greedily, grade, and write `answers.parquet` and `metrics.json`.

    A row without `answer` is graded against its completion. Every row that could be read is in the
    denominator, also those that were cut off or not answered. The same command goes on where a
    killed one stopped.

    Raises:
        ValueError: the model or the rows cannot be read, or the directory belongs to other
            settings.
    """
    tokenizer = load_tokenizer(config.model)
    renderer = Renderer(
        tokenizer, chat_template=config.chat_template, system_prompt=config.system_prompt
    )
    columns = config.columns if isinstance(config.columns, dict) else None
    rows, unreadable = load_rows(
        config.dataset,
        split=config.dataset_split,
        columns=columns,
        max_rows=config.max_rows,
        need_completion=False,
    )
    if not rows:
        raise ValueError(
            f"dataset: no row of {config.dataset} can be used ({unreadable[0].detail})"
        )
    root = Path(config.output_dir)
    answers = _Answers(config, renderer, rows)
    table = _grade(config, rows, *answers.get())
    write_table(root / "answers.parquet", table)
    counts = Counter(table["verdict"].to_pylist())
    result = EvaluateResult(
        accuracy=counts["right"] / len(rows),
        interval=wilson_interval(counts["right"], len(rows)),
        counts={name: counts[name] for name in VERDICTS if counts[name]},
        answers=root / "answers.parquet",
    )
    metrics = {**asdict(result), "rows": len(rows), "unreadable_rows": len(unreadable)}
    write_json(root / "metrics.json", {**metrics, "answers": str(result.answers)})
    _show(config, result, len(rows), len(unreadable))
    return result


class _Answers:
    """The model's answers to all rows: a Stage, which claims the run directory."""

    def __init__(self, config: EvaluateConfig, renderer: Renderer, rows: Sequence[Row]) -> None:
        self.config = config
        self.renderer = renderer
        self.root = Path(config.output_dir)
        self.prompts = _prompts(renderer, rows)
        # What an answer depends on; how it is graded is no part of it.
        self.settings: dict[str, object] = {
            "model": model_fingerprint(config.model),
            "rendering": renderer.fingerprint,
            "rows": digest([row.row_id, row.messages] for row in rows),
            **{name: getattr(config, name) for name in ("dtype", "max_new_tokens", "max_length")},
        }
        self._loaded: PreTrainedModel | None = None

    def get(self) -> tuple[pa.Table, str]:
        """Return the table of _ANSWERS and its fingerprint."""
        stage = Stage(self.root / "stages", "answers", self.settings, _ANSWERS)
        if not stage.finished:
            self._model()  # before the claim: settings that cannot work must not own a directory
        config = self.config
        names = {
            "model": config.model,
            "rendering": f"chat_template {config.chat_template}, system_prompt "
            f"{config.system_prompt}",
            "rows": config.dataset,
        }
        identity = {key: content(name, str(self.settings[key])) for key, name in names.items()}
        claim_run_directory(self.root, {"command": "evaluate", **self.settings, **identity})
        ids = list(self.prompts)
        lengths = [len(self.prompts[item]) + config.max_new_tokens for item in ids]
        plan = plan_batches(lengths, max_tokens=config.max_batch_tokens)
        batches = [[ids[i] for i in batch] for batch in plan]
        table = stage.run(batches, self._compute, desc="answers")
        self._loaded = None
        return table, stage.fingerprint

    def _model(self) -> PreTrainedModel:
        """Loaded at the first need: a finished stage needs none."""
        if self._loaded is None:
            config = self.config
            self._loaded = load_model(config.model, dtype=config.dtype, device=config.device)
        return self._loaded

    def _compute(self, batch: Sequence[int]) -> Iterator[dict[str, object]]:
        model = self._model()
        positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        limit = min(self.config.max_length, positions - 1 if positions else sys.maxsize)
        fitting = [item for item in batch if 0 < len(self.prompts[item]) <= limit]
        answers = generate(
            model,
            self.renderer.tokenizer,
            [self.prompts[item] for item in fitting],
            end_ids=self.renderer.end_ids,
            max_new_tokens=self.config.max_new_tokens,
        )
        for item in batch:
            if item not in fitting:
                failure = "too_long" if self.prompts[item] else "not_renderable"
                yield {"row_id": item, "answer": None, "n_tokens": 0, "failure": failure}
        for item, given in zip(fitting, answers, strict=True):
            failed = "not_finite" if given.invalid else None if given.finished else "cut_off"
            yield {
                "row_id": item,
                "answer": given.text,
                "n_tokens": given.n_tokens,
                "failure": failed,
            }


def _prompts(renderer: Renderer, rows: Sequence[Row]) -> dict[int, list[int]]:
    """Each prompt's tokens, none where the template refuses it."""
    prompts: dict[int, list[int]] = {}
    refused: list[str] = []
    for row in rows:
        try:
            prompts[row.row_id] = renderer.prompt(row.messages).input_ids
        except ValueError as error:
            prompts[row.row_id] = []
            refused.append(f"row {row.row_id}: {error}")
    if refused:
        logger.warning("%d rows cannot be rendered, as %s", len(refused), refused[0])
    return prompts


def _grade(config: EvaluateConfig, rows: Sequence[Row], table: pa.Table, upstream: str) -> pa.Table:
    """The answers in the rows' order, each with its gold answer and verdict."""
    given = {line["row_id"]: line for line in table.to_pylist()}
    golds = {row.row_id: row.completion if row.answer is None else row.answer for row in rows}
    verdicts = {item: line["failure"] for item, line in given.items()}
    verdicts |= grade_answers(
        Path(config.output_dir),
        "grades",
        upstream,
        {item: (golds[item], given[item]["answer"]) for item in golds if not verdicts[item]},
        rule=config.grade,
        timeout_s=config.grade_timeout,
    )
    return pa.table(
        {
            "row_id": pa.array(golds, pa.int64()),
            "prompt": [row.messages[-1]["content"] for row in rows],
            "gold": list(golds.values()),
            "answer": pa.array([given[item]["answer"] for item in golds], pa.string()),
            "verdict": [verdicts[item] for item in golds],
            "n_tokens": pa.array([given[item]["n_tokens"] for item in golds], pa.int32()),
        }
    )


def wilson_interval(right: int, total: int, *, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's score interval of a proportion; z = 1.96 is 95 %.

        (p + z^2/2n +- z sqrt(p (1 - p) / n + z^2/4n^2)) / (1 + z^2/n)

    Unlike p +- z sqrt(p (1 - p) / n), it stays in [0, 1] and is no point at 0 and 1.
    """
    if not 0 <= right <= total or total < 1:
        raise ValueError(f"right: needs 0 to total, and total at least 1, came {right}, {total}")
    share = right / total
    center = share + z * z / (2 * total)
    half = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    scale = 1 + z * z / total
    return max(0.0, (center - half) / scale), min(1.0, (center + half) / scale)


def _show(config: EvaluateConfig, result: EvaluateResult, total: int, unreadable: int) -> None:
    console = Console()
    table = Table(title=f"{config.model} on {config.dataset}")
    table.add_column("verdict")
    table.add_column("rows", justify="right")
    table.add_column("share", justify="right")
    for verdict, count in result.counts.items():
        table.add_row(verdict, str(count), f"{count / total:.1%}")
    console.print(table)
    if unreadable:
        console.print(f"{unreadable} rows could not be used and are not counted")
    low, high = result.interval
    print(
        f"Accuracy {result.accuracy:.1%} (95 % interval {low:.1%} to {high:.1%}, {total} rows); "
        f"the answers are in {result.answers}"
    )
