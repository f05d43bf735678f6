"""Files that are written whole or not at all, digests, and locks."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import secrets
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq


class StoreError(RuntimeError):
    """The disk, or a file on it, prevents the work; the message says what to do."""


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file whole or not at all and flush it to the disk.

    Raises:
        StoreError: the file cannot be written, or the path is no regular file (a device, a pipe, a
            directory), which is never replaced; names it, and says whether the disk is full.
    """
    if path.exists() and not path.is_file():
        raise StoreError(
            f"{path}: must be a regular file or new, got something else; give another path"
        )
    # The name is unique, and an existing file or link of that name is never opened.
    temporary = path.with_name(f".{path.name[:100]}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as file:
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
        raise disk_error(error, path, len(data)) from error


def write_json(path: Path, value: object) -> None:
    """Write JSON with sorted keys, and paths as text, as `write_bytes` does."""
    text = json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False, default=str)
    write_bytes(path, f"{text}\n".encode())


def write_table(path: Path, table: pa.Table) -> None:
    """Write a table as Parquet with a checksum on each page, as `write_bytes` does."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
    write_bytes(path, sink.getvalue().to_pybytes())


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        ValueError: the file cannot be read or holds no JSON object; names it.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(
            f"{path}: must be a readable JSON file, got an error ({error}); run the command that "
            "made it again"
        ) from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: must hold a JSON object, got {type(value).__name__}")
    return value


@contextlib.contextmanager
def reading(place: Path, *others: type[Exception]) -> Iterator[None]:
    """Turn all that a file of another shape can raise, and other errors, into one sentence.

    Raises:
        ValueError: names the file, or the directory of the files.
    """
    try:
        yield
    except (
        *(ArithmeticError, AttributeError, LookupError, TypeError, ValueError, RecursionError),
        *(pa.ArrowException, OSError, *others),
    ) as error:
        found = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(
            f"{place}: must be as LeaF writes it, got something else ({found:.200}); run the "
            "command that made it again"
        ) from error


def is_of(path: Path, command: str) -> bool:
    """Return whether a file is a JSON object that a command of `leaf` wrote under its name."""
    try:
        return bool(read_json(path).get("command") == command)
    except ValueError:
        return False


def digest(parts: Iterable[object]) -> str:
    """Return the sha256, as 64 hexadecimal digits, of values that JSON can express, or bytes."""
    state = hashlib.sha256()
    for part in parts:
        text = part if isinstance(part, bytes) else json.dumps(part, sort_keys=True).encode()
        state.update(f"{len(text)}:".encode())
        state.update(text)
    return state.hexdigest()


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Hold a directory for this process; the lock ends with the process, however it ends.

    A directory that is made here, and is empty when an error comes, goes again.

    Raises:
        StoreError: another process holds the directory, or it cannot be written to.
    """
    is_new = not directory.exists()
    make_directory(directory)
    path = directory / ".lock"
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    except OSError as error:
        raise disk_error(error, path) from error
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise StoreError(
                f"{directory} is in use by another process: wait for its end, or give another "
                "output_dir"
            ) from error
        yield
    except BaseException as error:
        held = not isinstance(error.__cause__, BlockingIOError)
        if held and is_new and os.listdir(directory) == [path.name]:
            path.unlink()
            directory.rmdir()
        raise
    finally:
        os.close(handle)


def user_directory(name: str | os.PathLike[str], argument: str = "output_dir") -> Path:
    """Return the path of a directory that a user named; it is there, or may be made.

    Raises:
        ValueError: it is a file, a dangling link, or no path at all; names the argument.
    """
    if not str(name):
        raise ValueError(f"{argument}: must be a directory, got an empty name; give one")
    try:
        path = Path(name).expanduser()
        taken = os.path.lexists(path) and not path.is_dir()
        path.stat()
    except FileNotFoundError:
        pass
    except (OSError, RuntimeError, ValueError) as error:  # too long, no such home, a null byte
        reason = (isinstance(error, OSError) and error.strerror) or error
        raise ValueError(
            f"{argument}: must be a directory, got {str(name)!r} ({reason}); give another one"
        ) from error
    if taken:
        raise ValueError(
            f"{argument}: must be a directory, got {path}, which is none; give another one"
        )
    return path


def make_directory(directory: Path) -> None:
    """Make a directory and those above it.

    Raises:
        StoreError: it cannot be made.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise disk_error(error, directory) from error


def disk_error(error: OSError, path: Path, size: int | None = None) -> StoreError:
    """Return the sentence for a system error on a path."""
    need = f" ({size} bytes)" if size is not None else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return StoreError(
            f"the disk is full: {path}{need} could not be written; results so far are kept: free "
            "some space and run the same command again"
        )
    return StoreError(
        f"{path}: must be a place to write to, got {error.strerror or error}; give another one, or "
        "change its permissions"
    )
