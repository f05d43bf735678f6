"""LeafTrainer: distils a teacher into a student on originals and counterfactuals together."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback, TrainerState
from transformers.trainer_utils import EvalLoopOutput, TrainOutput

from leaf_distill.data.collator import (
    Batch,
    ExampleDataset,
    collate,
    prepare_dataset,
    split_batch,
)
from leaf_distill.data.example import Example
from leaf_distill.models.lm_head import LMHeadHook
from leaf_distill.training.callbacks import CompleteLogs, SetLearningRate, WriteManifest
from leaf_distill.training.checkpoint import all_finite, find_checkpoint
from leaf_distill.training.config import LeafConfig
from leaf_distill.training.inputs import find_dataset
from leaf_distill.training.loss import CURE, SUMS, Objective, count_labels, mean_loss, metrics
from leaf_distill.training.pair import Model, disable_dropout, make_pair
from leaf_distill.training.sampler import EpochLoader, StepSampler
from leaf_ext import linear_dual_kl


class LeafTrainer(Trainer):
    """L = lambda L_kd + (1 - lambda) L_cd over each optimizer step, on one forward per model.

    L_kd is KL(teacher, student) on originals, L_cd on counterfactuals, each a mean over its label
    tokens in the whole step: all accumulation steps and all ranks. With `kd_weight="pool"`, lambda
    is the originals' share of the step's tokens. A step without counterfactuals is L_kd.

    Args:
        model: the student, a causal language model of transformers or a PeftModel around one, or
            its name, which is loaded in float32.
        teacher_model: the teacher or its name; put into eval mode, frozen, moved to the student's
            device, and neither optimized nor saved.
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
            `student_entropy`, `teacher_entropy`, `agreement`, `cf_rows`, `skipped_rows`) and
            returns more of them. It gets no logits: these are never formed.
        callbacks, optimizers: as for `transformers.Trainer`.
        peft_config: wraps the student in an adapter, which alone is trained and saved.
        teacher_dtype: of a teacher that is given by name: auto, float32, bfloat16 or float16.
        trust_remote_code: whether code that comes with a named model may run.

    Raises:
        ValueError: a model has no plain linear head, the two do not share a vocabulary, the rows
            cannot be read, or none is left.
    """

    args: LeafConfig
    train_dataset: ExampleDataset | None
    eval_dataset: ExampleDataset | dict[str, ExampleDataset] | None

    def __init__(
        self,
        model: Model,
        teacher_model: Model,
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
        trust_remote_code: bool = False,
    ) -> None:
        if not isinstance(args, LeafConfig):
            raise ValueError(f"args: must be a LeafConfig, got {type(args).__name__}")
        self._pair = make_pair(
            args,
            model,
            teacher_model,
            processing_class,
            teacher_processing_class,
            teacher_dtype=teacher_dtype,
            trust_remote_code=trust_remote_code,
            peft_config=peft_config,
        )
        self._renderers = self._pair.renderers(args)
        self._max_length = self._pair.max_length(args.max_length)
        student, teacher = self._pair.models["student"], self._pair.models["teacher"]
        self.left_out: list[Example] = []
        """Training rows that were left out, each with its `outcome`."""
        train_rows = None
        if train_dataset is not None:
            train_rows, self.left_out = self._prepare(train_dataset, "train_dataset")
        one, backend = torch.ones(1, 1, device=args.device), cast(Any, args.backend)
        linear_dual_kl(one, one, one, one, one[0], backend=backend)  # it may not be there
        self._objective = Objective(
            LMHeadHook(student, "student"),
            LMHeadHook(teacher, "teacher"),
            args.kd_weight,
            args.temperature,
            args.backend,
        )
        if args.disable_dropout:
            disable_dropout(student)
        own = [CompleteLogs(), WriteManifest()]
        if optimizers[0] is None:
            own.append(SetLearningRate())
        super().__init__(
            model=student,
            args=args,
            data_collator=data_collator or collate,
            train_dataset=train_rows,
            eval_dataset=self._prepare_eval(eval_dataset),
            processing_class=self._pair.tokenizers["student"],
            compute_metrics=cast(Any, compute_metrics),
            callbacks=[*own, *(callbacks or [])],
            optimizers=optimizers,
        )
        # The Trainer then leaves the loss as it is: it is already a mean over the whole step.
        self.model_accepts_loss_kwargs = self.loss_is_scaled_for_ga = True
        self.teacher_model = teacher.eval().requires_grad_(False).to(args.device)
        self._sums = self._eval_sums = _zeros()
        self._steps_without_cf = 0

    # ---- data ----

    def _prepare(self, rows: Any, name: str) -> tuple[ExampleDataset, list[Example]]:
        return prepare_dataset(
            find_dataset(rows) if isinstance(rows, str) else rows,
            self._renderers,
            max_length=self._max_length,
            embedding_rows=self._pair.embedding_rows,
            name=name,
        )

    def _prepare_eval(self, dataset: Any) -> ExampleDataset | dict[str, ExampleDataset] | None:
        if isinstance(dataset, Mapping):
            return {name: self._prepare(rows, name)[0] for name, rows in dataset.items()}
        return None if dataset is None else self._prepare(dataset, "eval_dataset")[0]

    def get_train_dataloader(self) -> DataLoader[Example]:
        """This rank's batches; accelerate must not shard them again, the sampler knows its rank."""
        if self.train_dataset is None:
            raise ValueError("train_dataset: is needed for training, got None")
        sampler = StepSampler(
            self.train_dataset.originals,
            self.train_dataset.counterfactuals,
            batch_size=self.args.per_device_train_batch_size,
            accumulation=self.args.gradient_accumulation_steps,
            world_size=self.args.world_size,
            rank=self.args.process_index,
            seed=self.args.seed if self.args.data_seed is None else self.args.data_seed,
            drop_last=self.args.dataloader_drop_last,
        )
        return self._loader(self.train_dataset, sampler)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Example]:
        """This rank's share of the evaluation rows, each row on exactly one rank."""
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(dataset, str) and isinstance(self.eval_dataset, dict):
            dataset = self.eval_dataset[dataset]
        if dataset is None:
            raise ValueError("eval_dataset: is needed for an evaluation, got None")
        if not isinstance(dataset, ExampleDataset):
            dataset, _ = self._prepare(dataset, "eval_dataset")
        sampler = StepSampler(
            range(len(dataset)),
            batch_size=self.args.per_device_eval_batch_size,
            world_size=self.args.world_size,
            rank=self.args.process_index,
            shuffle=False,
        )
        return self._loader(dataset, sampler)

    def _loader(self, dataset: ExampleDataset, sampler: StepSampler) -> DataLoader[Example]:
        return EpochLoader(
            dataset,
            batch_sampler=sampler,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory and self.args.device.type == "cuda",
            persistent_workers=self.args.dataloader_persistent_workers,
            prefetch_factor=self.args.dataloader_prefetch_factor,
            multiprocessing_context=self.args.dataloader_multiprocessing_context,
            in_order=self.args.dataloader_in_order,
        )

    # ---- training ----

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """Train, after comparing both models' heads with their own logits on one row.

        `resume_from_checkpoint=True` goes on from the newest checkpoint that is whole; a newer one
        that is damaged or not finite is named in the log and passed over. The learning rate is the
        one of `args`, also when a checkpoint was written with another. `train_loss` is the mean
        over the whole run.

        Raises:
            ValueError: a head does not give its model's logits, or the named checkpoint is not
                whole, or there is none.
            RuntimeError: the loss became NaN, or the weights are not finite.
        """
        checkpoint = None
        if resume_from_checkpoint:
            checkpoint = find_checkpoint(resume_from_checkpoint, Path(str(self.args.output_dir)))
        self._check_heads()
        self._sums, self._steps_without_cf = _zeros(), 0
        if checkpoint is not None and self._is_at_the_end(checkpoint):
            return self._take(checkpoint)
        output = super().train(checkpoint, trial, ignore_keys_for_eval)
        return output._replace(training_loss=output.metrics["train_loss"])

    def _is_at_the_end(self, checkpoint: str) -> bool:
        """Whether nothing is left to train, and the weights are plain files."""
        *_, max_steps = self.set_initial_training_values(self.args, self.get_train_dataloader())
        state = TrainerState.load_from_json(f"{checkpoint}/trainer_state.json")
        plain = any(Path(checkpoint).glob("*.safetensors"))
        return plain and state.global_step >= max_steps

    def _take(self, checkpoint: str) -> TrainOutput:
        """Take a checkpoint as the result; transformers would train one more step."""
        self._load_from_checkpoint(checkpoint)
        self.state = TrainerState.load_from_json(f"{checkpoint}/trainer_state.json")
        loss = mean_loss(self.state.log_history)
        return TrainOutput(self.state.global_step, loss, {"train_loss": loss})

    def _check_heads(self) -> None:
        if self.train_dataset is None:
            return
        make: Any = self.data_collator  # the Trainer's own takes dicts only
        batch = make([self.train_dataset.shortest])  # logits in full
        wanted = collate([self.train_dataset.shortest]).keys()
        if lacking := sorted(wanted - batch.keys()):
            raise ValueError(
                f"data_collator: must return the keys {', '.join(sorted(wanted))}, got none of "
                f"{', '.join(lacking)}"
            )
        self._objective.check(self._prepare_inputs(batch))

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], Tensor]:
        """An optimizer step's batches, and (n_kd, n_cd), its label tokens on all ranks."""
        batches = list(islice(epoch_iterator, num_batches))
        counts = torch.zeros(2, dtype=torch.int64)
        for batch in batches:
            counts += count_labels(batch)
        passes = [len(split_batch(batch, self.args.max_batch_tokens)) for batch in batches]
        everywhere = self._of_ranks(torch.cat([counts, torch.tensor(passes)]))
        for batch, number in zip(batches, everywhere[:, 2:].amax(dim=0), strict=True):
            batch["passes"] = number  # as many on all ranks: a sharded model gathers in each
        counts = everywhere[:, :2].sum(dim=0)
        self._steps_without_cf += int(counts[1] == 0)
        return batches, counts.to(device)

    def training_step(
        self, model: nn.Module, inputs: Batch, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """One batch, forward and backward, in passes of at most `max_batch_tokens`."""
        at_least = int(inputs.pop("passes", 1))
        parts = split_batch(inputs, self.args.max_batch_tokens, at_least=at_least)
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
        """This pass's part of the step's loss, times the ranks, over which DDP takes the mean."""
        if return_outputs:
            raise ValueError("return_outputs: must be False, the logits are never formed")
        counts = num_items_in_batch
        loss, sums = self._objective(
            model, inputs, counts if isinstance(counts, Tensor) else count_labels(inputs)
        )
        self._sums = self._sums + sums
        scaled: Tensor = loss * self.args.world_size
        return scaled

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add to a log of the loss what was measured on the way since the last one."""
        if "loss" in logs:
            logs.update(metrics(self._of_ranks(self._sums).sum(dim=0)))
            logs["steps_without_cf"] = self._steps_without_cf
            self._sums, self._steps_without_cf = _zeros(), 0
        if "train_loss" in logs:
            logs["train_loss"] = mean_loss(self.state.log_history)
        super().log(logs, start_time)

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
        super().save_model(output_dir, _internal_call)

    def _of_ranks(self, values: Tensor) -> Tensor:
        """The values of every rank, stacked."""
        if self.args.world_size == 1:
            return values[None]
        gathered: Tensor = self.accelerator.gather(values[None].to(self.args.device))
        return gathered.cpu()

    # ---- evaluation ----

    def prediction_step(
        self,
        model: nn.Module,
        inputs: Batch,
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, None, None]:
        """One evaluation batch; its sums count, the mean that the Trainer would take does not."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, sums = self._objective(model, inputs, count_labels(inputs))
        self._eval_sums = self._eval_sums + sums
        return loss, None, None

    def evaluation_loop(
        self,
        dataloader: DataLoader[Example],
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """As the Trainer's, with the loss of the whole dataset instead of a mean over batches."""
        self._eval_sums = _zeros()
        output = super().evaluation_loop(
            dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
        )
        sums = self._of_ranks(self._eval_sums).sum(dim=0)
        measured = {"loss": self._objective.from_sums(sums), **metrics(sums)}
        if (compute := cast(Any, self.compute_metrics)) is not None:
            measured |= compute(dict(measured))
        assert output.metrics is not None
        output.metrics.update({f"{metric_key_prefix}_{k}": v for k, v in measured.items()})
        return output


def _zeros() -> Tensor:
    return torch.zeros(len(SUMS), dtype=torch.float64)
