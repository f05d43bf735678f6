"""The settings of stage 2: the paper's by default, and a wrong one is named before any work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from distill_pair import make_config

from leaf_distill.training.config import DistillArguments, LeafConfig

DIVERGENCE = "divergence: must be kl, reverse_kl, jsd or a number between 0 and 1 .*"
KD_WEIGHT = "kd_weight: must be 'pool', a number from 0 to 1, or two of them as in 0.9:0.5"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"originals_per_step": 10}, "originals_per_step: must be a multiple of 4"),
        ({"gradient_accumulation_steps": 3}, "must be 2, which follows from originals_per_step 8"),
        ({"kd_weight": "1.5"}, f"{KD_WEIGHT}, got '1.5'"),
        ({"kd_weight": -0.1}, f"{KD_WEIGHT}, got -0.1"),
        ({"kd_weight": "half"}, f"{KD_WEIGHT}, got 'half'"),
        ({"kd_weight": float("nan")}, f"{KD_WEIGHT}, got nan"),
        ({"kd_weight": "0.9:1.1"}, f"{KD_WEIGHT}, got '0.9:1.1'"),
        ({"kd_weight": "0.9:0.5:0.1"}, f"{KD_WEIGHT}, got '0.9:0.5:0.1'"),
        ({"kd_weight": "pool:0.5"}, f"{KD_WEIGHT}, got 'pool:0.5'"),
        ({"span_weighting": "token"}, "span_weighting: must be one of span, sample, got 'token'"),
        (
            {"token_selection": "kl"},
            "token_selection: must be one of all, entropy, tip, random, got 'kl'",
        ),
        (
            {"token_selection": "tip", "token_share": 0.0},
            "token_share: must be above 0 and at most 1, got 0.0",
        ),
        ({"token_share": 0.2}, "token_share: must come with token_selection, got 0.2 alone"),
        ({"divergence": "js"}, f"{DIVERGENCE}, got 'js'"),
        ({"divergence": "0"}, f"{DIVERGENCE}, got '0'"),
        ({"divergence": 1.0}, f"{DIVERGENCE}, got 1.0"),
        ({"divergence": float("nan")}, f"{DIVERGENCE}, got nan"),
        ({"temperature": 0.0}, "temperature: must be from 0.001 to 1000, got 0.0"),
        ({"temperature": 1e-60}, "temperature: must be from 0.001 to 1000, got 1e-60"),
        ({"failed_share": 0.0}, "failed_share: must be above 0 and at most 1, got 0"),
        ({"failed_share": 1.5}, "failed_share: must be above 0 and at most 1, got 1.5"),
        ({"max_length": 0}, "max_length: must be at least 1, got 0"),
        ({"max_batch_tokens": 0}, "max_batch_tokens: must be at least 1, got 0"),
        ({"num_train_epochs": -1}, "num_train_epochs: must be a number above 0, got -1"),
        ({"max_steps": 0}, "max_steps: must be at least 1, or -1 for num_train_epochs, got 0"),
        ({"learning_rate": float("nan")}, "learning_rate: must be a finite number, got nan"),
        ({"learning_rate": -1.0}, "learning_rate: must be a number above 0, got -1"),
        ({"learning_rate": 1e300}, r"learning_rate: must be a finite number, got 1e\+300"),
        ({"adam_beta1": 2.0}, "adam_beta1: must be from 0 to below 1, got 2"),
        ({"weight_decay": float("inf")}, "weight_decay: must be a finite number, got inf"),
        ({"max_steps": 10**30}, "max_steps: must be an integer of 64 bits, got 1000"),
        ({"seed": -1}, "seed: must be from 0 to 4294967295, got -1"),
        ({"save_total_limit": 0}, "save_total_limit: must be at least 1, got 0"),
        ({"optim": "rmsprob"}, "^optim: must be one of adamw_torch, .*, got 'rmsprob'"),
        (
            {"lr_scheduler_type": "nope"},
            "^lr_scheduler_type: must be one of linear, .* got 'nope'",
        ),
        ({"save_strategy": "nope"}, "^save_strategy: must be one of no, steps, .*, got 'nope'"),
        ({"log_level": "nope"}, "^log_level: must be one of .*warning.*, got 'nope'"),
        ({"gradient_accumulation_steps": -1}, "^gradient_accumulation_steps: must be at least 1"),
        ({"deepspeed": "nope.json"}, r"^settings: must be .*\(given: .*deepspeed 'nope.json'"),
        ({"eval_strategy": "steps", "eval_steps": 1.5}, "^settings: must be .* --eval_steps must"),
    ],
)
def test_settings_are_checked(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as refused:
        make_config(tmp_path, **settings)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("label_smoothing_factor", 0.1),
        ("train_sampling_strategy", "group_by_length"),
        ("length_column_name", "tokens"),
        ("auto_find_batch_size", True),
        ("average_tokens_across_devices", False),
        ("label_names", ["labels"]),
        ("include_for_metrics", ["loss"]),
        ("batch_eval_metrics", True),
        ("eval_do_concat_batches", False),
        ("eval_use_gather_object", True),
        ("eval_accumulation_steps", 4),
        ("do_predict", True),
        ("enable_jit_checkpoint", True),
        ("remove_unused_columns", True),
    ],
)
def test_options_without_use_are_refused(tmp_path: Path, name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^{name}: must be left out, got .*; it has no use"):
        make_config(tmp_path, **{name: value})


@pytest.mark.parametrize("name", ["split_batches", "dispatch_batches", "non_blocking"])
def test_options_of_accelerates_loader_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=f"^accelerator_config: must leave {name} as it is"):
        make_config(tmp_path, accelerator_config={name: True})


def test_the_defaults_are_the_papers(tmp_path: Path) -> None:
    config = LeafConfig(output_dir=str(tmp_path), use_cpu=True)
    assert (config.learning_rate, config.lr_scheduler_type) == (1e-5, "cosine")
    assert (config.num_train_epochs, config.warmup_steps, config.max_length) == (3, 5, 4096)
    assert config.per_device_train_batch_size * config.gradient_accumulation_steps == 64
    assert not config.bf16 and config.report_to == [] and config.kd_weight == "pool"


@pytest.mark.parametrize(
    ("given", "at"),
    [
        ("0.25", [0.25, 0.25]),
        (1, [1.0, 1.0]),
        ("pool", ["pool", "pool"]),
        ("1:0.5", [1.0, 0.5]),
        (".2:0.4", [0.2, 0.4]),
    ],
)
def test_kd_weight_may_be_text(tmp_path: Path, given: Any, at: list[Any]) -> None:
    config = make_config(tmp_path, kd_weight=given).with_changes(seed=1)
    assert [config.kd_weight_at(0), config.kd_weight_at(1)] == at
    if at[0] != at[1]:
        assert config.kd_weight_at(0.25) == pytest.approx(0.75 * at[0] + 0.25 * at[1])


def test_a_changed_copy_derives_its_accumulation_anew(tmp_path: Path) -> None:
    config = make_config(tmp_path, originals_per_step=8, per_device_train_batch_size=4)
    changed = config.with_changes(originals_per_step=12, learning_rate=1e-3)
    assert changed.gradient_accumulation_steps == 3 and changed.learning_rate == 1e-3
    assert config.gradient_accumulation_steps == 2 and config.learning_rate == 1e-2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dataset": ""}, "dataset: must be given, got nothing; give --dataset"),
        ({"max_rows": 0}, "max_rows: must be at least 1, got 0"),
        ({"lora_r": 0}, "lora_r: must be at least 1, got 0"),
        ({"lora_r": 2, "lora_dropout": 1.0}, "lora_dropout: must be from 0 to below 1, got 1.0"),
        ({"lora_alpha": 8}, "lora_alpha: must come with lora_r, got 8 alone"),
    ],
)
def test_arguments_are_checked(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        DistillArguments(**{"student": "s", "teacher": "t", "dataset": "d", **settings})
