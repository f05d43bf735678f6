"""The benchmarks by name, and those of one's own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import pytest

from leaf_distill.config import GradeRule
from leaf_distill.evaluation.benchmarks import (
    BENCHMARKS,
    PLACE,
    SUITES,
    Benchmark,
    find_benchmarks,
    read_benchmark,
)
from leaf_distill.evaluation.config import EvaluateConfig
from leaf_distill.evaluation.problems import load_problems


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_benchmark_is_complete(name: str) -> None:
    benchmark = BENCHMARKS[name]
    assert benchmark.name == name and "/" in benchmark.dataset
    assert benchmark.grade in get_args(GradeRule) and benchmark.problems
    assert benchmark.prompt.count(PLACE) == 1
    if benchmark.grade == "math":
        assert "\\boxed{}" in benchmark.prompt and benchmark.max_new_tokens == 16384
    else:
        assert benchmark.max_new_tokens == 1024


def test_the_papers_table_has_six_columns_and_one_that_is_drawn() -> None:
    names = [name for suite in SUITES.values() for name in suite]
    assert len(names) == 6 and set(names) <= set(BENCHMARKS)
    metrics = {name: BENCHMARKS[name].metric for name in names}
    assert metrics.pop("livecodebench") == "pass@10"
    assert set(metrics.values()) == {"pass@1"}


def test_the_template_is_put_around_the_text_once() -> None:
    gsm8k = BENCHMARKS["gsm8k"]
    asked = gsm8k.asked("What is {prompt} \\frac{1}{2}?\n")
    assert asked.startswith("What is {prompt} \\frac{1}{2}?\n\nPlease reason")
    assert gsm8k.asked(asked) == asked
    assert Benchmark("a", "b").asked("text\n") == "text\n"


def test_suites_and_names_are_tables_in_their_order() -> None:
    groups = find_benchmarks(["math500", "paper-math", "mbpp+"])
    names = [(group.suite, [one.name for one in group.benchmarks]) for group in groups]
    assert names == [(None, ["math500", "mbpp+"]), ("paper-math", [*SUITES["paper-math"]])]


@pytest.mark.parametrize(
    ("names", "files", "datasets"),
    [
        (["gsm8k"], ["a=b.jsonl"], ["a=b.jsonl"]),
        (["gsm8k"], ["gsm8k=b.jsonl"], ["b.jsonl"]),
        (["gsm8k", "math500"], ["math500=c=d.jsonl"], [BENCHMARKS["gsm8k"].dataset, "c=d.jsonl"]),
    ],
)
def test_files_take_the_place_of_a_dataset(
    names: list[str], files: list[str], datasets: list[str]
) -> None:
    (group,) = find_benchmarks(names, files)
    assert [one.dataset for one in group.benchmarks] == datasets


@pytest.mark.parametrize(
    ("names", "files", "sentence"),
    [
        (["gsm8k", "gsm8k"], [], "benchmark: must be different, got gsm8k twice"),
        (["paper-math", "gsm8k"], [], "benchmark: must be different, got gsm8k twice"),
        (["mat500"], [], "must be one of gsm8k, .* got 'mat500'; did you mean math500?"),
        (["paper-maths"], [], "did you mean paper-math?"),
        (["gsm8k", "math"], ["a.jsonl"], "benchmark_file: must be NAME=PATH .* got 'a.jsonl'"),
        (["gsm8k", "math"], ["mth=a"], "with a name of gsm8k, math, got 'mth=a'"),
        (["gsm8k"], ["a", "b"], "benchmark_file: must be one for gsm8k"),
        (["nowhere.yaml"], [], "benchmark nowhere.yaml: must be a readable YAML file"),
    ],
)
def test_wrong_names_are_one_sentence(names: list[str], files: list[str], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        find_benchmarks(names, files)


def test_ones_own_benchmark_is_a_yaml_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        "dataset: rows.jsonl\nprompt: 'Q: {prompt}'\nstop: [END]\nsamples: 4\n"
        "temperature: 0.5\nk: 2\ncolumns: {prompt: q}\ngrade:\n"
    )
    mine = read_benchmark(path)
    assert (mine.name, mine.stop, mine.k, mine.columns) == ("mine", ("END",), 2, {"prompt": "q"})
    assert mine.grade == "math" and mine.metric == "pass@2"
    assert find_benchmarks([str(path)])[0].benchmarks == (mine,)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("dataset: a\npromt: b", "'promt' is not a field of a benchmark; did you mean prompt?"),
        ("prompt: '{prompt}'", "dataset: must be given, got nothing"),
        ("dataset: a\nprompt: Solve", r"prompt: must be a text with \{prompt\} in it, got 'Solve'"),
        ("dataset: a\nprompt: {prompt}", "prompt: must be a text, got {'prompt': None}"),
        ("dataset: 3", "dataset: must be a text, got 3"),
        ("dataset: a\ngrade: maths", "grade: must be one of math, number, exact, code"),
        ("dataset: a\nsamples: 2", "samples: must be 1 at temperature 0"),
        ("dataset: a\nk: 2", "k: must be at most the number of samples, 1, got 2"),
        ("dataset: a\nk: 1.0", "k: must be a whole number, got 1.0"),
        ("dataset: a\nmax_new_tokens: 0", "max_new_tokens: must be at least 1, got 0"),
        ("dataset: a\ntemperature: hot", "temperature: must be from 0 to 100, got 'hot'"),
        ("dataset: a\ntop_p: 0", "top_p: must be above 0, got 0"),
        ("dataset: a\nstop: end", "stop: must be a list of texts, got 'end'"),
        ("dataset: a\nstop: ['']", "stop: must be a list of texts"),
        ("dataset: a\ncolumns: [q]", "columns: must be a mapping of texts to texts"),
        ("dataset: a\ncolumns: q", "columns: must be a mapping of texts to texts"),
        ("dataset: a\nname: ../a", "name: must be letters, digits"),
        ("- dataset", "must hold `field: value` lines"),
        ("dataset: [", "must be a readable YAML file"),
    ],
)
def test_a_wrong_field_is_one_sentence(tmp_path: Path, text: str, sentence: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=sentence) as caught:
        read_benchmark(path)
    assert str(caught.value).startswith(f"benchmark {path}: ")


ROWS: dict[str, tuple[dict[str, Any], str, str]] = {
    "gsm8k": ({"question": "Q", "answer": "2 + 2 = 4\n#### 4"}, "Q", "4"),
    "math": ({"problem": "Q", "level": "1", "solution": "\\boxed{4}"}, "Q", "\\boxed{4}"),
    "math500": ({"problem": "Q", "solution": "So $4$.", "answer": "4"}, "Q", "4"),
    "olympiadbench": (
        {"id": 1, "question": "Q", "solution": ["One.", "Two."], "final_answer": ["4"]},
        "Q",
        "4",
    ),
}


@pytest.mark.parametrize("name", ROWS)
def test_rows_of_the_mathematical_benchmarks_are_read(tmp_path: Path, name: str) -> None:
    row, prompt, gold = ROWS[name]
    path = tmp_path / "test.jsonl"
    path.write_text(json.dumps(row) + "\n")
    ((_, (benchmark,)),) = find_benchmarks([name], [str(path)])
    problems = load_problems(benchmark, EvaluateConfig(benchmark=name, max_rows=1))
    assert problems.unreadable == 0
    (example,) = problems.rows
    assert example.text.startswith(f"{prompt}\n\nPlease reason step by step")
    assert example.gold == gold
