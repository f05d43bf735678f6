"""`leaf distill`: a pair, a dataset and settings in; a trained, described checkpoint out."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from leaf_distill.checkpoint import find_checkpoint
from leaf_distill.collate import summarize
from leaf_distill.distill_config import DistillArguments, LeafConfig
from leaf_distill.model_card import model_card
from leaf_distill.models import check_same_tokenizer, load_model, load_tokenizer, model_fingerprint
from leaf_distill.pair import digest
from leaf_distill.rows import load_rows
from leaf_distill.store import claim_run_directory, write_bytes, write_json
from leaf_distill.trainer import LeafTrainer

logger = logging.getLogger(__name__)

# What changes the trained weights by more than rounding; the rest may differ when a run goes on.
_IDENTITY = (
    "originals_per_step",
    "max_length",
    "kd_weight",
    "temperature",
    "chat_template",
    "system_prompt",
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "num_train_epochs",
    "max_steps",
    "weight_decay",
    "max_grad_norm",
    "seed",
)


@dataclass(frozen=True)
class DistillResult:
    """Where the trained student is, and what was measured on the way."""

    output_dir: Path
    metrics: dict[str, Any]


def distill(arguments: DistillArguments, config: LeafConfig) -> DistillResult:
    """Train the student and save it in `config.output_dir` with tokenizer, card and metrics.

    The same command goes on from the newest whole checkpoint in the directory; a finished run only
    saves again. Weights train and are saved in float32 (bfloat16 autocast on a GPU that has it):
    steps of 1e-5 vanish in bfloat16 weights. The teacher is bfloat16 there, else float32.

    Raises:
        ValueError: models or rows cannot be read, the tokenizers differ, no row is left, or the
            directory belongs to other settings.
        RuntimeError: the loss became NaN.
    """
    tokenizer, teacher_tokenizer = (
        load_tokenizer(name) for name in (arguments.student, arguments.teacher)
    )
    check_same_tokenizer(teacher_tokenizer, tokenizer)
    rows = _read_rows(arguments, arguments.dataset, arguments.dataset_split, arguments.max_rows)
    eval_rows = None
    if arguments.eval_dataset is not None:
        eval_rows = _read_rows(arguments, arguments.eval_dataset, arguments.eval_split, None)
    output_dir = Path(str(config.output_dir))
    if config.process_index == 0:
        claim_run_directory(output_dir, _identity(arguments, config, rows))
    wanted = config.resume_from_checkpoint or True
    checkpoint = find_checkpoint(wanted, output_dir, world_size=config.world_size)

    teacher_dtype = arguments.teacher_dtype
    if teacher_dtype == "auto":
        teacher_dtype = "bfloat16" if config.bf16 else "float32"
    device = str(config.device)
    trainer = LeafTrainer(
        load_model(arguments.student, dtype="float32", device=device),
        load_model(arguments.teacher, dtype=teacher_dtype, device=device),
        config,
        rows,
        eval_rows,
        tokenizer,
        teacher_processing_class=teacher_tokenizer,
    )
    trained = trainer.train(resume_from_checkpoint=checkpoint)
    evaluated = trainer.evaluate() if eval_rows is not None else {}
    trainer.save_model()
    metrics = _metrics(trainer, trained.metrics, evaluated)
    if trainer.is_world_process_zero():
        write_json(output_dir / "metrics.json", metrics)
        card = model_card(arguments, config, metrics)
        write_bytes(output_dir / "README.md", card.encode())
        print(f"The student is in {output_dir}; metrics.json and README.md there say how it went")
    return DistillResult(output_dir, metrics)


def _identity(
    arguments: DistillArguments, config: LeafConfig, rows: list[dict[str, Any]]
) -> dict[str, object]:
    settings = {name: getattr(config, name) for name in _IDENTITY}
    return {
        "command": "distill",
        "student": model_fingerprint(arguments.student),
        "teacher": model_fingerprint(arguments.teacher),
        "rows": digest(rows),
        **settings,
    }


def _metrics(
    trainer: LeafTrainer, trained: Mapping[str, float], evaluated: Mapping[str, float]
) -> dict[str, Any]:
    examples = trainer.train_dataset.examples if trainer.train_dataset else []
    counterfactuals = sum(example.counterfactual for example in examples)
    return {
        "rows": {
            "originals": len(examples) - counterfactuals,
            "counterfactuals": counterfactuals,
            "label_tokens": sum(example.n_labels for example in examples),
            "left_out": summarize(trainer.rejections),
        },
        "left_out": [asdict(rejection) for rejection in trainer.rejections],
        "train": dict(trained),
        "eval": dict(evaluated),
        "log": trainer.state.log_history,
    }


# ---- rows ----


def _read_rows(
    arguments: DistillArguments, source: str, split: str, max_rows: int | None
) -> list[dict[str, Any]]:
    """Rows of `leaf detect` with their branch, or any other rows, which are all originals."""
    path = Path(source).expanduser()
    if path.is_dir() and (path / "run.json").is_file():
        path = path / "dataset.parquet"
        if not path.is_file():
            raise ValueError(
                f"dataset: {source} is a run of `leaf detect` that is not finished; run the same "
                "command again, it goes on where it stopped"
            )
    rows = _branched_rows(path) if path.is_file() else None
    if rows is None:
        columns = arguments.columns if isinstance(arguments.columns, dict) else None
        plain, left = load_rows(source, split=split, columns=columns, max_rows=max_rows)
        if left:
            reasons = summarize(left)
            logger.warning("dataset: %d rows of %s left out: %s", len(left), source, reasons)
        return [
            {"row_id": row.row_id, "prompt": list(row.messages), "completion": row.completion}
            for row in plain
        ]
    if max_rows is None:
        return rows
    originals = [row["row_id"] for row in rows if row["branch"] != "counterfactual"]
    kept = set(originals[:max_rows])
    return [row for row in rows if row["row_id"] in kept]


def _branched_rows(path: Path) -> list[dict[str, Any]] | None:
    """The rows of a file in the layout of `dataset.parquet` or `dataset.jsonl`, else None."""
    try:
        if path.suffix == ".parquet":
            if "branch" not in pq.read_schema(path).names:
                return None
            table: list[dict[str, Any]] = pq.read_table(path).to_pylist()
            return table
        if path.suffix == ".jsonl":
            with path.open(encoding="utf-8") as file:
                if '"branch"' in file.readline():
                    file.seek(0)
                    return [json.loads(line) for line in file if line.strip()]
    except (pa.ArrowException, ValueError) as error:
        raise ValueError(f"dataset: {path} cannot be read: {error}") from error
    return None
