"""`leaf distill`: a pair, a dataset and settings in; a trained, described checkpoint out."""

from __future__ import annotations

import contextlib
import logging
import shutil
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_utils import sort_checkpoints

from leaf_distill.data.collator import count_notes, count_reasons
from leaf_distill.data.dataset import load_examples
from leaf_distill.data.example import Example
from leaf_distill.data.source import find_arm
from leaf_distill.io import locked, read_json, user_directory, write_bytes, write_json
from leaf_distill.models.source import named
from leaf_distill.terminal import say
from leaf_distill.training.answers import gradable
from leaf_distill.training.checkpoint import (
    NoCheckpoint,
    has_all_files,
    hash_file,
    hash_weights,
    stopped,
)
from leaf_distill.training.checks import GREATER_IS_BETTER, of_evaluation, refused
from leaf_distill.training.config import DistillArguments, LeafConfig
from leaf_distill.training.identity import (
    Identity,
    check_identity,
    check_output,
    check_parent,
    claim,
    digest_of,
    earlier_changes,
    identity_of,
    read_finished,
)
from leaf_distill.training.model_card import model_card
from leaf_distill.training.pair import import_peft
from leaf_distill.training.show import show_rows
from leaf_distill.training.teacher_cache import TeacherCache
from leaf_distill.training.token_kl import TokenKL
from leaf_distill.training.trainer import LeafTrainer

logger = logging.getLogger(__name__)

# Without sampling or beams these have no effect. transformers reads them from a generation config
# and refuses to write them again.
_SAMPLING = (
    *("temperature", "top_k", "top_p", "min_p", "top_h", "typical_p"),
    *("epsilon_cutoff", "eta_cutoff"),
)
_BEAMS = ("early_stopping", "length_penalty")


@dataclass(frozen=True)
class DistillResult:
    """The directory of the trained student, and the content of its metrics.json."""

    output_dir: Path
    metrics: dict[str, Any] = field(repr=False)


def distill(arguments: DistillArguments, config: LeafConfig) -> DistillResult:
    """Train the student and save it in `config.output_dir` with tokenizer, card and metrics.

    The same command goes on from the newest whole checkpoint in the directory
    (`config.resume_from_checkpoint` names another one, or is "false"); of a finished run it returns
    what is there, and with more `max_steps` it trains on. Weights train and are saved in float32
    (bfloat16 autocast on a GPU that has it): steps of 1e-5 vanish in bfloat16 weights. The teacher
    is bfloat16 there, else float32. With `arguments.lora_r`, or with an adapter as the student, an
    adapter is trained and saved. With `arguments.show` it prints rows as the models read them, and
    neither trains nor writes.

    Args:
        arguments: models, rows, and the adapter.
        config: settings of the training.

    Returns:
        The directory and the measures.

    Raises:
        ValueError: models or rows cannot be read, the tokenizers differ, no row is left, settings
            do not fit together, or the directory holds other files or a run of other settings.
        RuntimeError: the loss or the gradient is not finite, or the weights are not.
        StoreError: the disk is full, or another process works in the directory.
    """
    output_dir = user_directory(str(config.output_dir))
    if not arguments.show:
        check_output(output_dir)
    _check_together(arguments, config)
    examples = _load(arguments, arguments.dataset, arguments.dataset_split, arguments.max_rows)
    if arguments.show:
        show_rows(arguments, config, examples)
        return DistillResult(output_dir, {})
    eval_examples = None
    if arguments.eval_dataset is not None:
        with named("eval_dataset", "dataset"):
            eval_examples = _load(arguments, arguments.eval_dataset, arguments.eval_split, None)
    if eval_examples is not None:
        _check_evaluation(arguments, config, eval_examples)
    detected = _detected(arguments.dataset, config)
    identity = identity_of(arguments, config, examples, eval_examples)
    with contextlib.nullcontext() if config.process_index else locked(output_dir):
        start, finished = _find_start(config, output_dir, identity)
        if finished is not None:
            logger.warning("%s is finished: nothing is left to do", output_dir)
            return DistillResult(output_dir, finished)
        trainer = _make_trainer(arguments, config, examples, eval_examples)
        # A run that is to start at an earlier step must never go on from what came after it.
        trainer.add_callback(_Claim(output_dir, identity, discard=start is not True))
        trainer.add_callback(seen := _LastEvaluation())
        trainer.add_callback(token_kl := TokenKL(trainer, output_dir))
        with stopped(output_dir):
            trained = _train(trainer, start)
            token_kl.finish()
            trainer.save_model()  # before an evaluation, which may round the weights
            evaluated = _evaluate(trainer, seen) if eval_examples is not None else {}
        metrics = _metrics(trainer, examples, detected) | {"train": trained, "eval": evaluated}
        metrics |= {"changes": identity["changes"], "best": _best(trainer)}
        cache = trainer.teacher_cache
        metrics["teacher"] = {
            "name": identity["teacher"]["name"],
            "stored": None if cache is None else cache.description,
        }
        if trainer.is_world_process_zero():
            card = model_card(arguments, config, metrics)
            write_bytes(output_dir / "README.md", card.encode())
            write_json(output_dir / "metrics.json", metrics)  # last: the run is finished
            say(f"The student is in {output_dir}; its card README.md and metrics.json are there")
    return DistillResult(output_dir, metrics)


def _check_together(arguments: DistillArguments, config: LeafConfig) -> None:
    if config.disable_dropout and arguments.lora_dropout:
        raise ValueError(
            f"lora_dropout: must be 0 with disable_dropout, got {arguments.lora_dropout}"
        )
    for name in of_evaluation(config) if arguments.eval_dataset is None else ():
        raise ValueError(f"eval_dataset: must be given with {name}, got nothing; give rows")
    _check_metric(config)


def _check_metric(config: LeafConfig, absent: Collection[str] = ()) -> None:
    """Check that an evaluation has the measure that weights are compared by."""
    of_teacher = ("kd_loss", "cd_loss", "agreement") if config.ce_weight == 1 else ()
    accuracy = () if config.eval_answers else ("accuracy",)
    known = [one for one in GREATER_IS_BETTER if one not in (*absent, *of_teacher, *accuracy)]
    measured = str(config.metric_for_best_model or "loss").removeprefix("eval_")
    if measured not in known:
        hint = "; give --eval_answers N" if measured in accuracy else ""
        raise ValueError(
            f"metric_for_best_model: must be one of {', '.join(known)}, got {measured!r}{hint}"
        )


def _check_evaluation(
    arguments: DistillArguments, config: LeafConfig, rows: Sequence[Example]
) -> None:
    """Check that these rows and this teacher give the measures that are needed."""
    cache = arguments.teacher_cache
    stored = None if cache is None else TeacherCache(cache).manifest["signal"]
    absent = ["nll"] if stored == "topk" and not config.ce_weight else []
    if all(one.branch == "original" for one in rows):
        absent.append("cd_loss")
    _check_metric(config, absent)
    if config.eval_answers and not gradable(rows, config):
        raise ValueError(
            "eval_answers: must find a row of eval_dataset with an answer (with grade code, with "
            f"tests), got none of {len(rows)}; give such rows, or 0"
        )


def _load(
    arguments: DistillArguments, source: str, split: str, max_rows: int | None
) -> list[Example]:
    columns = arguments.columns if isinstance(arguments.columns, dict) else None
    return load_examples(source, split=split, columns=columns, max_rows=max_rows)


def _detected(source: str, config: LeafConfig) -> dict[str, Any]:
    """Return the settings of the run of `leaf detect` that made a dataset, or nothing.

    Logs which of them render prompts otherwise than the training does.
    """
    path = Path(source).expanduser()
    if (path / "run.json").is_file():
        path = find_arm(path)
    funnel = (path.parent if path.is_file() else path) / "funnel.json"
    summary = read_json(funnel) if funnel.is_file() else {}
    dataset = funnel.with_name("dataset.parquet")
    made = summary.get("dataset_sha256")
    if made is not None and dataset.is_file() and made != hash_file(dataset):
        summary = {}  # a run was killed between the two, or the dataset is another one
    settings = summary.get("settings")
    detected = settings if isinstance(settings, dict) else {}
    for name in ("chat_template", "chat_template_kwargs", "system_prompt"):
        value = getattr(config, name)
        if detected.get(name, value) != value:
            logger.warning(
                "%s is %r, but `leaf detect` scored with %r", name, value, detected[name]
            )
    return detected


def _find_start(
    config: LeafConfig, output_dir: Path, identity: Identity
) -> tuple[str | bool, dict[str, Any] | None]:
    """Return what to start from, as `train` takes it, and the metrics if nothing is left to do."""
    finished = read_finished(output_dir)
    changes = check_identity(output_dir, identity, finished=finished is not None)
    asked = str(config.resume_from_checkpoint)  # text when it comes from the command line
    start = {"none": True, "true": True, "false": False}.get(asked.lower(), asked)
    if isinstance(start, str):
        check_parent(Path(start), identity)
    elif start and finished is not None and not changes:
        return start, finished
    elif start and not sort_checkpoints(str(output_dir)):
        if finished is not None:
            raise ValueError(
                f"{changes[0].partition(' ')[0]}: must stay as it was, since {output_dir} has no "
                "checkpoint to go on from; give another output_dir"
            )
        start = False
    # The card tells them: a schedule that became longer is not that of a run from the start.
    identity["changes"] = [*earlier_changes(output_dir), *changes] if start else []
    for change in changes if start else ():
        logger.warning("%s; the steps so far stay as they are", change)
    return start, None


def _make_trainer(
    arguments: DistillArguments,
    config: LeafConfig,
    examples: list[Example],
    eval_examples: list[Example] | None,
) -> LeafTrainer:
    try:
        trainer = LeafTrainer(
            arguments.student,
            arguments.teacher or None,
            config,
            examples,
            eval_examples,
            peft_config=_adapter(arguments),
            teacher_dtype=arguments.teacher_dtype,
            teacher_device=arguments.teacher_device,
            teacher_quantization=arguments.teacher_quantization,
            teacher_cache=arguments.teacher_cache,
            trust_remote_code=arguments.trust_remote_code,
        )
    except (ValueError, TypeError, RuntimeError, ImportError, OSError) as error:
        raise refused(error) from error
    generation = getattr(trainer.model, "generation_config", None)
    if generation is not None:
        idle = () if generation.do_sample else _SAMPLING
        for name in idle if (generation.num_beams or 1) > 1 else idle + _BEAMS:
            setattr(generation, name, None)
    return trainer


def _adapter(arguments: DistillArguments) -> Any:
    """Return the LoRA settings, or None where all weights train."""
    if arguments.lora_r is None:
        return None
    return import_peft("lora_r").LoraConfig(
        r=arguments.lora_r,
        lora_alpha=arguments.lora_alpha or 2 * arguments.lora_r,
        lora_dropout=arguments.lora_dropout,
        target_modules=arguments.lora_target_modules or "all-linear",
        task_type="CAUSAL_LM",
    )


def _train(trainer: LeafTrainer, start: str | bool) -> dict[str, float]:
    try:
        try:
            output = trainer.train(resume_from_checkpoint=start)
        except NoCheckpoint:  # none of those there is whole
            output = trainer.train()
    except (ValueError, TypeError, ImportError, KeyError, RuntimeError) as error:
        # Before the first step it is a setting that torch or transformers refuses.
        if trainer.state.global_step:
            raise
        raise refused(error) from error
    return output.metrics


def _evaluate(trainer: LeafTrainer, seen: _LastEvaluation) -> dict[str, float]:
    """Return and log the measures of the weights at the end, which may have been taken just now."""
    state, config = trainer.state, trainer.args
    loaded = config.load_best_model_at_end and state.best_model_checkpoint is not None
    # The weights are rounded for an evaluation after the training, and not for one within it.
    rounded = config.bf16_full_eval or config.fp16_full_eval
    if rounded or seen.step != (state.best_global_step if loaded else state.global_step):
        return trainer.evaluate()
    trainer.log(dict(seen.measures))
    return seen.measures


def _metrics(
    trainer: LeafTrainer, examples: Sequence[Example], detected: dict[str, Any]
) -> dict[str, Any]:
    """Return the content of metrics.json but `train` and `eval`."""
    dataset = trainer.train_dataset
    assert dataset is not None
    strategies = {one.strategy for one in dataset.examples if one.strategy is not None}
    if not strategies and "strategy" in detected:
        strategies = {detected["strategy"]}
    return {
        "rows": {
            "originals": len(dataset.originals),
            "counterfactuals": len(dataset.counterfactuals),
            "cross": sum(one.branch == "cross" for one in dataset.examples),
            "responses": sum(one.segment > 0 for one in dataset.examples),
            "label_tokens": dataset.label_tokens,
            "left_out": count_reasons(trainer.left_out),
            "altered": count_notes(dataset.examples),
        },
        "left_out": [
            {"row_id": one.row_id, "candidate_id": one.candidate_id, **one.outcome._asdict()}
            for one in trainer.left_out
            if one.outcome is not None
        ],
        "dataset_sha256": digest_of(examples),
        "strategies": sorted(strategies),
        "detected": detected,
        "log": trainer.state.log_history,
        "weights": hash_weights(Path(str(trainer.args.output_dir))),
    }


def _best(trainer: LeafTrainer) -> dict[str, Any] | None:
    """Return the step whose weights were taken as the best ones, and its measure."""
    state, config = trainer.state, trainer.args
    if not config.load_best_model_at_end or state.best_model_checkpoint is None:
        return None
    measure = f"eval_{str(config.metric_for_best_model).removeprefix('eval_')}"
    return {"step": state.best_global_step, "measure": measure, "value": state.best_metric}


class _LastEvaluation(TrainerCallback):
    """Keeps the step of the last evaluation, and what it measured."""

    step: int | None = None
    measures: dict[str, float]

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.step, self.measures = state.global_step, kwargs["metrics"]


class _Claim(TrainerCallback):
    """Claims the directory once nothing can refuse the settings any more."""

    def __init__(self, directory: Path, identity: Identity, *, discard: bool) -> None:
        self.directory, self.identity, self.discard = directory, identity, discard

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.is_world_process_zero:
            for checkpoint in sort_checkpoints(str(self.directory)):
                later = int(checkpoint.rpartition("-")[2]) > state.global_step
                # The rest of one that a kill left half saved or deleted would count as newer.
                if (self.discard and later) or not has_all_files(Path(checkpoint)):
                    shutil.rmtree(checkpoint)
            claim(self.directory, self.identity)
