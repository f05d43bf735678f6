"""Models and tokenizers by name: a directory, a hub name or a GGUF file."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any, cast

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")
MODEL_FILES = (
    *("config.json", "generation_config.json", "adapter_config.json", "*.index.json"),
    *("*.safetensors", "pytorch_model*.bin", "adapter_model*.bin", "*.gguf"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "*.model", "*.jinja", "chat_template.json"),
)
"""What from_pretrained reads; other files beside it, such as metrics, decide nothing."""
BLOCK = 1 << 20
PROBE_TEXTS = (
    "Tom has 12 apples, buys 1,234 more and eats 0.5; how many are left?",
    "  two  spaces\tand a tab\n\nit's DON'T isn't \u00e9 e\u0301 \u00df na\u00efve",
    "def f(x):\n    return x**2  # \u4e2d\u6587 \u0440\u0443\u0441 \U0001f600",
)


def load_model(name: str, *, dtype: str = "auto", device: str = "auto") -> PreTrainedModel:
    """Load a causal language model from a directory, a hub name or a ``.gguf`` file.

    A GGUF file becomes a plain model (float32 for ``dtype="auto"``) that trains and saves like any
    other. Raises ValueError for a missing path, another kind of model, or missing weights.
    """
    check_dtype(dtype)
    target = resolve_device(device)
    place, extra = _locate(name)
    if extra and dtype == "auto":
        dtype = "float32"
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            place, dtype=dtype, output_loading_info=True, **extra
        )
    except Exception as error:  # damaged files raise whatever their parser raises
        raise ValueError(_unreadable("model", name, error)) from error
    model, info = loaded
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise ValueError(
            f"The model {name!r} lacks {len(missing)} of its weights, such as {missing[0]!r}: "
            "save it again, whole, with save_pretrained."
        )
    plain: Any = _plain(model) if extra else model
    return cast(PreTrainedModel, plain.to(target))


def check_dtype(dtype: str) -> None:
    """Raise ValueError unless `load_model` knows the dtype."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, not {dtype!r}.")


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Load the fast tokenizer of a model (its offsets are needed); without a pad token it gets EOS.

    Raises ValueError for a missing path, a missing tokenizer, or one without offsets.
    """
    place, extra = _locate(name)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(place, **extra)
    except Exception as error:
        raise ValueError(_unreadable("tokenizer", name, error)) from error
    if not tokenizer.is_fast:
        raise ValueError(
            f"The tokenizer of {name!r} is a slow one ({type(tokenizer).__name__}) that cannot "
            "tell where its tokens stand in the text: save it as a fast one (tokenizer.json)."
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token or "<|pad|>"
    return tokenizer


def model_fingerprint(name: str) -> str:
    """Return the sha256 of a model's settings, tokenizer and weights.

    Of a file above 64 MiB 64 evenly spaced MiB are read; training changes every weight. A hub name
    stands for itself and its commit.
    """
    digest = hashlib.sha256()
    path = Path(name).expanduser()
    if not path.exists():
        place, _ = _locate(name)
        try:
            commit = AutoConfig.from_pretrained(place)._commit_hash
        except (OSError, ValueError) as error:
            raise ValueError(_unreadable("model", name, error)) from error
        return hashlib.sha256(f"{name}@{commit}".encode()).hexdigest()
    files = [path] if path.is_file() else {file for kind in MODEL_FILES for file in path.glob(kind)}
    for file in sorted(files):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}\n".encode())
        with file.open("rb") as stream:
            blocks = min(64, -(-size // BLOCK))
            for block in range(blocks):
                stream.seek(block * max(size - BLOCK, 0) // max(blocks - 1, 1))
                digest.update(stream.read(BLOCK))
    return digest.hexdigest()


def resolve_device(device: str) -> torch.device:
    """Return the device of a name; "auto" is this process's GPU where there is one, else the CPU.

    Raises ValueError for an unknown device, or a GPU that is not there.
    """
    if device == "auto":
        if not torch.cuda.is_available():
            return torch.device("cpu")
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    try:
        resolved = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device must be 'auto', 'cpu' or 'cuda[:N]', not {device!r}.") from error
    if resolved.type == "cuda" and (resolved.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device {device!r} was asked for, but {torch.cuda.device_count()} GPUs are here."
        )
    return resolved


def check_same_tokenizer(
    teacher: PreTrainedTokenizerBase, student: PreTrainedTokenizerBase
) -> None:
    """Raise ValueError with the first difference if the two tokenizers are different ones.

    A token that only one of them has is no difference if it was added (a pad token, say); neither
    is the size of a model's padded vocabulary.
    """
    reason = "distillation compares the two models token by token, which needs the same tokenizer"
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    added = {*student.added_tokens_encoder, *teacher.added_tokens_encoder}
    for token in sorted({*ours, *theirs}, key=lambda t: (theirs.get(t, ours.get(t, 0)), t)):
        ids = theirs.get(token), ours.get(token)
        if ids[0] == ids[1] or (None in ids and token in added):
            continue
        raise ValueError(
            f"The tokenizers are different: token {token!r} is {_id(ids[0])} in the teacher's and "
            f"{_id(ids[1])} in the student's; {reason}. Use two models of one family."
        )
    for text in PROBE_TEXTS:
        pieces = [one(text, add_special_tokens=False)["input_ids"] for one in (teacher, student)]
        if pieces[0] != pieces[1]:
            raise ValueError(
                f"The tokenizers are different: they split {text!r} differently, into "
                f"{len(pieces[0])} and {len(pieces[1])} tokens; {reason}."
            )


def _locate(name: str) -> tuple[str, dict[str, Any]]:
    """Return what from_pretrained takes: a place, and for a GGUF file its name."""
    path = Path(name).expanduser()
    if path.is_dir():
        return str(path), {}
    if path.is_file():
        if path.suffix != ".gguf":
            raise ValueError(f"The model {name!r} is a file, but not a .gguf one: name its folder.")
        return str(path.parent), {"gguf_file": path.name}
    if name.startswith((".", "/", "~")) or name.endswith(".gguf") or name.count("/") > 1:
        raise ValueError(
            f"The model {name!r} does not exist: no such directory or .gguf file. Check the path."
        )
    return name, {}


def _plain(model: Any) -> Any:
    """Rebuild a model that was read from GGUF as an ordinary one.

    transformers counts it as quantized, although its weights are not any more: it refuses to save,
    to change its dtype and to train it.
    """
    settings = model.config.to_dict()
    settings.pop("quantization_config", None)
    config = type(model.config).from_dict(settings)
    fresh = type(model)._from_config(config, dtype=model.dtype)
    fresh.load_state_dict(model.state_dict(), assign=True)
    fresh.tie_weights()
    fresh.generation_config = model.generation_config
    return fresh.train(model.training)


def _unreadable(what: str, name: str, error: Exception) -> str:
    first = (str(error).strip() or type(error).__name__).splitlines()[0]
    return (
        f"No {what} of a causal language model can be read from {name!r}; give a directory saved "
        f"by save_pretrained, a hub name or a .gguf file. transformers says: {first}"
    )


def _id(index: int | None) -> str:
    return "absent" if index is None else f"number {index}"
