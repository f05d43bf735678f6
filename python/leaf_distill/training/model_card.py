"""The README.md of a trained student: its origin, its training and its measures."""

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


_DETECTED = (
    *("strategy", "threshold", "rule", "cap", "teacher_max", "join_gap", "min_length"),
    *("validate", "select", "completion_source", "seed"),
)
_SETTINGS = (
    *("originals_per_step", "learning_rate", "lr_scheduler_type", "warmup_steps", "optim"),
    *("kd_weight", "span_weighting", "token_selection", "token_share", "temperature"),
    *("failed_share", "ce_weight", "divergence"),
    *("max_length", "disable_dropout", "bf16", "fp16", "seed"),
)
_CONTROLS = (
    *("random_tokens", "random_spans", "perplexity", "student_saliency", "teacher_saliency"),
)


def model_card(arguments: DistillArguments, config: LeafConfig, metrics: Mapping[str, Any]) -> str:
    """Return the card as Markdown, with the metadata that the Hub reads on top.

    Args:
        arguments, config: the settings of the run.
        metrics: the content of `metrics.json`; its `detected` are the settings of `leaf detect`.
    """
    versions = ", ".join(f"{name} {found}" for name, found in package_versions().items())
    return "\n".join(
        [
            f"---\n{yaml.safe_dump(_metadata(arguments), sort_keys=False)}---",
            f"\n# {Path(str(config.output_dir)).name}\n",
            f"`{arguments.student}`, {_method(config, metrics)}\n",
            f"## Data\n\n{_data(arguments, metrics)}\n",
            f"## Settings\n\n{_settings(arguments, config, metrics)}\n",
            f"## Measured\n\n{_measured(metrics)}\n",
            f"## Versions\n\n{versions}\n",
            f"## Citation\n\n{_CITATION}\n",
        ]
    )


def _method(config: LeafConfig, metrics: Mapping[str, Any]) -> str:
    if config.ce_weight == 1:
        return "fine-tuned on the completions of the rows, without a teacher."
    mixed = f" and the rows' completions (ce_weight {config.ce_weight:g})" * bool(config.ce_weight)
    return f"distilled from `{metrics['teacher']['name']}`{mixed} {_rows_of(metrics)}"


def _rows_of(metrics: Mapping[str, Any]) -> str:
    paper = "[LeaF](https://arxiv.org/abs/2506.07851) (Learning to Focus)"
    if not metrics["rows"]["counterfactuals"]:
        return "by plain distillation: there were no counterfactual prompts."
    strategies = metrics["strategies"]
    if strategies == ["distractors"]:
        return "on prompts and on the same prompts with a sentence of another prompt inserted."
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
    text = (
        f"{rows['originals']} originals and {rows['counterfactuals']} counterfactuals"
        f"{_kinds(rows)} ({rows['label_tokens']} label tokens) of `{arguments.dataset}` "
        f"(sha256 of the rows {metrics['dataset_sha256'][:16]}); left out: {left_out or 'none'}."
    )
    if not rows["counterfactuals"]:
        return text
    found = {**metrics["detected"], "strategy": ", ".join(metrics["strategies"])}
    shown = [(name, str(found[name])) for name in _DETECTED if found.get(name) not in (None, "")]
    return f"{text}\n\n{markdown_table([('setting of `leaf detect`', 'value'), *shown])}"


def _kinds(rows: Mapping[str, Any]) -> str:
    """Say how many rows are other than a cut prompt that both models read."""
    kinds = {
        "with another prompt for the teacher than for the student": rows["cross"],
        "cut in the beginning of the response": rows["responses"],
    }
    said = " and ".join(f"{count} {kind}" for kind, count in kinds.items() if count)
    return f", {said}," if said else ""


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


def _settings(arguments: DistillArguments, config: LeafConfig, metrics: Mapping[str, Any]) -> str:
    length = "max_steps" if config.max_steps > 0 else "num_train_epochs"
    lines = [("setting", "value")]
    for name in (length, *_SETTINGS):
        if name == "token_share" and config.token_selection == "all":
            continue
        value = getattr(config, name)
        lines.append((name, str(value.value if isinstance(value, Enum) else value)))
    if stored := metrics["teacher"]["stored"]:
        lines.append(("the teacher's part", f"stored by `leaf cache`: {stored}"))
    if changes := metrics["changes"]:
        lines.append(("changed on the way", "; ".join(changes)))
    if arguments.lora_r is not None:
        alpha = arguments.lora_alpha or 2 * arguments.lora_r
        where = ", ".join(arguments.lora_target_modules or ["all linear layers but the head"])
        lines.append(("LoRA", f"rank {arguments.lora_r}, alpha {alpha}, {where}"))
    return markdown_table(lines)


def _measured(metrics: Mapping[str, Any]) -> str:
    """Return the first and the last logged window, and the evaluation, if there are any."""
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
        "nll": "student's negative log-likelihood of a label (nats)",
        "accuracy": "accuracy of greedy answers",
        "student_entropy": "student's entropy (nats)",
        "teacher_entropy": "teacher's entropy (nats)",
    }
    lines = [
        (label, *(f"{column[name]:.4f}" if name in column else "" for _, column in columns))
        for name, label in names.items()
    ]
    table = markdown_table([("", *(title for title, _ in columns)), *lines])
    mean = f"Mean training loss over the whole run: {metrics['train']['train_loss']:.4f}."
    if best := metrics["best"]:
        mean += (
            f" The weights are those after step {best['step']}, where {best['measure']} was best "
            f"({best['value']:.4f})."
        )
    return f"{table}\n\n{mean} The columns of the training are means over different rows."


def markdown_table(lines: Sequence[Sequence[str]]) -> str:
    """Return a table whose first line is the head; columns after the first are numbers."""
    head, *rows = lines
    rule = ("---", *("---:" for _ in head[1:]))
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, rule, *rows))
