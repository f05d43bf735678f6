"""Settings of stage 2: `leaf distill` takes DistillArguments and LeafConfig."""

from __future__ import annotations

import math
from dataclasses import MISSING, dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from transformers import TrainingArguments

from leaf_distill.config import (
    ROWS,
    PairOptions,
    RowOptions,
    about,
    check_range,
    check_rows,
    json_object,
    need,
)
from leaf_ext import row_weights


def parse_kd_weight(value: object) -> float | Literal["pool"]:
    """Read a weight of the originals' loss: "pool", or a number from 0 to 1, also as text.

    Raises:
        ValueError: it is neither.
    """
    try:
        weight: Any = value if value == "pool" else float(str(value))
        nothing = torch.empty(0, dtype=torch.bool)
        row_weights(nothing, nothing, kd_weight=weight)  # the one check of its range
    except ValueError:
        raise ValueError(
            f"kd_weight: must be 'pool' or a number from 0 to 1, got {value!r}"
        ) from None
    return "pool" if weight == "pool" else float(weight)


if TYPE_CHECKING:
    KdWeight = float | Literal["pool"]
else:  # the command line's parser gives text, which the configuration reads
    KdWeight = str


@dataclass
class LeafConfig(TrainingArguments):
    """Settings of LeafTrainer, a TrainingArguments; the defaults are the paper's (Table 3).

    An optimizer step is stated in originals over all ranks and accumulation steps;
    `gradient_accumulation_steps` follows from it. Counterfactuals come on top, evenly spread.
    Options of TrainingArguments that would do nothing here are refused.

    Raises:
        ValueError: a setting is outside its range, or `originals_per_step` is no multiple of
            `per_device_train_batch_size` times the ranks.
    """

    originals_per_step: int = field(
        default=64,
        metadata=about(
            "originals of one optimizer step over all ranks and accumulation steps; must be a "
            "multiple of per_device_train_batch_size times the ranks"
        ),
    )
    per_device_train_batch_size: int = field(
        default=8, metadata=about("originals of one batch on one device")
    )
    max_batch_tokens: int = field(
        default=8192,
        metadata=about(
            "padded tokens of one forward pass, counterfactuals included; a larger batch runs in "
            "several passes, with the same loss"
        ),
    )
    max_length: int = field(
        default=4096,
        metadata=about("tokens of prompt and completion; longer rows are left out, and counted"),
    )
    kd_weight: KdWeight = field(
        default="pool",
        metadata=about(
            "weight of the originals' loss, the paper's lambda: a number from 0 to 1, or pool: "
            "every token counts the same"
        ),
    )
    temperature: float = field(
        default=1.0, metadata=about("softens both distributions; the loss has its square")
    )
    disable_dropout: bool = field(
        default=False,
        metadata=about(
            "train without the student's dropout; by default the model's own setting holds"
        ),
    )
    chat_template: str = field(
        default="auto", metadata=about("auto: the tokenizer's, if it has one; none: plain text")
    )
    chat_template_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata=about('variables for the chat template, as JSON: {"enable_thinking": false}'),
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
        default=False, metadata=about("hide infinite losses from the log (NaN stops LeafTrainer)")
    )
    save_steps: float = field(default=100, metadata=about("optimizer steps between checkpoints"))
    save_total_limit: int | None = field(
        default=2, metadata=about("how many checkpoints are kept, the newest ones")
    )
    remove_unused_columns: bool = field(
        default=False, metadata=about("must stay off: rows carry columns that no model takes")
    )

    def __post_init__(self) -> None:
        self.kd_weight = parse_kd_weight(self.kd_weight)
        self.chat_template_kwargs = json_object(self.chat_template_kwargs, "chat_template_kwargs")
        _check_ranges(self)
        _check_ineffective(self)
        if self.bf16 is None:
            on_gpu = torch.cuda.is_available() and not self.use_cpu and not self.fp16
            self.bf16 = on_gpu and torch.cuda.is_bf16_supported()
        given = self.gradient_accumulation_steps
        try:
            super().__post_init__()  # type: ignore[no-untyped-call]
        except Exception as error:  # whatever refuses a setting of the base class
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ValueError(f"settings: {first}") from error
        _check_accelerator(self)
        # One process drives one GPU: nn.DataParallel would average the ranks' losses, and is slow.
        # Several GPUs are torchrun's or accelerate's business.
        self._n_gpu = min(self.n_gpu, 1)
        per_pass = self.per_device_train_batch_size * self.world_size
        derived, rest = divmod(self.originals_per_step, per_pass)
        if rest or not derived:
            raise ValueError(
                f"originals_per_step: must be a multiple of {per_pass} "
                f"(per_device_train_batch_size {self.per_device_train_batch_size} x "
                f"{self.world_size} ranks), got {self.originals_per_step}"
            )
        if given not in (1, derived):
            raise ValueError(
                f"gradient_accumulation_steps: must be {derived}, which follows from "
                f"originals_per_step {self.originals_per_step}, got {given}; leave it out, or "
                f"give originals_per_step {per_pass * given}"
            )
        self.gradient_accumulation_steps = derived

    def with_changes(self, **changes: Any) -> LeafConfig:
        """Return a copy with other values; what follows from them is derived anew."""
        return replace(self, **{"gradient_accumulation_steps": 1, **changes})


_LARGEST = 1e30  # float32 holds it, and what is computed from it
_COUNT = (1, 2**63 - 1, "at least 1")
_POSITIVE = (5e-324, _LARGEST, "a number above 0")
_NOT_NEGATIVE = (0, _LARGEST, "a number of at least 0")
_BELOW_1 = (0, math.nextafter(1, 0), "from 0 to below 1")

_RANGES: dict[str, tuple[float, float, str]] = {
    **dict.fromkeys(("originals_per_step", "max_length", "max_batch_tokens"), _COUNT),
    **dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size"), _COUNT),
    "save_total_limit": _COUNT,
    **dict.fromkeys(("learning_rate", "num_train_epochs"), _POSITIVE),
    **dict.fromkeys(("logging_steps", "save_steps", "eval_steps"), _POSITIVE),
    **dict.fromkeys(("weight_decay", "adam_epsilon", "max_grad_norm"), _NOT_NEGATIVE),
    **dict.fromkeys(("warmup_steps", "neftune_noise_alpha", "eval_delay"), _NOT_NEGATIVE),
    **dict.fromkeys(("dataloader_num_workers", "data_seed"), _NOT_NEGATIVE),
    **dict.fromkeys(("adam_beta1", "adam_beta2"), _BELOW_1),
    # Beyond these, logits of the usual size leave float32 or become all alike.
    "temperature": (1e-3, 1e3, "from 0.001 to 1000"),
    "seed": (0, 2**32 - 1, "from 0 to 4294967295"),  # as NumPy takes it
}
_ANY_INTEGER = (-(2**63), 2**63 - 1, "an integer of 64 bits")
_ANY_NUMBER = (-_LARGEST, _LARGEST, "a finite number")

_INEFFECTIVE: dict[str, str] = {
    "label_smoothing_factor": "the labels are the teacher's distributions",
    "train_sampling_strategy": "the sampler spreads originals and counterfactuals over the steps",
    "length_column_name": "rows are not grouped by length",
    "auto_find_batch_size": "max_batch_tokens bounds a forward pass",
    "average_tokens_across_devices": "the loss always counts the tokens of all devices",
    "label_names": "the loss mask tells the labels",
    "include_for_metrics": "no logits are kept for compute_metrics",
    "batch_eval_metrics": "no logits are kept for compute_metrics",
    "eval_do_concat_batches": "an evaluation keeps sums only",
    "eval_use_gather_object": "an evaluation keeps sums only",
    "eval_accumulation_steps": "an evaluation keeps sums only",
    "do_predict": "there is no prediction",
    "enable_jit_checkpoint": "a run goes on from its newest checkpoint; see save_steps",
    "parallelism_config": "each rank needs whole rows and a whole model or an FSDP shard",
    "remove_unused_columns": "rows carry columns that no model takes",
}
"""Options that would do nothing here, or harm, each with the reason."""


def _check_ranges(config: LeafConfig) -> None:
    if config.max_steps != -1 and config.max_steps < 1:
        raise ValueError(
            f"max_steps: must be at least 1, or -1 for num_train_epochs, got {config.max_steps}"
        )
    for item in fields(config):
        value = getattr(config, item.name)
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        for low, high, wanted in (
            _ANY_INTEGER if isinstance(value, int) else _ANY_NUMBER,
            _RANGES.get(item.name, _ANY_NUMBER),
        ):
            if not low <= value <= high:
                raise ValueError(f"{item.name}: must be {wanted}, got {value}")


def _check_ineffective(config: LeafConfig) -> None:
    for item in fields(config):
        default = item.default if item.default_factory is MISSING else item.default_factory()
        if item.name in _INEFFECTIVE and getattr(config, item.name) not in (default, None):
            raise ValueError(
                f"{item.name}: must be left out, got {getattr(config, item.name)!r}; it has no use "
                f"for LeafTrainer: {_INEFFECTIVE[item.name]}"
            )


def _check_accelerator(config: LeafConfig) -> None:
    """Refuse what accelerate would do to a data loader of its own, which LeafTrainer has not."""
    given: Any = config.accelerator_config
    if given is None:
        return
    plain = type(given)()
    for name, value in vars(given).items():
        if name != "gradient_accumulation_kwargs" and value != getattr(plain, name):
            raise ValueError(
                f"accelerator_config: must leave {name} as it is, got {value!r}; LeafTrainer "
                "shares the rows among the ranks itself"
            )
    if (given.gradient_accumulation_kwargs or {}).get("num_steps", 1) != 1:
        raise ValueError(
            "accelerator_config: must not set num_steps; it follows from originals_per_step"
        )


@dataclass(frozen=True)
class DistillArguments(RowOptions, PairOptions):
    """What `leaf distill` trains, from whom, on which rows.

    Raises:
        ValueError: a model or the dataset is missing, or a setting is outside its range.
    """

    dataset: str = field(
        default="",
        metadata=about(
            "a run directory of `leaf detect`, one of its arms (RUN/arms/NAME), or rows as it "
            f"takes them: {ROWS}"
        ),
    )
    eval_dataset: str | None = field(
        default=None, metadata=about("rows for the evaluation loss, in the same forms")
    )
    eval_split: str = field(default="test", metadata=about("split of the evaluation dataset"))
    teacher_dtype: str = field(
        default="auto",
        metadata=about("dtype of the teacher's weights: auto, float32, bfloat16 or float16"),
    )
    trust_remote_code: bool = field(
        default=False, metadata=about("run Python code that a model on the hub brings")
    )
    lora_r: int | None = field(
        default=None,
        metadata=about("rank of a LoRA adapter, which is then trained instead of all weights"),
    )
    lora_alpha: int | None = field(
        default=None, metadata=about("scale of the adapter; default: twice lora_r")
    )
    lora_dropout: float = field(
        default=0.0, metadata=about("dropout of the adapter's input while it trains")
    )
    lora_target_modules: list[str] | None = field(
        default=None,
        metadata=about("names of the layers to adapt; default: all linear ones but the head"),
    )

    def __post_init__(self) -> None:
        need(self, "student", "teacher", "dataset")
        check_rows(self)
        for name in ("lora_r", "lora_alpha"):
            check_range(self, name, 1, 2**31 - 1)
        low, high, wanted = _BELOW_1
        if not low <= self.lora_dropout <= high:
            raise ValueError(f"lora_dropout: must be {wanted}, got {self.lora_dropout}")
        others = ("lora_alpha", "lora_dropout", "lora_target_modules")
        for name in others if self.lora_r is None else ():
            if getattr(self, name):
                raise ValueError(f"{name}: needs lora_r, got {getattr(self, name)} without it")
