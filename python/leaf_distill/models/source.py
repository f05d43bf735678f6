"""Finds the files of a model and takes the fingerprint of their content."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from huggingface_hub.constants import is_offline_mode
from huggingface_hub.errors import LocalEntryNotFoundError
from transformers.utils.hub import cached_file, extract_commit_hash

TOKENIZER_FILES: Final = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "*.model", "*.jinja", "chat_template.json"),
)
_MODEL_FILES: Final = (
    *("config.json", "generation_config.json", "adapter_config.json", "*.index.json"),
    *("*.safetensors", "pytorch_model*.bin", "adapter_model*.bin", "*.gguf"),
    *("modeling_*.py", "configuration_*.py", "tokenization_*.py"),
    *TOKENIZER_FILES,
)  # all that from_pretrained reads; other files beside them, such as metrics, decide nothing
_MEBIBYTE: Final = 1 << 20


@dataclass(frozen=True)
class ModelSource:
    """The place of a model's files: a directory, a hub name or a GGUF file.

    Attributes:
        name: the name as it was given, for messages.
        place: the first argument of `from_pretrained`.
        gguf_file: the file's name, if it is one.
        base: the base model, if `place` holds an adapter.
    """

    name: str
    place: str
    gguf_file: str | None = None
    base: ModelSource | None = None

    @property
    def root(self) -> ModelSource:
        """The source of the model below all adapters."""
        return self if self.base is None else self.base.root

    @property
    def arguments(self) -> dict[str, Any]:
        """The keyword arguments of `from_pretrained` that belong to the place."""
        return {} if self.gguf_file is None else {"gguf_file": self.gguf_file}

    @property
    def is_local(self) -> bool:
        return os.path.isdir(self.place)

    def has(self, *patterns: str) -> bool:
        """Tell whether a local directory has a file of one of these patterns."""
        return any(file for pattern in patterns for file in Path(self.place).glob(pattern))


def locate_model(name: str, *, _above: tuple[str, ...] = ()) -> ModelSource:
    """Find a model by name; an adapter's base may have a path relative to the adapter.

    Args:
        name: a directory, a hub name, a ``.gguf`` file or the directory of an adapter.

    Raises:
        ValueError: the path does not exist, the hub is out of reach, the file is no GGUF file, the
            package for one is missing, or an adapter names no base.
    """
    place = os.path.expanduser(name)
    if os.path.isfile(place):
        if not name.lower().endswith(".gguf"):
            raise ValueError(
                f"model: must be a directory, a hub name or a .gguf file, got the file {name!r}; "
                "name its directory"
            )
        if importlib.util.find_spec("gguf") is None:
            raise ValueError(
                f"model: must come with the package gguf, got none for {_short(name)}; run: pip "
                "install gguf"
            )
        return ModelSource(name, os.path.dirname(place) or ".", os.path.basename(place))
    if not os.path.isdir(place):
        # A name whose first part is a folder here is a misspelled path, and not asked of the hub.
        beside = "/" in name and os.path.isdir(os.path.dirname(place))
        outside = name.startswith((".", "/", "~")) or name.count("/") > 1
        if beside or outside or name.endswith(".gguf"):
            raise ValueError(
                "model: must be a directory, a hub name or a .gguf file, got "
                f"{_short(name)}, which does not exist; check the path"
            )
        place = name
    adapter = _adapter_config(place)
    if adapter is None:
        return ModelSource(name, place)
    return ModelSource(name, place, base=_locate_base(name, place, adapter, _above))


def model_fingerprint(name: str) -> str:
    """Return the sha256 of a model's settings, code, tokenizer and weights.

    A file above 64 MiB is sampled at 64 evenly spaced MiB, because training changes every weight. A
    hub name is hashed with its commit. An adapter's fingerprint includes that of its base model.

    Args:
        name: as for `locate_model`.

    Raises:
        ValueError: the model is not there, or has no files.
    """
    return fingerprint_source(locate_model(name))


def fingerprint_source(source: ModelSource) -> str:
    """Return `model_fingerprint` of a located model."""
    digest = hashlib.sha256()
    if source.base is not None:
        digest.update(fingerprint_source(source.base).encode())
    try:
        if source.gguf_file is not None:
            _add_file(digest, Path(source.place, source.gguf_file))
        elif source.is_local:
            _add_directory(digest, Path(source.place), source)
        else:
            _add_hub(digest, source)
    except OSError as error:
        raise ValueError(unreadable("model", source.name, error)) from error
    return digest.hexdigest()


def fingerprint_in_memory(model: Any) -> str:
    """Return the sha256 of a model's configuration and of 1 MiB, evenly spaced, of each tensor."""
    digest = hashlib.sha256(type(model).__name__.encode())
    for config in (model.config, getattr(model, "generation_config", None)):
        settings = {} if config is None else config.to_dict()
        for incidental in ("_name_or_path", "transformers_version"):
            settings.pop(incidental, None)
        digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, tensor in _plain(sorted(model.state_dict().items())):
        if not isinstance(tensor, torch.Tensor):  # the settings of a quantization
            digest.update(f"{name} {tensor!r}\n".encode())
            continue
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        if tensor.device.type == "meta":
            raise ValueError(
                f"model: must have all weights of a model in memory there, got {name!r} offloaded "
                "in it; give the name of its directory, with the device balanced"
            )
        flat = tensor.detach().reshape(-1)
        step = max(1, -(-flat.numel() * flat.element_size() // _MEBIBYTE))
        sample = flat[(flat.numel() - 1) % step :: step].cpu().contiguous()
        digest.update(sample.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _plain(tensors: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    """Yield tensors, and in place of a quantized one those that it consists of."""
    for name, tensor in tensors:
        if hasattr(tensor, "__tensor_flatten__"):
            parts, _ = tensor.__tensor_flatten__()
            yield from _plain((f"{name}.{part}", getattr(tensor, part)) for part in parts)
        else:
            yield name, tensor


def unreadable(what: str, name: str, error: Exception) -> str:
    """Return the sentence for a model or tokenizer that transformers cannot read."""
    if "trust_remote_code" in str(error):
        return (
            f"trust_remote_code: must be true for {_short(name)}, which brings code of its own, "
            "got false; read its *.py files, and set it if you trust them"
        )
    reason = " ".join(str(error).split())
    reason = reason if len(reason) <= 300 else f"{reason[:300]}..."
    if os.path.exists(os.path.expanduser(name)):
        advice = f"save the {what} there again"
    else:
        advice = "there is no such directory here: check the path, or the name on the hub"
    return (
        "model: must be a directory saved by save_pretrained, a hub name or a .gguf file, got "
        f"{_short(name)}, from which no {what} can be read ({type(error).__name__}: {reason}); "
        f"{advice}"
    )


@contextmanager
def named(argument: str, common: str = "model") -> Iterator[None]:
    """Let errors about a `model` (or another common name) name the argument that gave it."""
    try:
        yield
    except ValueError as error:
        if not str(error).startswith(f"{common}: "):
            raise
        raise ValueError(f"{argument}{str(error).removeprefix(common)}") from error


def _short(name: str) -> str:
    return repr(name if len(name) <= 200 else f"{name[:100]}...{name[-60:]}")


def _adapter_config(place: str) -> Path | None:
    """Return the path of the adapter's configuration, None if the place holds a full model."""
    if os.path.isdir(place):
        path = Path(place, "adapter_config.json")
        return path if path.is_file() and not Path(place, "config.json").is_file() else None
    unreached = None
    try:
        if cached_file(place, "config.json"):
            return None
    except (OSError, ValueError) as error:
        if not isinstance(error.__cause__, LocalEntryNotFoundError):
            return None  # the loading of the model reports it
        unreached = error.__cause__
    try:  # a hub that is out of reach keeps each question waiting
        found = cached_file(place, "adapter_config.json", local_files_only=unreached is not None)
    except (OSError, ValueError) as error:
        if unreached is not None and not is_offline_mode():
            raise ValueError(_no_hub(place, unreached)) from error
        return None
    return None if found is None else Path(found)


def _no_hub(name: str, error: Exception) -> str:
    """Return the sentence for a name of the hub, which could not be asked for it."""
    reason = error.__cause__ or error
    return (
        f"model: the hub cannot be reached ({type(reason).__name__}: {str(reason)[:200]}), and "
        f"{_short(name)} is neither a directory here nor downloaded; check the network and the "
        "name. HF_HUB_OFFLINE=1 reads what was downloaded, without a network"
    )


def _locate_base(name: str, place: str, adapter: Path, above: tuple[str, ...]) -> ModelSource:
    try:
        base = json.loads(adapter.read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(unreadable("adapter", name, error)) from error
    wanted, above = base, (*above, _real(place))
    if isinstance(base, str):
        beside = os.path.join(place, base)
        if not os.path.exists(os.path.expanduser(base)) and os.path.exists(beside):
            base = beside
    if not wanted or not isinstance(base, str) or _real(base) in above:
        raise ValueError(
            f"model: must be an adapter that names its base model, got {name!r}, whose "
            f"adapter_config.json names {wanted!r}; set base_model_name_or_path there"
        )
    try:
        return locate_model(base, _above=above)
    except ValueError as error:
        raise ValueError(
            f"{error} (the base model of the adapter {name!r}: base_model_name_or_path in its "
            "adapter_config.json)"
        ) from error


def _real(place: str) -> str:
    place = os.path.expanduser(place)
    return os.path.realpath(place) if os.path.isdir(place) else place


def _add_directory(digest: Any, directory: Path, source: ModelSource) -> None:
    files = sorted({file for kind in _MODEL_FILES for file in directory.glob(kind)})
    if not files:
        raise FileNotFoundError(f"{str(directory)!r} has none of the files of a model")
    for file in files:
        if source.base is not None and file.name == "adapter_config.json":
            # The base model counts by its content, so its path does not.
            settings = json.loads(file.read_text(encoding="utf-8"))
            settings.pop("base_model_name_or_path", None)
            digest.update(json.dumps(settings, sort_keys=True).encode())
            continue
        digest.update(f"{file.name} ".encode())
        _add_file(digest, file)


def _add_file(digest: Any, file: Path) -> None:
    size = file.stat().st_size
    digest.update(f"{size}\n".encode())
    with file.open("rb") as stream:
        blocks = min(64, -(-size // _MEBIBYTE))
        for block in range(blocks):
            stream.seek(block * max(size - _MEBIBYTE, 0) // max(blocks - 1, 1))
            digest.update(stream.read(_MEBIBYTE))


def _add_hub(digest: Any, source: ModelSource) -> None:
    settings = "config.json" if source.base is None else "adapter_config.json"
    file = cached_file(source.place, settings)
    commit = extract_commit_hash(file, None)
    if commit is not None:
        digest.update(f"{source.place}@{commit}".encode())
    else:  # a cache of another layout
        _add_directory(digest, Path(str(file)).parent, source)
