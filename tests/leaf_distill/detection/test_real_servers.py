"""Answers from `transformers serve` and from llama.cpp's server, which are killed on the way."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import detect_pair
import pytest
from detect_run import run, settings
from real_servers import ABSENT, PYTHON, RealServer, counting, running

from leaf_distill.data.example import Answer, Example
from leaf_distill.detection.answers import answer, open_cache, prompted_model
from leaf_distill.detection.config import DetectConfig
from leaf_distill.detection.pipeline import DetectResult
from leaf_distill.models.loading import LazyModel
from leaf_distill.models.server import connect

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON.is_file(), reason=ABSENT),
]

QUESTIONS = [f"What is {first} + {first * 2 + 1}?" for first in range(1, 13)]
PROBLEMS = [row["prompt"] for row in detect_pair.make_rows(12)]


@pytest.fixture(scope="module")
def real(
    pair: dict[str, str], smollm2_path: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, RealServer]]:
    """Both servers: the tiny teacher and student, and SmolLM2."""
    logs = tmp_path_factory.mktemp("logs")
    served = {
        "teacher": ("transformers", pair["teacher"]),
        "student": ("transformers", pair["student"]),
    }
    served["llama.cpp"] = ("llama.cpp", smollm2_path)
    with (
        running(*served["teacher"], logs / "teacher") as teacher,
        running(*served["student"], logs / "student") as student,
        running(*served["llama.cpp"], logs / "llama.cpp") as llama,
    ):
        yield {"teacher": teacher, "student": student, "llama.cpp": llama}


def texts_of(name: str) -> list[str]:
    return QUESTIONS if name == "llama.cpp" else PROBLEMS


def by_hand(server: RealServer, text: str) -> str:
    """One answer, without our client."""
    body: dict[str, Any] = {"model": server.model, "max_tokens": 12, "temperature": 0}
    body["messages"] = [{"role": "user", "content": text}]
    request = urllib.request.Request(
        f"{server.url}/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request) as response:
        found: str = json.load(response)["choices"][0]["message"]["content"]
    return found


def ask(
    server: RealServer, url: str, texts: Sequence[str], cache_dir: Path, **options: Any
) -> list[Answer]:
    """The answers to texts through the row cache."""
    concurrency = options.pop("concurrency", 3)
    config = DetectConfig(cache_dir=str(cache_dir), grade="exact", max_new_tokens=12, **options)
    place = connect("teacher", url, None, concurrency=concurrency, timeout_s=200)
    one = prompted_model("teacher", LazyModel(server.model), config, place)
    rows = [Example(at, ({"role": "user", "content": text},), "7") for at, text in enumerate(texts)]
    with open_cache(config) as cache:
        answer(one, rows, config, cache)
    return [row.answers["teacher"] for row in rows]


NAMES = ["teacher", "llama.cpp"]


@pytest.mark.parametrize("name", NAMES)
def test_answers_are_those_that_the_server_gives_by_hand(
    real: dict[str, RealServer], tmp_path: Path, name: str
) -> None:
    server, texts = real[name], texts_of(name)
    with counting(server.url) as proxy:
        found = ask(server, proxy.url, texts, tmp_path)
        assert proxy.count == len(texts) and proxy.busiest <= 3
        again = ask(server, proxy.url, texts, tmp_path)
        assert proxy.count == len(texts) and again == found
    assert [one.text for one in found] == [by_hand(server, text) for text in texts]
    assert len({one.text for one in found}) > 5 and all(one.n_tokens for one in found)


@pytest.mark.parametrize("name", NAMES)
def test_an_answer_at_the_limit_is_cut_off_by_real_servers(
    real: dict[str, RealServer], tmp_path: Path, name: str
) -> None:
    texts = ["Write a long story about a fox."] if name == "llama.cpp" else PROBLEMS[:1]
    length = 12 if name == "llama.cpp" else 1
    server = real[name]
    config = DetectConfig(cache_dir=str(tmp_path), grade="exact", max_new_tokens=length)
    place = connect("teacher", server.url, None, concurrency=1, timeout_s=200)
    one = prompted_model("teacher", LazyModel(server.model), config, place)
    row = Example(0, ({"role": "user", "content": texts[0]},), "7")
    with open_cache(config) as cache:
        answer(one, [row], config, cache)
    assert row.answers["teacher"].verdict == "cut_off"


@pytest.mark.parametrize("name", NAMES)
def test_a_beginning_is_continued_by_real_servers(
    real: dict[str, RealServer], tmp_path: Path, name: str
) -> None:
    server = real[name]
    config = DetectConfig(cache_dir=str(tmp_path), grade="exact", max_new_tokens=8)
    place = connect("teacher", server.url, None, concurrency=1, timeout_s=200)
    one = prompted_model("teacher", LazyModel(server.model), config, place)
    text, prefix = texts_of(name)[1], "The sum is" if name == "llama.cpp" else "seven"
    row = Example(0, ({"role": "user", "content": text},), "7", prefix=prefix)
    with open_cache(config) as cache:
        answer(one, [row], config, cache)
    found = row.answers["teacher"].text
    assert found and not found.lstrip().startswith(prefix)
    if name == "llama.cpp":
        assert "5" in found or "7" in found  # 2 + 5


@pytest.mark.parametrize("name", NAMES)
def test_a_server_that_is_killed_and_started_again_changes_no_answer(
    real: dict[str, RealServer], tmp_path: Path, name: str
) -> None:
    server, texts = real[name], texts_of(name)
    expected = ask(server, server.url, texts, tmp_path / "whole")
    starting: list[threading.Thread] = []

    def kill() -> None:
        server.kill()
        starting.append(threading.Thread(target=server.start))
        starting[0].start()

    with counting(server.url) as proxy:
        proxy.at[5] = kill
        found = ask(server, proxy.url, texts, tmp_path / "broken")
        assert proxy.count > len(texts)
    starting[0].join()
    assert found == expected


def test_stage_1_with_transformers_serve_gives_the_dataset_of_the_models_here(
    real: dict[str, RealServer],
    pair: dict[str, str],
    finished: DetectResult,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("leaf_distill.detection.answers.generate", None)
    result = run(pair, tmp_path, **urls(real))
    for name in ("dataset.parquet", "samples.parquet", "outcomes.parquet"):
        assert (result.arm / name).read_bytes() == (finished.arm / name).read_bytes()
    assert result.funnel["served"] == pair


def urls(real: dict[str, Any]) -> dict[str, Any]:
    return {f"{role}_server_url": real[role].url for role in ("student", "teacher")}


def test_a_killed_run_asks_transformers_serve_for_the_rest_alone(
    real: dict[str, RealServer], pair: dict[str, str], finished: DetectResult, tmp_path: Path
) -> None:
    with counting(real["student"].url) as student, counting(real["teacher"].url) as teacher:
        places = urls({"student": student, "teacher": teacher})
        run(pair, tmp_path / "whole", **places)
        whole = student.count + teacher.count
        student.count = teacher.count = 0
        file = tmp_path / "settings.json"
        file.write_text(json.dumps(settings(pair, tmp_path, **places, server_concurrency=2)))
        command = [sys.executable, detect_pair.__file__, str(file), "9"]
        assert subprocess.run(command, capture_output=True).returncode == -signal.SIGKILL
        result = run(pair, tmp_path, **places, server_concurrency=2)
        assert whole <= student.count + teacher.count <= whole + 2
    assert result.dataset.read_bytes() == finished.dataset.read_bytes()
