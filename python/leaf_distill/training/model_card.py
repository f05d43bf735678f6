"""The README.md of a trained student: its origin, its training, what was measured."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any

import yaml

from leaf_distill.config import package_versions
from leaf_distill.training.config import DistillArguments, LeafConfig

_CITATION = """\
```bibtex
@article{guo2025leaf,
  title   = {Learning to Focus: Causal Attention Distillation via Gradient-Guided Token Pruning},
  author  = {Guo, Yiju and Yang, Wenkai and Sun, Zexu and Ding, Ning and Liu, Zhiyuan and
             Lin, Yankai},
  journal = {arXiv preprint arXiv:2506.07851},
  year    = {2025},
  url     = {https://arxiv.org/abs/2506.07851}
}
```"""


def model_card(arguments: DistillArguments, config: LeafConfig, metrics: Mapping[str, Any]) -> str:
    """The card as Markdown, with the metadata that the Hub reads on top."""
    rows = metrics["rows"]
    left_out = ", ".join(f"{count} {reason}" for reason, count in rows["left_out"].items())
    data = (
        f"{rows['originals']} originals and {rows['counterfactuals']} counterfactuals "
        f"({rows['label_tokens']} label tokens) of `{arguments.dataset}`; "
        f"left out: {left_out or 'none'}."
    )
    method = (
        "with [LeaF](https://arxiv.org/abs/2506.07851) (Learning to Focus): on prompts and on the "
        "same prompts with their confounding tokens cut out"
        if rows["counterfactuals"]
        else "by plain distillation: there were no counterfactual prompts"
    )
    versions = ", ".join(f"{name} {found}" for name, found in package_versions().items())
    return "\n".join(
        [
            f"---\n{yaml.safe_dump(_metadata(arguments), sort_keys=False)}---",
            f"\n# {Path(str(config.output_dir)).name}\n",
            f"`{arguments.student}`, distilled from `{arguments.teacher}` {method}.\n",
            f"## Data\n\n{data}\n",
            f"## Settings\n\n{_settings(config)}\n",
            f"## Measured\n\n{_measured(metrics)}\n",
            f"## Versions\n\n{versions}\n",
            f"## Citation\n\n{_CITATION}\n",
        ]
    )


def _metadata(arguments: DistillArguments) -> dict[str, object]:
    metadata: dict[str, object] = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["leaf", "distillation"],
    }
    # The Hub takes names of its own repositories here, and no paths.
    if not Path(arguments.student).expanduser().exists():
        metadata["base_model"] = arguments.student
    if not Path(arguments.dataset).expanduser().exists():
        metadata["datasets"] = [arguments.dataset.split(":")[0]]
    return metadata


def _settings(config: LeafConfig) -> str:
    weight = config.kd_weight
    entries = {
        "originals per step": config.originals_per_step,
        **(
            {"optimizer steps": config.max_steps}
            if config.max_steps > 0
            else {"epochs": config.num_train_epochs}
        ),
        "learning rate": f"{config.learning_rate:g}, {_value(config.lr_scheduler_type)}, "
        f"{config.warmup_steps:g} warm-up steps",
        "optimizer": _value(config.optim),
        "kd_weight": "pool (every token counts the same)" if weight == "pool" else weight,
        "temperature": config.temperature,
        "max length": config.max_length,
        "autocast": "bfloat16" if config.bf16 else "none",
        "seed": config.seed,
    }
    return _table(("setting", "value"), [(name, str(value)) for name, value in entries.items()])


def _measured(metrics: Mapping[str, Any]) -> str:
    """First and last logged step, and the evaluation, where there are any."""
    logs = [log for log in metrics["log"] if "loss" in log]
    columns: list[tuple[str, Mapping[str, float]]] = []
    if logs:
        columns += [(f"step {log['step']}", log) for log in (logs[0], *logs[1:][-1:])]
    if metrics["eval"]:
        scored = {name.removeprefix("eval_"): value for name, value in metrics["eval"].items()}
        columns.append(("evaluation", scored))
    names = {
        "loss": "loss",
        "kd_loss": "KL per token, originals",
        "cd_loss": "KL per token, counterfactuals",
        "agreement": "top-1 agreement with the teacher",
        "student_entropy": "student's entropy (nats)",
        "teacher_entropy": "teacher's entropy (nats)",
    }
    lines = [
        (label, *(f"{column[name]:.4f}" if name in column else "" for _, column in columns))
        for name, label in names.items()
    ]
    return _table(("", *(title for title, _ in columns)), lines)


def _table(head: tuple[str, ...], lines: list[tuple[str, ...]]) -> str:
    rule = tuple("---" for _ in head)
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, rule, *lines))


def _value(setting: object) -> str:
    """TrainingArguments turns some words into members of an Enum."""
    return str(setting.value if isinstance(setting, Enum) else setting)
