"""Writes the files of a teacher's cache; see `leaf_distill.training.teacher_cache`."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors.torch import save

from leaf_distill.io import write_bytes
from leaf_distill.training.cache_columns import Columns, column_types, part_files
from leaf_distill.training.teacher import Head

GROUP_BYTES: Final = 1 << 20  # a training reads a row by its group
PART_BYTES: Final = 64 << 20
PART_S: Final = 60.0  # a killed run loses at most so much work

Row = tuple[bytes, Columns]


class CacheWriter:
    """Adds rows to a cache in parts; use it as a context manager, which writes the last one."""

    def __init__(self, directory: Path, manifest: Mapping[str, Any]) -> None:
        self.directory, self._kinds = directory, column_types(manifest)
        names = [int(path.stem.partition("-")[2]) for path in part_files(directory)]
        self._next = max(names, default=-1) + 1
        self._rows: list[Row] = []
        self._bytes, self._since = 0, time.monotonic()

    def __enter__(self) -> CacheWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self._flush()

    def add(self, rows: Iterable[Row]) -> None:
        """Add the rows of a batch, by key."""
        for key, columns in rows:
            self._rows.append((key, columns))
            self._bytes += sum(column.nbytes for column in columns.values())
        if self._bytes >= PART_BYTES or time.monotonic() - self._since >= PART_S:
            self._flush()

    def _flush(self) -> None:
        if self._rows:
            schema = pa.schema(
                [("key", pa.binary(16)), *((name, pa.list_(one)) for name, one in self._kinds)]
            )
            sink = pa.BufferOutputStream()
            with pq.ParquetWriter(
                sink,
                schema,
                compression="zstd",
                use_dictionary=False,
                # The bytes of numbers by their place: those in front are alike, and zstd sees it.
                column_encoding={
                    f"{name}.list.element": "BYTE_STREAM_SPLIT" for name, _ in self._kinds
                },
                write_page_checksum=True,
            ) as file:
                for group in _groups(self._rows):
                    file.write_table(_table(group, schema))
            write_bytes(self.directory / f"part-{self._next:05d}.parquet", sink.getvalue())
            self._next += 1
        self._rows, self._bytes, self._since = [], 0, time.monotonic()


def _groups(rows: Sequence[Row]) -> Iterator[Sequence[Row]]:
    first, size = 0, 0
    for at, (_, columns) in enumerate(rows):
        size += sum(column.nbytes for column in columns.values())
        if size >= GROUP_BYTES or at + 1 == len(rows):
            yield rows[first : at + 1]
            first, size = at + 1, 0


def _table(rows: Sequence[Row], schema: pa.Schema) -> pa.Table:
    columns = [pa.array([key for key, _ in rows], pa.binary(16))]
    for item in list(schema)[1:]:
        values = [columns_of[item.name] for _, columns_of in rows]
        borders = np.cumsum([0, *map(len, values)], dtype=np.int32)
        flat = pa.array(np.concatenate(values), item.type.value_type)
        columns.append(pa.ListArray.from_arrays(borders, flat))
    return pa.Table.from_arrays(columns, schema=schema)


def write_head(path: Path, head: Head) -> None:
    """Write a head beside the hidden states that it takes."""
    tensors = {"weight": head.weight, "bias": head.bias}
    numbers = {"scale": head.scale, "softcap": head.softcap}
    data = save(
        {name: one.contiguous().cpu() for name, one in tensors.items() if one is not None},
        {name: json.dumps(number) for name, number in numbers.items()},
    )
    write_bytes(path, data)
