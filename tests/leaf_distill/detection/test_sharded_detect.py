"""`leaf detect` by several processes, as torchrun and accelerate start them."""

from __future__ import annotations

import json
import os
import socket
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import detect_pair
import numpy as np
import pytest
import shard_run
import yaml
from detect_run import ROWS, run, settings, table

from leaf_distill.detection.pipeline import DetectResult

Plan = dict[str, dict[str, Any]]
ARM = Path("run/arms/span-threshold-0.15")
ENDS_WITHIN_S = 120.0  # of which imports on a busy machine take most


@dataclass
class Launched:
    status: int
    output: str
    errors: str
    seconds: float
    ranks: dict[int, dict[str, Any]]  # what each rank wrote at its end

    @property
    def sentences(self) -> list[str]:
        return [line for line in self.errors.splitlines() if line.startswith("leaf detect: error")]

    @property
    def passes(self) -> int:
        return sum(sum(one["rows"].values()) for one in self.ranks.values())


@pytest.fixture(scope="module")
def finished(pair: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> DetectResult:
    return run(pair, tmp_path_factory.mktemp("finished"), device="cpu")  # as the processes


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def torchrun(processes: int) -> list[str]:
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}"]
    return [*command, "--master_addr=127.0.0.1", f"--master_port={free_port()}"]


def accelerate(processes: int) -> list[str]:
    # "--multi_gpu" is how it starts several processes; there need be no GPU.
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--multi_gpu"]
    command += ["--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no"]
    return [*command, f"--num_processes={processes}", f"--main_process_port={free_port()}"]


def launch(
    launcher: list[str], pair: dict[str, str], root: Path, plan: Plan | None = None, **changes: Any
) -> Launched:
    root.mkdir(parents=True, exist_ok=True)
    config, steps = root / "config.yaml", root / "plan.json"
    for old in root.glob("config.yaml.*.json"):
        old.unlink()
    config.write_text(yaml.safe_dump(settings(pair, root, device="cpu", **changes)))
    steps.write_text(json.dumps(plan or {}))
    path = os.pathsep.join([str(Path(detect_pair.__file__).parent), *filter(None, sys.path)])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    command = [*launcher, shard_run.__file__, str(config), str(steps)]
    start = time.monotonic()
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as launched:
        try:
            output, errors = launched.communicate(timeout=ENDS_WITHIN_S)
        finally:
            launched.terminate()  # SIGTERM: if it hangs, torchrun ends its ranks as well
    ends = {int(one.suffixes[-2][1:]): one for one in root.glob("config.yaml.*.json")}
    ranks = {rank: json.loads(one.read_text()) for rank, one in ends.items()}
    seconds = time.monotonic() - start
    return Launched(launched.returncode, output, errors, seconds, ranks)


def cached(directory: Path) -> int:
    with closing(sqlite3.connect(directory / "rows.sqlite")) as rows:
        number: int = rows.execute("SELECT count(*) FROM rows").fetchone()[0]
        return number


def check_same(root: Path, finished: DetectResult) -> None:
    """The same dataset to the byte; the same spans, and norms to 1e-5."""
    assert (root / ARM / "dataset.parquet").read_bytes() == finished.dataset.read_bytes()
    assert table(root / ARM / "outcomes.parquet") == table(finished.outcomes)
    ours, theirs = table(root / ARM / "samples.parquet"), table(finished.samples)
    measured = {"teacher_saliency", "student_saliency", "score", "teacher_nll", "student_nll"}
    for one, two in zip(ours, theirs, strict=True):
        for name in measured:
            np.testing.assert_allclose(one.pop(name), two.pop(name), atol=1e-5)
        assert one == two


def test_two_processes_with_a_cache_each_do_what_one_does(
    pair: dict[str, str], finished: DetectResult, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    # What fits into the memory differs too: all take the batches of the least.
    options = ["--cache_dir", str(other), "--max_batch_tokens", "400"]
    done = launch(torchrun(2), pair, tmp_path, {"1": {"options": options}})
    assert done.status == 0, done.errors
    check_same(tmp_path, finished)
    whole = cached(finished.run_directory.parent / "cache")
    assert done.passes == whole  # each row by one of them
    assert cached(other) == sum(done.ranks[1]["rows"].values()) > 0
    assert cached(tmp_path / "cache") == whole
    assert done.output.count("The dataset is") == done.output.count("LeaF, stage 1") == 1
    assert not any(one["initialized"] for one in done.ranks.values())


def test_the_first_process_alone_prints_the_estimate(pair: dict[str, str], tmp_path: Path) -> None:
    done = launch(torchrun(2), pair, tmp_path, dry_run=True)
    assert done.status == 0, done.errors
    assert done.output.count("Estimate of the run") == 1 and not (tmp_path / "run").exists()


def test_an_error_of_one_process_ends_all_with_its_sentence(
    pair: dict[str, str], tmp_path: Path
) -> None:
    missing = {"1": {"options": ["--teacher", str(tmp_path / "missing")]}}
    done = launch(torchrun(2), pair, tmp_path, missing)
    assert done.status != 0
    assert len(done.sentences) == 1 and "teacher: " in done.sentences[0], done.errors
    assert not (tmp_path / ARM).exists()


@pytest.mark.slow
@pytest.mark.parametrize("again", [1, 2, 3])
def test_a_killed_process_loses_nothing_of_what_was_stored(
    pair: dict[str, str], finished: DetectResult, tmp_path: Path, again: int
) -> None:
    killed = launch(torchrun(2), pair, tmp_path, {"1": {"kill_after": 2}})
    assert killed.status != 0 and not killed.ranks
    assert not (tmp_path / ARM).exists()
    there = cached(tmp_path / "cache")
    whole = cached(finished.run_directory.parent / "cache")
    assert 0 < there < whole
    done = launch(torchrun(again), pair, tmp_path)
    assert done.status == 0, done.errors
    assert done.passes == whole - there
    check_same(tmp_path, finished)


@pytest.mark.slow
def test_three_processes_with_one_cache_do_what_one_does(
    pair: dict[str, str], finished: DetectResult, tmp_path: Path
) -> None:
    done = launch(torchrun(3), pair, tmp_path)
    assert done.status == 0, done.errors
    check_same(tmp_path, finished)
    whole = cached(finished.run_directory.parent / "cache")
    assert done.passes == cached(tmp_path / "cache") == whole


@pytest.mark.slow
def test_accelerate_launch_does_what_one_process_does(
    pair: dict[str, str], finished: DetectResult, tmp_path: Path
) -> None:
    done = launch(accelerate(2), pair, tmp_path)
    assert done.status == 0, done.errors
    assert sorted(done.ranks) == [0, 1]
    check_same(tmp_path, finished)


@pytest.mark.slow
def test_processes_with_other_rows_are_refused(pair: dict[str, str], tmp_path: Path) -> None:
    done = launch(torchrun(2), pair, tmp_path, {"1": {"options": ["--max_rows", "5"]}})
    assert done.status != 0
    assert len(done.sentences) == 1 and "must have the same work" in done.sentences[0]


@pytest.mark.slow
def test_an_unknown_option_is_named_once(pair: dict[str, str], tmp_path: Path) -> None:
    wrong = {"options": ["--thresold", "0.2"]}
    done = launch(torchrun(2), pair, tmp_path, {"0": wrong, "1": wrong})
    assert done.status != 0
    assert done.errors.count("--thresold is not an option") == 1


@pytest.mark.slow
def test_grading_is_shared_too(
    pair: dict[str, str], finished: DetectResult, tmp_path: Path
) -> None:
    alone = launch([sys.executable], pair, tmp_path / "alone", grade="math")
    two = launch(torchrun(2), pair, tmp_path / "two", grade="math")
    assert alone.status == two.status == 0, two.errors
    ours, theirs = (tmp_path / name / ARM / "dataset.parquet" for name in ("two", "alone"))
    assert ours.read_bytes() == theirs.read_bytes()
    assert cached(tmp_path / "two" / "cache") == cached(tmp_path / "alone" / "cache")
    assert len(table(theirs)) > len(ROWS)
