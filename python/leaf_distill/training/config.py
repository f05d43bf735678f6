"""Settings of stage 2: `leaf distill` takes DistillArguments and LeafConfig."""

from __future__ import annotations

import logging
import os
import sys
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from transformers import TrainingArguments

from leaf_distill.config import (
    GRADES,
    LARGEST,
    ROWS,
    GradeRule,
    ModelOptions,
    PairOptions,
    RowOptions,
    TeacherServerOptions,
    about,
    check_range,
    check_rows,
    check_servers,
    documented,
    json_object,
    need,
)
from leaf_distill.config import (
    check_choices as check_literals,
)
from leaf_distill.training.checks import (
    GREATER_IS_BETTER,
    changed_settings,
    check_accelerator,
    check_beside_cache,
    check_choices,
    check_evaluation,
    check_ranges,
    check_reporters,
    check_unused,
    refused,
)

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    KdWeight = float | str
    Divergence = float | str
else:  # the command line gives text, which LeafConfig reads
    KdWeight = Divergence = str


@documented
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
            "tokens of one forward pass, counterfactuals and any padding included; a larger batch "
            "runs in several passes, with the same loss"
        ),
    )
    packing: bool = field(
        default=True,
        metadata=about(
            "run the rows of a pass one after the other, without padding, where the model keeps "
            "them apart; else, and with torch_compile, they are padded"
        ),
    )
    max_length: int = field(
        default=4096,
        metadata=about("tokens of prompt and completion; longer rows are left out, and counted"),
    )
    train_on: Literal["last", "all"] = field(
        default="last",
        metadata=about(
            "labels of an original with several assistant turns: its last one, or all; of a "
            "counterfactual always the last one"
        ),
    )
    kd_weight: KdWeight = field(
        default="pool",
        metadata=about(
            "weight of the originals' loss, the paper's lambda: a number from 0 to 1; two of them, "
            "0.9:0.5, for a straight line from the first step to the last; or pool: every token "
            "counts the same"
        ),
    )
    span_weighting: str = field(
        default="span",
        metadata=about(
            "span: every counterfactual counts the same; sample: each of the k of an original "
            "counts 1/k"
        ),
    )
    token_selection: str = field(
        default="all",
        metadata=about(
            "label tokens of each row that are trained on: all, or the token_share with the "
            "highest student entropy (entropy), half by entropy and half by KL where the entropy "
            "is low (tip), or at random (random)"
        ),
    )
    token_share: float = field(
        default=0.5,
        metadata=about("share of each row's label tokens that token_selection chooses"),
    )
    failed_share: float | None = field(
        default=None,
        metadata=about(
            "share of each step's originals that are rows the student fails, as the column "
            "student_verdict says; default: every original once an epoch"
        ),
    )
    ce_weight: float = field(
        default=0.0,
        metadata=about(
            "weight of the cross-entropy of the labels beside the distillation loss, from 0 to 1; "
            "1: supervised fine-tuning, for which no teacher runs"
        ),
    )
    divergence: Divergence = field(
        default="kl",
        metadata=about(
            "how far the student is from the teacher: kl, KL(teacher, student); reverse_kl, "
            "KL(student, teacher); jsd; or a number between 0 and 1, the teacher's share in the "
            "mixture of the generalized Jensen-Shannon divergence"
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
        default=None, metadata=about("system message for every row that has none")
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
    eval_answers: int = field(
        default=0,
        metadata=about(
            "originals of eval_dataset that the student answers greedily at each evaluation, "
            "graded as eval_accuracy; 0: none"
        ),
    )
    max_new_tokens: int = field(default=512, metadata=about("most tokens of an answer"))
    grade: GradeRule = field(default="math", metadata=about(GRADES))
    grade_timeout: float = field(
        default=5.0, metadata=about("processor seconds after which grading an answer is given up")
    )
    allow_code_execution: bool = field(
        default=False,
        metadata=about("run the programs in answers, confined by the kernel (for --grade code)"),
    )
    early_stopping_patience: int | None = field(
        default=None,
        metadata=about(
            "stop after so many evaluations without a better metric_for_best_model (by default "
            "the loss)"
        ),
    )
    remove_unused_columns: bool = field(
        default=False, metadata=about("must stay off: rows carry columns that no model takes")
    )

    def __post_init__(self) -> None:
        self.kd_weight = _read_weight(self.kd_weight)
        self.divergence = _read_divergence(self.divergence)
        self.chat_template_kwargs = json_object(self.chat_template_kwargs, "chat_template_kwargs")
        check_ranges(self)
        check_unused(self)
        check_choices(self)
        if self.token_selection == "all" and self.token_share != 0.5:
            raise ValueError(
                f"token_share: must come with token_selection, got {self.token_share} alone; give "
                "both"
            )
        check_evaluation(self)
        check_reporters(self)
        if self.early_stopping_patience is not None and self.metric_for_best_model is None:
            self.metric_for_best_model = "loss"
        if self.greater_is_better is None:  # transformers calls all but losses so
            measured = str(self.metric_for_best_model).removeprefix("eval_")
            self.greater_is_better = GREATER_IS_BETTER.get(measured)
        if self.token_selection == "tip" and self.ce_weight == 1:
            raise ValueError("token_selection: must not need a teacher with ce_weight 1, got tip")
        for name, plain in (("divergence", "kl"), ("temperature", 1)):
            if self.ce_weight == 1 and getattr(self, name) != plain:
                logger.warning("%s has no effect with ce_weight 1, which asks no teacher", name)
        given, changed = self.gradient_accumulation_steps, changed_settings(self)
        by_deepspeed = self.deepspeed or os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"
        several = int(os.environ.get("WORLD_SIZE", "1")) > 1 and not by_deepspeed
        if (several or self.bf16) and not torch.accelerator.is_available():
            # Else accelerate takes each process for a run of its own, and bfloat16 is refused.
            self.use_cpu = True
        if self.bf16 is None:
            on_gpu = torch.cuda.is_available() and not self.use_cpu and not self.fp16
            self.bf16 = on_gpu and torch.cuda.is_bf16_supported()
        if self.disable_tqdm is None:
            self.disable_tqdm = not sys.stderr.isatty()
        if self.ddp_find_unused_parameters is None:  # transformers looks for them in each pass
            self.ddp_find_unused_parameters = False
        try:
            super().__post_init__()  # type: ignore[no-untyped-call]
        except Exception as error:  # the base class has many ways to refuse a setting
            raise ValueError(f"{refused(error)} (given: {changed})") from error
        check_accelerator(self)
        # One process drives one GPU: nn.DataParallel would average the ranks' losses, and is slow.
        # Several GPUs are torchrun's or accelerate's business.
        self._n_gpu = min(self.n_gpu, 1)
        per_pass = self.per_device_train_batch_size * self.world_size
        derived, rest = divmod(self.originals_per_step, per_pass)
        if rest or not derived:
            raise ValueError(
                f"originals_per_step: must be a multiple of {per_pass} "
                f"(per_device_train_batch_size {self.per_device_train_batch_size} x "
                f"{self.world_size} ranks), got {self.originals_per_step}; change one of them"
            )
        if given not in (1, derived):
            raise ValueError(
                f"gradient_accumulation_steps: must be {derived}, which follows from "
                f"originals_per_step {self.originals_per_step}, got {given}; leave it out, or "
                f"give originals_per_step {per_pass * given}"
            )
        self.gradient_accumulation_steps = derived

    def kd_weight_at(self, done: float) -> float | Literal["pool"]:
        """Return lambda, or "pool", when a part of the training is done, from 0 to 1."""
        if isinstance(self.kd_weight, str) and ":" in self.kd_weight:
            first, last = map(float, self.kd_weight.split(":"))
            return first * (1 - done) + last * done
        return "pool" if self.kd_weight == "pool" else float(self.kd_weight)

    def with_changes(self, **changes: Any) -> LeafConfig:
        """Return a copy with other values; what follows from them is derived anew."""
        return replace(self, **{"gradient_accumulation_steps": 1, **changes})


def _read_divergence(value: object) -> float | str:
    """Return a divergence of `linear_dual_kl`: a name, or a number that may be text."""
    if value in ("kl", "reverse_kl", "jsd"):
        return str(value)
    try:
        beta = float(str(value))
    except ValueError:
        beta = 0.0
    if not 1e-6 <= beta <= 1 - 1e-6:
        raise ValueError(
            "divergence: must be kl, reverse_kl, jsd or a number between 0 and 1 (0.000001 from "
            f"both at least), got {value!r}"
        )
    return beta


def _read_weight(value: object) -> float | str:
    """Return a weight that may be text: "pool", a number, or a schedule "number:number"."""
    if value == "pool":
        return "pool"
    try:
        weights = [float(part) for part in str(value).split(":")]
    except ValueError:
        weights = []
    if not 1 <= len(weights) <= 2 or not all(0 <= weight <= 1 for weight in weights):
        raise ValueError(
            "kd_weight: must be 'pool', a number from 0 to 1, or two of them as in 0.9:0.5, got "
            f"{value!r}"
        )
    return weights[0] if len(weights) == 1 else ":".join(map(str, weights))


@documented
@dataclass(frozen=True)
class DistillArguments(RowOptions, PairOptions):
    """Models, rows and adapter of `leaf distill`.

    Raises:
        ValueError: a model or the dataset is missing, or a setting is outside its range, or has no
            use with a cache.
    """

    show: int = field(
        default=0,
        metadata=about(
            "print the tokens and labels of so many rows in the order of the training, and train "
            "nothing"
        ),
    )
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
    teacher_device: str = field(
        default="auto",
        metadata=about(
            "where the teacher is: auto is the student's device; cpu, cuda:1, ...; balanced: "
            "spread over all GPUs, the CPU's memory and the disk"
        ),
    )
    teacher_quantization: str | None = field(
        default=None,
        metadata=about(
            "round the teacher's weights: int8, bnb8 or nf4; see docs/guides/quantized.md"
        ),
    )
    teacher_cache: str | None = field(
        default=None,
        metadata=about(
            "output directory of `leaf cache`, which takes the teacher's place; --teacher may then "
            "be left out"
        ),
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
        need(self, "student", "dataset")
        if self.teacher_cache is None:
            need(self, "teacher")
        else:
            check_beside_cache(
                teacher_dtype=self.teacher_dtype,
                teacher_device=self.teacher_device,
                teacher_quantization=self.teacher_quantization,
            )
        check_rows(self)
        check_range(self, "show", 0, LARGEST)
        for name in ("lora_r", "lora_alpha"):
            check_range(self, name, 1, 2**31 - 1)
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout: must be from 0 to below 1, got {self.lora_dropout}")
        others = ("lora_alpha", "lora_dropout", "lora_target_modules")
        for name in others if self.lora_r is None else ():
            if getattr(self, name):
                raise ValueError(
                    f"{name}: must come with lora_r, got {getattr(self, name)} alone; give both"
                )


@documented
@dataclass(frozen=True)
class CacheConfig(ModelOptions, TeacherServerOptions, RowOptions, PairOptions):
    """Settings of `leaf cache`.

    Raises:
        ValueError: a setting is missing or outside its range.
    """

    student: str = field(
        default="",
        metadata=about(
            "the model to be trained, for topk: the probabilities are over the tokens that both "
            "models have, and the difference to the whole loss is measured with it"
        ),
    )
    dataset: str = field(
        default="",
        metadata=about(
            "a run directory of `leaf detect`, one of its arms (RUN/arms/NAME), or rows as it "
            f"takes them: {ROWS}"
        ),
    )
    dtype: str = field(
        default="auto",
        metadata=about(
            "dtype of the teacher's weights: float32, bfloat16, float16, or auto: bfloat16 on a "
            "GPU that has it, else float32, as in a training"
        ),
    )
    max_batch_tokens: int = field(
        default=8192, metadata=about("most tokens of a batch on a GPU, padding included")
    )
    teacher_quantization: str | None = field(
        default=None,
        metadata=about(
            "round the teacher's weights: int8, bnb8 or nf4; see docs/guides/quantized.md"
        ),
    )
    train_on: Literal["last", "all"] = field(
        default="last",
        metadata=about(
            "labels of an original with several assistant turns: its last one, or all, as in the "
            "training"
        ),
    )
    signal: Literal["hidden", "topk"] = field(
        default="hidden",
        metadata=about(
            "hidden: the states in front of the head, with the head: the exact loss; topk: the "
            "largest log-probabilities and the mass of all others"
        ),
    )
    top_k: int = field(
        default=32, metadata=about("how many log-probabilities of a token, at most 1024, for topk")
    )
    temperature: float = field(
        default=1.0, metadata=about("temperature of the probabilities: the training's, for topk")
    )
    output_dir: str = field(
        default="", metadata=about("directory of the cache; rows are added to one that is there")
    )

    def __post_init__(self) -> None:
        need(self, "teacher", "dataset", "output_dir")
        if self.signal == "topk":
            need(self, "student")
        check_rows(self)
        check_servers(self)
        self._check_served()
        check_literals(self)
        kwargs = json_object(self.chat_template_kwargs, "chat_template_kwargs")
        object.__setattr__(self, "chat_template_kwargs", kwargs)
        for name in ("max_length", "max_batch_tokens"):
            check_range(self, name, 1, LARGEST)
        check_range(self, "top_k", 1, 1024)
        check_range(self, "temperature", 1e-3, 1e3)
        for name, unused in (("top_k", 32), ("temperature", 1.0)):
            if self.signal == "hidden" and getattr(self, name) != unused:
                raise ValueError(
                    f"{name}: must come with signal topk, got {getattr(self, name)} for hidden "
                    "states, which hold for any; leave it out, or give --signal topk"
                )

    def _check_served(self) -> None:
        """Refuse what a server of prompt log-probabilities cannot give."""
        if not self.teacher_server_url:
            return
        if self.signal != "topk":
            raise ValueError(
                f"signal: must be topk with teacher_server_url, got {self.signal!r}; a server "
                "gives log-probabilities and no hidden states"
            )
        if self.temperature != 1:
            raise ValueError(
                f"temperature: must be 1 with teacher_server_url, got {self.temperature}; a "
                "server gives probabilities at 1, and the mass of the others at another "
                "temperature does not follow from them"
            )
        for name in ("dtype", "device", "teacher_quantization"):
            if (value := getattr(self, name)) not in (None, "auto"):
                raise ValueError(
                    f"{name}: must be left out with teacher_server_url, got {value!r}; the server "
                    "has decided it"
                )
