"""Files whole or not at all, on a full disk and through links; digests; progress."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from leaf_distill.io import (
    StoreError,
    digest,
    read_json,
    user_directory,
    write_bytes,
    write_json,
)


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_writing_is_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_bytes(path, b"old")
    write_bytes(path, b"new content")
    assert path.read_bytes() == b"new content" and names(tmp_path) == ["file"]
    with pytest.raises(StoreError, match="must be a place to write to"):
        write_bytes(tmp_path / "absent" / "file", b"x")


def test_only_regular_files_are_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "directory").mkdir()
    for name in ("pipe", "directory"):
        with pytest.raises(StoreError, match="must be a regular file or new, got something else"):
            write_bytes(tmp_path / name, b"x")
    assert names(tmp_path) == ["directory", "pipe"] and (tmp_path / "pipe").is_fifo()


def test_a_full_disk_is_said_and_leaves_the_old_file(tmp_path: Path) -> None:
    program = (
        "import sys\nfrom pathlib import Path\n"
        "from leaf_distill.io import StoreError, write_bytes\n"
        "try:\n write_bytes(Path(sys.argv[1]), b'x' * 100_000)\n"
        "except StoreError as error:\n print(error)\n"
    )
    (tmp_path / "file").write_bytes(b"old")

    def limit() -> None:
        import signal

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))

    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "file")],
        capture_output=True,
        text=True,
        preexec_fn=limit,
    )
    assert "the disk is full" in done.stdout and "100000 bytes" in done.stdout, done.stderr
    assert (tmp_path / "file").read_bytes() == b"old" and names(tmp_path) == ["file"]


def test_a_link_is_replaced_not_followed(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("mine")
    os.symlink(tmp_path / "precious", tmp_path / "out")
    write_bytes(tmp_path / "out", b"new")
    assert (tmp_path / "precious").read_text() == "mine"
    assert not (tmp_path / "out").is_symlink()


@pytest.mark.parametrize("content", [b"{", b"", b"\xff\xfe", b"[" * 100_000, b"[1]", b'"text"'])
def test_a_broken_json_file_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "file.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"file\.json: must"):
        read_json(path)
    with pytest.raises(ValueError, match=r"absent\.json: must"):
        read_json(tmp_path / "absent.json")


def test_json_is_read_as_written(tmp_path: Path) -> None:
    value = {"b": [1, 2.5, None], "a": "größer"}
    write_json(tmp_path / "file.json", value)
    assert read_json(tmp_path / "file.json") == value


def test_a_digest_tells_values_and_their_borders_apart() -> None:
    values = [["a", "b"], ["ab"], ["a", "b", ""], [b"a", b"b"], [1], ["1"], [None], [], [[]]]
    assert len({digest(value) for value in values}) == len(values)
    assert digest([{"a": 1, "b": 2}]) == digest([{"b": 2, "a": 1}])


@pytest.mark.parametrize(
    "name", ["file", "file/below", "dangling", "loop", "x" * 300, "~no-such-user/x"]
)
def test_what_can_be_no_directory(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("mine")
    Path("dangling").symlink_to("nowhere")
    Path("loop").symlink_to("loop")
    with pytest.raises(ValueError, match="cache_dir: must be a directory, got"):
        user_directory(name, "cache_dir")
    assert user_directory("new/deep") == Path("new/deep") and not Path("new").exists()
