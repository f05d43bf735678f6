"""Rows of any source as dictionaries: files, directories, hub datasets and objects in memory."""

from __future__ import annotations

import csv
import glob
import gzip
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any

Record = dict[str, Any]

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")  # all but the last also with .gz
SPLITS = {"train", "test", "validation", "valid", "val", "dev", "eval"}
BOM = b"\xef\xbb\xbf"
LONGEST_CELL = 2**31 - 1


def read_records(source: object, *, split: str = "train", max_rows: int | None = None) -> list[Any]:
    """Read the rows of a source, in order.

    Args:
        source: As for `load_examples`.
        split: The split of a hub dataset, a saved DatasetDict or a directory of files.
        max_rows: How many rows to read. Ignored where the first row has a column `branch`: the
            dataset may be one of `leaf detect`, of which originals are counted.

    Returns:
        The rows. Those of an object in memory are whatever the object yields.

    Raises:
        ValueError: The source cannot be read or has no rows; the sentence names file and line.
    """
    rows = iter(_rows(source, split))
    head = list(islice(rows, 1))
    if not head:
        raise ValueError(f"dataset: {named(source)}: must have at least one row, got none.")
    branched = isinstance(head[0], Mapping) and "branch" in head[0]
    limit = None if max_rows is None or branched else max_rows - 1
    return [*head, *islice(rows, limit)]


def named(source: object) -> str:
    """Return what an error calls a source."""
    return str(source) if isinstance(source, str | Path) else f"the {type(source).__name__} given"


def _rows(source: object, split: str) -> Iterable[Any]:
    if not isinstance(source, str | Path):
        return _object_rows(source, named(source), split)
    name = str(source)
    if not name.strip():
        raise ValueError("dataset: must be a name or a path, got an empty text.")
    try:
        path = Path(name).expanduser()
        if path.is_dir():
            return _directory_rows(path, split)
        if path.is_file():
            return _file_rows(path)
        if re.search(r"[*?\[]", name):
            files = [Path(file) for file in sorted(glob.glob(str(path), recursive=True))]
            return _many_rows(name, [file for file in files if file.is_file()])
    except (OSError, RuntimeError) as error:  # a name that is too long, no permission, no home
        reason = (isinstance(error, OSError) and error.strerror) or error
        raise ValueError(f"dataset: {name:.200}: must be readable, got: {reason}.") from error
    if _kind(path) or name.startswith((".", "/", "~")):
        raise ValueError(f"dataset: {name}: must be a file or directory, got none; check the path.")
    return _hub_rows(name, split)


def _object_rows(source: object, name: str, split: str) -> Iterable[Any]:
    """Return the rows of a `datasets.Dataset`, of one split of a dict of them, or of a list."""
    if isinstance(source, Mapping):
        if not all(hasattr(value, "column_names") for value in source.values()):
            raise ValueError(
                f"dataset: must be a name, a path, a Dataset or a list of rows, got {name}; give "
                "one dict a row."
            )
        if split not in source:
            raise ValueError(
                f"dataset: {name} must have the split {split!r}, got {sorted(source)}; name one of "
                "these."
            )
        source = source[split]
    if hasattr(source, "with_format"):
        # As Arrow, nothing is turned into tensors, and no image that nobody reads is decoded.
        tables = source.with_format("arrow").iter(batch_size=1000)
        return (row for table in tables for row in table.to_pylist())
    if not isinstance(source, Iterable):
        raise ValueError(
            f"dataset: must be a name, a path, a Dataset or a list of rows, got {name}."
        )
    return source


def _kind(path: Path) -> str | None:
    """Return the suffix that says how to read a file, in lower case and without .gz."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes[-1:] == [".gz"] and suffixes[-2:-1] != [".parquet"]:
        suffixes.pop()
    return suffixes[-1] if suffixes and suffixes[-1] in SUFFIXES else None


def _directory_rows(path: Path, split: str) -> Iterable[Any]:
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        return _saved_rows(path, split)
    if (path / "dataset.parquet").is_file() and (path / "dataset.jsonl").is_file():
        return _file_rows(path / "dataset.parquet")  # the two hold the same rows
    found = sorted(path.rglob("*"))
    files = [
        file
        for file in found
        if file.is_file()
        and _kind(file)
        and not any(part.startswith(".") for part in file.relative_to(path).parts)
    ]
    words = {file: _words(file.relative_to(path)) for file in files}
    of_split = [file for file in files if split.lower() in words[file]]
    if not of_split and any(words[file] & SPLITS for file in files):
        raise ValueError(
            f"dataset: {path}: must have files of the split {split!r}, got "
            f"{[file.name for file in files[:5]]}; name another split, or the files as "
            f"'{path}/*{_kind(files[0])}'."
        )
    return _many_rows(str(path), of_split or files)


def _words(path: Path) -> set[str]:
    return set(re.split(r"[\W_]+", str(path).lower()))


def _many_rows(name: str, files: list[Path]) -> Iterator[Any]:
    """Return the rows of all files, which must be of one kind."""
    kinds = {kind: file for file in files if (kind := _kind(file))}
    if len(kinds) > 1:
        kinds.pop(".json", None)  # beside data of another kind these are metadata
    if not kinds:
        raise ValueError(
            f"dataset: {name}: must hold {', '.join(SUFFIXES)} files or a dataset saved by "
            "datasets.save_to_disk, got none; check the path."
        )
    if len(kinds) > 1:
        raise ValueError(
            f"dataset: {name}: must hold files of one kind, got {sorted(kinds)}; name those to "
            f"read, as '{next(iter(kinds.values())).parent}/*{min(kinds)}'."
        )
    return (row for file in files if _kind(file) in kinds for row in _file_rows(file))


def _file_rows(path: Path) -> Iterator[Record]:
    kind = _kind(path)
    readers = {".jsonl": _json_rows, ".json": _json_rows, ".csv": _csv_rows}
    if kind is None:
        raise ValueError(
            f"dataset: {path}: must end in {', '.join(SUFFIXES)} (or .gz), got {path.suffix!r}."
        )
    return _parquet_rows(path) if kind == ".parquet" else _text_rows(path, readers[kind])


def _text_rows(path: Path, reader: Any) -> Iterator[Record]:
    packed = path.suffix.lower() == ".gz"
    try:
        with gzip.open(path) if packed else path.open("rb") as file:
            yield from reader(path, file)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"dataset: {path}: must be a readable file, got: {error}.") from error


def _lines(path: Path, file: IO[bytes]) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(file, start=1):
        try:
            yield number, (line.removeprefix(BOM) if number == 1 else line).decode()
        except UnicodeDecodeError as error:
            raise ValueError(
                f"dataset: {path}, line {number}: must be UTF-8 text, got {error.reason} at byte "
                f"{error.start}; convert the file."
            ) from error


def _json_rows(path: Path, file: IO[bytes]) -> Iterator[Record]:
    """Yield the objects of a JSON list, or of JSON lines, whatever the file is called."""
    lines = ((number, line) for number, line in _lines(path, file) if line.strip())
    head = list(islice(lines, 1))
    if head and head[0][1].lstrip().startswith("["):
        whole = "".join(line for _, line in chain(head, lines))
        for index, value in enumerate(_parsed(whole, str(path))):
            yield _object(value, f"{path}, item {index}")
        return
    for number, line in chain(head, lines):
        place = f"{path}, line {number}"
        yield _object(_parsed(line, place), place)


def _parsed(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"dataset: {place}: must be valid JSON, got: {error}; a file holds one object a line, "
            "or one list of objects."
        ) from error


def _object(value: object, place: str) -> Record:
    if not isinstance(value, dict):
        raise ValueError(
            f"dataset: {place}: must be a JSON object, one a row, got {value!r:.60}; give each "
            "row its column names."
        )
    return value


def _csv_rows(path: Path, file: IO[bytes]) -> Iterator[Record]:
    """Yield the rows of a CSV file with a header; every cell is text."""
    csv.field_size_limit(LONGEST_CELL)
    reader = csv.DictReader(text for _, text in _lines(path, file))
    try:
        for row in reader:
            if None in row:
                raise ValueError(
                    f"dataset: {path}, line {reader.line_num}: must have {len(row) - 1} cells as "
                    "the header has, got more; put quotes around cells with commas."
                )
            yield dict(row)
    except csv.Error as error:
        raise ValueError(
            f"dataset: {path}, line {reader.line_num}: must be valid CSV, got: {error}."
        ) from error


def _parquet_rows(path: Path) -> Iterator[Record]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches():
                yield from batch.to_pylist()
    except (pa.ArrowException, OSError, KeyError) as error:
        raise ValueError(f"dataset: {path}: must be a Parquet file, got: {error}.") from error


def _saved_rows(path: Path, split: str) -> Iterable[Any]:
    from datasets import load_from_disk

    try:
        dataset = load_from_disk(str(path))
    except Exception as error:  # whatever a damaged directory makes the library raise
        raise ValueError(
            f"dataset: {path}: must be a dataset saved by datasets.save_to_disk, got: "
            f"{_short(error)}."
        ) from error
    return _object_rows(dataset, str(path), split)


def _hub_rows(source: str, split: str) -> Iterable[Any]:
    from datasets import load_dataset

    name, _, config = source.partition(":")
    try:
        dataset = load_dataset(name, config or None, split=split)
    except Exception as error:  # the network, the hub and any builder may fail in their own ways
        raise ValueError(
            f"dataset: {source:.200} (split {split!r}): must be a file or directory here, or "
            f"owner/name or owner/name:config on the hub, got: {_short(error)}."
        ) from error
    return _object_rows(dataset, source, split)


def _short(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:300]}..."
