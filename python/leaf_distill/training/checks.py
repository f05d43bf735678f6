"""Ranges of the training's settings, and options of transformers that have no use here."""

from __future__ import annotations

import math
import traceback
from dataclasses import MISSING, fields
from importlib.util import find_spec
from typing import Any, get_args

from transformers import TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.trainer_utils import HubStrategy, IntervalStrategy, SaveStrategy, SchedulerType
from transformers.training_args import OptimizerNames, trainer_log_levels

from leaf_distill.config import GradeRule
from leaf_distill.training.selection import SELECTIONS

_LARGEST = 1e30  # float32 holds it, and what is computed from it
_ANY_INTEGER = (-(2**63), 2**63 - 1, "an integer of 64 bits")
_ANY_NUMBER = (-_LARGEST, _LARGEST, "a finite number")
_COUNT = (1, 2**63 - 1, "at least 1")
_POSITIVE = (5e-324, _LARGEST, "a number above 0")
_NOT_NEGATIVE = (0, _LARGEST, "a number of at least 0")
_BELOW_1 = (0, math.nextafter(1, 0), "from 0 to below 1")

_RANGES: dict[str, tuple[float, float, str]] = {
    **dict.fromkeys(("originals_per_step", "max_length", "max_batch_tokens"), _COUNT),
    **dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size"), _COUNT),
    **dict.fromkeys(("learning_rate", "num_train_epochs"), _POSITIVE),
    **dict.fromkeys(("logging_steps", "save_steps", "eval_steps"), _POSITIVE),
    **dict.fromkeys(("weight_decay", "adam_epsilon", "max_grad_norm"), _NOT_NEGATIVE),
    **dict.fromkeys(("warmup_steps", "neftune_noise_alpha", "eval_delay"), _NOT_NEGATIVE),
    **dict.fromkeys(("dataloader_num_workers", "data_seed"), _NOT_NEGATIVE),
    **dict.fromkeys(("adam_beta1", "adam_beta2"), _BELOW_1),
    **dict.fromkeys(("gradient_accumulation_steps", "torch_empty_cache_steps"), _COUNT),
    **dict.fromkeys(("save_total_limit", "early_stopping_patience", "max_new_tokens"), _COUNT),
    "eval_answers": _NOT_NEGATIVE,
    "grade_timeout": _POSITIVE,
    "token_share": (5e-324, 1, "above 0 and at most 1"),
    "ce_weight": (0, 1, "from 0 to 1"),
    "failed_share": (5e-324, 1, "above 0 and at most 1"),
    # Beyond these, logits of the usual size leave float32 or become all alike.
    "temperature": (1e-3, 1e3, "from 0.001 to 1000"),
    "seed": (0, 2**32 - 1, "from 0 to 4294967295"),  # as NumPy takes it
}

GREATER_IS_BETTER = {
    **dict.fromkeys(("loss", "kd_loss", "cd_loss", "nll"), False),
    **dict.fromkeys(("agreement", "accuracy"), True),
}
"""The measures of an evaluation by which weights may be called the best, and which way."""

_UNUSED = {
    "label_smoothing_factor": "the labels are the teacher's distributions",
    "train_sampling_strategy": "the sampler spreads originals and counterfactuals over the steps",
    "length_column_name": "rows are not grouped by length",
    "auto_find_batch_size": "max_batch_tokens bounds a forward pass",
    "average_tokens_across_devices": "the loss always counts the tokens of all devices",
    "label_names": "the loss mask tells the labels",
    **dict.fromkeys(
        ("include_for_metrics", "batch_eval_metrics"), "no logits are kept for compute_metrics"
    ),
    **dict.fromkeys(
        ("eval_do_concat_batches", "eval_use_gather_object", "eval_accumulation_steps"),
        "an evaluation keeps sums only",
    ),
    "do_predict": "there is no prediction",
    "enable_jit_checkpoint": "a run goes on from its newest checkpoint; see save_steps",
    "parallelism_config": "each rank needs whole rows and a whole model or an FSDP shard",
    "remove_unused_columns": "rows carry columns that no model takes",
}
"""Options without effect here, or with a harmful one, each with the reason."""


_CHOICES = {
    "span_weighting": ["span", "sample"],
    "token_selection": [*SELECTIONS],
    "train_on": ["last", "all"],
    "grade": [*get_args(GradeRule)],
    "lr_scheduler_type": [*SchedulerType],
    "optim": [*OptimizerNames],
    "logging_strategy": [*IntervalStrategy],
    "eval_strategy": [*IntervalStrategy],
    "save_strategy": [*SaveStrategy],
    "hub_strategy": [*HubStrategy],
    "log_level": [*trainer_log_levels],
    "log_level_replica": [*trainer_log_levels],
}


_TRACKERS = ("tensorboard", "trackio", "wandb")
"""Reporters whose package has their name."""


def check_ranges(config: TrainingArguments) -> None:
    """Raise ValueError for the first number that is outside its range or not finite."""
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


def check_unused(config: TrainingArguments) -> None:
    """Raise ValueError for the first option that was set although it has no use."""
    for item in fields(config):
        value = getattr(config, item.name)
        if item.name in _UNUSED and value not in (_default(item), None):
            raise ValueError(
                f"{item.name}: must be left out, got {value!r}; it has no use for LeafTrainer: "
                f"{_UNUSED[item.name]}"
            )


def check_choices(config: TrainingArguments) -> None:
    """Raise ValueError for the first option that is none of its choices."""
    for name, choices in _CHOICES.items():
        value = getattr(config, name)
        if value is not None and value not in choices:  # a choice equals its text
            listed = ", ".join(getattr(choice, "value", choice) for choice in choices)
            raise ValueError(f"{name}: must be one of {listed}, got {value!r}")


def of_evaluation(config: Any) -> dict[str, str]:
    """Return the settings that ask for evaluations, with their values."""
    names = ("eval_on_start", "eval_answers", "early_stopping_patience", "load_best_model_at_end")
    values = {name: getattr(config, name) for name in (*names, "eval_strategy")}
    return {name: _text(value) for name, value in values.items() if value and value != "no"}


def check_evaluation(config: Any) -> None:
    """Raise ValueError where answers cannot be graded, or an early stop has nothing to go by."""
    if config.eval_answers and config.grade == "code" and not config.allow_code_execution:
        raise ValueError(
            "allow_code_execution: must be true to run the programs in answers, got false; give "
            "--allow_code_execution, which confines them"
        )
    for name in ("early_stopping_patience", "load_best_model_at_end"):
        if getattr(config, name) and config.eval_strategy == "no":
            raise ValueError(
                f"eval_strategy: must be steps or epoch with {name}, got no; give "
                "--eval_strategy steps --eval_steps N"
            )
    if not config.load_best_model_at_end or config.save_strategy == "best":
        return
    if config.save_strategy != config.eval_strategy:
        raise ValueError(
            f"save_strategy: must be best or {_text(config.eval_strategy)}, as eval_strategy is, "
            f"with load_best_model_at_end, got {_text(config.save_strategy)}; give best"
        )
    every = config.logging_steps if config.eval_steps is None else config.eval_steps
    if config.eval_strategy == "steps" and config.save_steps != every:
        raise ValueError(
            f"save_steps: must be eval_steps, {every:g}, with load_best_model_at_end, since only "
            f"weights that were saved can be taken, got {config.save_steps:g}; give one number "
            "for both, or --save_strategy best"
        )


def _text(choice: Any) -> str:
    return str(getattr(choice, "value", choice))


def check_reporters(config: TrainingArguments) -> None:
    """Raise ValueError for the first name in `report_to` that is unknown or not installed."""
    given: Any = config.report_to
    for name in [given] if isinstance(given, str) else given or []:
        if name in ("none", "all"):
            continue
        if name not in INTEGRATION_TO_CALLBACK:
            listed = ", ".join(("none", "all", *sorted(INTEGRATION_TO_CALLBACK)))
            raise ValueError(f"report_to: must be of {listed}, got {name!r}")
        if name in _TRACKERS and not find_spec(name):
            raise ValueError(
                f"report_to: must name an installed package, got {name!r}, which is not; run: pip "
                f"install {name}"
            )


def changed_settings(config: TrainingArguments) -> str:
    """Return the settings that only the base class has, and that are not its defaults, as text."""
    own = {*type(config).__annotations__, "output_dir"}
    changed = [
        f"{item.name} {getattr(config, item.name)!r:.80}"
        for item in fields(config)
        if item.name not in own and getattr(config, item.name) not in (_default(item), None)
    ]
    return ", ".join(changed) or "only those that --help shows"


def _default(item: Any) -> Any:
    return item.default if item.default_factory is MISSING else item.default_factory()


def check_accelerator(config: TrainingArguments) -> None:
    """Refuse settings of accelerate's own data loader, which LeafTrainer does not use."""
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
            "accelerator_config: must leave num_steps as it is; give originals_per_step instead"
        )


def check_beside_cache(**settings: object) -> None:
    """Raise ValueError where a setting of the teacher is given beside a cache of its signal."""
    for name, value in settings.items():
        if value not in (None, "auto"):
            got = repr(value) if isinstance(value, str) else f"a {type(value).__name__}"
            raise ValueError(
                f"{name}: must be left out with teacher_cache, got {got}; `leaf cache` has decided "
                "it"
            )


def refused(error: Exception) -> ValueError:
    """Return the sentence for a setting that transformers, torch or peft refuse; ours stay."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    if frame.f_globals["__name__"].startswith(("leaf_distill", "leaf_ext")):
        return ValueError(str(error))
    first = next(iter(str(error).strip().splitlines()), "")
    return ValueError(
        f"settings: must be what transformers and torch take, got {type(error).__name__}: {first}"
    )
