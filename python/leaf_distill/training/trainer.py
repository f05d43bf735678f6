"""LeafTrainer: distils a teacher into a student on originals and counterfactuals together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback
from transformers.trainer_utils import EvalLoopOutput, TrainOutput

from leaf_distill.data.collator import Collator, Example, ExampleDataset, Rows, prepare_dataset
from leaf_distill.data.dataset import Rejection
from leaf_distill.data.prompt import Renderer
from leaf_distill.models.lm_head import HeadPath
from leaf_distill.training.checkpoint import find_checkpoint
from leaf_distill.training.config import LeafConfig
from leaf_distill.training.loss import SUMS, Objective, count_labels, metrics
from leaf_distill.training.sampler import StepSampler

Batch = dict[str, Tensor]


class LeafTrainer(Trainer):
    """L = lambda L_kd + (1 - lambda) L_cd over each optimizer step, on one forward per model.

    L_kd is KL(teacher, student) on originals, L_cd on counterfactuals, each a mean over its label
    tokens in the whole step: all accumulation steps and all ranks. With `kd_weight="pool"`, lambda
    is the originals' share of the step's tokens. A step without counterfactuals is L_kd.

    Args:
        model: the student, any causal language model of transformers or a PeftModel around one.
        teacher_model: the teacher; put into eval mode, frozen, moved to the student's device, and
            neither optimized nor saved.
        args: the settings.
        train_dataset: rows in the layout of `dataset.parquet`, or prompt/completion rows (all
            originals). Rows over `args.max_length`, or refused by a template, are left out: see
            `rejections`.
        eval_dataset: rows, or a dict of them, for the evaluation loss.
        processing_class: the student's tokenizer.
        teacher_processing_class: the teacher's, where it has another chat template.
        callbacks, optimizers: as for `transformers.Trainer`.

    Raises:
        ValueError: a model has no plain linear head, a row is malformed or labeled differently by
            the two templates, or no row is left.
    """

    args: LeafConfig
    train_dataset: ExampleDataset | None
    eval_dataset: ExampleDataset | dict[str, ExampleDataset] | None

    def __init__(
        self,
        model: nn.Module,
        teacher_model: nn.Module,
        args: LeafConfig,
        train_dataset: Rows | None = None,
        eval_dataset: Rows | Mapping[str, Rows] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        *,
        teacher_processing_class: PreTrainedTokenizerBase | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, Any] = (None, None),
    ) -> None:
        if processing_class is None:
            raise ValueError("processing_class: needs the student's tokenizer, came None")
        if teacher_model is model:
            raise ValueError("teacher_model: needs a model of its own, came the student itself")
        tokenizers = (processing_class, teacher_processing_class or processing_class)
        self._renderers = [
            Renderer(one, chat_template=args.chat_template, system_prompt=args.system_prompt)
            for one in tokenizers
        ]
        self._max_length = args.max_length
        self.rejections: list[Rejection] = []
        """Training rows that were left out, with the reason."""
        train_rows = None
        if train_dataset is not None:
            train_rows, self.rejections = self._prepare(train_dataset, "train_dataset")
        self._objective = Objective(
            HeadPath(model, "student"),
            HeadPath(teacher_model, "teacher"),
            args.objective_weight,
            args.temperature,
            args.backend,
        )
        super().__init__(
            model=model,
            args=args,
            data_collator=Collator(*(_pad(one) for one in tokenizers)),
            train_dataset=train_rows,
            eval_dataset=self._prepare_eval(eval_dataset),
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        # The Trainer then leaves the loss as it is: it is already a mean over the whole step.
        self.model_accepts_loss_kwargs = self.loss_is_scaled_for_ga = True
        self.teacher_model = teacher_model.eval().requires_grad_(False).to(args.device)
        self._sums = self._eval_sums = _zeros()
        self._steps_without_cf = 0

    # ---- data ----

    def _prepare(self, rows: Rows, name: str) -> tuple[ExampleDataset, list[Rejection]]:
        return prepare_dataset(rows, *self._renderers, max_length=self._max_length, name=name)

    def _prepare_eval(
        self, dataset: Rows | Mapping[str, Rows] | None
    ) -> ExampleDataset | dict[str, ExampleDataset] | None:
        if isinstance(dataset, Mapping):
            return {name: self._prepare(rows, name)[0] for name, rows in dataset.items()}
        return None if dataset is None else self._prepare(dataset, "eval_dataset")[0]

    def get_train_dataloader(self) -> DataLoader[Example]:
        """This rank's batches; accelerate must not shard them again, the sampler knows its rank."""
        if self.train_dataset is None:
            raise ValueError("train_dataset: is needed for training, came None")
        sampler = StepSampler(
            self.train_dataset.branch_indices(counterfactual=False),
            self.train_dataset.branch_indices(counterfactual=True),
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
            raise ValueError("eval_dataset: is needed for an evaluation, came None")
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
        return _EpochLoader(
            dataset,
            batch_sampler=sampler,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory and self.args.device.type == "cuda",
            persistent_workers=self.args.dataloader_persistent_workers,
            prefetch_factor=self.args.dataloader_prefetch_factor,
        )

    # ---- training ----

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """Train, after comparing the head path with both models' own logits on one row.

        `resume_from_checkpoint=True` goes on from the newest checkpoint that is whole; a newer one
        that a killed run left half-written is named in the log and passed over.

        Raises:
            ValueError: the head path does not give a model's logits, or the named checkpoint is
                not whole, or there is none.
            RuntimeError: the loss became NaN.
        """
        checkpoint = None
        if resume_from_checkpoint:
            directory, world_size = Path(str(self.args.output_dir)), self.args.world_size
            checkpoint = find_checkpoint(resume_from_checkpoint, directory, world_size=world_size)
            if checkpoint is None:
                raise ValueError(f"resume_from_checkpoint: no whole checkpoint in {directory}")
        self._check_heads()
        self._sums, self._steps_without_cf = _zeros(), 0
        return super().train(checkpoint, trial, ignore_keys_for_eval)

    def _check_heads(self) -> None:
        if self.train_dataset is None:
            return
        collate: Any = self.data_collator  # the Trainer's own takes dicts only
        batch = self._prepare_inputs(collate([self.train_dataset.shortest]))  # logits in full
        keys = ("input_ids", "attention_mask", "predicts")
        for path, prefix in ((self._objective.student, ""), (self._objective.teacher, "teacher_")):
            path.check(*(batch[prefix + key] for key in keys))

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], Tensor]:
        """An optimizer step's batches, and (n_kd, n_cd), its label tokens on all ranks."""
        batches = list(islice(epoch_iterator, num_batches))
        counts = torch.zeros(2, dtype=torch.int64)
        for batch in batches:
            counts += count_labels(batch)
        counts = self._over_ranks(counts)
        self._steps_without_cf += int(counts[1] == 0)
        return batches, counts.to(device)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """This batch's part of the step's loss, times the ranks, over which DDP takes the mean."""
        if return_outputs:
            raise ValueError("return_outputs: the logits are never formed, there are no outputs")
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
            logs.update(metrics(self._over_ranks(self._sums)))
            logs["steps_without_cf"] = self._steps_without_cf
            self._sums, self._steps_without_cf = _zeros(), 0
        super().log(logs, start_time)

    def _over_ranks(self, sums: Tensor) -> Tensor:
        """The sum over all ranks."""
        if self.args.world_size == 1:
            return sums
        total: Tensor = self.accelerator.reduce(sums.to(self.args.device), reduction="sum")
        return total

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
        sums = self._over_ranks(self._eval_sums)
        measured = {"loss": self._objective.from_sums(sums), **metrics(sums)}
        assert output.metrics is not None
        output.metrics.update({f"{metric_key_prefix}_{k}": v for k, v in measured.items()})
        return output


class _EpochLoader(DataLoader[Example]):
    """A DataLoader that hands the epoch on, as the training loop asks, to its batch sampler."""

    def set_epoch(self, epoch: int) -> None:
        sampler = self.batch_sampler
        if isinstance(sampler, StepSampler):
            sampler.set_epoch(epoch)


def _zeros() -> Tensor:
    return torch.zeros(len(SUMS), dtype=torch.float64)


def _pad(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id on padding, which no label position sees: any will do."""
    return tokenizer.pad_token_id if isinstance(tokenizer.pad_token_id, int) else 0
