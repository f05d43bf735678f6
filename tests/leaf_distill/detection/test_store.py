"""The run directory, killed, filled up and damaged for real."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from store_stage import PLAN, SCHEMA, rows_of, stage

from leaf_distill.io import (
    MAX_PARTS,
    Stage,
    StoreError,
    claim_run_directory,
    content,
    write_bytes,
    write_json,
)


def run_in_process(root, *, where="nowhere", limit=None):
    program = Path(__file__).with_name("store_stage.py")
    return subprocess.run(
        [sys.executable, str(program), where, str(root), json.dumps(sys.path)],
        capture_output=True,
        text=True,
        preexec_fn=limit,
    )


def contents(root):
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in Path(root).rglob("*")
        if path.is_file()
    }


def counting(calls):
    def compute(batch):
        calls.append(list(batch))
        return rows_of(batch)

    return compute


def never(_batch):
    raise AssertionError("nothing is left to compute")


def test_table_is_in_the_plans_order_and_typed(tmp_path):
    table = stage(tmp_path).run(PLAN, rows_of, desc="score")
    assert table.schema == SCHEMA
    assert table["row_id"].to_pylist() == [3, 1, 0, 2, 5, 4, 6, 7]
    assert stage(tmp_path).run(PLAN, never, desc="score") == table


def test_empty_plan(tmp_path):
    table = stage(tmp_path).run([], never, desc="score")
    assert (table.num_rows, table.schema) == (0, SCHEMA)


@pytest.mark.parametrize(
    ("where", "left"),
    [
        ("before plan.json", 4),
        ("after plan.json", 4),
        ("compute", 2),
        ("before part-00001.parquet", 3),
        ("after part-00001.parquet", 2),
        ("before manifest.json", 0),
        ("after manifest.json", 0),
    ],
)
def test_killed_run_goes_on_and_ends_with_the_same_bytes(tmp_path, where, left):
    stage(tmp_path / "whole").run(PLAN, rows_of, desc="score")
    killed = run_in_process(tmp_path / "killed", where=where)
    assert killed.returncode == -signal.SIGKILL
    calls = []
    stage(tmp_path / "killed").run(PLAN, counting(calls), desc="score")
    assert calls == PLAN[len(PLAN) - left :]
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_error_in_a_batch_keeps_what_is_done(tmp_path):
    def compute(batch):
        if 5 in batch:
            raise KeyboardInterrupt
        return rows_of(batch)

    with pytest.raises(KeyboardInterrupt):
        stage(tmp_path).run(PLAN, compute, desc="score")
    assert not stage(tmp_path).finished
    calls = []
    stage(tmp_path).run(PLAN, counting(calls), desc="score")
    assert calls == PLAN[2:]


def test_many_batches_make_few_parts(tmp_path):
    plan = [[i] for i in range(MAX_PARTS * 2 + 1)]
    table = stage(tmp_path).run(plan, rows_of, desc="score")
    assert table["row_id"].to_pylist() == list(range(MAX_PARTS * 2 + 1))
    assert len(list(stage(tmp_path).directory.glob("part-*"))) == 43


# Of an unfinished stage no sha256 is known yet, and a Parquet footer has no checksum of its own.
@pytest.mark.parametrize(
    ("damage", "finished"),
    [
        ("footer", True),
        *(
            (damage, done)
            for damage in ("value", "cut", "empty", "other")
            for done in (True, False)
        ),
    ],
)
def test_corrupt_part_is_named_and_recomputed_when_deleted(tmp_path, damage, finished):
    whole = stage(tmp_path).run(PLAN, rows_of, desc="score")
    before = contents(tmp_path)
    directory = stage(tmp_path).directory
    part = directory / "part-00001.parquet"
    data = bytearray(part.read_bytes())
    if damage == "value":
        data[data.index(b"row ")] ^= 1  # a text that still reads as text
    if damage == "footer":
        data[data.index(b"parquet-cpp")] ^= 1
    part.write_bytes({"cut": data[:-9], "empty": b"", "other": b"x" * 99}.get(damage, bytes(data)))
    if not finished:
        (directory / "manifest.json").unlink()
    words = f"{part} is corrupt: delete it and run the same command again; only that part is"
    with pytest.raises(StoreError, match=words):
        stage(tmp_path).run(PLAN, never, desc="score")
    part.unlink()
    calls = []
    assert stage(tmp_path).run(PLAN, counting(calls), desc="score") == whole
    assert calls == [PLAN[1]]
    assert contents(tmp_path) == before


def test_corrupt_manifest_is_named(tmp_path):
    stage(tmp_path).run(PLAN, rows_of, desc="score")
    manifest = stage(tmp_path).directory / "manifest.json"
    manifest.write_text("{")
    with pytest.raises(StoreError, match=r"manifest.json is corrupt: delete it and run the same"):
        stage(tmp_path).run(PLAN, never, desc="score")
    manifest.unlink()
    assert stage(tmp_path).run(PLAN, never, desc="score").num_rows == 8


def test_parts_without_their_plan_are_refused(tmp_path):
    stage(tmp_path).run(PLAN, rows_of, desc="score")
    directory = stage(tmp_path).directory
    (directory / "plan.json").write_text("{")
    with pytest.raises(StoreError, match=f"plan.json is corrupt: delete {directory} and run"):
        stage(tmp_path).run(PLAN, never, desc="score")
    (directory / "plan.json").unlink()
    with pytest.raises(StoreError, match=f"plan.json, .* is missing: delete {directory} and run"):
        stage(tmp_path).run(PLAN[::-1], never, desc="score")


def test_file_size_limit_is_a_full_disk(tmp_path):
    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (600, 600))  # the plan fits, a part does not

    failed = run_in_process(tmp_path / "full", limit=limit)
    assert failed.returncode == 1
    assert "StoreError: The disk is full" in failed.stderr and "part-00000.parquet" in failed.stderr
    assert not list((tmp_path / "full").rglob("*.tmp"))
    stage(tmp_path / "whole").run(PLAN, rows_of, desc="score")
    stage(tmp_path / "full").run(PLAN, rows_of, desc="score")
    assert contents(tmp_path / "full") == contents(tmp_path / "whole")


def test_full_disk_keeps_what_is_done(tmp_path):
    """A device without any room: the file system's own ENOSPC."""
    small = tmp_path / "small"
    small.mkdir()
    size = f"size={os.sysconf('SC_PAGE_SIZE') * 4},mode=700"
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", size, "tmpfs", str(small)], capture_output=True
    )
    if mount.returncode:  # not root: a limit on file sizes tests the same, above
        pytest.skip(f"cannot mount a small file system: {mount.stderr.decode().strip()}")
    try:
        with pytest.raises(StoreError, match=r"The disk is full: .*free some space"):
            stage(small).run(PLAN, rows_of, desc="score")
        assert [path.name for path in stage(small).directory.glob("part-*")] != []
        subprocess.run(["mount", "-o", "remount,size=1m", str(small)], check=True)
        calls = []
        stage(small).run(PLAN, counting(calls), desc="score")
        assert 0 < len(calls) < len(PLAN)
        stage(tmp_path / "whole").run(PLAN, rows_of, desc="score")
        assert contents(small) == contents(tmp_path / "whole")
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_two_processes_do_not_mix(tmp_path):
    def compute(batch):
        other = run_in_process(tmp_path)
        assert "Another process is at work in" in other.stderr
        return rows_of(batch)

    stage(tmp_path).run(PLAN[:1], compute, desc="score")


def test_smaller_batches_keep_the_finished_parts(tmp_path):
    """As after an out-of-memory error in the third batch."""
    plan = [list(range(8)), list(range(8, 16)), list(range(16, 24)), [24]]
    small = [list(range(start, min(start + 3, 25))) for start in range(0, 25, 3)]

    def compute(batch):
        if batch == plan[2]:
            raise MemoryError
        return rows_of(batch)

    with pytest.raises(MemoryError):
        stage(tmp_path).run(plan, compute, desc="score")
    before = contents(stage(tmp_path).directory)
    calls = []
    table = stage(tmp_path).run(small, counting(calls), desc="score")
    assert calls == [[16, 17], [18, 19, 20], [21, 22, 23], [24]]
    assert table["row_id"].to_pylist() == list(range(25))
    after = contents(stage(tmp_path).directory)
    assert all(after[name] == data for name, data in before.items() if name != "plan.json")
    for batches in (plan, small):  # once finished, in whatever batches
        assert stage(tmp_path).run(batches, never, desc="score") == table


def test_a_plan_of_other_items_is_refused(tmp_path):
    stage(tmp_path).run(PLAN, rows_of, desc="score")
    for plan in (PLAN[:2], [*PLAN, [8]], [*PLAN, [7]]):
        with pytest.raises(StoreError, match="other items than this run's"):
            stage(tmp_path).run(plan, rows_of, desc="score")


def test_fingerprint_follows_name_settings_and_schema(tmp_path):
    stages = [
        stage(tmp_path),
        stage(tmp_path, dtype="float32"),
        Stage(tmp_path, "predict", {"model": "abc"}, SCHEMA),
        Stage(tmp_path, "saliency", {"model": "abc"}, SCHEMA.remove(2)),
    ]
    assert len({one.fingerprint for one in stages}) == 4
    same = Stage(tmp_path / "b", "saliency", {"model": "abc"}, SCHEMA)
    assert same.fingerprint == stages[0].fingerprint
    assert same.directory == tmp_path / "b" / "saliency" / same.fingerprint[:12]


def test_wrong_columns_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"'saliency' has the columns \['row_id'\], not"):
        stage(tmp_path).run([[1]], lambda batch: [{"row_id": 1}], desc="score")


def test_run_directory_of_others_is_refused(tmp_path):
    root = tmp_path / "run"
    claim_run_directory(root, {"student": "a", "threshold": 0.1, "columns": {"prompt": "q"}})
    before = contents(root)
    claim_run_directory(root, {"threshold": 0.1, "student": "a", "columns": {"prompt": "q"}})
    with pytest.raises(
        ValueError,
        match=r"other settings: seed was None and is now 3; student was 'a' and is now 'b'",
    ):
        claim_run_directory(
            root, {"student": "b", "threshold": 0.1, "columns": {"prompt": "q"}, "seed": 3}
        )
    assert contents(root) == before
    with pytest.raises(ValueError, match="is a file; give a directory"):
        claim_run_directory(root / "run.json", {})
    (root / "run.json").write_text("[")
    with pytest.raises(StoreError, match=r"run\.json is corrupt"):
        claim_run_directory(root, {})


def test_what_a_name_stands_for_counts_and_the_name_is_said(tmp_path):
    root = tmp_path / "run"
    assert claim_run_directory(root, {"model": content("tiny", "ab"), "rows": content("x", "1")})
    same = {"model": content("moved", "ab"), "rows": content("x", "1")}
    assert not claim_run_directory(root, same)
    with pytest.raises(
        ValueError,
        match=r"model was 'tiny' and is now 'big'; the content of rows 'x' changed\. Give",
    ):
        claim_run_directory(root, {"model": content("big", "cd"), "rows": content("x", "2")})
    with pytest.raises(ValueError, match=r"rows was .* and is now None"):
        claim_run_directory(root, {"model": content("tiny", "ab")})


def test_writing_is_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"b": [1, "é"], "a": None})
    assert json.loads(path.read_text()) == {"b": [1, "é"], "a": None}
    assert [one.name for one in tmp_path.iterdir()] == ["a.json"]
    with pytest.raises(StoreError, match="could not be written"):
        write_bytes(tmp_path / "missing" / "a", b"x")
