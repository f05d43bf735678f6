"""LeafTrainer: distils a teacher into a student on originals and counterfactuals together."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase, PrinterCallback, Trainer, TrainerCallback
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import EvalLoopOutput, TrainOutput

from leaf_distill.data.collator import Batch, ExampleDataset, collate, split_batch
from leaf_distill.data.example import Example
from leaf_distill.data.prompt import Renderer
from leaf_distill.models.checks import eval_mode, pads_in_front
from leaf_distill.models.lm_head import LMHeadHook
from leaf_distill.models.loading import without_progress_bars
from leaf_distill.training.answers import count_right, gradable
from leaf_distill.training.broken import save_broken_batch
from leaf_distill.training.callbacks import (
    CompleteLogs,
    SetLearningRate,
    StopEarly,
    WriteManifest,
)
from leaf_distill.training.checkpoint import all_finite, find_checkpoint
from leaf_distill.training.checks import check_beside_cache
from leaf_distill.training.config import LeafConfig
from leaf_distill.training.log_lines import LogLines, ProgressBar
from leaf_distill.training.loss import (
    CURE,
    SUMS,
    BrokenLoss,
    KdWeight,
    Objective,
    count_labels,
    count_tokens,
    mean_loss,
    metrics,
)
from leaf_distill.training.pair import Model, make_pair
from leaf_distill.training.sampler import StepLoader, StepSampler, check_failed
from leaf_distill.training.selection import Selection
from leaf_distill.training.sharding import is_sharded, keep_float32, saved_whole
from leaf_distill.training.teacher import LiveTeacher
from leaf_distill.training.teacher_cache import StoredTeacher, open_cache
from leaf_ext import linear_dual_kl, use_cpu_memory_pool

logger = logging.getLogger(__name__)


class LeafTrainer(Trainer):
    """L = lambda L_kd + (1 - lambda) L_cd over each optimizer step, on one forward per model.

    L_kd is KL(teacher, student) on originals, L_cd on counterfactuals, each a mean over its label
    tokens in the whole step: all accumulation steps and all ranks. With `kd_weight="pool"`, lambda
    is the originals' share of the step's tokens. A step without counterfactuals is L_kd. The
    settings `span_weighting` and `token_selection` say how these tokens count. An evaluation
    measures all label tokens, with the last value of a scheduled `kd_weight`.

    In a counterfactual of the branch "cross" the teacher reads another prompt than the student,
    before the same labels. The part of a response that a row gives as context stands behind both
    prompts and has no label.

    Args:
        model: the student, a causal language model of transformers or a PeftModel around one, or
            its name, which is loaded in float32.
        teacher_model: the teacher or its name; put into eval mode, frozen, moved to its device, and
            neither optimized nor saved. Its weights must not change in a training: on a CPU the
            hidden states of a row are kept. With a `teacher_cache` None, or its name to compare.
        args: the settings.
        train_dataset: a run directory of `leaf detect`, rows in the layout of its
            `dataset.parquet`, or in any other that it takes (all originals): a path, a hub name, a
            `datasets.Dataset` or a list of dicts. Rows that cannot be trained on, such as longer
            ones than `args.max_length`, are left out: see `left_out`.
        eval_dataset: rows, or a dict of them, for the evaluation loss.
        processing_class: the student's tokenizer; by default the one beside the model.
        teacher_processing_class: the teacher's; by default the one beside its model, or else the
            student's.
        data_collator: makes a batch of Examples, with the keys that
            `leaf_distill.data.collator.collate` describes.
        compute_metrics: takes the measures of an evaluation by name (`loss`, `kd_loss`, `cd_loss`,
            `student_entropy`, `teacher_entropy`, `agreement`, `nll`, `cf_rows`, `skipped_rows`,
            with `eval_answers` also `accuracy` and `accuracy_n`) and returns more of them. It gets
            no logits: these are never formed.
        callbacks, optimizers: as for `transformers.Trainer`.
        peft_config: wraps the student in an adapter, which alone is trained and saved.
        teacher_dtype: of a teacher that is given by name: auto, float32, bfloat16 or float16.
        teacher_device: where the teacher is: "auto" is the student's device; "cpu", "cuda:1" and so
            on; "balanced", for a teacher that is given by name, spreads it over all GPUs, the CPU's
            memory and the disk.
        teacher_quantization: int8, bnb8 or nf4: how the weights of a teacher that is given by name
            are rounded.
        teacher_cache: the output directory of `leaf cache`, which takes the teacher's place.
        trust_remote_code: whether code that comes with a named model may run.

    Raises:
        ValueError: a model has no plain linear head, the two do not share a vocabulary, the rows
            cannot be read, none is left or none is given for the evaluations that are asked for, or
            the cache does not fit or lacks some of them.
    """

    args: LeafConfig
    train_dataset: ExampleDataset | None
    eval_dataset: ExampleDataset | dict[str, ExampleDataset] | None

    def __init__(
        self,
        model: Model | os.PathLike[str],
        teacher_model: Model | os.PathLike[str] | None,
        args: LeafConfig,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        *,
        teacher_processing_class: PreTrainedTokenizerBase | None = None,
        data_collator: Callable[[Sequence[Example]], Batch] | None = None,
        compute_metrics: Callable[[dict[str, float]], dict[str, float]] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, Any] = (None, None),
        peft_config: Any = None,
        teacher_dtype: str = "auto",
        teacher_device: str = "auto",
        teacher_quantization: str | None = None,
        teacher_cache: str | Path | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        if not isinstance(args, LeafConfig):
            raise ValueError(f"args: must be a LeafConfig, got a {type(args).__name__}; convert it")
        if isinstance(model, os.PathLike):
            model = os.fspath(model)
        if isinstance(teacher_model, os.PathLike):
            teacher_model = os.fspath(teacher_model)
        if eval_dataset is None and args.eval_strategy != "no":
            raise ValueError(
                "eval_dataset: must be given with eval_strategy, got None; give rows, or leave "
                "eval_strategy out"
            )
        self.teacher_cache = (
            None if teacher_cache is None else open_cache(teacher_cache, teacher_model)
        )
        self._asks_teacher = args.ce_weight < 1
        if self.teacher_cache is not None:
            check_beside_cache(
                teacher_dtype=teacher_dtype,
                teacher_device=teacher_device,
                teacher_quantization=teacher_quantization,
                teacher_processing_class=teacher_processing_class,
            )
        if self.teacher_cache is not None and 0 < args.ce_weight < 1:
            self.teacher_cache.check_labels()
        if self.teacher_cache is None and teacher_model is None:
            raise ValueError("teacher_model: must be given without a teacher_cache, got None")
        self._pair = make_pair(
            args,
            model,
            self.teacher_cache or cast(Model, teacher_model),
            processing_class,
            teacher_processing_class,
            teacher_dtype=teacher_dtype,
            teacher_device=teacher_device,
            teacher_quantization=teacher_quantization,
            trust_remote_code=trust_remote_code,
            peft_config=peft_config,
        )
        student, self.teacher_model = self._pair.models["student"], self._pair.models.get("teacher")
        self.left_out: list[Example] = []
        """Training rows that were left out, each with its `outcome`."""
        train_rows = None
        if train_dataset is not None:
            train_rows, self.left_out = self._prepare(train_dataset, "train_dataset")
            if args.failed_share is not None:
                check_failed(train_rows.failed)
        one = torch.ones(1, 1, device=args.device)
        linear_dual_kl(one, one, one, one, one[0], backend=cast(Any, args.backend))  # is it there?
        self._objective = Objective(
            LMHeadHook(student, "student"),
            StoredTeacher(self.teacher_cache, args.device)
            if self.teacher_cache
            else LiveTeacher(self.teacher_model, args.device),
            args.temperature,
            args.divergence,
            args.backend,
            args.ce_weight,
        )
        own = [CompleteLogs(), LogLines(), WriteManifest()]
        own += [] if optimizers[0] else [SetLearningRate()]
        if args.early_stopping_patience is not None:
            own.append(StopEarly(args.early_stopping_patience))
        super().__init__(
            model=student,
            args=args,
            data_collator=data_collator or collate,
            train_dataset=train_rows,
            eval_dataset=self._prepare_eval(eval_dataset),
            processing_class=self._pair.renderers["student"].tokenizer,
            compute_metrics=cast(Any, compute_metrics),
            callbacks=[*own, *(callbacks or [])],
            optimizers=optimizers,
        )
        self.pop_callback(PrinterCallback if args.disable_tqdm else DEFAULT_PROGRESS_CALLBACK)
        if not args.disable_tqdm:
            self.add_callback(ProgressBar)
        keep_float32(self.accelerator)
        # The Trainer then leaves the loss as it is: it is already a mean over the whole step.
        self.model_accepts_loss_kwargs = self.loss_is_scaled_for_ga = True
        self._sums = self._eval_sums = _zeros()
        self._steps_without_cf = 0
        self._read = torch.zeros(2, dtype=torch.float64)  # tokens and label tokens, of all ranks
        self._since: float | None = None  # the start of the first step since the last log
        self._step: list[Batch] = []
        if args.eval_answers:
            if self.is_fsdp_enabled or self.is_deepspeed_enabled:
                raise ValueError(
                    "eval_answers: must be 0 with FSDP or DeepSpeed, whose shards of a model "
                    f"cannot answer alone, got {args.eval_answers}; use `leaf evaluate` afterwards"
                )
            if eval_dataset is None:
                logger.warning("eval_answers has no effect without an eval_dataset; give rows")
            with eval_mode(student):
                pads_in_front(student)  # measured before autocast rounds the logits

    # ---- data ----

    def _prepare(self, rows: Any, name: str) -> tuple[ExampleDataset, list[Example]]:
        prepared = self._pair.prepare(rows, name)
        if self.teacher_cache is not None and self._asks_teacher:
            self.teacher_cache.check_rows(prepared[0], name)
        return prepared

    def _prepare_eval(self, rows: Any) -> Any:
        if isinstance(rows, Mapping):
            return {name: self._prepare(part, name)[0] for name, part in rows.items()}
        if rows is None or isinstance(rows, ExampleDataset):
            return rows
        return self._prepare(rows, "eval_dataset")[0]

    def get_train_dataloader(self) -> DataLoader[Example]:
        """Return this rank's batches, which accelerate must not share among the ranks again."""
        if self.train_dataset is None:
            raise ValueError("train_dataset: must be given for a training, got None; give rows")
        sampler = StepSampler(
            self.train_dataset.originals,
            self.train_dataset.counterfactuals,
            failed=self.train_dataset.failed,
            failed_share=self.args.failed_share,
            batch_size=self.args.per_device_train_batch_size,
            accumulation=self.args.gradient_accumulation_steps,
            world_size=self.args.world_size,
            rank=self.args.process_index,
            seed=self.args.seed if self.args.data_seed is None else self.args.data_seed,
            drop_last=self.args.dataloader_drop_last,
        )
        return StepLoader(self.train_dataset, sampler, self.args, self.data_collator)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Example]:
        """Return this rank's share of the evaluation rows, each row on exactly one rank."""
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(dataset, str) and isinstance(self.eval_dataset, dict):
            dataset = self.eval_dataset[dataset]
        if dataset is None:
            raise ValueError("eval_dataset: must be given for an evaluation, got None; give rows")
        dataset = self._prepare_eval(dataset)
        sampler = StepSampler(
            range(len(dataset)),
            batch_size=self.args.per_device_eval_batch_size,
            world_size=self.args.world_size,
            rank=self.args.process_index,
            shuffle=False,
        )
        return StepLoader(dataset, sampler, self.args, self.data_collator)

    # ---- training ----

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """Train, after comparing both models' heads with their own logits on one row.

        The learning rate is the one of `args`, also when a checkpoint was written with another.

        Args:
            resume_from_checkpoint: the checkpoint to go on from, or True for the newest whole one;
                a newer one that is damaged or not finite is named in the log and passed over.
            trial, ignore_keys_for_eval: as for `transformers.Trainer`.

        Returns:
            The steps, and `train_loss`, the mean over the whole run.

        Raises:
            ValueError: a head does not give its model's logits, or the named checkpoint is not
                whole, or there is none.
            RuntimeError: the loss or the gradient is not finite, or the weights are not.
        """
        checkpoint = None
        if resume_from_checkpoint:
            checkpoint = find_checkpoint(resume_from_checkpoint, Path(str(self.args.output_dir)))
        if self.train_dataset is not None:
            make: Any = self.data_collator  # the Trainer's own takes dicts only
            batch = self._prepare_inputs(make([self.train_dataset.shortest]))
            self._objective.check(batch, weighted=self.args.span_weighting == "sample")
        self._sums, self._steps_without_cf, self._since = _zeros(), 0, None
        self._read.zero_()
        if checkpoint is not None and (output := self._take_last(checkpoint)) is not None:
            return output
        with self.running():
            output = super().train(checkpoint, trial, ignore_keys_for_eval)
        return output._replace(training_loss=output.metrics["train_loss"])

    def _take_last(self, checkpoint: str) -> TrainOutput | None:
        """Take a checkpoint of the last step as the result; transformers would train a step more.

        The last step is also one at which the run has stopped early. Returns None for an earlier
        one, and for one that only DeepSpeed can read.
        """
        *_, max_steps = self.set_initial_training_values(self.args, self.get_train_dataloader())
        state = TrainerState.load_from_json(f"{checkpoint}/trainer_state.json")
        patience = self.args.early_stopping_patience
        stopped = patience is not None and StopEarly.count(state) >= patience
        last = stopped or state.global_step >= max_steps
        readable = self.is_fsdp_enabled or any(Path(checkpoint).glob("*.safetensors"))
        if not last or not readable:
            return None
        self._load_from_checkpoint(checkpoint)
        self.state = state
        if self.args.load_best_model_at_end and state.best_model_checkpoint is not None:
            self._load_best_model()
        loss = mean_loss(state.log_history)
        return TrainOutput(state.global_step, loss, {"train_loss": loss})

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], Tensor]:
        """Return an optimizer step's batches, and its denominators (n_kd, n_cd) over all ranks."""
        self._since = self._since or time.monotonic()
        batches = list(islice(epoch_iterator, num_batches))
        counts = torch.zeros(4, dtype=torch.float64)
        for batch in batches:
            counts += torch.cat([count_labels(batch, self._selection()), count_tokens(batch)])
        passes = [len(self._passes(batch)) for batch in batches]
        everywhere = self._of_ranks(torch.cat([counts, torch.tensor(passes)]))
        for batch, number in zip(batches, everywhere[:, 4:].amax(dim=0), strict=True):
            batch["passes"] = number  # as many on all ranks: a sharded model gathers in each
        self._step = batches
        counts = everywhere[:, :4].sum(dim=0)
        self._read += counts[2:]
        self._steps_without_cf += int(counts[1] == 0)
        return batches, counts[:2].to(device)

    def _selection(self) -> Selection:
        """Return which label tokens the current step is trained on."""
        seed = (self.args.seed, self.state.global_step)
        return Selection(self.args.token_selection, self.args.token_share, seed)

    def _kd_weight(self, step: int) -> KdWeight:
        """Return lambda of a step, counted from 0."""
        return self.args.kd_weight_at(step / max(self.state.max_steps - 1, 1))

    def _passes(self, batch: Batch, at_least: int = 1) -> list[Batch]:
        objective = self._objective
        packed = objective.student.packs and objective.teacher.packs
        return split_batch(batch, self.args.max_batch_tokens, at_least=at_least, packed=packed)

    def training_step(
        self, model: nn.Module, inputs: Batch, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Run a batch forward and backward, in passes of at most `max_batch_tokens`."""
        at_least = int(inputs.pop("passes", 1))
        parts = self._passes(inputs, at_least)
        gradients, losses = self.accelerator.gradient_state, []
        ends_step = gradients.sync_gradients
        for number, part in enumerate(parts, 1):
            last = number == len(parts)
            gradients._set_sync_gradients(ends_step and last)
            with contextlib.nullcontext() if last else self.accelerator.no_sync(model):
                losses.append(super().training_step(model, part, num_items_in_batch))
        return torch.stack(losses).sum()

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Return this pass's part of the step's loss, times the ranks, whose mean DDP takes."""
        if return_outputs:
            raise ValueError("return_outputs: must be False, got True; the logits are never formed")
        counts, selection = num_items_in_batch, self._selection()
        if not isinstance(counts, Tensor):
            counts = count_labels(inputs, selection)
        weight = self._kd_weight(self.state.global_step)
        loss, sums = self._measure(model, inputs, counts, weight, selection)
        self._sums = self._sums + sums
        scaled: Tensor = loss * self.args.world_size
        return scaled

    def _measure(self, *arguments: Any) -> tuple[Tensor, Tensor]:
        """Return the objective of a pass; a batch whose loss is not finite is saved, and told."""
        try:
            return self._objective(*arguments)
        except BrokenLoss as error:
            place = self._save_broken(str(error), [error.batch], error.kl)
            raise RuntimeError(f"{error}. The batch is in {place}") from error

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Return the norm of a step's gradient, which must be finite."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)  # type: ignore[no-untyped-call]
        # The scaler of float16 looks for infinities, and steps over them.
        if self.args.fp16 or norm is None or math.isfinite(float(norm)):
            return norm
        reason = f"the gradient is not finite, though the loss is. {CURE}"
        place = self._save_broken(reason, self._step)
        raise RuntimeError(f"{reason}. The rows of the step are in {place}")

    def _save_broken(
        self, reason: str, batches: list[Batch], kl: list[list[float]] | None = None
    ) -> Path:
        rank = f"-{self.args.process_index}" if self.args.world_size > 1 else ""
        place = Path(str(self.args.output_dir)) / f"broken_batch{rank}.json"
        step, tokenizer = self.state.global_step, self._pair.renderers["student"].tokenizer
        save_broken_batch(place, reason, step, batches, tokenizer, kl)
        return place

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add to a log of the loss what was measured on the way since the last one."""
        if "loss" in logs:
            logs.update(metrics(self._of_ranks(self._sums).sum(dim=0)))
            logs["steps_without_cf"] = self._steps_without_cf
            logs |= self._speed()
            if ":" in str(self.args.kd_weight):
                logs["kd_weight"] = cast(float, self._kd_weight(self.state.global_step - 1))
            self._sums, self._steps_without_cf = _zeros(), 0
        if "train_loss" in logs:
            logs["train_loss"] = mean_loss(self.state.log_history)
        super().log(logs, start_time)

    def _speed(self) -> dict[str, float]:
        """Return the tokens a second and the share of labels since the last log, and start anew.

        Checkpoints and evaluations do not count: each comes between a log and the next step.
        """
        if self._since is None:
            return {}
        seconds, (tokens, labels) = time.monotonic() - self._since, self._read.tolist()
        self._since = None
        self._read.zero_()
        return {"tokens_per_second": tokens / seconds, "label_share": labels / max(tokens, 1)}

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the student, unless its weights are not finite (RuntimeError)."""
        model: Any = self.model
        local = (getattr(one, "_local_tensor", one) for one in model.parameters())
        broken = torch.tensor(int(not all_finite(local)))
        if self._of_ranks(broken).any():
            raise RuntimeError(
                f"the student's weights are not finite after step {self.state.global_step}, and "
                f"were not saved. {CURE}"
            )
        whole = contextlib.nullcontext() if _internal_call else saved_whole(self.accelerator)
        with without_progress_bars(), whole:
            super().save_model(output_dir, _internal_call)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Warn of what a checkpoint lacks, unless another weight of the model is the same one."""
        tied = set(getattr(self.model, "_tied_weights_keys", None) or ())
        if not (set(load_result.missing_keys) <= tied and not load_result.unexpected_keys):
            super()._issue_warnings_after_load(load_result)

    def _of_ranks(self, values: Tensor) -> Tensor:
        """Return the values of all ranks, stacked."""
        if self.args.world_size == 1:
            return values[None]
        gathered: Tensor = self.accelerator.gather(values[None].to(self.args.device))
        return gathered.cpu()

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Let both models run rows without padding, where they can and the settings allow it.

        On a CPU the memory of a pass's tensors goes to those of the next one, and the teacher's
        hidden states of rows that come again are kept.
        """
        with contextlib.ExitStack() as stack:
            if self.args.device.type == "cpu":
                stack.enter_context(use_cpu_memory_pool())
            stack.enter_context(self._objective.teacher.keeping())
            if self.args.packing and not self.args.torch_compile:
                stack.enter_context(self._objective.student.packing())
                stack.enter_context(self._objective.teacher.packing())
            yield

    # ---- evaluation ----

    def prediction_step(
        self,
        model: nn.Module,
        inputs: Batch,
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, None, None]:
        """Measure one batch; its sums count, and not the mean that the Trainer would take."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            at_least = int(self._of_ranks(torch.tensor(len(self._passes(inputs)))).max())
            parts = self._passes(inputs, at_least)
            counts, losses = count_labels(inputs), []
            for part in parts:
                # Every token must be measured, also one that a lambda of 0 or 1 would drop.
                loss, sums = self._measure(model, part, counts, "pool")
                losses.append(loss)
                self._eval_sums = self._eval_sums + sums
        return torch.stack(losses).sum(), None, None

    def evaluation_loop(
        self,
        dataloader: DataLoader[Example],
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Evaluate, with the loss of the whole dataset in place of a mean over batches."""
        self._eval_sums = _zeros()
        with self.running():
            if self.is_fsdp_enabled and not is_sharded(self.model):
                # accelerate shards a model together with its optimizer only.
                self.create_optimizer()
                self.model, self.optimizer = self.accelerator.prepare(self.model, self.optimizer)
                self.model_wrapped = self.model
            output = super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )
        sums = self._of_ranks(self._eval_sums).sum(dim=0)
        measured = {
            "loss": self._objective.from_sums(sums, self.args.kd_weight_at(1)),
            **metrics(sums),
        }
        if self.args.eval_answers:
            measured |= self._accuracy(cast(ExampleDataset, dataloader.dataset))
        if (compute := cast(Any, self.compute_metrics)) is not None:
            measured |= compute(dict(measured))
        assert output.metrics is not None
        output.metrics.update({f"{metric_key_prefix}_{k}": v for k, v in measured.items()})
        return output

    @property
    def student_renderer(self) -> Renderer:
        """What renders rows for the student."""
        return self._pair.renderers["student"]

    @property
    def is_sharded_over_ranks(self) -> bool:
        """Whether no rank has the student whole."""
        return self.is_fsdp_enabled or self.is_deepspeed_enabled

    def token_kl(self, rows: Sequence[Example]) -> list[list[float]]:
        """Return KL(teacher, student) of each label token of rows, in nats.

        Each row is a pass of its own on every rank, so all ranks must be given the same rows.
        """
        model: Any = self.model
        if rows and not self.accelerator._models:  # nothing was trained: as an evaluation does
            self.accelerator.prepare_model(model, evaluation_mode=True)
        measured = []
        with torch.no_grad(), eval_mode(model), self.compute_loss_context_manager():
            for row in rows:
                batch = self._prepare_inputs(collate([row]))
                measured.append(self._objective.token_kl(model, batch).tolist())
        return measured

    def _accuracy(self, dataset: ExampleDataset) -> dict[str, float]:
        """Return the share of right answers among the graded ones of all ranks, and their number.

        Where no row can be graded, there is no share.
        """
        rows = gradable(dataset.examples, self.args)[
            self.args.process_index :: self.args.world_size
        ]
        counts = count_right(self.model, self._pair.renderers["student"], rows, self.args)
        right, number = self._of_ranks(torch.tensor(counts)).sum(dim=0).tolist()
        if number and not right and self.is_world_process_zero():
            logger.warning(
                "none of %d answers is right: see --grade (now %s), --max_new_tokens (now %d) and "
                "--chat_template",
                *(number, self.args.grade, self.args.max_new_tokens),
            )
        return {"accuracy": right / number, "accuracy_n": number} if number else {"accuracy_n": 0}


def _zeros() -> Tensor:
    return torch.zeros(len(SUMS), dtype=torch.float64)
