"""The owner of an output directory: the settings of its run, and files that must stay unharmed."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from enum import Enum
from pathlib import Path
from typing import Any

from leaf_distill.data.example import ROLES, Example
from leaf_distill.io import digest, is_of, make_directory, read_json, write_json
from leaf_distill.models.source import model_fingerprint, named
from leaf_distill.training.checkpoint import hash_weights
from leaf_distill.training.config import DistillArguments, LeafConfig
from leaf_distill.training.teacher_cache import TeacherCache

Identity = dict[str, Any]

# Settings that change the trained weights by more than rounding. Others may differ when a run goes
# on, and those that only a newer transformers has.
_DECIDING = (
    *("span_weighting", "token_selection", "token_share", "failed_share", "ce_weight"),
    "divergence",
    *("originals_per_step", "max_length", "kd_weight", "temperature", "disable_dropout"),
    *("chat_template", "chat_template_kwargs", "system_prompt", "learning_rate", "warmup_steps"),
    *("lr_scheduler_type", "lr_scheduler_kwargs", "num_train_epochs", "max_steps", "optim"),
    *("optim_args", "optim_target_modules", "weight_decay", "adam_beta1", "adam_beta2"),
    *("adam_epsilon", "max_grad_norm", "bf16", "fp16", "neftune_noise_alpha", "seed", "data_seed"),
    *("dataloader_drop_last", "load_best_model_at_end", "metric_for_best_model", "train_on"),
    "early_stopping_patience",
)
_DECIDING_BEST = (
    *("eval_strategy", "eval_steps", "eval_delay", "save_strategy", "save_steps"),
    *("eval_answers", "grade", "grade_timeout", "max_new_tokens", "greater_is_better"),
    *("bf16_full_eval", "fp16_full_eval"),
)
"""Settings of the evaluation, which decide where a run stops early and which weights are best."""
_DECIDING_ARGUMENTS = (
    *("teacher_dtype", "teacher_quantization"),
    *("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules"),
)
_WRITTEN = (
    *("README.md", "metrics.json", "run.json", "*config.json", "*.safetensors", "*.bin"),
    *("*.safetensors.index.json", "tokenizer*", "special_tokens_map.json", "*.jinja", "vocab.*"),
    *("merges.txt", "checkpoint-*", "broken_batch*.json", "token_kl.jsonl"),
)
"""Patterns of the files that a run writes; it must not overwrite those of others."""


def identity_of(
    arguments: DistillArguments,
    config: LeafConfig,
    examples: Sequence[Example],
    eval_examples: Sequence[Example] | None,
) -> Identity:
    """Return what decides the weights and what is written about them, as JSON holds it.

    Models and rows have a name and a digest, by which they are compared.
    """
    identity: Identity = {"command": "distill", "eval_dataset": None, "teacher_cache": None}
    for role in ROLES:
        if name := getattr(arguments, role):
            with named(role):
                identity[role] = {"name": name, "digest": model_fingerprint(name)}
    if arguments.teacher_cache is not None:
        cache = TeacherCache(arguments.teacher_cache)
        identity["teacher"] = cache.manifest["teacher"]
        made = {**cache.manifest, "teacher": cache.manifest["teacher"]["digest"]}
        identity["teacher_cache"] = {"name": arguments.teacher_cache, "digest": digest([made])}
    for rows, source in ((examples, "dataset"), (eval_examples, "eval_dataset")):
        if rows is not None:
            identity[source] = {"name": getattr(arguments, source), "digest": digest_of(rows)}
    if config.failed_share is not None:
        failed = digest([one.row_id] for one in examples if one.failed)
        identity["failed_rows"] = {"name": arguments.dataset, "digest": failed}
    identity |= {name: getattr(arguments, name) for name in _DECIDING_ARGUMENTS}
    if arguments.teacher_dtype == "auto" and arguments.teacher_device == "cpu":
        identity["teacher_dtype"] = "auto on a CPU"  # which may be another one
    if _by_evaluation(config) and config.eval_answers and eval_examples is not None:
        golds = golds_of(eval_examples)
        identity["graded_rows"] = {"name": arguments.eval_dataset, "digest": golds}
    result: Identity = json.loads(json.dumps(identity, default=str))
    return result | settings_of(config)


def settings_of(config: LeafConfig) -> Identity:
    """Return the settings of an `identity_of` that are those of the training."""
    settings = {}
    for name in (*_DECIDING, *(_DECIDING_BEST if _by_evaluation(config) else ())):
        value = getattr(config, name, None)
        settings[name] = value.value if isinstance(value, Enum) else value
    result: Identity = json.loads(json.dumps(settings, default=str))
    return result


def _by_evaluation(config: LeafConfig) -> bool:
    return config.load_best_model_at_end or config.early_stopping_patience is not None


def digest_of(examples: Iterable[Example]) -> str:
    """Return the sha256 of the rows' content."""
    return digest(
        [
            *(one.row_id, one.candidate_id, one.messages, one.completion, one.reply),
            *(dict(one.template_kwargs), one.teacher_messages, one.prefix),
        ]
        for one in examples
    )


def golds_of(examples: Iterable[Example]) -> str:
    """Return the sha256 of what answers to the rows are graded against."""
    return digest([one.row_id, one.answer, one.tests and one.tests.to_json()] for one in examples)


def check_output(directory: Path) -> None:
    """Raise ValueError where a run would overwrite files that no run of `leaf distill` wrote."""
    if _read_identity(directory) is not None:
        return
    found = sorted(path.name for pattern in _WRITTEN for path in directory.glob(pattern))
    if found:
        raise ValueError(
            f"output_dir: must be empty or hold a run of `leaf distill`, got {directory} with "
            f"{', '.join(found[:4])}{', ...' if len(found) > 4 else ''}, which would be "
            "overwritten; give another output_dir"
        )


def _read_identity(directory: Path) -> Identity | None:
    path = directory / "run.json"
    return read_json(path) if is_of(path, "distill") else None


def read_finished(directory: Path) -> dict[str, Any] | None:
    """Return the metrics of a run that was finished and whose weights are still there, or None.

    Raises:
        ValueError: a file of weights is another one than the run wrote.
    """
    try:
        metrics = read_json(directory / "metrics.json")
        written = dict(metrics["weights"])
    except (ValueError, TypeError, KeyError):
        return None
    found = hash_weights(directory)
    for name in written.keys() & found.keys():
        if written[name] != found[name]:
            raise ValueError(
                f"output_dir: must hold the student as the run wrote it, got {directory}, where "
                f"{name} has changed; delete that file to have it made again, or give another "
                "output_dir"
            )
    return metrics if written and written.keys() <= found.keys() else None


def check_identity(directory: Path, identity: Identity, *, finished: bool) -> list[str]:
    """Compare with the run in a directory, and return the differences that it may go on with.

    More steps are no other run, and neither is more patience: the steps so far would have been the
    same. Another learning rate is none as long as the run has not finished: a lower one is the cure
    where numbers are not finite.

    Raises:
        ValueError: another setting or content differs; names each on a line.
    """
    old = _read_identity(directory) or {}
    allowed: list[str] = []
    refused: list[str] = []
    for name in sorted(old.keys() & identity.keys()):
        if difference := _difference(name, old[name], identity[name]):
            may = _longer(name, old, identity) or (name == "learning_rate" and not finished)
            (allowed if may else refused).append(difference)
    if refused:
        lines = "".join(f"\n  {line}" for line in refused)
        raise ValueError(
            f"output_dir: must hold a run of these settings, got {directory}, where{lines}\n"
            "Give another output_dir, or the old settings to go on."
        )
    return allowed


def check_parent(checkpoint: Path, identity: Identity) -> None:
    """Raise ValueError unless a checkpoint is of a run of these very settings, wherever it lies."""
    if _read_identity(checkpoint.parent) is None:
        raise ValueError(
            f"resume_from_checkpoint: must be a checkpoint of a run of `leaf distill`, got "
            f"{checkpoint}, which has no run.json beside it; give another one"
        )
    check_identity(checkpoint.parent, identity, finished=False)


def earlier_changes(directory: Path) -> list[str]:
    """Return the settings that changed while the run in a directory went on."""
    changes = (_read_identity(directory) or {}).get("changes")
    return [str(change) for change in changes] if isinstance(changes, list) else []


def claim(directory: Path, identity: Identity) -> None:
    """Write that the directory belongs to a run that is not finished."""
    make_directory(directory)
    for stale in (directory / "metrics.json", *directory.glob("broken_batch*.json")):
        stale.unlink(missing_ok=True)
    write_json(directory / "run.json", identity)


def _difference(name: str, old: Any, new: Any) -> str:
    """Return a sentence, or nothing where the two are the same."""
    if isinstance(old, dict) and isinstance(new, dict) and "digest" in old and "digest" in new:
        if old["digest"] == new["digest"]:
            return ""
        old, new = old.get("name"), new["name"]
        if old == new:
            return f"the content of {name} {new} has changed, or what is taken from it"
    return "" if old == new else f"{name} was {_short(old)} and is now {_short(new)}"


def _longer(name: str, old: Identity, new: Identity) -> bool:
    """Return whether the difference is that the run may have more steps than before."""
    try:
        if name == "early_stopping_patience":
            return bool(old[name] < new[name])
        before, now = old["max_steps"], new["max_steps"]
        if name == "max_steps":
            return bool(0 < before < now)
        # max_steps decides if it is given.
        epochs = name == "num_train_epochs"
        return epochs and (min(before, now) > 0 or (max(before, now) < 0 and old[name] < new[name]))
    except (KeyError, TypeError):  # a file that was edited
        return False


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:60]}...{text[-15:]}"
