"""`leaf evaluate`: a model's greedy answers on a dataset, graded, with what the count is worth."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import pyarrow as pa
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel

from leaf_distill.distill_config import EvaluateConfig
from leaf_distill.grade import Grader
from leaf_distill.models import load_model, load_tokenizer, model_fingerprint
from leaf_distill.pair import digest, run_stage
from leaf_distill.predict import generate, plan_batches
from leaf_distill.render import Renderer
from leaf_distill.rows import Row, load_rows
from leaf_distill.store import Stage, claim_run_directory, write_json, write_table

_ANSWERS = pa.schema(
    [
        ("row_id", pa.int64()),
        ("answer", pa.string()),
        ("finished", pa.bool_()),
        ("n_tokens", pa.int32()),
        ("invalid", pa.bool_()),
    ]
)

VERDICTS = ("right", "wrong", "no_answer", "cut_off", "timeout", "not_finite", "too_long")
"""The grader's verdicts; cut_off by the length limit; logits not_finite; a prompt too_long."""


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
    fingerprint = model_fingerprint(config.model)
    settings = {
        "command": "evaluate",
        "model": fingerprint,
        "renderer": renderer.fingerprint,
        "rows": digest([row.row_id, row.messages, row.answer, row.completion] for row in rows),
        **{name: getattr(config, name) for name in ("dtype", "max_new_tokens", "max_length")},
        **{name: getattr(config, name) for name in ("grade", "grade_timeout")},
    }
    claim_run_directory(root, settings)
    stage = Stage(root / "stages", "answers", settings, _ANSWERS)
    table = _answer(config, stage, rows, renderer)
    graded = _grade(config, rows, table)
    write_table(root / "answers.parquet", graded)
    counts = Counter(graded["verdict"].to_pylist())
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


def _answer(
    config: EvaluateConfig, stage: Stage, rows: Sequence[Row], renderer: Renderer
) -> pa.Table:
    by_id = {row.row_id: row for row in rows}
    prompts = {row.row_id: renderer.prompt(row.messages).input_ids for row in rows}
    loaded: list[PreTrainedModel] = []

    def model() -> PreTrainedModel:
        """Loaded at the first need: a finished stage needs none."""
        if not loaded:
            loaded.append(load_model(config.model, dtype=config.dtype, device=config.device))
        return loaded[0]

    def room(network: PreTrainedModel) -> int:
        positions = getattr(network.config.get_text_config(), "max_position_embeddings", None)
        return min(config.max_length, positions - 1 if positions else config.max_length)

    def compute(batch: Sequence[int]) -> Iterator[dict[str, object]]:
        limit = room(model())
        fitting = [item for item in batch if len(prompts[item]) <= limit]
        texts = generate(
            model(),
            renderer.tokenizer,
            [prompts[item] for item in fitting],
            max_new_tokens=config.max_new_tokens,
        )
        answers = dict(zip(fitting, texts, strict=True))
        for item in batch:
            given = answers.get(item)
            yield {
                "row_id": item,
                "answer": None if given is None else given.text,
                "finished": given is not None and given.finished,
                "n_tokens": 0 if given is None else given.n_tokens,
                "invalid": given is not None and given.invalid,
            }

    ids = list(by_id)
    lengths = [len(prompts[item]) + config.max_new_tokens for item in ids]
    plan = plan_batches(lengths, max_tokens=config.max_batch_tokens)
    return run_stage(stage, [[ids[i] for i in batch] for batch in plan], compute, desc="answers")


def _grade(config: EvaluateConfig, rows: Sequence[Row], table: pa.Table) -> pa.Table:
    """The answers in the rows' order, each with its gold answer and verdict."""
    given = {line["row_id"]: line for line in table.to_pylist()}
    golds = {row.row_id: row.completion if row.answer is None else row.answer for row in rows}
    whole = [item for item in golds if given[item]["finished"]]
    with Grader(config.grade, timeout_s=config.grade_timeout) as grader:
        graded = grader.grade([(golds[item], given[item]["answer"]) for item in whole])
    verdicts: dict[int, str] = dict(zip(whole, graded, strict=True))
    for item, line in given.items():
        if line["answer"] is None:
            verdicts[item] = "too_long"
        elif not line["finished"]:
            verdicts[item] = "not_finite" if line["invalid"] else "cut_off"
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
