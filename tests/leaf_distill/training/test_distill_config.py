"""The settings of stage 2: the paper's by default, and a wrong one is named before any work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from distill_pair import make_config

from leaf_distill.training.config import LeafConfig


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"originals_per_step": 10}, "originals_per_step: needs a multiple of 4"),
        ({"gradient_accumulation_steps": 3}, "follows from originals_per_step 8 and is 2 here"),
        ({"kd_weight": "1.5"}, "kd_weight: needs 'pool' or a number"),
        ({"kd_weight": "half"}, "kd_weight: needs 'pool' or a number"),
        ({"temperature": 0.0}, "temperature: needs a number above 0"),
        ({"max_length": 0}, "max_length: needs at least 1"),
        ({"remove_unused_columns": True}, "remove_unused_columns: must be off"),
    ],
)
def test_settings_are_checked(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_config(tmp_path, **settings)


def test_the_defaults_are_the_papers(tmp_path: Path) -> None:
    config = LeafConfig(output_dir=str(tmp_path), use_cpu=True)
    assert (config.learning_rate, config.lr_scheduler_type) == (1e-5, "cosine")
    assert (config.num_train_epochs, config.warmup_steps, config.max_length) == (3, 5, 4096)
    assert config.per_device_train_batch_size * config.gradient_accumulation_steps == 64
    assert not config.bf16 and config.report_to == [] and config.objective_weight == "pool"
