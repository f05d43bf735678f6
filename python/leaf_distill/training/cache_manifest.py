"""The description of a teacher's cache: cache.json and the tokenizer beside it."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from leaf_distill.data.prompt import Renderer
from leaf_distill.io import is_of, read_json, write_json
from leaf_distill.models.checks import embedding_rows, input_device
from leaf_distill.models.loading import LazyModel
from leaf_distill.models.server import Server
from leaf_distill.training.config import CacheConfig
from leaf_distill.training.served_teacher import served_vocabulary
from leaf_distill.training.teacher_cache import COMMAND, FILE, TOKENIZER
from leaf_distill.training.top_k_difference import load_student, shared_vocabulary

_SETTINGS = ("chat_template", "chat_template_kwargs", "system_prompt", "train_on")
_CONTENT = {"teacher": "digest", "server": "model"}
"""Only this part of each is compared; the rest tells where it was found, and may change."""


def read_manifest(
    config: CacheConfig,
    directory: Path,
    teacher: LazyModel,
    renderer: Renderer,
    server: Server | None,
) -> dict[str, Any]:
    """Return the content of cache.json, after comparing it with the one that is there.

    Raises:
        ValueError: the directory holds other files, or a cache of other settings.
    """
    topk = config.signal == "topk"
    wanted: dict[str, Any] = {
        "command": COMMAND,
        "teacher": {"name": teacher.name, "digest": teacher.fingerprint},
        "renderer": renderer.fingerprint,
        "settings": {name: getattr(config, name) for name in _SETTINGS},
        "signal": config.signal,
        "server": None if server is None else {"url": server.url, "model": server.model},
        "dtype": teacher.dtype if server is None else None,
        "quantization": config.teacher_quantization,
        "temperature": config.temperature if topk else None,
    }
    if is_of(directory / FILE, COMMAND):
        old = read_json(directory / FILE)
        if topk and old.get("signal") == "topk":
            wanted["top_k"] = min(config.top_k, old["vocab_size"])
        _check_same(directory, old, wanted)
        return old
    others = sorted(path.name for path in directory.iterdir() if path.name != ".lock")
    if others:
        raise ValueError(
            f"output_dir: must be empty or hold a cache of `leaf cache`, got {directory} with "
            f"{', '.join(others[:4])}; give another output_dir"
        )
    if server is not None:
        hidden, (rows, vocabulary) = None, served_vocabulary(config, teacher)
    else:
        model: Any = teacher.load()
        rows, hidden = embedding_rows(model), model.get_output_embeddings().in_features
        vocabulary = 0
        if topk:
            vocabulary = shared_vocabulary(model, load_student(config, input_device(model)))
    return wanted | {
        "embedding_rows": rows,
        "max_positions": teacher.max_positions,
        "hidden_size": hidden,
        "vocab_size": vocabulary or None,
        "top_k": min(config.top_k, vocabulary) if vocabulary else None,
    }


def _check_same(directory: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    for name, value in new.items():
        if name == "teacher" and new["server"] and old.get("server"):
            continue  # the weights are the server's, and those in the directory are not read
        there = old.get(name)
        if name in _CONTENT:
            there, value = ((one or {}).get(_CONTENT[name]) for one in (there, value))
        if there != value:
            shown = "" if name in ("teacher", "renderer") else f" {there!r}, not {value!r}"
            words = {
                "teacher": "content of the teacher",
                "renderer": "tokenizer or template",
                "server": "model of a server:",
            }
            raise ValueError(
                f"output_dir: must hold a cache of the same settings, got {directory}, made with "
                f"another {words.get(name, name)}{shown}; give another output_dir"
            )


def claim(directory: Path, manifest: Mapping[str, Any], teacher: LazyModel) -> None:
    """Write what describes the rows, as far as it is not there."""
    if not (directory / FILE).exists():
        write_json(directory / FILE, manifest)
    if not (directory / TOKENIZER).exists():
        with tempfile.TemporaryDirectory(prefix=".tokenizer-", dir=directory) as folder:
            made = Path(folder) / "saved"
            teacher.tokenizer.save_pretrained(made)
            made.rename(directory / TOKENIZER)
