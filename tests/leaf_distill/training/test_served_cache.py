"""A cache filled from a server of prompt log-probabilities: what it holds, and what is refused.

The server is a small one of ours, which answers in vLLM's form with what a real model computes;
`test_vllm_cache.py` asks a real vLLM.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from distill_pair import (
    losses,
    make_config,
    make_rows,
    make_student,
    make_teacher,
    make_tokenizer,
    render,
)
from small_server import NAME, SmallServer, dropped, serving

from leaf_distill.cli import main
from leaf_distill.data.collator import collate
from leaf_distill.models import server as client
from leaf_distill.models.server import ServerAway, ServerError
from leaf_distill.training.cache import CacheResult, cache_teacher
from leaf_distill.training.config import CacheConfig
from leaf_distill.training.teacher_cache import StoredTeacher, TeacherCache
from leaf_distill.training.trainer import LeafTrainer

VOCABULARY = 48  # of the teacher, and of a student that has them all


def save(model: Any, directory: Path) -> str:
    model.save_pretrained(directory)
    make_tokenizer().save_pretrained(directory)
    return str(directory)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("pair")
    student = make_student(vocab_size=VOCABULARY)
    return {
        "teacher": save(make_teacher(max_position_embeddings=64), root / "teacher"),
        "student": save(student, root / "student"),
    }


@pytest.fixture(scope="module")
def shared(pair: dict[str, str]) -> Iterator[SmallServer]:
    with serving(pair["teacher"]) as running:
        yield running


@pytest.fixture
def running(shared: SmallServer, monkeypatch: pytest.MonkeyPatch) -> SmallServer:
    shared.reset()
    monkeypatch.delenv("LEAF_API_KEY", raising=False)
    monkeypatch.setattr(client, "WAITS_S", (0.01, 0.1))
    return shared


def fill(
    directory: Path, pair: dict[str, str], rows: Any, url: str | None = None, **settings: Any
) -> CacheResult:
    dataset = directory.with_suffix(".jsonl")
    dataset.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = {**pair, "signal": "topk", "top_k": 5, "teacher_server_url": url, **settings}
    return cache_teacher(CacheConfig(dataset=str(dataset), output_dir=str(directory), **given))


def make(tmp_path: Path, rows: Any, cache: Path | None, teacher: str | None = None) -> LeafTrainer:
    student = make_student(vocab_size=VOCABULARY)
    return LeafTrainer(
        *(student, teacher, make_config(tmp_path / "run"), rows, rows, make_tokenizer()),
        teacher_cache=cache,
    )


# ---- what is stored ----


def test_a_servers_cache_is_that_of_the_live_teacher(
    pair: dict[str, str], running: SmallServer, tmp_path: Path
) -> None:
    rows = make_rows(12, 4, cross=2)
    result = fill(tmp_path / "served", pair, rows, running.url)
    fill(tmp_path / "live", pair, rows)
    served, live = (
        StoredTeacher(TeacherCache(tmp_path / name), torch.device("cpu"))
        for name in ("served", "live")
    )
    assert served.cache.manifest["server"] == {"url": running.url, "model": NAME}
    assert result.summary["rows"] == len(live.cache) == 18
    outside = []  # labels that are not among the five
    for example in render(rows):
        batch = collate([example])
        ours, theirs = served(batch), live(batch)
        assert torch.equal(ours.ids, theirs.ids)
        # The values agree to 1e-6, and so are stored as the same step or the next one.
        assert float((ours.logprobs - theirs.logprobs).abs().max()) <= 1 / 8192 + 1e-9
        mass = theirs.tail_logprob.exp()
        assert torch.allclose(ours.tail_logprob.exp(), mass, atol=2e-6, rtol=0)
        one = example.renderings["teacher"]
        labels = torch.from_numpy(one.input_ids[one.loss_mask]).long()
        outside.append((ours.ids != labels[:, None]).all(dim=1))
    assert 0 < int(torch.cat(outside).sum()) < len(torch.cat(outside))
    assert all(body["max_tokens"] == body["temperature"] == 1 for body in running.bodies)


def test_a_training_from_it_has_the_losses_of_the_live_top_k(
    pair: dict[str, str], running: SmallServer, tmp_path: Path
) -> None:
    rows, found = make_rows(12, 4), []
    fill(tmp_path / "served", pair, rows, running.url)
    fill(tmp_path / "live", pair, rows)
    for name in ("served", "live"):
        trainer = make(tmp_path, rows, tmp_path / name)
        trainer.train()
        found.append(torch.tensor(losses(trainer)))
    assert len(found[0]) == 4
    assert torch.allclose(found[0], found[1], rtol=1e-4, atol=0)


def test_the_loss_is_whole_at_the_vocabulary(
    pair: dict[str, str], running: SmallServer, tmp_path: Path
) -> None:
    rows, cache = make_rows(8, 2), tmp_path / "served"
    running.max_logprobs = 1024
    fill(cache, pair, rows, running.url, top_k=1024)
    assert TeacherCache(cache).manifest["top_k"] == VOCABULARY
    whole = make(tmp_path, rows, None, pair["teacher"]).evaluate()
    stored = make(tmp_path, rows, cache).evaluate()
    assert stored["eval_loss"] == pytest.approx(whole["eval_loss"], rel=1e-4)


def test_the_weights_need_not_be_here(
    pair: dict[str, str], running: SmallServer, tmp_path: Path
) -> None:
    rows, own = make_rows(6, 2), {**pair, "teacher": str(tmp_path / "own")}
    shutil.copytree(pair["teacher"], own["teacher"])
    Path(own["teacher"], "model.safetensors").unlink()
    cache = tmp_path / "cache"
    fill(cache, own, rows[:4], running.url)
    fill(cache, pair, rows, running.url)  # where the weights are
    shutil.rmtree(own["teacher"])
    make(tmp_path, rows, cache).train()
    make(tmp_path, rows, cache, pair["teacher"]).train()


# ---- what is new, what ended ----


def kept(cache: Path) -> set[bytes]:
    return set(TeacherCache(cache)._places)


def test_a_run_that_ended_goes_on_with_the_rows_that_lack(
    pair: dict[str, str], running: SmallServer, tmp_path: Path
) -> None:
    rows, cache = make_rows(9, 3), tmp_path / "cache"
    running.spoil = lambda entries: entries if len(running.bodies) < 8 else None
    with pytest.raises(ServerError, match="run the same command again"):
        fill(cache, pair, rows, running.url, server_concurrency=1)
    there = kept(cache)
    assert len(there) == 6  # the first request is for the shortest row, before anything is written
    running.reset()
    assert fill(cache, pair, rows, running.url).summary["rows"] == 12
    assert len(running.bodies) == 6 and kept(cache) > there
    fill(cache, pair, rows, running.url)  # nothing is left to ask
    assert len(running.bodies) == 6


@pytest.mark.slow
def test_a_killed_run_goes_on_with_the_rows_that_lack(
    pair: dict[str, str], running: SmallServer, tmp_path: Path
) -> None:
    rows, cache = make_rows(60, 20), tmp_path / "cache"
    dataset = tmp_path / "rows.jsonl"
    dataset.write_text("".join(json.dumps(row) + "\n" for row in rows))
    running.delay_s = 0.1
    code = (
        "import sys\n"
        "from leaf_distill.cli import main\n"
        "from leaf_distill.training import cache_writer\n"
        "cache_writer.PART_BYTES = 2000\n"
        "main(sys.argv[1:])\n"
    )
    command = ["cache", "--signal", "topk", "--top_k", "5", "--dataset", str(dataset)]
    command += [f"--{role}={name}" for role, name in pair.items()]
    command += ["--teacher_server_url", running.url, "--server_concurrency", "2"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    child = subprocess.Popen(
        [sys.executable, "-c", code, *command, "--output_dir", str(cache)], env=environment
    )
    deadline = time.monotonic() + 120
    while not (cache / "part-00002.parquet").exists() and time.monotonic() < deadline:
        assert child.poll() is None
        time.sleep(0.02)
    child.kill()
    child.wait()
    there = kept(cache)
    assert 0 < len(there) < 80
    running.reset()
    assert fill(cache, pair, rows, running.url).summary["rows"] == 80
    assert len(running.bodies) == 80 - len(there)


def test_a_server_may_move_and_its_model_may_not_change(
    pair: dict[str, str], running: SmallServer, tmp_path: Path
) -> None:
    rows, cache = make_rows(6, 2), tmp_path / "cache"
    fill(cache, pair, rows[:4], running.url)
    fill(cache, pair, rows, running.url.replace("127.0.0.1", "localhost"))
    with pytest.raises(ValueError, match="another model of a server: 'tiny', not 'other'"):
        fill(cache, pair, rows, running.url, teacher_server_model="other")
    with pytest.raises(ValueError, match="another model of a server: 'tiny', not None"):
        fill(cache, pair, rows)
    fill(tmp_path / "live", pair, rows)
    with pytest.raises(ValueError, match="another model of a server: None, not 'tiny'"):
        fill(tmp_path / "live", pair, rows, running.url)


# ---- refusals ----


def change(**fields: Any) -> Callable[[list[Any]], list[Any]]:
    """Give the last token's likeliest token other fields."""

    def spoil(entries: list[Any]) -> list[Any]:
        likeliest = max(entries[-1].values(), key=lambda value: value["logprob"])
        likeliest.update(fields)
        return entries

    return spoil


def cut(entries: list[Any]) -> list[Any]:
    """Leave each token, which comes first, and one of the likeliest."""
    return [entry and dict(list(entry.items())[:2]) for entry in entries]


def rename(entries: list[Any]) -> list[Any]:
    return [entry and {str(int(name) + 1): one for name, one in entry.items()} for entry in entries]


def far(entries: list[Any]) -> list[Any]:
    return [entry and {**entry, "48": {"logprob": -1e-3, "rank": 1}} for entry in entries]


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda entries: None, "must give prompt_logprobs, as vLLM does, got from .* a reply with"),
        (lambda entries: entries[1:], r"log-probabilities of all \d+ tokens, got .* \d+ entries"),
        (lambda entries: [None] * len(entries), r"log-probabilities of token \d+ of a prompt by"),
        (change(logprob=None), r"log-probabilities of token \d+ of a prompt by token id, got"),
        (change(logprob=float("nan")), "finite log-probabilities, at most 0, got .* nan for token"),
        (change(logprob=float("inf")), "finite log-probabilities, at most 0, got .* inf for token"),
        (change(logprob=3.5), "finite log-probabilities, at most 0, got .* 3.5 for token"),
        (
            lambda entries: [
                entry and {name: {**one, "logprob": -9999.0} for name, one in entry.items()}
                for entry in entries
            ],
            "finite log-probabilities, at most 0, got .* -9999.0 for token",
        ),
        (
            lambda entries: [
                entry and {name: {**one, "logprob": -0.5} for name, one in entry.items()}
                for entry in entries
            ],
            r"probabilities of a sum of at most 1, got .* 3.033 for token",
        ),
        (cut, r"5 log-probabilities of a token, got .* 2 for token"),
        (rename, r"the log-probability of \d+, token \d+ of a prompt, got .* those of"),
        (far, "ids below 48, of tokens that the student has, got .* 48 for token"),
    ],
)
def test_a_reply_that_cannot_be_right_is_one_sentence(
    spoil: Any, sentence: str, pair: dict[str, str], running: SmallServer, tmp_path: Path
) -> None:
    running.spoil = spoil
    with pytest.raises(ServerError, match=sentence) as caught:
        fill(tmp_path / "cache", pair, make_rows(3, 0), running.url)
    assert str(caught.value).startswith("teacher_server_url: must give ")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "cache").exists()


def test_a_k_above_the_servers_limit_is_said_before_anything_is_written(
    pair: dict[str, str], running: SmallServer, tmp_path: Path
) -> None:
    rows, cache = make_rows(3, 0), tmp_path / "cache"
    with pytest.raises(
        ValueError,
        match=r"^top_k: must be at most what the server at .* allows, got 21 \(.*max allowed: 20\)"
        r"; give a smaller --top_k, or start vLLM with --max-logprobs 21$",
    ):
        fill(cache, pair, rows, running.url, top_k=21)
    fill(cache, pair, rows, running.url, top_k=20)


@pytest.mark.parametrize("context", [64, 60])
def test_a_row_beyond_the_servers_context_is_said(
    context: int,
    pair: dict[str, str],
    running: SmallServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = make_rows(3, 0)
    monkeypatch.setattr(running.model.config, "max_position_embeddings", context)
    words = len(rows[1]["completion"][0]["content"].split())
    rows[1]["prompt"][0]["content"] = " ".join(["w1"] * (61 - words))
    assert max(len(one.renderings["teacher"]) for one in render(rows)) == 64  # and one to answer
    with pytest.raises(ValueError, match=r"^max_length: must be below the context of the server"):
        fill(tmp_path / "cache", pair, rows, running.url, server_concurrency=1)
    # The server was tried with the shortest row, and refused the longest, which is sent first.
    lengths = [len(body["prompt"]) for body in running.bodies]
    assert len(lengths) == 2 and lengths[1] == 64
    assert fill(tmp_path / "cache", pair, rows, running.url, max_length=63).summary["rows"] == 2
    assert [len(body["prompt"]) for body in running.bodies].count(64) == 1


def test_tokens_that_the_student_lacks_are_refused_among_the_likeliest(
    pair: dict[str, str], running: SmallServer, tmp_path: Path
) -> None:
    fewer = {**pair, "student": save(make_student(), tmp_path / "fewer")}
    with pytest.raises(ServerError, match="ids below 45, of tokens that the student has"):
        fill(tmp_path / "cache", fewer, make_rows(9, 3), running.url, top_k=20)


def test_a_server_that_is_away_is_one_sentence(
    pair: dict[str, str], running: SmallServer, tmp_path: Path
) -> None:
    running.troubles = [dropped] * 200
    with pytest.raises(ServerAway, match=r"^teacher_server_url: must give an answer within 0.3 s"):
        fill(tmp_path / "cache", pair, make_rows(3, 0), running.url, server_timeout=0.3)


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        ("", "signal: must be topk with teacher_server_url, got 'hidden'; a server gives log-"),
        ("--signal topk --temperature 2", "temperature: must be 1 with teacher_server_url, got 2"),
        ("--signal topk --dtype float32", "dtype: must be left out with teacher_server_url, got"),
        ("--signal topk --device cpu", "device: must be left out with teacher_server_url, got"),
        ("--signal topk --teacher_quantization int8", "teacher_quantization: must be left out wi"),
        ("--signal topk --server_concurrency 0", "server_concurrency: must be from 1 to 1024"),
    ],
)
def test_a_setting_that_no_server_has_is_one_sentence(
    argv: str, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command = "cache --student s --teacher t --dataset d --output_dir o --teacher_server_url u"
    with pytest.raises(SystemExit):
        main([*command.split(), *argv.split()])
    assert sentence in capsys.readouterr().err


def test_the_command_and_the_description_name_the_server(
    pair: dict[str, str],
    running: SmallServer,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    dataset, cache = tmp_path / "rows.jsonl", tmp_path / "cache"
    dataset.write_text("".join(json.dumps(row) + "\n" for row in make_rows(3, 1)))
    command = ["cache", "--teacher_server_url", running.url, "--signal", "topk", "--top_k", "5"]
    command += [f"--{role}={name}" for role, name in pair.items()]
    assert main([*command, "--dataset", str(dataset), "--output_dir", str(cache)]) == 0
    out = capsys.readouterr().out
    assert "rows 4 (new 4)" in out and "Mass outside" in out and "KL" not in out
    assert TeacherCache(cache).description.endswith("given by a server for its model tiny")
