"""Reads the rows of any source as dictionaries: files, directories, hub datasets and objects."""

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

Record = Mapping[str, Any]

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")  # all but the last also with .gz
SPLITS = {"train", "test", "validation", "valid", "val", "dev", "eval"}
HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?(:[^:]+)?", re.ASCII)
BOM = b"\xef\xbb\xbf"


def read_records(
    source: object, *, split: str = "train", max_rows: int | None = None
) -> list[Record]:
    """Read the rows of a source, in order.

    Args:
        source: As for `load_examples`.
        split: The split of a hub dataset, a saved DatasetDict or a directory of files.
        max_rows: The number of rows to read. It is ignored where the first row has a column
            `branch`: the dataset may be one of `leaf detect`, where originals are counted.

    Returns:
        One dictionary per row.

    Raises:
        ValueError: The source cannot be read, has no rows, or has a row that is no dictionary. The
            message names the file and the line.
    """
    rows = iter(_rows(source, split))
    head = list(islice(rows, 1))
    if not head:
        raise _error(f"{named(source)}: must have at least one row", "none")
    branched = isinstance(head[0], Mapping) and "branch" in head[0]
    records = [*head, *islice(rows, None if max_rows is None or branched else max_rows - 1)]
    for position, record in enumerate(records):
        if not isinstance(record, Mapping):
            raise _error(f"row {position}: must be a dict of columns", f"{record!r:.60}")
    return records


def named(source: object) -> str:
    """Return the name of a source in messages."""
    return str(source) if isinstance(source, str | Path) else f"the {type(source).__name__} given"


def _error(wanted: str, got: object, advice: str = "", *, argument: str = "dataset") -> ValueError:
    return ValueError(f"{argument}: {wanted}, got {got}" + (f"; {advice}" if advice else ""))


def _rows(source: object, split: str) -> Iterable[Any]:
    if not isinstance(source, str | Path):
        return _object_rows(source, named(source), split)
    name = str(source)
    if not name.strip():
        raise _error("must be a name or a path", "an empty text")
    try:
        path = Path(name).expanduser()
        if path.is_dir():
            return _directory_rows(path, split)
        if path.is_file():
            return _file_rows(path)
        if re.search(r"[*?\[]", name):
            found = sorted(glob.glob(str(path), recursive=True))
            return _rows_of_files(name, [file for file in map(Path, found) if file.is_file()])
    except (OSError, RuntimeError) as error:  # a name that is too long, no permission, no home
        reason = (isinstance(error, OSError) and error.strerror) or error
        raise _error(f"{name:.200}: must be readable", reason) from error
    # A name whose first part is a folder here is a misspelled path, and not asked of the hub.
    beside = "/" in name and path.parent.is_dir()
    if _kind(path) or beside or not HUB_NAME.fullmatch(name):
        wanted = "must be a file or directory, or a name on the hub as owner/name"
        raise _error(f"{name}: {wanted}", "neither: it does not exist", "check the path")
    return _library_rows(name, split, saved=False)


def _object_rows(source: object, name: str, split: str) -> Iterable[Any]:
    """Return the rows of a `datasets.Dataset`, of one split of a dict of them, or of a list."""
    wanted = "must be a name, a path, a Dataset or a list of rows"
    if isinstance(source, Mapping):
        if not all(hasattr(value, "column_names") for value in source.values()):
            raise _error(wanted, name, "give one dict a row")
        if split not in source:
            raise _error(
                f"{name} must have the split {split!r}", sorted(source), "name one of these"
            )
        source = source[split]
    if hasattr(source, "with_format"):
        # As Arrow, nothing is turned into tensors, and images are not decoded.
        tables = source.with_format("arrow").iter(batch_size=1000)
        return (row for table in tables for row in table.to_pylist())
    if not isinstance(source, Iterable):
        raise _error(wanted, name)
    return source


def _library_rows(name: str, split: str, *, saved: bool) -> Iterable[Any]:
    """Return the rows of a hub dataset, or of a directory written by `save_to_disk`."""
    from datasets import load_dataset, load_from_disk

    repository, _, config = name.partition(":")
    try:
        if saved:
            dataset = load_from_disk(name)
        else:
            dataset = load_dataset(repository, config or None, split=split)
    except Exception as error:  # the network, the hub and damaged files fail in many ways
        reason = " ".join(str(error).split()) or type(error).__name__
        if saved:
            wanted = f"{name}: must be a dataset saved by datasets.save_to_disk"
        else:
            wanted = (
                f"{name:.200} (split {split!r}): must be a file or directory here, or owner/name "
                "or owner/name:config on the hub"
            )
        raise _error(wanted, reason if len(reason) <= 300 else f"{reason[:300]}...") from error
    return _object_rows(dataset, name, split)


def _kind(path: Path) -> str | None:
    """Return the suffix that says how to read a file, in lower case and without .gz."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes[-1:] == [".gz"] and suffixes[-2:-1] != [".parquet"]:
        suffixes.pop()
    return suffixes[-1] if suffixes and suffixes[-1] in SUFFIXES else None


def _directory_rows(path: Path, split: str) -> Iterable[Any]:
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        return _library_rows(str(path), split, saved=True)
    is_arm = (path / "dataset.parquet").is_file() and (path / "dataset.jsonl").is_file()
    if is_arm or (path / "run.json").is_file():
        return _file_rows(find_arm(path) / "dataset.parquet")
    words: dict[Path, set[str]] = {}  # those in the path of each data file
    for file in sorted(path.rglob("*")):
        relative = file.relative_to(path)
        hidden = any(part.startswith(".") for part in relative.parts)
        if _kind(file) and not hidden and file.is_file():
            words[file] = set(re.split(r"[\W_]+", str(relative).lower()))
    of_split = [file for file in words if split.lower() in words[file]]
    if not of_split and any(found & SPLITS for found in words.values()):
        first = next(iter(words))
        raise _error(
            f"{path}: must have files of the split {split!r}",
            [file.name for file in islice(words, 5)],
            f"name another split, or the files as '{path}/*{_kind(first)}'",
        )
    return _rows_of_files(str(path), of_split or list(words))


def find_arm(directory: Path, argument: str = "dataset") -> Path:
    """Return the arm of a run directory of `leaf detect`, or the directory if it is an arm itself.

    An arm is a directory with a dataset.parquet.

    Args:
        directory: the path that was given.
        argument: the option that it was given with; errors name it.

    Raises:
        ValueError: There is no such directory, no arm, or there are several; the sentence names
            them.
    """
    try:
        if (directory / "dataset.parquet").is_file():
            return directory
        found = sorted(path.parent for path in directory.glob("arms/*/dataset.parquet"))
        missing = not directory.exists()
    except OSError as error:  # a name that is too long, no permission
        raise _error(
            "must be the run directory of a `leaf detect`",
            f"{directory!s:.200} ({error.strerror})",
            "check the path",
            argument=argument,
        ) from error
    if missing:
        raise _error(
            f"{directory}: must be the run directory of a `leaf detect`",
            "a path that does not exist",
            "check it: it is the --output_dir of that command",
            argument=argument,
        )
    if not found:
        raise _error(
            f"{directory}: must be the run directory of a finished `leaf detect`",
            "one without an arm",
            "check the path, or run the same `leaf detect` again, it goes on where it stopped",
            argument=argument,
        )
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        proposed = next((path for path in found if path.name.startswith("span")), found[0])
        raise _error(
            f"{directory}: must have one arm",
            f"{len(found)} ({names})",
            f"name one, as {proposed}",
            argument=argument,
        )
    return found[0]


def _rows_of_files(name: str, files: list[Path]) -> Iterator[Any]:
    """Return the rows of all files, which must be of one kind."""
    kinds = {kind: file for file in files if (kind := _kind(file))}
    if len(kinds) > 1:
        kinds.pop(".json", None)  # beside data of another kind these are metadata
    if not kinds:
        raise _error(
            f"{name}: must hold {', '.join(SUFFIXES)} files or a dataset saved by "
            "datasets.save_to_disk",
            "none",
            "check the path",
        )
    if len(kinds) > 1:
        example = f"{next(iter(kinds.values())).parent}/*{min(kinds)}"
        raise _error(
            f"{name}: must hold files of one kind",
            sorted(kinds),
            f"name those to read, as '{example}'",
        )
    return (row for file in files if _kind(file) in kinds for row in _file_rows(file))


def _file_rows(path: Path) -> Iterator[Record]:
    kind = _kind(path)
    if kind is None:
        raise _error(f"{path}: must end in {', '.join(SUFFIXES)} (or .gz)", repr(path.suffix))
    if kind == ".parquet":
        yield from _parquet_rows(path)
        return
    reader: Any = _csv_rows if kind == ".csv" else _json_rows
    try:
        with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as file:
            yield from reader(path, file)
    except (OSError, EOFError, zlib.error) as error:
        raise _error(f"{path}: must be a readable file", error) from error


def _lines(path: Path, file: IO[bytes]) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(file, start=1):
        try:
            yield number, (line.removeprefix(BOM) if number == 1 else line).decode()
        except UnicodeDecodeError as error:
            place = f"{path}, line {number}"
            got = f"{error.reason} at byte {error.start}"
            raise _error(f"{place}: must be UTF-8 text", got, "convert the file") from error


def _json_rows(path: Path, file: IO[bytes]) -> Iterator[Record]:
    """Yield the objects of a JSON list or of JSON lines, which the first character tells apart."""
    lines = _lines(path, file)
    head = list(islice(((number, line) for number, line in lines if line.strip()), 1))
    values: Iterable[tuple[str, Any]]
    if head and head[0][1].lstrip().startswith("["):
        # Blank lines stay, so that an error names the line of the file.
        blank = "\n" * (head[0][0] - 1)
        text = blank + "".join(line for _, line in chain(head, lines))
        values = (
            (f"{path}, item {i}", item)
            for i, item in enumerate(_parsed(text, str(path), many=True))
        )
    else:
        filled = (one for one in chain(head, lines) if one[1].strip())
        places = ((f"{path}, line {number}", line) for number, line in filled)
        values = ((place, _parsed(line, place)) for place, line in places)
    for place, value in values:
        if not isinstance(value, dict):
            raise _error(
                f"{place}: must be a JSON object, one a row",
                f"{value!r:.60}",
                "give each row its column names",
            )
        yield value


def _parsed(text: str, place: str, *, many: bool = False) -> Any:
    """Return the value of a JSON text: a line, whose number the place says, or many lines."""
    try:
        return json.loads(text.rstrip())
    except (ValueError, RecursionError) as error:
        advice = "a file holds one object a line, or one list of objects"
        got: object = error
        if isinstance(error, json.JSONDecodeError):
            line = f"line {error.lineno}, " if many else ""
            got = f"{error.msg} at {line}column {error.colno}"
        raise _error(f"{place}: must be valid JSON", got, advice) from error


def _csv_rows(path: Path, file: IO[bytes]) -> Iterator[Record]:
    """Yield the rows of a CSV file with a header; every cell is text."""
    csv.field_size_limit(2**31 - 1)
    reader = csv.DictReader(text for _, text in _lines(path, file))
    try:
        names = reader.fieldnames or []
        if len(names) == 1 and (sign := next((one for one in ";\t|" if one in names[0]), "")):
            raise _error(
                f"{path}: must have commas between cells", f"{sign!r} in its header", "convert it"
            )
        if twice := {name for name in names if names.count(name) > 1}:
            wanted = f"{path}: must have another name for each column"
            raise _error(wanted, f"{sorted(twice)} twice", "rename one")
        for row in reader:
            if None in row:
                raise _error(
                    f"{path}, line {reader.line_num}: must have {len(row) - 1} cells as the header "
                    "has",
                    "more",
                    "put quotes around cells with commas",
                )
            yield row
    except csv.Error as error:
        raise _error(f"{path}, line {reader.line_num}: must be valid CSV", error) from error


def _parquet_rows(path: Path) -> Iterator[Record]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches():
                yield from batch.to_pylist()
    except (pa.ArrowException, OSError, KeyError, UnicodeDecodeError) as error:
        raise _error(f"{path}: must be a Parquet file", error) from error
