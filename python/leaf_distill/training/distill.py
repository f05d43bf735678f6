"""`leaf distill`: a pair, a dataset and settings in; a trained, described checkpoint out."""

from __future__ import annotations

import contextlib
import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_utils import sort_checkpoints

from leaf_distill.data.collator import count_notes, count_reasons
from leaf_distill.data.example import Example
from leaf_distill.io import locked, read_json, write_bytes, write_json
from leaf_distill.models.loading import check_same_tokenizer, load_tokenizer
from leaf_distill.training.checkpoint import NoCheckpoint, stopped
from leaf_distill.training.config import DistillArguments, LeafConfig
from leaf_distill.training.identity import (
    Identity,
    check_identity,
    check_output,
    claim,
    digest_of,
    identity_of,
    read_identity,
)
from leaf_distill.training.inputs import (
    compare_templates,
    find_dataset,
    load_dataset,
    read_detected,
)
from leaf_distill.training.loss import MEASURES
from leaf_distill.training.model_card import model_card
from leaf_distill.training.trainer import LeafTrainer

logger = logging.getLogger(__name__)

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
    what is there, and with more `max_steps` it trains on. Weights train and are saved in float32
    (bfloat16 autocast on a GPU that has it): steps of 1e-5 vanish in bfloat16 weights. The teacher
    is bfloat16 there, else float32. With `arguments.lora_r`, or with an adapter as the student, an
    adapter is trained and saved.

    Raises:
        ValueError: models or rows cannot be read, the tokenizers differ, no row is left, settings
            do not fit together, or the directory holds other files or a run of other settings.
        RuntimeError: the loss became NaN, or the weights are not finite.
        StoreError: the disk is full, or another process works in the directory.
    """
    output_dir = Path(str(config.output_dir))
    check_output(output_dir)
    _check_together(arguments, config)
    student, teacher = (
        load_tokenizer(name, trust_remote_code=arguments.trust_remote_code)
        for name in (arguments.student, arguments.teacher)
    )
    check_same_tokenizer(teacher, student)
    source = find_dataset(arguments.dataset)
    detected = read_detected(source)
    compare_templates(config, student, teacher, detected)
    examples = load_dataset(arguments, source, arguments.dataset_split, arguments.max_rows)
    eval_examples = None
    if arguments.eval_dataset is not None:
        eval_source = find_dataset(arguments.eval_dataset)
        eval_examples = load_dataset(arguments, eval_source, arguments.eval_split, None)
    run = _Run(arguments, config, output_dir, detected, examples, eval_examples)
    with contextlib.nullcontext() if config.process_index else locked(output_dir):
        return run.go((student, teacher))


@dataclass
class _Run:
    """A checked command, at work in its directory."""

    arguments: DistillArguments
    config: LeafConfig
    output_dir: Path
    detected: dict[str, Any]
    examples: list[Example]
    eval_examples: list[Example] | None

    def go(
        self, tokenizers: tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase]
    ) -> DistillResult:
        identity = identity_of(self.arguments, self.config, self.examples, self.eval_examples)
        finished = self._finished()
        changes = check_identity(self.output_dir, identity, finished=finished is not None)
        asked = str(self.config.resume_from_checkpoint)  # text when it comes from the command line
        wanted = {"none": True, "true": True, "false": False}.get(asked.lower(), asked)
        if isinstance(wanted, str):
            _check_parent(Path(wanted), identity)
        elif wanted and finished is not None and not changes:
            logger.warning("%s is finished: nothing is left to do", self.output_dir)
            return DistillResult(self.output_dir, finished)
        elif wanted and not sort_checkpoints(str(self.output_dir)):
            if finished is not None:
                raise ValueError(
                    f"max_steps: must stay as it was, since {self.output_dir} has no checkpoint to "
                    "go on from; give another output_dir"
                )
            wanted = False
        for change in changes if wanted else ():
            logger.warning("%s; the steps so far stay as they are", change)
        trainer = self._build(tokenizers)
        # A run that is to start at an earlier step must never go on from what came after it.
        trainer.add_callback(_Claim(self.output_dir, identity, discard=wanted is not True))
        with stopped(self.output_dir):
            measured = self._train(trainer, wanted)
            trainer.save_model()  # before an evaluation, which may round the weights
            evaluated = trainer.evaluate() if self.eval_examples is not None else {}
        metrics = self._metrics(trainer, measured, evaluated)
        if trainer.is_world_process_zero():
            self._describe(metrics)
        return DistillResult(self.output_dir, metrics)

    def _finished(self) -> dict[str, Any] | None:
        """The metrics of a run that was finished, and whose weights are still there."""
        try:
            metrics = read_json(self.output_dir / "metrics.json")
            whole = all((self.output_dir / name).is_file() for name in metrics["weights"])
        except (ValueError, TypeError, KeyError):
            return None
        return metrics if whole and metrics["weights"] else None

    def _build(
        self, tokenizers: tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase]
    ) -> LeafTrainer:
        try:
            trainer = LeafTrainer(
                self.arguments.student,
                self.arguments.teacher,
                self.config,
                self.examples,
                self.eval_examples,
                tokenizers[0],
                teacher_processing_class=tokenizers[1],
                peft_config=_adapter(self.arguments),
                teacher_dtype=self.arguments.teacher_dtype,
                trust_remote_code=self.arguments.trust_remote_code,
            )
        except (ValueError, TypeError, RuntimeError, ImportError, OSError) as error:
            raise _refused(error) from error
        if (generation := getattr(trainer.model, "generation_config", None)) is not None:
            _make_savable(generation)
        return trainer

    def _train(self, trainer: LeafTrainer, wanted: str | bool) -> Mapping[str, float]:
        try:
            try:
                return trainer.train(resume_from_checkpoint=wanted).metrics
            except NoCheckpoint:  # none of those there is whole
                return trainer.train().metrics
        except (ValueError, TypeError, ImportError, KeyError) as error:
            # Before the first step it is a setting that torch or transformers refuses.
            if trainer.state.global_step:
                raise
            raise _refused(error) from error

    def _metrics(
        self,
        trainer: LeafTrainer,
        trained: Mapping[str, float],
        evaluated: Mapping[str, float],
    ) -> dict[str, Any]:
        dataset = trainer.train_dataset
        assert dataset is not None
        weights = sorted(
            path.name
            for kind in ("*.safetensors", "*.bin")
            for path in self.output_dir.glob(kind)
            if path.name != "training_args.bin"
        )
        return {
            "rows": {
                "originals": len(dataset.originals),
                "counterfactuals": len(dataset.counterfactuals),
                "label_tokens": dataset.label_tokens,
                "left_out": count_reasons(trainer.left_out),
                "altered": count_notes(dataset.examples),
            },
            "left_out": [
                {"row_id": one.row_id, "candidate_id": one.candidate_id, **one.outcome._asdict()}
                for one in trainer.left_out
                if one.outcome is not None
            ],
            "dataset_sha256": digest_of(self.examples),
            "strategies": sorted(
                {one.strategy for one in dataset.examples if one.strategy is not None}
            )
            or [self.detected[name] for name in ("strategy",) if name in self.detected],
            "detected": self.detected,
            "train": dict(trained),
            "eval": dict(evaluated),
            "log": trainer.state.log_history,
            "weights": weights,
        }

    def _describe(self, metrics: dict[str, Any]) -> None:
        card = model_card(self.arguments, self.config, metrics)
        write_bytes(self.output_dir / "README.md", card.encode())
        write_json(self.output_dir / "metrics.json", metrics)  # last: the run is finished
        print(
            f"The student is in {self.output_dir}; metrics.json and README.md there say how it went"
        )


class _Claim(TrainerCallback):
    """Claims the directory once nothing can refuse the settings any more."""

    def __init__(self, directory: Path, identity: Identity, *, discard: bool) -> None:
        self.directory, self.identity, self.discard = directory, identity, discard

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.is_world_process_zero:
            for checkpoint in sort_checkpoints(str(self.directory)) if self.discard else ():
                if int(checkpoint.rpartition("-")[2]) > state.global_step:
                    shutil.rmtree(checkpoint)
            claim(self.directory, self.identity)
        if state.max_steps <= args.get_warmup_steps(state.max_steps):
            logger.warning(
                "the run has %d steps in all, and the warm-up never ends: lower originals_per_step "
                "or warmup_steps, or raise num_train_epochs",
                state.max_steps,
            )


def _check_parent(checkpoint: Path, identity: Identity) -> None:
    """Go on only from a checkpoint of a run of these very settings, wherever it lies."""
    if read_identity(checkpoint.parent) is None:
        raise ValueError(
            f"resume_from_checkpoint: must be a checkpoint of a run of `leaf distill`, got "
            f"{checkpoint}, which has no run.json beside it"
        )
    check_identity(checkpoint.parent, identity, finished=False)


def _check_together(arguments: DistillArguments, config: LeafConfig) -> None:
    if config.disable_dropout and arguments.lora_dropout:
        raise ValueError(
            f"lora_dropout: must be 0 with disable_dropout, got {arguments.lora_dropout}"
        )
    measured = str(config.metric_for_best_model or "loss").removeprefix("eval_")
    if measured not in MEASURES:
        raise ValueError(
            f"metric_for_best_model: must be one of {', '.join(MEASURES)}, got {measured!r}"
        )


def _adapter(arguments: DistillArguments) -> Any:
    """The LoRA settings, None where all weights train."""
    if arguments.lora_r is None:
        return None
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ValueError("lora_r: needs the package peft: pip install peft") from error
    return LoraConfig(
        r=arguments.lora_r,
        lora_alpha=arguments.lora_alpha or 2 * arguments.lora_r,
        lora_dropout=arguments.lora_dropout,
        target_modules=arguments.lora_target_modules or "all-linear",
        task_type="CAUSAL_LM",
    )


def _refused(error: Exception) -> ValueError:
    """The sentence for settings that transformers, torch or peft refuses; our own stay."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    raised_in = "" if trace is None else str(trace.tb_frame.f_globals.get("__name__"))
    if raised_in.startswith(("leaf_distill", "leaf_ext")):
        return ValueError(str(error))
    first = next(iter(str(error).strip().splitlines()), "")
    return ValueError(
        f"settings: must be what transformers and torch take, got {type(error).__name__}: {first}"
    )


def _make_savable(generation: Any) -> None:
    """Take from a generation config what would stop its saving, and has no effect."""
    idle = () if generation.do_sample else _SAMPLING
    for name in idle if (generation.num_beams or 1) > 1 else (*idle, *_BEAMS):
        setattr(generation, name, None)
