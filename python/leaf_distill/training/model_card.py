"""The README.md of a trained student: its origin, its training, what was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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


_CONTROLS = ("random_tokens", "random_spans", "perplexity", "student_saliency")


def model_card(arguments: DistillArguments, config: LeafConfig, metrics: Mapping[str, Any]) -> str:
    """The card as Markdown, with the metadata that the Hub reads on top.

    `metrics` is what `metrics.json` holds; its `detected` are the settings of `leaf detect`.
    """
    versions = ", ".join(f"{name} {found}" for name, found in package_versions().items())
    return "\n".join(
        [
            f"---\n{yaml.safe_dump(_metadata(arguments), sort_keys=False)}---",
            f"\n# {Path(str(config.output_dir)).name}\n",
            f"`{arguments.student}`, distilled from `{arguments.teacher}` {_method(metrics)}\n",
            f"## Data\n\n{_data(arguments, metrics)}\n",
            f"## Settings\n\n{_settings(arguments, config)}\n",
            f"## Measured\n\n{_measured(metrics)}\n",
            f"## Versions\n\n{versions}\n",
            f"## Citation\n\n{_CITATION}\n",
        ]
    )


def _method(metrics: Mapping[str, Any]) -> str:
    paper = "[LeaF](https://arxiv.org/abs/2506.07851) (Learning to Focus)"
    if not metrics["rows"]["counterfactuals"]:
        return "by plain distillation: there were no counterfactual prompts."
    strategies = metrics["strategies"]
    if any(strategy in _CONTROLS for strategy in strategies):
        return (
            f"as a control of {paper}: on prompts and on the same prompts with parts cut out that "
            f"`{', '.join(strategies)}` chose, instead of the confounding tokens."
        )
    return (
        f"with {paper}: on prompts and on the same prompts with their confounding tokens cut out."
    )


def _data(arguments: DistillArguments, metrics: Mapping[str, Any]) -> str:
    rows = metrics["rows"]
    left_out = ", ".join(f"{count} {reason}" for reason, count in rows["left_out"].items())
    lines = [
        f"{rows['originals']} originals and {rows['counterfactuals']} counterfactuals "
        f"({rows['label_tokens']} label tokens) of `{arguments.dataset}` "
        f"(sha256 of the rows {metrics['dataset_sha256'][:16]}); left out: {left_out or 'none'}."
    ]
    names = {
        "strategy": "what is cut",
        "threshold": "threshold",
        "rule": "rule of the threshold",
        "cap": "cap of the quantile rule",
        "teacher_max": "highest teacher saliency",
        "join_gap": "tokens between joined spans",
        "min_length": "shortest span",
        "validate": "who must answer a cut prompt correctly",
        "select": "rows that were searched",
        "completion_source": "whose completion",
        "seed": "seed of the controls",
    }
    found = {"strategy": ", ".join(metrics["strategies"])} | dict(metrics["detected"])
    shown = [
        (label, str(found[name]))
        for name, label in names.items()
        if found.get(name) not in (None, "")
    ]
    if rows["counterfactuals"]:
        lines.append(_table(("`leaf detect`", "value"), shown))
    return "\n\n".join(lines)


def _metadata(arguments: DistillArguments) -> dict[str, object]:
    metadata: dict[str, object] = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["leaf", "distillation"],
    }
    if arguments.lora_r is not None:
        metadata["library_name"] = "peft"
    # The Hub takes names of its own repositories here, and no paths.
    if not Path(arguments.student).expanduser().exists():
        metadata["base_model"] = arguments.student
    if not Path(arguments.dataset).expanduser().exists():
        metadata["datasets"] = [arguments.dataset.split(":")[0]]
    return metadata


def _settings(arguments: DistillArguments, config: LeafConfig) -> str:
    weight = config.kd_weight
    steps = config.max_steps > 0
    entries: dict[str, object] = {
        "originals per step": config.originals_per_step,
        "optimizer steps" if steps else "epochs": config.max_steps
        if steps
        else config.num_train_epochs,
        "learning rate": f"{config.learning_rate:g}, {_value(config.lr_scheduler_type)}, "
        f"{config.warmup_steps:g} warm-up steps",
        "optimizer": _value(config.optim),
        "kd_weight": "pool (every token counts the same)" if weight == "pool" else weight,
        "temperature": config.temperature,
        "max length": config.max_length,
        "dropout": "off" if config.disable_dropout else "as the model has it",
        "autocast": "bfloat16" if config.bf16 else "float16" if config.fp16 else "none",
        "seed": config.seed,
    }
    if arguments.lora_r is not None:
        alpha = arguments.lora_alpha or 2 * arguments.lora_r
        where = ", ".join(arguments.lora_target_modules or ["all linear layers but the head"])
        entries["LoRA"] = f"rank {arguments.lora_r}, alpha {alpha}, {where}"
    return _table(("setting", "value"), [(name, str(value)) for name, value in entries.items()])


def _measured(metrics: Mapping[str, Any]) -> str:
    """The first and the last logged window, and the evaluation, where there are any."""
    logs = [log for log in metrics["log"] if "loss" in log]
    columns: list[tuple[str, Mapping[str, float]]] = []
    for i in sorted({0, len(logs) - 1}) if logs else ():
        first = logs[i - 1]["step"] + 1 if i else 1
        columns.append((f"training, mean of steps {first} to {logs[i]['step']}", logs[i]))
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
    table = _table(("", *(title for title, _ in columns)), lines)
    mean = f"Mean training loss over the whole run: {metrics['train']['train_loss']:.4f}."
    return f"{table}\n\n{mean} The columns of the training are means over different rows."


def _table(head: tuple[str, ...], lines: Sequence[tuple[str, ...]]) -> str:
    rule = tuple("---" for _ in head)
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, rule, *lines))


def _value(setting: object) -> str:
    """TrainingArguments turns some words into members of an Enum."""
    return str(setting.value if isinstance(setting, Enum) else setting)
