"""The run directory: each stage is a folder of Parquet parts that survives being killed.

A part is written whole beside its place, flushed to the disk and renamed, so that it is either
there and right or not there. The batch plan is fixed before the first pass; a run that goes on
where another stopped therefore makes the same parts, byte for byte.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

MAX_PARTS = 64  # a kill costs at most about this fraction of a stage

Batch = Sequence[int]
Compute = Callable[[Batch], Iterable[dict[str, object]]]


class StoreError(RuntimeError):
    """The disk or what lies on it stands in the way; the message says what to do."""


class Stage:
    """One stage's table, keyed by the fingerprint of its name, settings and schema."""

    def __init__(
        self, root: Path, name: str, settings: Mapping[str, object], schema: pa.Schema
    ) -> None:
        self.name = name
        self.settings = dict(settings)
        self.schema = schema
        fields = [[field.name, str(field.type), field.nullable] for field in schema]
        self.fingerprint = _digest([name, self.settings, fields])
        self.directory = Path(root) / name / self.fingerprint[:12]

    def run(self, plan: Sequence[Batch], compute: Compute, *, desc: str) -> pa.Table:
        """Compute what is missing of the plan's batches and return the table, in the plan's order.

        ``compute`` takes a batch (numbers of the caller's own) and yields its rows, of the schema's
        columns. Raises StoreError for a full disk, a corrupt part, another plan, or another process
        at work here; what is done stays, and the same call goes on from there.
        """
        batches = [[int(item) for item in batch] for batch in plan]
        with _locked(self.directory):
            self._fix_plan(batches)
            parts = _split(batches)
            known = self._manifest_parts()
            done = {i for i in range(len(parts)) if self._part(i).exists()}
            total = sum(map(len, batches))
            start = sum(len(batch) for i in done for batch in parts[i])
            tables: list[pa.Table] = []
            digests: list[str] = []
            with tqdm(total=total, initial=start, desc=desc, unit="row", disable=None) as bar:
                for i, part in enumerate(parts):
                    if i not in done:
                        self._compute(self._part(i), part, compute, bar)
                    # What was just written is read back too: one path, one truth.
                    table, digest = self._read(self._part(i), known.get(i) if i in done else None)
                    tables.append(table)
                    digests.append(digest)
            self._finish(batches, digests, tables)
        return pa.concat_tables([self.schema.empty_table(), *tables])

    def table(self) -> pa.Table:
        """Return the finished stage's table; StoreError if it is not finished or damaged."""
        known = self._manifest_parts()
        if not (self.directory / "manifest.json").exists():
            raise StoreError(
                f"The stage {self.name!r} in {self.directory} is not finished: run the same "
                "command again, it goes on where it stopped."
            )
        tables = [self._read(self._part(i), known[i])[0] for i in sorted(known)]
        return pa.concat_tables([self.schema.empty_table(), *tables])

    def _part(self, index: int) -> Path:
        return self.directory / f"part-{index:05d}.parquet"

    def _fix_plan(self, batches: list[list[int]]) -> None:
        path = self.directory / "plan.json"
        if not path.exists():
            write_json(path, batches)
        elif _read_json(path) != batches:
            raise StoreError(
                f"{path} holds another batch plan than this run's, although their settings are the "
                f"same: delete {self.directory} and run the same command again."
            )

    def _compute(
        self, path: Path, batches: Sequence[Batch], compute: Compute, bar: tqdm[None]
    ) -> None:
        rows: list[dict[str, object]] = []
        names = set(self.schema.names)
        for batch in batches:
            for row in compute(batch):
                if row.keys() != names:
                    raise ValueError(
                        f"A row of stage {self.name!r} has the columns {sorted(row)}, not "
                        f"{sorted(names)}."
                    )
                rows.append(row)
            bar.update(len(batch))
        write_table(path, pa.Table.from_pylist(rows, schema=self.schema))

    def _read(self, path: Path, expected: str | None) -> tuple[pa.Table, str]:
        try:
            data = path.read_bytes()
            digest = hashlib.sha256(data).hexdigest()
            if expected in (None, digest):
                reader = pa.BufferReader(data)
                table = pq.read_table(reader, page_checksum_verification=True)
                if table.schema.equals(self.schema):
                    return table, digest
        except (pa.ArrowException, OSError):
            pass  # said below, with what to do
        state = "is missing" if not path.exists() else "is corrupt"
        cure = "run" if not path.exists() else "delete it and run"
        raise StoreError(
            f"The part {path} {state}: {cure} the same command again; only that part is recomputed."
        )

    def _manifest_parts(self) -> dict[int, str]:
        path = self.directory / "manifest.json"
        if not path.exists():
            return {}
        parts = _read_json(path)["parts"]
        return {index: part["sha256"] for index, part in enumerate(parts)}

    def _finish(
        self, batches: list[list[int]], digests: list[str], tables: Sequence[pa.Table]
    ) -> None:
        manifest = {
            "stage": self.name,
            "fingerprint": self.fingerprint,
            "settings": self.settings,
            "plan_sha256": _digest(batches),
            "rows": sum(table.num_rows for table in tables),
            "parts": [
                {"file": self._part(i).name, "rows": table.num_rows, "sha256": digest}
                for i, (digest, table) in enumerate(zip(digests, tables, strict=True))
            ],
        }
        path = self.directory / "manifest.json"
        if not path.exists() or _read_json(path) != json.loads(json.dumps(manifest)):
            write_json(path, manifest)


def claim_run_directory(root: Path, identity: dict[str, object]) -> None:
    """Make ``root`` the run directory of these settings, or check that it is already theirs.

    Raises ValueError naming each setting that differs, with its old and new value.
    """
    path = Path(root) / "run.json"
    identity = json.loads(json.dumps(identity))
    if Path(root).exists() and not Path(root).is_dir():
        raise ValueError(f"output_dir {str(root)!r} is a file; give a directory.")
    if not path.exists():
        _make(Path(root))
        write_json(path, identity)
        return
    old = _read_json(path)
    changes = [
        f"{key} was {old.get(key)!r} and is now {identity.get(key)!r}"
        for key in sorted({*old, *identity})
        if old.get(key) != identity.get(key)
    ]
    if changes:
        raise ValueError(
            f"The run directory {root} belongs to other settings: {'; '.join(changes)}. Give "
            "another output_dir, or the old settings to go on."
        )


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file whole or not at all, flushed to the disk; StoreError if that fails."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise _named(error, path, len(data)) from error


def write_json(path: Path, value: object) -> None:
    """Write JSON as ``write_bytes`` does, with sorted keys."""
    text = json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False)
    write_bytes(path, f"{text}\n".encode())


def write_table(path: Path, table: pa.Table) -> None:
    """Write a table as Parquet as ``write_bytes`` does, with a checksum on each page."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
    write_bytes(path, sink.getvalue().to_pybytes())


def _split(batches: Sequence[Batch]) -> list[Sequence[Batch]]:
    size = max(1, -(-len(batches) // MAX_PARTS))
    return [batches[i : i + size] for i in range(0, len(batches), size)]


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise StoreError(f"{path} is corrupt: delete it and run the same command again.") from error


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Hold the directory for this process; the lock goes with the process, however it ends."""
    _make(directory)
    handle = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise StoreError(
                f"Another process is at work in {directory}: wait for it, or end it."
            ) from error
        yield
    finally:
        os.close(handle)


def _make(directory: Path) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _named(error, directory, None) from error


def _named(error: OSError, path: Path, size: int | None) -> StoreError:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    need = f" ({size} bytes)" if size is not None else ""
    if full:
        return StoreError(
            f"The disk is full: {path}{need} could not be written. What was done stays: free some "
            "space and run the same command again."
        )
    return StoreError(f"{path} could not be written: {error}. What was done stays.")
