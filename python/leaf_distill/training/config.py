"""Settings of stage 2: `leaf distill` takes DistillArguments and LeafConfig."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from transformers import TrainingArguments

from leaf_distill.config import about, parse_columns


@dataclass
class LeafConfig(TrainingArguments):
    """Settings of LeafTrainer; the defaults are the paper's (Table 3, batch 64).

    An optimizer step is stated in originals over all ranks and accumulation steps;
    `gradient_accumulation_steps` follows from it. Counterfactuals come on top, evenly spread.

    Raises ValueError naming the first setting that is outside its range, or an `originals_per_step`
    that the ranks and `per_device_train_batch_size` do not divide.
    """

    originals_per_step: int = field(
        default=64,
        metadata=about(
            "originals of one optimizer step over all ranks and accumulation steps; must be a "
            "multiple of per_device_train_batch_size times the ranks"
        ),
    )
    per_device_train_batch_size: int = field(
        default=8, metadata=about("originals of one forward pass on one device")
    )
    max_length: int = field(
        default=4096,
        metadata=about("tokens of prompt and completion; longer rows are left out, and counted"),
    )
    kd_weight: str = field(
        default="pool",
        metadata=about(
            "weight of the originals' loss, the paper's lambda: a number from 0 to 1, or pool: "
            "every token counts the same"
        ),
    )
    temperature: float = field(
        default=1.0, metadata=about("softens both distributions; the loss has its square")
    )
    chat_template: str = field(
        default="auto", metadata=about("auto: the tokenizer's, if it has one; none: plain text")
    )
    system_prompt: str | None = field(
        default=None, metadata=about("a system turn put before every row without one")
    )
    backend: str = field(
        default="auto", metadata=about("kernels of the loss: auto, reference, cpu, ...")
    )
    learning_rate: float = field(default=1e-5, metadata=about("peak learning rate"))
    lr_scheduler_type: str = field(default="cosine", metadata=about("learning rate schedule"))
    warmup_steps: float = field(default=5, metadata=about("steps of linear warm-up"))
    num_train_epochs: float = field(default=3.0, metadata=about("passes over the originals"))
    bf16: bool | None = field(  # type: ignore[assignment]  # None: the device decides
        default=None,
        metadata=about("bfloat16 autocast; when not given: where the device has it"),
    )
    logging_steps: float = field(default=10, metadata=about("optimizer steps between two logs"))
    logging_first_step: bool = field(default=True, metadata=about("log the first step too"))
    logging_nan_inf_filter: bool = field(
        default=False, metadata=about("hide NaN losses from the log (they stop LeafTrainer)")
    )
    save_steps: float = field(default=100, metadata=about("optimizer steps between checkpoints"))
    save_total_limit: int | None = field(
        default=2, metadata=about("how many checkpoints are kept, the newest ones")
    )
    remove_unused_columns: bool = field(
        default=False, metadata=about("must stay off: rows carry columns that no model takes")
    )

    def __post_init__(self) -> None:
        if self.remove_unused_columns:
            raise ValueError("remove_unused_columns: must be off for LeafTrainer, came True")
        _check_objective(self)
        if self.bf16 is None:
            on_gpu = torch.cuda.is_available() and not self.use_cpu and not self.fp16
            self.bf16 = on_gpu and torch.cuda.is_bf16_supported()
        given = self.gradient_accumulation_steps
        try:
            super().__post_init__()  # type: ignore[no-untyped-call]
        except (ValueError, RuntimeError, ImportError, OSError) as error:
            # Raised here, a setting of the base class is told in a sentence like our own.
            raise ValueError(str(error).strip()) from error
        # One process drives one GPU: nn.DataParallel would average the ranks' losses, and is slow.
        # Several GPUs are torchrun's or accelerate's business.
        self._n_gpu = min(self.n_gpu, 1)
        per_pass = self.per_device_train_batch_size * self.world_size
        derived, rest = divmod(self.originals_per_step, per_pass)
        if rest or not derived:
            raise ValueError(
                f"originals_per_step: needs a multiple of {per_pass} "
                f"(per_device_train_batch_size {self.per_device_train_batch_size} x "
                f"{self.world_size} ranks), came {self.originals_per_step}"
            )
        if given not in (1, derived):
            raise ValueError(
                f"gradient_accumulation_steps: follows from originals_per_step "
                f"{self.originals_per_step} and is {derived} here, came {given}; leave it out, or "
                f"give originals_per_step {per_pass * given}"
            )
        self.gradient_accumulation_steps = derived

    @property
    def objective_weight(self) -> float | Literal["pool"]:
        """`kd_weight` as `leaf_ext.row_weights` takes it."""
        return "pool" if self.kd_weight == "pool" else float(self.kd_weight)


def _check_objective(config: LeafConfig) -> None:
    try:
        weight = 0.5 if config.kd_weight == "pool" else float(config.kd_weight)
    except ValueError:
        weight = -1.0
    if not 0 <= weight <= 1:
        raise ValueError(f"kd_weight: needs 'pool' or a number 0 to 1, came {config.kd_weight!r}")
    if not config.temperature > 0:
        raise ValueError(f"temperature: needs a number above 0, came {config.temperature}")
    batches = ("per_device_train_batch_size", "per_device_eval_batch_size")
    for name in ("originals_per_step", *batches, "max_length"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name}: needs at least 1, came {getattr(config, name)}")


@dataclass(frozen=True)
class DistillArguments:
    """What `leaf distill` trains, from whom, on which rows."""

    student: str = field(
        default="", metadata=about("the model to be trained: directory, hub name or .gguf file")
    )
    teacher: str = field(
        default="", metadata=about("the model to learn from: directory, hub name or .gguf file")
    )
    dataset: str = field(
        default="",
        metadata=about("a run directory of `leaf detect`, or rows as `leaf detect` takes them"),
    )
    eval_dataset: str | None = field(
        default=None, metadata=about("rows for the evaluation loss, in the same forms")
    )
    dataset_split: str = field(default="train", metadata=about("split of the dataset"))
    eval_split: str = field(default="test", metadata=about("split of the evaluation dataset"))
    columns: dict[str, str] | str | None = field(
        default=None,
        metadata=about(
            'names of other columns, as JSON: {"prompt": "question", "completion": "solution"}'
        ),
    )
    max_rows: int | None = field(
        default=None, metadata=about("take only so many originals from the start of the dataset")
    )
    teacher_dtype: str = field(
        default="auto",
        metadata=about("the teacher's weights: auto, float32, bfloat16 or float16"),
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "columns", parse_columns(self.columns))
        for name in ("student", "teacher", "dataset"):
            if not getattr(self, name):
                raise ValueError(f"{name}: is needed, came empty; give --{name}")
        if self.max_rows is not None and self.max_rows < 1:
            raise ValueError(f"max_rows: needs at least 1, came {self.max_rows}")
