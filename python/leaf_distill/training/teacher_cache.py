"""A teacher's signal on the disk: the files, and the training that reads them.

    CACHE/cache.json           the teacher, its template, and the form of the signal
    CACHE/tokenizer/           the teacher's tokenizer
    CACHE/head.safetensors     its head, where the signal is hidden states
    CACHE/part-00000.parquet   rows, each under a key of its tokens and labels

A part is written whole or not at all, and never changed.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from safetensors import safe_open
from torch import Tensor

from leaf_distill.data.collator import Batch, ExampleDataset
from leaf_distill.data.prompt import Renderer
from leaf_distill.io import is_of, read_json, reading
from leaf_distill.models.source import model_fingerprint, named
from leaf_distill.models.tokenizer import load_tokenizer
from leaf_distill.training.cache_columns import (
    Columns,
    column_types,
    part_files,
    rendering_key,
    row_key,
    top_k_logprobs,
)
from leaf_distill.training.teacher import TENSORS, Head, Hidden, Signal, TopK, teacher_rows

COMMAND: Final = "cache"
FILE: Final = "cache.json"
HEAD: Final = "head.safetensors"
TOKENIZER: Final = "tokenizer"
GROUPS_KEPT: Final = 8


class TeacherCache:
    """A cache of `leaf cache`; its rows are read by groups of about a megabyte, as they are needed.

    Any number of processes may read it, also while another one adds rows, which they do not see.

    Args:
        directory: the output directory of `leaf cache`.

    Attributes:
        manifest: the content of its cache.json.

    Raises:
        ValueError: the directory is no cache, or a file in it is damaged.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory).expanduser()
        if not is_of(self.directory / FILE, COMMAND):
            raise ValueError(
                f"teacher_cache: must be a directory that `leaf cache` wrote, got {directory}, "
                f"which has no {FILE} of it; check the path"
            )
        self.manifest = read_json(self.directory / FILE)
        with named("teacher_cache"):
            self.tokenizer = load_tokenizer(str(self.directory / TOKENIZER))
        self._group = functools.lru_cache(GROUPS_KEPT)(self._read_group)
        self._places = self._index()

    @property
    def name(self) -> str:
        """The teacher's name, when the cache was made."""
        return str(self.manifest["teacher"]["name"])

    @property
    def description(self) -> str:
        """The form of the signal, in words."""
        made = self.manifest
        if made["signal"] == "hidden":
            return f"hidden states in {made['dtype']} with their head"
        source = made.get("server")
        served = f", given by a server for its model {source['model']}" if source else ""
        return f"the {made['top_k']} largest log-probabilities and the mass of all others{served}"

    def __contains__(self, key: bytes) -> bool:
        return key in self._places

    def __len__(self) -> int:
        return len(self._places)

    def read(self, key: bytes) -> Columns:
        """Return the signal of a row.

        Raises:
            KeyError: the cache has no such row.
            ValueError: its file is damaged.
        """
        path, group, row = self._places[key]
        table = self._group(path, group)
        return {name: table[name][row].values.to_numpy() for name in table.column_names}

    def _index(self) -> dict[bytes, tuple[Path, int, int]]:
        places: dict[bytes, tuple[Path, int, int]] = {}
        for path in part_files(self.directory):
            with reading(path), pq.ParquetFile(path) as file:
                for group in range(file.num_row_groups):
                    keys = file.read_row_group(group, columns=["key"])["key"].to_pylist()
                    places |= {key: (path, group, row) for row, key in enumerate(keys)}
        return places

    def _read_group(self, path: Path, group: int) -> pa.Table:
        names = [name for name, _ in column_types(self.manifest)]
        with reading(path), pq.ParquetFile(path, page_checksum_verification=True) as file:
            return file.read_row_group(group, columns=names).combine_chunks()

    def totals(self) -> dict[str, Any]:
        """Return the rows, their label tokens, the bytes of one, and the mass outside the top k."""
        topk = self.manifest["signal"] == "topk"
        values = size = 0
        tails = []
        for path in part_files(self.directory):
            with reading(path), pq.ParquetFile(path) as file:
                size += path.stat().st_size
                groups = [file.metadata.row_group(i) for i in range(file.num_row_groups)]
                values += sum(group.column(group.num_columns - 1).num_values for group in groups)
                if topk:
                    tail = file.read(columns=["tail_logprob"])["tail_logprob"]
                    tails.append(np.exp(pc.list_flatten(tail).to_numpy()))
        tokens = values if topk else values // self.manifest["hidden_size"]
        mass = np.concatenate(tails) if tails else np.zeros(0)
        mass = mass[~np.isnan(mass)]
        outside = {"mean": float(mass.mean()), "highest": float(mass.max())} if len(mass) else None
        return {
            "rows": len(self),
            "label_tokens": tokens,
            "bytes_a_token": size / max(tokens, 1),
            "outside": outside,
        }

    # ---- checks before a training ----

    def check_teacher(self, name: str) -> None:
        """Raise ValueError unless the signal is that of a model, which is given by name.

        Which weights a server had is unknown, and its cache is taken for any teacher's.
        """
        if self.manifest.get("server"):
            return
        with named("teacher"):
            found = model_fingerprint(name)
        if found != self.manifest["teacher"]["digest"]:
            raise ValueError(
                f"teacher_cache: must hold the signal of the teacher {name}, got {self.directory}, "
                f"made with {self.name} of another content; leave the teacher out, or run "
                "`leaf cache` with it and another output_dir"
            )

    def check_training(
        self, renderer: Renderer, temperature: float, divergence: float | str, vocab_size: int
    ) -> None:
        """Check that the cache fits the settings of a training and its student.

        Args:
            renderer: of the teacher's prompts, with the training's template.
            temperature, divergence: of the training.
            vocab_size: the number of the student's logits.

        Raises:
            ValueError: it was made with another template, or another temperature or vocabulary, or
                has no signal for the divergence.
        """
        made = self.manifest
        if renderer.fingerprint != made["renderer"]:
            shown = {name: made["settings"][name] for name in sorted(made["settings"])}
            raise ValueError(
                "teacher_cache: must be made with the chat template and the settings of the "
                f"training, got {self.directory}, made with {shown}; give the same, or run "
                "`leaf cache` again with another output_dir"
            )
        if made["signal"] == "topk" and made["temperature"] != temperature:
            raise ValueError(
                f"temperature: must be that of the probabilities in teacher_cache, "
                f"{made['temperature']}, got {temperature}; give that, or run `leaf cache` with "
                f"--temperature {temperature} and another output_dir"
            )
        if made["signal"] == "topk" and divergence != "kl":
            raise ValueError(
                "divergence: must be kl where teacher_cache holds the signal topk, got "
                f"{divergence!r}; run `leaf cache` with --signal hidden and another output_dir"
            )
        if made["signal"] == "topk" and vocab_size < made["vocab_size"]:
            raise ValueError(
                f"teacher_cache: must hold probabilities over at most the {vocab_size} tokens of "
                f"the student, got {made['vocab_size']}; run `leaf cache` with this student and "
                "another output_dir"
            )

    def check_labels(self) -> None:
        """Raise ValueError where the loss of the signal cannot be mixed with that of the labels."""
        if self.manifest["signal"] == "topk":
            raise ValueError(
                "ce_weight: must be 0 or 1 with a stored top k, got a number between and "
                f"{self.directory}; run `leaf cache --signal hidden` with another output_dir"
            )

    def check_rows(self, dataset: ExampleDataset, name: str) -> None:
        """Raise ValueError, naming them, where rows of a dataset are not in the cache."""
        lacking = sorted(
            {
                one.row_id
                for one in dataset.examples
                if rendering_key(one.renderings["teacher"]) not in self
            }
        )
        if lacking:
            shown = ", ".join(map(str, lacking[:10])) + (", ..." if len(lacking) > 10 else "")
            raise ValueError(
                f"{name}: must be in the teacher_cache {self.directory}, got {len(lacking)} rows "
                f"that are not (row_id {shown}); run `leaf cache` with this dataset and the same "
                "output_dir, which adds them"
            )


def open_cache(directory: str | Path, teacher: object) -> TeacherCache:
    """Return a cache, once it is known to be of a teacher, which may be None.

    Raises:
        ValueError: it is no cache, or of another teacher, or the teacher is a model in memory.
    """
    cache = TeacherCache(directory)
    if isinstance(teacher, str):
        cache.check_teacher(teacher)
    elif teacher is not None:
        raise ValueError(
            "teacher_model: must be None or a name with a teacher_cache, got a "
            f"{type(teacher).__name__} in memory; leave one of the two out"
        )
    return cache


class StoredTeacher:
    """A cache as the teacher of a training.

    Args:
        cache: the cache.
        device: the student's; what is read is brought there, and the head once.

    Raises:
        ValueError: the file of the head is damaged.
    """

    packs = True

    def __init__(self, cache: TeacherCache, device: torch.device) -> None:
        self.cache, self.device = cache, device
        self.head: Head | None = None
        if cache.manifest["signal"] == "hidden":
            self.head = _read_head(cache.directory / HEAD, device)

    def packing(self) -> AbstractContextManager[None]:
        return nullcontext()

    def keeping(self) -> AbstractContextManager[None]:
        return nullcontext()

    def __call__(self, batch: Batch) -> Signal:
        tensors = [batch[f"teacher_{name}"].cpu() for name in TENSORS]
        rows = [(row.numpy(), at.numpy()) for row, at in teacher_rows(*tensors)]
        try:
            found = [self.cache.read(row_key(row, at)) for row, at in rows if at.any()]
        except KeyError as error:
            raise ValueError(
                "data_collator: must keep the teacher's tokens and labels as teacher_cache has "
                f"them, got others in a batch of row_id {batch['row_id'].tolist()}; leave them"
            ) from error
        columns = {
            name: torch.from_numpy(np.concatenate([one[name] for one in found])).to(self.device)
            for name in (found[0] if found else ())
        }
        return self._hidden(columns) if self.head is not None else self._top_k(columns)

    def _hidden(self, columns: Mapping[str, Tensor]) -> Hidden:
        assert self.head is not None
        weight = self.head.weight
        states = columns.get("states", weight.new_zeros(0))
        if states.dtype != weight.dtype:
            states = states.view(weight.dtype)
        return Hidden(states.view(-1, weight.shape[1]), self.head)

    def _top_k(self, columns: Mapping[str, Tensor]) -> TopK:
        made = self.cache.manifest
        tail = columns.get("tail_logprob", torch.zeros(0, device=self.device))
        ids, steps = (
            columns.get(name, torch.zeros(0, device=self.device)).long().view(-1, made["top_k"])
            for name in ("ids", "steps")
        )
        return TopK(ids, top_k_logprobs(steps), tail.double(), made["vocab_size"])

    def check(self, batch: Batch) -> None:
        """Read a batch; `leaf cache` has compared the head with its model."""
        self(batch)


def _read_head(path: Path, device: torch.device) -> Head:
    place = "cpu" if device.type == "cpu" else str(device)  # of several ranks each has a "cpu:0"
    with reading(path, Exception), safe_open(path, framework="pt", device=place) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        numbers = {name: json.loads(text) for name, text in file.metadata().items()}
        return Head(tensors["weight"], tensors.get("bias"), numbers["scale"], numbers["softcap"])
