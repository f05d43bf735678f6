"""The row cache: by content, shared, killed, damaged."""

from __future__ import annotations

import multiprocessing
import sqlite3
from pathlib import Path
from random import Random

import pytest

from leaf_distill.detection.cache import (
    FILE,
    RowCache,
    compute_missing,
    default_cache_directory,
)
from leaf_distill.io import StoreError

KEYS = [f"key-{index}" for index in range(8)]
PLAN = [[3, 1], [0, 2], [5], [4, 6, 7]]


def value_of(at: int) -> bytes:
    return f"value {at}".encode() * (at + 1)


def compute(calls: list[list[int]]):  # type: ignore[no-untyped-def]
    def run(batch: list[int]) -> list[bytes]:
        calls.append(batch)
        return [value_of(at) for at in batch]

    return run


def missing(cache: RowCache, keys: list[str], **options: object) -> list[list[int]]:
    """The batches that are computed for these keys; the values must be right."""
    calls: list[list[int]] = []
    values = compute_missing(cache, keys, PLAN, compute(calls), description="test", **options)  # type: ignore[arg-type]
    assert values == [value_of(int(key.split("-")[1])) for key in keys]
    return calls


def test_every_value_is_computed_once_and_found_again(tmp_path: Path) -> None:
    with RowCache(tmp_path) as cache:
        assert missing(cache, KEYS) == PLAN
        assert missing(cache, KEYS) == []
    with RowCache(tmp_path) as cache:
        assert missing(cache, KEYS) == []


def test_only_rows_that_are_missing_are_computed(tmp_path: Path) -> None:
    with RowCache(tmp_path) as cache:
        cache.put({KEYS[at]: value_of(at) for at in (0, 1, 5)})
        assert missing(cache, KEYS) == [[3], [2], [4, 6, 7]]


def test_values_that_depend_on_their_batch_are_computed_with_it(tmp_path: Path) -> None:
    with RowCache(tmp_path) as cache:
        cache.put({KEYS[at]: value_of(at) for at in (0, 1, 5)})
        assert missing(cache, KEYS, whole_batches=True) == [[3, 1], [0, 2], [4, 6, 7]]


def test_equal_rows_are_computed_once(tmp_path: Path) -> None:
    calls: list[list[int]] = []
    with RowCache(tmp_path) as cache:
        keys = ["a", "b", "a", "a"]
        plan = [[2, 1], [0, 3]]
        values = compute_missing(cache, keys, plan, compute(calls), description="test")
    assert calls == [[2, 1]] and values == [value_of(2), value_of(1), value_of(2), value_of(2)]


def test_a_value_that_is_not_kept_is_computed_again(tmp_path: Path) -> None:
    with RowCache(tmp_path) as cache:
        keep = lambda value: value != value_of(5)  # noqa: E731
        assert missing(cache, KEYS, keep=keep) == PLAN
        assert missing(cache, KEYS, keep=keep) == [[5]]


def test_the_first_value_stays(tmp_path: Path) -> None:
    with RowCache(tmp_path) as one, RowCache(tmp_path) as other:
        assert one.put({"a": b"first"}) == {"a": b"first"}
        assert other.put({"a": b"second", "b": b"third"}) == {"a": b"first", "b": b"third"}


def test_more_keys_than_a_statement_takes(tmp_path: Path) -> None:
    values = {f"{index}": b"%d" % index for index in range(5000)}
    with RowCache(tmp_path) as cache:
        assert cache.put(values) == values
        assert cache.get([*values, "absent"]) == values


def test_a_failed_batch_leaves_the_earlier_ones(tmp_path: Path) -> None:
    def fail(batch: list[int]) -> list[bytes]:
        if batch == [5]:
            raise KeyboardInterrupt
        return [value_of(at) for at in batch]

    with RowCache(tmp_path) as cache:
        with pytest.raises(KeyboardInterrupt):
            compute_missing(cache, KEYS, PLAN, fail, description="test")
        assert missing(cache, KEYS) == [[5], [4, 6, 7]]


def test_flipped_bits_are_computed_again(tmp_path: Path) -> None:
    with RowCache(tmp_path) as cache:
        missing(cache, KEYS)
    with sqlite3.connect(tmp_path / FILE) as database:
        database.execute("UPDATE rows SET value = ? WHERE key = ?", (b"valve 4", KEYS[4]))
    with RowCache(tmp_path) as cache:
        assert missing(cache, KEYS) == [[4]]
        assert missing(cache, KEYS) == []


@pytest.mark.parametrize("content", [b"no database" * 100, b"SQLite format 3\0" + b"\xff" * 4000])
def test_a_damaged_file_is_one_sentence(tmp_path: Path, content: bytes) -> None:
    (tmp_path / FILE).write_bytes(content)
    with pytest.raises(StoreError, match=r"rows\.sqlite cannot be used .*: delete it"):
        RowCache(tmp_path)
    assert (tmp_path / FILE).read_bytes() == content


def test_a_directory_that_cannot_be_made_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="must be a place to write to"):
        RowCache(tmp_path / "file" / "cache")


def write_many(directory: str, seed: int) -> None:
    draw = Random(seed)
    with RowCache(Path(directory)) as cache:
        for _ in range(30):
            batch = draw.sample(range(200), 10)
            stored = cache.put({f"key-{at}": value_of(at) for at in batch})
            assert stored == {f"key-{at}": value_of(at) for at in batch}


def test_processes_share_it(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=write_many, args=(str(tmp_path), i)) for i in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    with RowCache(tmp_path) as cache:
        found = cache.get([f"key-{at}" for at in range(200)])
    assert len(found) > 150
    assert all(value == value_of(int(key.split("-")[1])) for key, value in found.items())


def test_where_it_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEAF_CACHE_DIR", "/a")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert default_cache_directory() == Path("/a")
    monkeypatch.delenv("LEAF_CACHE_DIR")
    assert default_cache_directory() == Path("/b/leaf-distill")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_cache_directory().expanduser() == Path.home() / ".cache/leaf-distill"
