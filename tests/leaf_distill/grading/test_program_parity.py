"""Our verdicts on programs are evalplus's, on right programs and on mutants of them."""

from __future__ import annotations

import gzip
import json
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import harness
import pytest
from mutants import mutants
from real_data import data_file

from leaf_distill.data.dataset import load_examples
from leaf_distill.grading.code import CodeGrader

pytestmark = pytest.mark.slow

FILES = {
    "humaneval": "humanevalplus/HumanEvalPlus.jsonl.gz",
    "mbpp": "mbppplus/MbppPlus.jsonl.gz",
    "leetcode": "leetcode/LeetCodeDataset-v0.3.1-test.jsonl.gz",
}
TRIES = 8
UNCOUNTED = "find_zero"
"""Evalplus 0.3.1 leaves the loop for this function before it counts a test: nothing ever passes."""


class Case(NamedTuple):
    """A program, evalplus's verdict on it, and whether it is the dataset's own."""

    problem: dict[str, Any]
    program: str
    passes: bool
    canonical: bool


def problems_of(dataset: str) -> list[dict[str, Any]]:
    with gzip.open(data_file(FILES[dataset]), "rt") as lines:
        return [json.loads(line) for line in lines]


def evalplus(dataset: str, programs: list[tuple[str, str]], folder: Path) -> list[bool]:
    """Return whether programs, each with its task, pass evalplus's base and plus tests."""
    rows = [{"dataset": dataset, "task_id": task, "program": text} for task, text in programs]
    file = harness.write_lines(folder / "programs.jsonl", rows)
    paths = {
        "HUMANEVAL_OVERRIDE_PATH": str(data_file(FILES["humaneval"])),
        "MBPP_OVERRIDE_PATH": str(data_file(FILES["mbpp"])),
    }
    printed = harness.run(
        Path(__file__).with_name("evalplus_verdicts.py"), file, cwd=folder, **paths
    )
    return [one["base"] == one["plus"] == "pass" for one in harness.read_lines(printed)]


@pytest.fixture(scope="module", params=["humaneval", "mbpp"])
def judged(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Every right program and its mutants up to the first that evalplus refuses, in cases."""
    dataset, folder = request.param, tmp_path_factory.mktemp("evalplus")
    problems = problems_of(dataset)
    right = [one["prompt"] + one["canonical_solution"] for one in problems]
    tried = [list(islice(mutants(text, seed=0), TRIES)) for text in right]
    cases: list[Case] = []
    alive = range(len(problems))
    for round_ in range(TRIES):
        alive = [at for at in alive if round_ < len(tried[at])]
        batch = [(at, tried[at][round_]) for at in alive]
        if not round_:
            batch += enumerate(right)
        named = [(problems[at]["task_id"], text) for at, text in batch]
        passing = evalplus(dataset, named, folder)
        cases += [
            Case(problems[at], text, passes, text == right[at])
            for (at, text), passes in zip(batch, passing, strict=True)
        ]
        alive = [at for at, passes in zip(alive, passing, strict=False) if passes]
        if not alive:
            break
    return dataset, problems, cases


@cache
def tests_of(dataset: str) -> list[Any]:
    path = str(data_file(FILES[dataset]))
    return [example.tests for example in load_examples(path, need_completion=False)]


def graded(dataset: str, answers: list[tuple[int, str]]) -> list[str]:
    """Return our verdicts on programs, each with the number of its row."""
    tests = tests_of(dataset)
    with CodeGrader(timeout_s=5.0, workers=2) as grader:
        fenced = [(tests[at], f"```python\n{text}\n```") for at, text in answers]
        return [one.verdict for one in grader.grade(fenced)]


def test_every_right_program_passes_evalplus_and_has_a_mutant_that_does_not(judged: Any) -> None:
    _, problems, cases = judged
    refused = [one.problem["entry_point"] for one in cases if one.canonical and not one.passes]
    assert set(refused) <= {UNCOUNTED}
    killed = {one.problem["task_id"] for one in cases if not one.canonical and not one.passes}
    assert len(killed) >= 0.95 * len(problems)


def test_programs_are_right_where_evalplus_says_so(judged: Any) -> None:
    dataset, problems, cases = judged
    rows = {problem["task_id"]: row for row, problem in enumerate(problems)}
    verdicts = graded(dataset, [(rows[one.problem["task_id"]], one.program) for one in cases])
    pairs = list(zip(cases, verdicts, strict=True))
    assert [
        (one.problem["task_id"], one.passes, verdict, one.program)
        for one, verdict in pairs
        if (verdict == "right") != one.passes and one.problem["entry_point"] != UNCOUNTED
    ] == []
    own = [verdict for one, verdict in pairs if one.canonical]
    assert own == ["right"] * len(problems)


def test_leetcodes_solutions_are_right_and_mutants_of_them_are_not() -> None:
    problems = problems_of("leetcode")
    own = graded("leetcode", [(at, one["completion"]) for at, one in enumerate(problems)])
    assert own == ["right"] * len(problems) and len(own) == 228
    tried = [list(islice(mutants(one["completion"], seed=0), TRIES)) for one in problems]
    alive, unseen = list(range(len(problems))), 0
    for round_ in range(TRIES):
        batch = [(at, tried[at][round_]) for at in alive if round_ < len(tried[at])]
        verdicts = graded("leetcode", batch)
        alive = [at for (at, _), one in zip(batch, verdicts, strict=True) if one == "right"]
        unseen += sum(round_ + 1 == len(tried[at]) for at in alive)
    assert unseen <= 0.05 * len(problems)
