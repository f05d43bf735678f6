"""Several models on several benchmarks: their files, their table, and drawn answers."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import answering
import numpy as np
import pyarrow.parquet as pq
import pytest

from leaf_distill.evaluation.benchmarks import Benchmark, Group
from leaf_distill.evaluation.config import EvaluateConfig
from leaf_distill.evaluation.evaluate import evaluate, evaluate_benchmarks, run, short_names
from leaf_distill.evaluation.measure import EvaluateResult, Measured
from leaf_distill.evaluation.results import write_results
from leaf_distill.statistics import bootstrap, paired_bootstrap, wilson_interval


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """One that is always right, and one that is right where n is even."""
    root = tmp_path_factory.mktemp("models")
    return [
        answering.save_model(root / "a" / "final", lambda n: n + 1),
        answering.save_model(root / "b" / "final", lambda n: n + 1 - n % 2),
    ]


@pytest.fixture
def settings(tmp_path: Path, models: list[str]) -> dict[str, Any]:
    """Two benchmarks: n from 0 to 7; and even n, where the template puts a word before it."""
    plain, led = tmp_path / "plain.yaml", tmp_path / "led.yaml"
    plain.write_text("dataset: nowhere.jsonl\ngrade: exact\nmax_new_tokens: 4\n")
    rows = answering.write_rows(tmp_path / "led.jsonl", [0, 2, 4, 6])
    led.write_text(f"dataset: {rows}\nprompt: w30 {{prompt}}\ngrade: exact\nmax_new_tokens: 4\n")
    return {
        "model": models,
        "benchmark": [str(plain), str(led)],
        "benchmark_file": [f"plain={answering.write_rows(tmp_path / 'rows.jsonl', [*range(8)])}"],
        "output_dir": str(tmp_path / "out"),
        "cache_dir": str(tmp_path / "cache"),
        "device": "cpu",
    }


def test_models_on_benchmarks_give_files_and_a_table(
    tmp_path: Path, settings: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    result = evaluate_benchmarks(EvaluateConfig(**settings))
    (table,) = result.tables
    assert table.columns == ("plain", "led") and table.suite is None
    assert list(table.scores) == ["a-final", "b-final"]
    first, second = table.scores.values()
    assert [one.value for one in first] == [1.0, 1.0]
    assert [one.value for one in second] == [0.5, 1.0]
    assert second[0].interval == wilson_interval(4, 8) and first[0].difference is None
    pattern = np.array([n % 2 == 0 for n in range(8)])
    assert second[0].difference == paired_bootstrap(np.ones(8), pattern)
    assert second[0].difference[0] == -0.5 and second[1].difference == (0.0, 0.0, 0.0)

    lines = pq.read_table(tmp_path / "out/led/b-final/answers.parquet").to_pylist()
    assert [line["prompt"] for line in lines] == ["w30 w0", "w30 w2", "w30 w4", "w30 w6"]
    assert {(line["sample"], line["detail"]) for line in lines} == {(0, "")}
    metrics = json.loads((tmp_path / "out/plain/b-final/metrics.json").read_text())
    assert metrics["value"] == 0.5 and metrics["counts"] == {"right": 4, "wrong": 4}
    assert metrics["metric"] == "pass@1" and metrics["benchmark"]["name"] == "plain"
    assert metrics["benchmark"]["dataset"] == str(tmp_path / "rows.jsonl")

    numbers = json.loads((tmp_path / "out/results.json").read_text())
    assert numbers["models"] == dict(zip(("a-final", "b-final"), settings["model"], strict=True))
    assert numbers["measured"]["plain"]["b-final"]["value"] == 0.5
    page = (tmp_path / "out/results.md").read_text()
    assert "| b-final | 50.0 (21.5 to 78.5) | 100.0 (51.0 to 100.0) |" in page
    assert "Differences to a-final, points:" in page and "| b-final | -50.0 (" in page
    printed = capsys.readouterr().out
    assert "21.5 to 78.5" in printed and max(map(len, printed.splitlines()[:-1])) <= 80


def test_a_second_run_asks_nothing_and_writes_the_same(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    evaluate_benchmarks(EvaluateConfig(**settings))
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    before = {path: path.read_bytes() for path in files}
    assert len(before) == 2 + 2 * 4 + 1  # tables, two files a pair, the lock
    cached = (tmp_path / "cache/rows.sqlite").read_bytes()
    evaluate_benchmarks(EvaluateConfig(**settings))
    assert {path: path.read_bytes() for path in files} == before
    assert (tmp_path / "cache/rows.sqlite").read_bytes() == cached


DRAWN = {"samples": 4, "temperature": 3.0, "top_p": 0.9, "k": 2, "max_batch_tokens": 24}


def drawn(settings: dict[str, Any], root: Path, **others: Any) -> dict[str, Any]:
    places = {"output_dir": str(root / "out"), "cache_dir": str(root / "cache")}
    return {**settings, **DRAWN, **places, **others}


def answers(root: Path) -> dict[str, bytes]:
    found = (root / "out").rglob("answers.parquet")
    return {str(path.relative_to(root)): path.read_bytes() for path in found}


def test_drawn_answers_are_several_and_the_same_again(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    result = evaluate_benchmarks(EvaluateConfig(**drawn(settings, tmp_path / "one")))
    assert result.tables[0].columns == ("plain pass@2", "led pass@2")
    path = tmp_path / "one/out/plain/a-final/answers.parquet"
    lines = pq.read_table(path).to_pylist()
    assert [line["sample"] for line in lines] == [0, 1, 2, 3] * 8
    texts = [{line["answer"] for line in lines[at : at + 4]} for at in range(0, 32, 4)]
    assert max(map(len, texts)) > 1
    metrics = json.loads(path.with_name("metrics.json").read_text())
    right = [
        sum(line["verdict"] == "right" for line in lines[at : at + 4]) for at in range(0, 32, 4)
    ]
    chances = np.array([{0: 0.0, 1: 0.5, 2: 5 / 6}.get(count, 1.0) for count in right])
    assert metrics["value"] == pytest.approx(chances.mean())
    assert tuple(metrics["interval"]) == pytest.approx(bootstrap([chances])[1:])
    evaluate_benchmarks(EvaluateConfig(**drawn(settings, tmp_path / "two")))
    assert answers(tmp_path / "two") == answers(tmp_path / "one")
    evaluate_benchmarks(EvaluateConfig(**drawn(settings, tmp_path / "three", seed=1)))
    assert answers(tmp_path / "three") != answers(tmp_path / "one")


def test_killed_while_drawing_and_resumed_ends_with_the_same_bytes(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    evaluate_benchmarks(EvaluateConfig(**drawn(settings, tmp_path / "whole")))
    killed = drawn(settings, tmp_path / "killed")
    (tmp_path / "settings.json").write_text(json.dumps(killed))
    for batches in (2, 3):
        command = [sys.executable, answering.__file__, str(tmp_path / "settings.json")]
        done = subprocess.run([*command, str(batches)], capture_output=True)
        assert done.returncode == -signal.SIGKILL, done.stderr
    assert not answers(tmp_path / "killed")
    evaluate_benchmarks(EvaluateConfig(**killed))
    assert answers(tmp_path / "killed") == answers(tmp_path / "whole")


def test_an_answer_that_is_right_before_the_cut_is_right(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    rows = [{"prompt": "w39", "answer": "w39 w39"}, {"prompt": "w39", "answer": "w38"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    alone = {"model": settings["model"][0], "benchmark": (), "benchmark_file": ()}
    config = {**settings, **alone, "dataset": str(tmp_path / "rows.jsonl"), "grade": "exact"}
    result = evaluate(EvaluateConfig(**config, max_new_tokens=2))
    assert result.counts == {"right": 1, "cut_off": 1}


def test_several_models_on_a_dataset_are_a_table_too(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    rows = answering.write_rows(tmp_path / "my rows.jsonl", [1, 2])
    others = {"benchmark": (), "benchmark_file": (), "dataset": rows, "grade": "exact"}
    config = EvaluateConfig(**{**settings, **others})
    run(config)
    page = (tmp_path / "out/results.md").read_text()
    assert "| model | my-rows |" in page and "| b-final | 50.0 (" in page
    assert (tmp_path / "out/my-rows/a-final/metrics.json").is_file()
    with pytest.raises(ValueError, match="model: must be one, with a dataset"):
        evaluate(config)


def test_answers_fit_into_the_models_positions(
    tmp_path: Path, settings: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    long = (tmp_path / "plain.yaml").read_text().replace("4", "16384")
    (tmp_path / "plain.yaml").write_text(long)
    evaluate_benchmarks(EvaluateConfig(**{**settings, "model": settings["model"][0]}))
    metrics = json.loads((tmp_path / "out/plain/final/metrics.json").read_text())
    assert metrics["value"] == 1.0 and metrics["benchmark"]["max_new_tokens"] == 1792
    assert "at most 1792 tokens in place of 16384, for it has 2048 positions" in caplog.text


def test_another_number_of_problems_is_reported(
    tmp_path: Path, settings: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    with (tmp_path / "plain.yaml").open("a") as file:
        file.write("problems: 9\n")
    alone = {**settings, "model": settings["model"][0]}
    evaluate_benchmarks(EvaluateConfig(**alone))
    assert "plain has 9 problems, and " in caplog.text and "has 8" in caplog.text
    caplog.clear()
    evaluate_benchmarks(EvaluateConfig(**alone, max_rows=3))
    assert "9 problems" not in caplog.text


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        (
            {"benchmark_file": []},
            r"^benchmark plain: dataset: nowhere.*--benchmark_file plain=PATH",
        ),
        ({"grade": "code"}, r"^allow_code_execution: must be true .* give --allow_code_execution"),
        ({"model": ["nowhere", "nowhere"]}, "^model: must be different, got nowhere twice"),
        ({"samples": 2}, "^samples: must be 1 at temperature 0"),
        ({"k": 2}, "^k: must be at most the number of samples, 1, got 2"),
        ({"benchmark": ["gsm8", "led"]}, "^benchmark: must be one of .* did you mean gsm8k?"),
        ({"model": []}, "^model: must be given, got nothing; give --model"),
    ],
)
def test_a_wrong_setting_is_one_sentence_before_anything_is_loaded(
    tmp_path: Path, settings: dict[str, Any], wrong: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence):
        evaluate_benchmarks(EvaluateConfig(**{**settings, "model": ["nowhere"], **wrong}))
    assert not (tmp_path / "out").exists()


def test_files_of_others_are_left_alone(tmp_path: Path, settings: dict[str, Any]) -> None:
    for name in ("results.md", "results.json", "led/b-final/metrics.json"):
        path = tmp_path / "out" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("mine")
        with pytest.raises(ValueError, match="output_dir: must be new or of an earlier"):
            evaluate_benchmarks(EvaluateConfig(**settings))
        assert path.read_text() == "mine"
        path.unlink()


def test_an_input_is_never_an_output(tmp_path: Path, settings: dict[str, Any]) -> None:
    evaluate_benchmarks(EvaluateConfig(**settings))
    own = {"benchmark_file": [f"plain={tmp_path}/out/led/a-final/answers.parquet"]}
    with pytest.raises(ValueError, match="output_dir: must not be an input, but the dataset is"):
        evaluate_benchmarks(EvaluateConfig(**{**settings, **own}))


@pytest.mark.parametrize(
    ("models", "names"),
    [
        (["runs/a/student"], ["student"]),
        (["org/Model-1B", "runs/span/checkpoint-100"], ["Model-1B", "checkpoint-100"]),
        (["runs/a/final", "runs/b/final", "org/x"], ["a-final", "b-final", "x"]),
        (["x/a/c", "y/a/c", "c"], ["x-a-c", "y-a-c", "c"]),
        (["~nobody-here/a", "x" * 5000], ["a", None]),
        (["a b.gguf", "..", "a-b.gguf"], ["a-b.gguf", None, "a-b.gguf-3"]),
    ],
)
def test_names_of_models_are_short_and_different(models: list[str], names: list[Any]) -> None:
    found = short_names(models)
    assert [name if want else None for name, want in zip(found, names, strict=True)] == names
    assert len(set(found)) == len(found) and all(name.strip(".") for name in found)


def test_a_suite_has_an_average_with_an_interval_over_all_its_problems(tmp_path: Path) -> None:
    suite = tuple(Benchmark(name, "nothing") for name in ("one", "two"))
    scores = {
        ("a", "one"): np.array([1.0, 0, 0, 0]),
        ("a", "two"): np.array([1.0, 1]),
        ("b", "one"): np.array([1.0, 1, 0, 0]),
        ("b", "two"): np.array([1.0, 0.5]),
    }
    done = {
        pair: Measured(
            EvaluateResult(float(one.mean()), (0.0, 1.0), {}, tmp_path), one, {"rows": len(one)}
        )
        for pair, one in scores.items()
    }
    config = EvaluateConfig(model=["a", "b"])
    (table,) = write_results(tmp_path, [Group("both", suite)], ["a", "b"], done, config).tables
    assert table.columns == ("one", "two", "Avg.")
    average = table.scores["b"][2]
    assert table.scores["a"][2].value == 0.625 and average.value == 0.625
    assert average.difference is not None and average.difference[0] == pytest.approx(0.0)
    # The ends of the difference: at most -0.5 of `two`, at most +1 of `one`, half of each.
    assert -0.25 <= average.difference[1] < 0 < average.difference[2] <= 0.5
    assert average.interval[0] < 0.625 < average.interval[1]
    assert "## both" in (tmp_path / "results.md").read_text()
