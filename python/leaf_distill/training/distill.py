"""`leaf distill`: a pair, a dataset and settings in; a trained, described checkpoint out."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainerState

from leaf_distill.data.collator import summarize
from leaf_distill.data.prompt import Renderer, template_differences
from leaf_distill.io import claim_run_directory, content, digest, write_bytes, write_json
from leaf_distill.models.loading import (
    check_same_tokenizer,
    load_model,
    load_tokenizer,
    model_fingerprint,
)
from leaf_distill.training.checkpoint import find_checkpoint, is_at_the_end, stopped
from leaf_distill.training.config import DistillArguments, LeafConfig
from leaf_distill.training.model_card import model_card
from leaf_distill.training.rows import DistillRow, read_distill_rows
from leaf_distill.training.trainer import LeafTrainer

logger = logging.getLogger(__name__)

# Settings (or how their names begin) that change the trained weights by no more than rounding: they
# may differ when a run goes on. All others may not.
_INCIDENTAL = (
    *("output_dir", "resume_from_checkpoint", "local_rank", "use_cpu", "backend", "do_", "eval_"),
    *("per_device_", "gradient_accumulation_steps", "prediction_loss_only", "batch_eval_metrics"),
    *("gradient_checkpointing", "activation_checkpointing", "torch_compile", "torch_empty_cache"),
    *("logging_", "log_", "disable_tqdm", "report_to", "run_name", "project", "trackio_", "debug"),
    *("save_", "enable_jit_checkpoint", "hub_", "push_to_hub", "include_", "skip_memory_metrics"),
    *("dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers"),
    *("dataloader_prefetch_factor", "dataloader_multiprocessing_context", "ddp_"),
)
# What has no effect without sampling or without beams; transformers reads it from a generation
# config and refuses to write it again.
_SAMPLING = (
    *("temperature", "top_k", "top_p", "min_p", "top_h"),
    *("typical_p", "epsilon_cutoff", "eta_cutoff"),
)
_BEAMS = ("early_stopping", "length_penalty")


@dataclass(frozen=True)
class DistillResult:
    """Where the trained student is, and what was measured on the way."""

    output_dir: Path
    metrics: dict[str, Any]


def distill(arguments: DistillArguments, config: LeafConfig) -> DistillResult:
    """Train the student and save it in `config.output_dir` with tokenizer, card and metrics.

    The same command goes on from the newest whole checkpoint in the directory
    (`config.resume_from_checkpoint` names another one, or is "false"); of a finished run it returns
    what is there. Weights train and are saved in float32 (bfloat16 autocast on a GPU that has it):
    steps of 1e-5 vanish in bfloat16 weights. The teacher is bfloat16 there, else float32.

    Raises:
        ValueError: models or rows cannot be read, the tokenizers differ, no row is left, settings
            do not fit together, or the directory belongs to other settings.
        RuntimeError: the loss became NaN.
        StoreError: the disk is full.
    """
    student, teacher = (load_tokenizer(name) for name in (arguments.student, arguments.teacher))
    check_same_tokenizer(teacher, student)
    _compare_templates(arguments, config, student, teacher)
    rows, left = read_distill_rows(
        arguments, arguments.dataset, arguments.dataset_split, arguments.max_rows
    )
    eval_rows = None
    if arguments.eval_dataset is not None:
        eval_rows, _ = read_distill_rows(
            arguments, arguments.eval_dataset, arguments.eval_split, None
        )
    output_dir = Path(str(config.output_dir))
    identity = _identity(arguments, config, rows, eval_rows)
    asked = str(config.resume_from_checkpoint)  # text when it comes from the command line
    wanted = {"none": True, "true": True, "false": False}.get(asked.lower(), asked)
    if claimed := (output_dir / "run.json").exists():
        claim_run_directory(output_dir, identity)
        if wanted is True and (output_dir / "metrics.json").exists():
            logger.warning("%s is finished: nothing is left to do", output_dir)
            metrics = json.loads((output_dir / "metrics.json").read_text(encoding="utf-8"))
            return DistillResult(output_dir, metrics)
    checkpoint = find_checkpoint(wanted, output_dir, world_size=config.world_size)
    own = claimed and checkpoint and Path(checkpoint).resolve().parent == output_dir.resolve()
    trained = checkpoint if own and is_at_the_end(str(checkpoint)) else None

    trainer = _build(arguments, config, trained, rows, eval_rows, (student, teacher))
    trainer.rejections[:0] = left
    if not any(row.get("branch") == "counterfactual" for row in rows):
        logger.warning(
            "%s has no counterfactuals, so this is plain distillation; LeaF's needs the run "
            "directory of `leaf detect`",
            arguments.dataset,
        )
    trainer.add_callback(_Watch(output_dir, identity))
    with stopped(output_dir, world_size=config.world_size):
        if trained is None:
            measured = trainer.train(resume_from_checkpoint=checkpoint).metrics
        else:  # transformers would take one more step
            trainer.state = TrainerState.load_from_json(f"{trained}/trainer_state.json")
            measured = {}
        evaluated = trainer.evaluate() if eval_rows is not None else {}
        trainer.save_model()
    metrics = _metrics(trainer, measured, evaluated)
    if trainer.is_world_process_zero():
        _describe(arguments, config, metrics)
    return DistillResult(output_dir, metrics)


def _build(
    arguments: DistillArguments,
    config: LeafConfig,
    trained: str | None,
    rows: list[DistillRow],
    eval_rows: list[DistillRow] | None,
    tokenizers: tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase],
) -> LeafTrainer:
    """The trainer of the student, or of its finished weights."""
    teacher_dtype = arguments.teacher_dtype
    if teacher_dtype == "auto":
        teacher_dtype = "bfloat16" if config.bf16 else "float32"
    device = str(config.device)
    student = load_model(trained or arguments.student, dtype="float32", device=device)
    if student.generation_config is not None:
        _make_savable(student.generation_config)
    teacher = load_model(arguments.teacher, dtype=teacher_dtype, device=device)
    try:
        return LeafTrainer(
            student,
            teacher,
            config,
            rows,
            eval_rows,
            tokenizers[0],
            teacher_processing_class=tokenizers[1],
        )
    except (ValueError, RuntimeError, ImportError, OSError) as error:
        # The settings of transformers.Trainer are the user's too: a sentence, no traceback.
        raise ValueError(str(error).strip()) from error


def _make_savable(generation: Any) -> None:
    """Take from a generation config what would stop its saving, and has no effect."""
    idle = () if generation.do_sample else _SAMPLING
    for name in idle if (generation.num_beams or 1) > 1 else (*idle, *_BEAMS):
        setattr(generation, name, None)


class _Watch(TrainerCallback):
    """Claims the directory once nothing can refuse the settings any more; logs the last step."""

    def __init__(self, directory: Path, identity: dict[str, object]) -> None:
        self.directory, self.identity = directory, identity

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.is_world_process_zero:
            claim_run_directory(self.directory, self.identity)
        if state.max_steps <= args.get_warmup_steps(state.max_steps):
            logger.warning(
                "the run has %d steps in all, and the warm-up never ends: lower originals_per_step "
                "or warmup_steps, or raise num_train_epochs",
                state.max_steps,
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_log |= state.global_step >= state.max_steps


def _compare_templates(
    arguments: DistillArguments,
    config: LeafConfig,
    student: PreTrainedTokenizerBase,
    teacher: PreTrainedTokenizerBase,
) -> None:
    """Log how the two models' prompts differ, and both from those that detection scored."""
    settings = {"chat_template": config.chat_template, "system_prompt": config.system_prompt}
    ours, theirs = (
        Renderer(one, chat_template=config.chat_template, system_prompt=config.system_prompt)
        for one in (student, teacher)
    )
    for sentence in template_differences(theirs, ours):
        logger.warning("%s", sentence)
    funnel = Path(arguments.dataset).expanduser() / "funnel.json"
    if funnel.is_file():
        detected = json.loads(funnel.read_text(encoding="utf-8")).get("settings", {})
        for name, value in settings.items():
            if detected.get(name, value) != value:
                logger.warning(
                    "%s is %r, but `leaf detect` scored with %r", name, value, detected[name]
                )


def _identity(
    arguments: DistillArguments,
    config: LeafConfig,
    rows: list[DistillRow],
    eval_rows: list[DistillRow] | None,
) -> dict[str, object]:
    """All that decides the weights and what is written about them."""
    every: dict[str, object] = config.to_dict()  # type: ignore[no-untyped-call]
    settings = {name: value for name, value in every.items() if not name.startswith(_INCIDENTAL)}
    identity: dict[str, object] = {
        "command": "distill",
        "student": content(arguments.student, model_fingerprint(arguments.student)),
        "teacher": content(arguments.teacher, model_fingerprint(arguments.teacher)),
        "teacher_dtype": arguments.teacher_dtype,
        "dataset": content(arguments.dataset, digest(rows)),
        **json.loads(json.dumps(settings, default=str)),
    }
    if eval_rows is not None:
        identity["eval_dataset"] = content(str(arguments.eval_dataset), digest(eval_rows))
    return identity


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


def _describe(arguments: DistillArguments, config: LeafConfig, metrics: dict[str, Any]) -> None:
    directory = Path(str(config.output_dir))
    write_bytes(directory / "README.md", model_card(arguments, config, metrics).encode())
    write_json(directory / "metrics.json", metrics)  # last: it says that the run is finished
    print(f"The student is in {directory}; metrics.json and README.md there say how it went")
