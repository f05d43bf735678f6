"""`leaf cache`: a teacher and rows in; what the teacher says about them on the disk."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from leaf_distill.data.collator import ExampleDataset, collate, pad, plan_batches, prepare_dataset
from leaf_distill.data.dataset import load_examples
from leaf_distill.data.example import Example, Rendering
from leaf_distill.data.prompt import Renderer
from leaf_distill.io import locked, read_json, user_directory, write_json
from leaf_distill.models.checks import input_device
from leaf_distill.models.label_logits import widened
from leaf_distill.models.lm_head import finish_logits
from leaf_distill.models.loading import LazyModel
from leaf_distill.models.placement import resolve_device
from leaf_distill.models.server import Server, find_server
from leaf_distill.models.source import model_fingerprint, named
from leaf_distill.models.tokenizer import check_same_tokenizer, load_tokenizer
from leaf_distill.ranks import processes
from leaf_distill.terminal import Progress, say
from leaf_distill.training.cache_columns import (
    Columns,
    hidden_columns,
    rendering_key,
    top_k_columns,
)
from leaf_distill.training.cache_manifest import claim, read_manifest
from leaf_distill.training.cache_writer import CacheWriter, write_head
from leaf_distill.training.config import CacheConfig
from leaf_distill.training.served_teacher import served_columns
from leaf_distill.training.teacher import Head, LiveTeacher
from leaf_distill.training.teacher_cache import (
    FILE,
    HEAD,
    StoredTeacher,
    TeacherCache,
)
from leaf_distill.training.top_k_difference import difference, load_student

logger = logging.getLogger(__name__)

SUMMARY = "summary.json"
LOGIT_ROWS = 128  # of which all logits are formed at a time


@dataclass(frozen=True)
class CacheResult:
    """The directory of a cache, and the content of its summary.json."""

    output_dir: Path
    summary: dict[str, Any]


def cache_teacher(config: CacheConfig) -> CacheResult:
    """Store the signal of a teacher for the rows of a dataset that a cache lacks.

    Args:
        config: the settings.

    Returns:
        The directory, and what was measured.

    Raises:
        ValueError: the teacher or the rows cannot be read, no row is left, or the directory holds
            other files or a cache of another teacher, template or form.
        ServerError: the teacher's server does not give what is needed.
        StoreError: the disk is full, or another process works in the directory.
    """
    directory = user_directory(config.output_dir)
    if processes() > 1:
        raise ValueError(
            f"leaf cache: must be started as one process, got {processes()}; give each a part of "
            "the rows and an output_dir of its own, or start one"
        )
    server = find_server("teacher", config)
    teacher = _teacher(config, read=server is None)
    columns = config.columns if isinstance(config.columns, dict) else None
    examples = load_examples(
        config.dataset, split=config.dataset_split, columns=columns, max_rows=config.max_rows
    )
    renderer = _renderer(config, _as_loaded(teacher.tokenizer))
    with locked(directory):
        manifest = read_manifest(config, directory, teacher, renderer, server)
        rows = _prepare(config, examples, renderer, manifest)
        if server is not None and not (directory / FILE).exists():  # before a file is written
            shortest = {b"": rows.shortest.renderings["teacher"]}
            list(served_columns(server, shortest, manifest["top_k"], manifest["vocab_size"]))
        claim(directory, manifest, teacher)
        cache = TeacherCache(directory)
        renderings = {
            rendering_key(one.renderings["teacher"]): one.renderings["teacher"]
            for one in rows.examples
        }
        lacking = {key: one for key, one in renderings.items() if key not in cache}
        whole = (directory / SUMMARY).exists()
        measured = read_json(directory / SUMMARY).get("difference") if whole else None
        if server is not None:
            _store_served(directory, manifest, server, lacking)
        elif lacking or not whole:
            live = _live(teacher, rows)
            _store(config, directory, manifest, live, lacking)
            if config.signal == "topk":
                stored = StoredTeacher(TeacherCache(directory), live.device)
                student = load_student(config, live.device)
                measured = difference(stored, live, student, rows.examples)
        summary = {**TeacherCache(directory).totals(), "difference": measured}
        write_json(directory / SUMMARY, summary)
    say(_said(directory, summary, len(lacking)))
    return CacheResult(directory, summary)


def _said(directory: Path, summary: Mapping[str, Any], new: int) -> str:
    lines = [
        f"The cache {directory}: rows {summary['rows']} (new {new}), label tokens "
        f"{summary['label_tokens']}, bytes a label token {summary['bytes_a_token']:.1f}"
        f"{'' if new else '; it was complete'}"
    ]
    if (outside := summary["outside"]) is not None:
        lines.append(
            f"Mass outside of the stored probabilities: {outside['mean']:.2g} a token, at most "
            f"{outside['highest']:.2g}"
        )
    if (measured := summary["difference"]) is not None:
        lines.append(
            f"KL(teacher, student) on a sample of {measured['label_tokens']} label tokens: "
            f"{measured['stored']:.5f} nats from the cache, {measured['whole']:.5f} over the whole "
            "vocabulary"
        )
    return "\n".join(lines)


def _teacher(config: CacheConfig, *, read: bool) -> LazyModel:
    """Return the teacher; where its weights are not to be read they need not be there."""
    fingerprint = None
    if not read:
        with named("teacher"):
            fingerprint = model_fingerprint(config.teacher)
    return LazyModel(
        config.teacher,
        dtype=_dtype(config),
        device=config.device,
        trust_remote_code=config.trust_remote_code,
        argument="teacher",
        fingerprint=fingerprint,
        quantization=config.teacher_quantization,
    )


def _dtype(config: CacheConfig) -> str:
    """Return the dtype that a training would load the teacher in."""
    if config.dtype != "auto":
        return config.dtype
    on_gpu = resolve_device(config.device).type == "cuda"
    return "bfloat16" if on_gpu and torch.cuda.is_bf16_supported() else "float32"


def _renderer(config: CacheConfig, tokenizer: PreTrainedTokenizerBase) -> Renderer:
    kwargs = config.chat_template_kwargs
    return Renderer(
        tokenizer,
        chat_template=config.chat_template,
        system_prompt=config.system_prompt,
        template_kwargs=kwargs if isinstance(kwargs, dict) else None,
        train_on=config.train_on,
    )


def _as_loaded(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Return a tokenizer as a training will load it, so that both have the same fingerprint."""
    with tempfile.TemporaryDirectory(prefix="leaf-tokenizer-") as folder:
        tokenizer.save_pretrained(folder)
        return load_tokenizer(folder)


# ---- rows ----


def _prepare(
    config: CacheConfig,
    examples: Sequence[Example],
    renderer: Renderer,
    manifest: Mapping[str, Any],
) -> ExampleDataset:
    """Render the rows as the teacher reads them; those that no training takes are left out."""
    theirs = renderer
    if config.student:
        tokenizer = load_tokenizer(config.student, trust_remote_code=config.trust_remote_code)
        check_same_tokenizer(renderer.tokenizer, tokenizer)
        theirs = _renderer(config, tokenizer)
    ids, positions = manifest["embedding_rows"], manifest["max_positions"]
    rows, _ = prepare_dataset(
        list(examples),
        {"student": theirs, "teacher": renderer},
        max_length=min(config.max_length, positions or config.max_length),
        embedding_rows={"student": ids, "teacher": ids},
        name="dataset",
    )
    return rows


def _live(teacher: LazyModel, rows: ExampleDataset) -> LiveTeacher:
    """Load the teacher, and compare its head with its own logits on the shortest row."""
    model = teacher.load().requires_grad_(False)
    live = LiveTeacher(model, input_device(model))
    live.check(collate([rows.shortest]))
    return live


def _store(
    config: CacheConfig,
    directory: Path,
    manifest: Mapping[str, Any],
    live: LiveTeacher,
    lacking: Mapping[bytes, Rendering],
) -> None:
    """Run the teacher on rows, and write its head where the rows need it."""
    keys, rows = list(lacking), list(lacking.values())
    if manifest["signal"] == "hidden" and not (directory / HEAD).exists():
        write_head(directory / HEAD, live.head)
    batches = plan_batches([len(row) for row in rows], max_tokens=config.max_batch_tokens)
    with (
        CacheWriter(directory, manifest) as writer,
        Progress(len(rows), "teacher") as progress,
    ):
        for batch in batches:
            signals = _signals(live, [rows[at] for at in batch], manifest)
            writer.add(zip((keys[at] for at in batch), signals, strict=True))
            progress.update(len(batch))


def _store_served(
    directory: Path,
    manifest: Mapping[str, Any],
    server: Server,
    lacking: Mapping[bytes, Rendering],
) -> None:
    """Ask a server for rows, and write each as it comes."""
    sizes = manifest["top_k"], manifest["vocab_size"]
    with (
        CacheWriter(directory, manifest) as writer,
        Progress(len(lacking), "teacher") as progress,
        closing(served_columns(server, lacking, *sizes)) as rows,
    ):
        for row in rows:
            writer.add([row])
            progress.update(1)


def _signals(
    live: LiveTeacher, rows: Sequence[Rendering], manifest: Mapping[str, Any]
) -> Iterator[Columns]:
    """Yield the signal of each row of a batch."""
    batch = pad(rows)
    at = batch["loss_mask"]
    states = live.hidden(batch["input_ids"], batch["attention_mask"], at)
    for part in torch.split(states, at.sum(dim=1).tolist()):
        if manifest["signal"] == "hidden":
            yield hidden_columns(part)
        else:
            yield _top_k(part, live.head, manifest)


def _top_k(states: Tensor, head: Head, manifest: Mapping[str, Any]) -> Columns:
    """Return the stored probabilities of hidden states, from logits in float32 or wider."""
    weight = head.weight[: manifest["vocab_size"]]
    bias = None if head.bias is None else head.bias[: manifest["vocab_size"]]
    chunks = []
    for part in torch.split(states, LOGIT_ROWS):
        logits = widened(nn.functional.linear(part, weight, bias))
        logits = finish_logits(logits, head.scale, head.softcap)
        chunks.append(top_k_columns(logits, manifest["top_k"], manifest["temperature"]))
    return {name: np.concatenate([one[name] for one in chunks]) for name in chunks[0]}
