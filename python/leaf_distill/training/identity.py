"""Whose a run directory is: what decides the trained student, and what may lie in the way."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any

from leaf_distill.data.example import Example
from leaf_distill.io import digest, make_directory, read_json, write_json
from leaf_distill.models.loading import model_fingerprint
from leaf_distill.training.config import DistillArguments, LeafConfig

logger = logging.getLogger(__name__)

Identity = dict[str, Any]

# Settings that change the trained weights by more than rounding. Others may differ when a run goes
# on, and those that a new transformers has, too.
_DECIDING = (
    *("originals_per_step", "max_length", "kd_weight", "temperature", "disable_dropout"),
    *(
        "chat_template",
        "chat_template_kwargs",
        "system_prompt",
        "learning_rate",
        "lr_scheduler_type",
    ),
    *("lr_scheduler_kwargs", "warmup_steps", "num_train_epochs", "max_steps", "optim"),
    *("optim_args", "optim_target_modules", "weight_decay", "adam_beta1", "adam_beta2"),
    *("adam_epsilon", "max_grad_norm", "bf16", "fp16", "neftune_noise_alpha", "seed", "data_seed"),
    *("dataloader_drop_last", "load_best_model_at_end", "metric_for_best_model"),
)
_OF_ARGUMENTS = (*("teacher_dtype", "lora_r", "lora_alpha", "lora_dropout", "lora_target_modules"),)
_NAMED = ("student", "teacher", "dataset", "eval_dataset")
"""What is compared by content, whatever its name."""

_WRITTEN = (
    *("README.md", "metrics.json", "*config.json", "*.safetensors", "*.safetensors.index.json"),
    *("*.bin", "tokenizer*", "special_tokens_map.json", "*.jinja", "vocab.*", "merges.txt"),
    *("checkpoint-*", "run.json"),
)
"""What a run of `leaf distill` writes; of others it must not overwrite any."""


def identity_of(
    arguments: DistillArguments,
    config: LeafConfig,
    examples: Sequence[Example],
    eval_examples: Sequence[Example] | None,
) -> Identity:
    """All that decides the weights and what is written about them, as JSON has it."""
    identity: Identity = {
        "command": "distill",
        "student": _content(arguments.student, model_fingerprint(arguments.student)),
        "teacher": _content(arguments.teacher, model_fingerprint(arguments.teacher)),
        "dataset": _content(arguments.dataset, digest_of(examples)),
        "eval_dataset": None,
        **{name: getattr(arguments, name) for name in _OF_ARGUMENTS},
        **{name: _plain(getattr(config, name, None)) for name in _DECIDING},
    }
    if eval_examples is not None:
        identity["eval_dataset"] = _content(str(arguments.eval_dataset), digest_of(eval_examples))
    result: Identity = json.loads(json.dumps(identity, default=str))
    return result


def digest_of(examples: Sequence[Example]) -> str:
    """The sha256 of the rows' content."""
    return digest(
        [
            *(one.row_id, one.candidate_id, one.messages, one.completion, one.reply),
            dict(one.template_kwargs),
        ]
        for one in examples
    )


def check_output(directory: Path) -> None:
    """Raise ValueError where a run would overwrite files that no run of `leaf distill` wrote."""
    try:
        if directory.exists() and not directory.is_dir():
            raise ValueError(f"output_dir: must be a directory, got the file {directory}")
    except OSError as error:  # such as a name that is too long
        raise ValueError(f"output_dir: must be a directory, got {error}") from error
    if read_identity(directory) is not None:
        return
    found = sorted(path.name for kind in _WRITTEN for path in directory.glob(kind))
    if found:
        raise ValueError(
            f"output_dir: must be empty or hold a run of `leaf distill`, got {directory} with "
            f"{', '.join(found[:4])}{', ...' if len(found) > 4 else ''}, which would be "
            "overwritten; give another output_dir"
        )


def read_identity(directory: Path) -> Identity | None:
    """The identity of the run in a directory, None where there is no run of `leaf distill`."""
    try:
        found = read_json(directory / "run.json")
    except ValueError:
        return None
    return found if found.get("command") == "distill" else None


def check_identity(directory: Path, identity: Identity, *, finished: bool) -> list[str]:
    """Compare with the run in a directory, and return the differences that it may go on with.

    More steps are no other run; neither is another learning rate, as long as the run has not
    finished: it is the cure where numbers are not finite.

    Raises:
        ValueError: another setting or content differs; names each on a line.
    """
    old = read_identity(directory)
    if old is None:
        return []
    allowed: list[str] = []
    refused: list[str] = []
    for name in sorted(old.keys() & identity.keys()):
        if _same(name, old[name], identity[name]):
            continue
        may = _longer(name, old, identity) or (name == "learning_rate" and not finished)
        (allowed if may else refused).append(_difference(name, old[name], identity[name]))
    if refused:
        lines = "".join(f"\n  {line}" for line in refused)
        raise ValueError(
            f"output_dir: must hold a run of these settings, got {directory}, where{lines}\n"
            "Give another output_dir, or the old settings to go on."
        )
    return allowed


def claim(directory: Path, identity: Identity) -> None:
    """Write that the directory belongs to a run that is not finished."""
    make_directory(directory)
    (directory / "metrics.json").unlink(missing_ok=True)
    write_json(directory / "run.json", identity)


def _content(name: str, fingerprint: str) -> dict[str, str]:
    return {"name": name, "digest": fingerprint}


def _plain(value: object) -> object:
    return value.value if isinstance(value, Enum) else value


def _same(name: str, old: Any, new: Any) -> bool:
    if name in _NAMED and isinstance(old, dict) and isinstance(new, dict):
        old, new = old.get("digest"), new.get("digest")
    return bool(old == new)


def _longer(name: str, old: Identity, new: Identity) -> bool:
    """Whether the run is to have more steps than before."""
    if name not in ("max_steps", "num_train_epochs"):
        return False
    try:
        steps = old["max_steps"], new["max_steps"]
        if name == "max_steps":
            return bool(0 < steps[0] < steps[1])
        # Where max_steps is given, it decides.
        return min(steps) > 0 or (max(steps) < 0 and bool(old[name] < new[name]))
    except (KeyError, TypeError):  # a file that was edited
        return False


def _difference(name: str, old: Any, new: Any) -> str:
    if name in _NAMED and isinstance(old, Mapping) and isinstance(new, Mapping):
        if old.get("name") == new.get("name"):
            return f"the content of {name} {new.get('name')} has changed"
        old, new = old.get("name"), new.get("name")
    return f"{name} was {_short(old)} and is now {_short(new)}"


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:60]}...{text[-15:]}"
