"""Callbacks that LeafTrainer adds to the training loop of transformers."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import EarlyStoppingCallback, TrainerCallback
from transformers.trainer_utils import rotate_checkpoints

from leaf_distill.training.checkpoint import write_manifest

logger = logging.getLogger(__name__)


class CompleteLogs(TrainerCallback):
    """Logs the loss up to each checkpoint, each evaluation and the last step.

    A run that goes on from a checkpoint then has every step in its logs.
    """

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        last = state.global_step >= state.max_steps
        control.should_log |= control.should_save or control.should_evaluate or last

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_log |= control.should_save or control.should_evaluate


class WriteManifest(TrainerCallback):
    """Writes the hashes of a checkpoint's files into it, once all ranks have written theirs.

    Only then is the last older checkpoint deleted, where one alone is kept.
    """

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if args.world_size > 1:
            torch.distributed.barrier()
        if args.should_save:
            write_manifest(Path(args.output_dir) / f"checkpoint-{state.global_step}")
            rotate_checkpoints(
                args.output_dir, args.save_total_limit, state.best_model_checkpoint, use_mtime=True
            )


class StopEarly(EarlyStoppingCallback):
    """Stops a run whose evaluations bring nothing better; one that goes on keeps its count."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.early_stopping_patience_counter = self.count(state)
        state.stateful_callbacks[type(self).__name__] = self.state()

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any
    ) -> None:
        super().on_evaluate(args, state, control, metrics, **kwargs)  # type: ignore[no-untyped-call]
        if control.should_training_stop and state.is_world_process_zero:
            logger.warning(
                "stopped early at step %d: no better %s in %d evaluations",
                *(state.global_step, args.metric_for_best_model, self.early_stopping_patience),
            )

    @classmethod
    def count(cls, state: Any) -> int:
        """Return the evaluations without a better value before a checkpoint's state."""
        saved = state.stateful_callbacks.get(cls.__name__, {"attributes": {}})
        return int(saved["attributes"].get("early_stopping_patience_counter", 0))


class SetLearningRate(TrainerCallback):
    """Trains on with the learning rate and schedule of the settings; a checkpoint has its own."""

    def on_train_begin(
        self, args: Any, state: Any, control: Any, *, lr_scheduler: Any = None, **_: Any
    ) -> None:
        one_rate = isinstance(lr_scheduler, LambdaLR) and len(set(lr_scheduler.base_lrs)) == 1
        if not state.global_step or not one_rate:
            return
        groups = lr_scheduler.optimizer.param_groups
        for group, factor in zip(groups, lr_scheduler.lr_lambdas, strict=True):
            group["initial_lr"] = args.learning_rate
            group["lr"] = args.learning_rate * factor(lr_scheduler.last_epoch)
        lr_scheduler.base_lrs = [args.learning_rate for _ in groups]
        lr_scheduler._last_lr = [group["lr"] for group in groups]
