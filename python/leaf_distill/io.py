"""The run directory: each stage is a folder of Parquet parts that survives being killed.

A part is written whole beside its place, flushed to the disk and renamed, so that it is either
there and right or not there. Which items belong to which part is fixed before the first pass; a run
that goes on where another stopped, with the same batches, makes the same parts, byte for byte.
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
Part = list[list[int]]  # its batches
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
        self.fingerprint = digest([name, self.settings, fields])
        self.directory = Path(root) / name / self.fingerprint[:12]

    @property
    def finished(self) -> bool:
        """Whether the stage was once run to its end."""
        return (self.directory / "manifest.json").exists()

    def run(self, plan: Sequence[Batch], compute: Compute, *, desc: str) -> pa.Table:
        """Compute what is missing of the plan's batches and return the table, part by part.

        ``compute`` takes a batch (distinct numbers of the caller's own) and yields its rows, of the
        schema's columns. The same items may come in other batches than before (smaller ones, after
        an out-of-memory error): finished parts stay, the others follow the new batches. Raises
        StoreError for a full disk, a corrupt part, a plan of other items, or another process at
        work here; what is done stays, and the same call goes on from there.
        """
        with _locked(self.directory):
            parts = self._fix_plan([[int(item) for item in batch] for batch in plan])
            known = self._manifest_parts()
            done = {i for i in range(len(parts)) if self._part(i).exists()}
            total = sum(len(batch) for part in parts for batch in part)
            start = sum(len(batch) for i in done for batch in parts[i])
            read: list[tuple[pa.Table, str]] = []
            with tqdm(total=total, initial=start, desc=desc, unit="row", disable=None) as bar:
                for i, part in enumerate(parts):
                    if i not in done:
                        self._compute(self._part(i), part, compute, bar)
                    # What was just written is read back too: one path, one truth.
                    read.append(self._read(self._part(i), known.get(i) if i in done else None))
            self._finish(parts, read)
        return pa.concat_tables([self.schema.empty_table(), *(table for table, _ in read)])

    def _part(self, index: int) -> Path:
        return self.directory / f"part-{index:05d}.parquet"

    def _fix_plan(self, batches: list[list[int]]) -> list[Part]:
        """Return the parts: those of the stored plan, where there is one."""
        path = self.directory / "plan.json"
        cure = f"delete {self.directory} and run the same command again"
        if not path.exists():
            if any(self.directory.glob("part-*")):
                raise StoreError(f"{path}, which says what the parts hold, is missing: {cure}.")
            write_json(path, _split(batches))
        stored: list[Part] = _read_json(path, cure)
        if _items(stored) != _items([batches]):
            raise StoreError(f"{path} has other items than this run's, of like settings: {cure}.")
        parts = [
            part if self._part(i).exists() else _rebatched(part, batches)
            for i, part in enumerate(stored)
        ]
        if parts != stored:
            write_json(path, parts)
        return parts

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
            found = hashlib.sha256(data).hexdigest()
            if expected in (None, found):
                reader = pa.BufferReader(data)
                table = pq.read_table(reader, page_checksum_verification=True)
                if table.schema.equals(self.schema):
                    return table, found
        except (pa.ArrowException, OSError):
            pass  # said below, with what to do
        raise StoreError(
            f"The part {path} is corrupt: delete it and run the same command again; only that part "
            "is recomputed."
        )

    def _manifest_parts(self) -> dict[int, str]:
        path = self.directory / "manifest.json"
        parts = _read_json(path)["parts"] if path.exists() else []
        return {index: part["sha256"] for index, part in enumerate(parts)}

    def _finish(self, parts: Sequence[Part], read: Sequence[tuple[pa.Table, str]]) -> None:
        manifest = {
            "stage": self.name,
            "fingerprint": self.fingerprint,
            "settings": self.settings,
            "plan_sha256": digest(parts),
            "rows": sum(table.num_rows for table, _ in read),
            "parts": [
                {"file": self._part(i).name, "rows": table.num_rows, "sha256": sha256}
                for i, (table, sha256) in enumerate(read)
            ],
        }
        path = self.directory / "manifest.json"
        if not path.exists() or _read_json(path) != json.loads(json.dumps(manifest)):
            write_json(path, manifest)


def content(name: str, fingerprint: str) -> dict[str, str]:
    """Return an identity's value for what a name stands for: its content counts, not the name."""
    return {"name": name, "digest": fingerprint}


def claim_run_directory(root: Path, identity: Mapping[str, object]) -> bool:
    """Make ``root`` the run directory of these settings, or check that it is already theirs.

    Returns whether it was free until now. Raises ValueError naming each setting that differs, with
    its old and new value, or whose ``content`` changed.
    """
    path = Path(root) / "run.json"
    new = json.loads(json.dumps(identity))
    if Path(root).exists() and not Path(root).is_dir():
        raise ValueError(f"output_dir {str(root)!r} is a file; give a directory.")
    if not path.exists():
        make_directory(Path(root))
        write_json(path, new)
        return True
    old = _read_json(path)
    changes = [_change(key, old.get(key), new.get(key)) for key in sorted({*old, *new})]
    if any(changes):
        listed = "; ".join(filter(None, changes))
        raise ValueError(
            f"The run directory {root} belongs to other settings: {listed}. Give another "
            "output_dir, or the old settings to go on."
        )
    return False


def _change(key: str, old: Any, new: Any) -> str:
    """Return what is different, "" if nothing is."""
    names = [
        one["name"] if isinstance(one, dict) and "digest" in one else None for one in (old, new)
    ]
    if None in names:
        return "" if old == new else f"{key} was {old!r} and is now {new!r}"
    if old["digest"] == new["digest"]:
        return ""
    if names[0] == names[1]:
        return f"the content of {key} {names[0]!r} changed"
    return f"{key} was {names[0]!r} and is now {names[1]!r}"


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


def digest(parts: Iterable[object]) -> str:
    """Return a sha256 over values that JSON can express."""
    state = hashlib.sha256()
    for part in parts:
        state.update(json.dumps(part, sort_keys=True).encode())
        state.update(b"\n")
    return state.hexdigest()


def _split(batches: list[list[int]]) -> list[Part]:
    size = max(1, -(-len(batches) // MAX_PARTS))
    return [batches[i : i + size] for i in range(0, len(batches), size)]


def _items(parts: Iterable[Part]) -> list[int]:
    return sorted(item for part in parts for batch in part for item in batch)


def _rebatched(part: Part, batches: Sequence[Batch]) -> Part:
    """Return the part's items in the given batches, as far as these hold them."""
    own = set(_items([part]))
    kept = ([item for item in batch if item in own] for batch in batches)
    return [batch for batch in kept if batch]


def _read_json(path: Path, cure: str = "delete it and run the same command again") -> Any:
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise StoreError(f"{path} is corrupt: {cure}.") from error


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Hold the directory for this process; the lock goes with the process, however it ends."""
    make_directory(directory)
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


def make_directory(directory: Path) -> None:
    """Make a directory and those above it; StoreError if that fails."""
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
