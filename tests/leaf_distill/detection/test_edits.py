"""Stage 1 with other edits and labels than a cut with the row's completion, and stage 2 on them."""

from __future__ import annotations

import shutil
from collections import defaultdict
from pathlib import Path
from typing import Any

import detect_pair
import pytest
import torch
from detect_run import CONFOUNDED, ROWS, check_sums, reasons, run, table
from distill_pair import make_config
from transformers import AutoModelForCausalLM

from leaf_distill.data.collator import render_examples
from leaf_distill.data.dataset import load_examples
from leaf_distill.data.example import ROLES
from leaf_distill.data.prompt import Renderer
from leaf_distill.detection.pipeline import DetectResult
from leaf_distill.training.config import DistillArguments
from leaf_distill.training.distill import distill

NUMBERS = {*detect_pair.DIGITS, *detect_pair.NAMES}
LABELED = [{**row, "completion": f"{row['answer']} apples"} for row in ROWS]
"""Rows whose completion the teacher would not write."""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of the runs, which share the answers."""
    return tmp_path_factory.mktemp("edits")


@pytest.fixture(scope="module")
def substituted(pair: dict[str, str], root: Path) -> DetectResult:
    return run(pair, root, edit="substitute", draws=2, validate="teacher")


@pytest.fixture(scope="module")
def relabeled(pair: dict[str, str], root: Path) -> DetectResult:
    return run(pair, root, LABELED, relabel=True)


@pytest.fixture(scope="module")
def agreed(pair: dict[str, str], root: Path) -> DetectResult:
    """Random words are replaced, so that a changed prompt may have another answer."""
    options = {"edit": "substitute", "strategy": "random_spans", "validate": "teacher"}
    return run(pair, root, LABELED, relabel=True, guard="agreement", agreement=3, **options)


@pytest.fixture(scope="module")
def crossed(pair: dict[str, str], root: Path) -> DetectResult:
    return run(pair, root, cross_branch=True)


def made(result: DetectResult) -> list[dict[str, Any]]:
    return [line for line in table(result.dataset) if line["branch"] != "original"]


def text_of(line: dict[str, Any], name: str = "prompt") -> str:
    return str(line[name][-1]["content"])


def test_words_are_replaced_by_others_of_their_class(substituted: DetectResult) -> None:
    check_sums(substituted, len(ROWS))
    lines = table(substituted.arm / "candidates.parquet")
    by_span: dict[tuple[int, int], list[dict[str, Any]]] = defaultdict(list)
    for line in lines:
        before, (span,), (new,) = ROWS[line["row_id"]]["prompt"], line["spans"], line["inserted"]
        assert before[: span["start"]] + new + before[span["stop"] :] == text_of(line)
        old = before[span["start"] : span["stop"]]
        assert new != old and ((new in NUMBERS) == (old in NUMBERS))
        by_span[line["row_id"], span["start"]].append(line)
    assert made(substituted) and {len(group) for group in by_span.values()} == {2}
    for first, second in by_span.values():
        repeated = first["inserted"] == second["inserted"]
        assert (second["reason"] == "duplicate") == repeated


def test_the_same_seed_draws_the_same_words(pair: dict[str, str], root: Path) -> None:
    options = {"edit": "substitute", "draws": 2, "validate": "teacher"}
    inserted = []
    for seed in (0, 0, 1):
        result = run(pair, root, seed=seed, **options)
        lines = table(result.arm / "candidates.parquet")
        inserted.append([(line["row_id"], tuple(line["inserted"])) for line in lines])
    assert inserted[0] == inserted[1] != inserted[2]


def test_the_teachers_new_answer_is_the_label(relabeled: DetectResult) -> None:
    check_sums(relabeled, len(ROWS))
    assert len(made(relabeled)) >= 0.8 * sum(CONFOUNDED)
    for line in table(relabeled.dataset):
        answer = LABELED[line["row_id"]]["answer"]
        said = f"{answer} apples" if line["branch"] == "original" else answer
        assert text_of(line, "completion") == said and line["answer"] == answer
    for line in table(relabeled.arm / "candidates.parquet"):
        if line["accepted"]:
            assert line["student_verdict"] == line["teacher_verdict"] == "right"
            assert text_of(line, "completion") == line["teacher_answer"]


def test_a_new_answer_on_which_the_teacher_agrees_is_the_gold(agreed: DetectResult) -> None:
    check_sums(agreed, len(ROWS))
    changed = 0
    for line in made(agreed):
        (digit,) = set(text_of(line).split()) & set(detect_pair.DIGITS)
        assert text_of(line, "completion") == line["answer"] == digit
        changed += digit != LABELED[line["row_id"]]["answer"]
    assert changed, "no question got another answer"


def test_rows_on_which_the_teachers_draws_disagree_leave(
    pair: dict[str, str], tmp_path: Path
) -> None:
    unsure = str(shutil.copytree(pair["teacher"], tmp_path / "unsure"))
    model = AutoModelForCausalLM.from_pretrained(unsure)
    with torch.no_grad():
        model.lm_head.weight *= 0.02  # the same greedy answers, but nearly even chances
    model.save_pretrained(unsure)
    options = {"relabel": True, "validate": "teacher"}
    names = pair | {"teacher": unsure}
    trusted = run(names, tmp_path, **options)
    assert made(trusted)
    result = run(names, tmp_path, guard="agreement", **options)
    check_sums(result, len(ROWS))
    assert made(result) == []
    assert reasons(result, "candidates").keys() == {"teacher_disagrees"}
    details = {line["detail"] for line in table(result.outcomes) if line["candidate_id"] >= 0}
    assert details <= {f"{at} of 5 drawn answers agree with the greedy one" for at in (0, 1, 2)}


def test_the_student_of_a_crossed_row_reads_the_whole_prompt(
    crossed: DetectResult, finished: DetectResult
) -> None:
    lines = made(crossed)
    assert {line["branch"] for line in lines} == {"cross"}
    for line, cut in zip(lines, made(finished), strict=True):
        row = ROWS[line["row_id"]]
        assert text_of(line) == row["prompt"] and text_of(line, "completion") == row["completion"]
        assert line["teacher_prompt"] == cut["prompt"] and line["spans"] == cut["spans"]
        (span,) = line["spans"]
        assert text_of(line, "teacher_prompt") == (
            row["prompt"][: span["start"]] + row["prompt"][span["stop"] :]
        )
    assert all(line["teacher_prompt"] is None for line in table(finished.dataset))


def test_a_crossed_row_may_have_the_teachers_new_answer(pair: dict[str, str], root: Path) -> None:
    result = run(pair, root, LABELED, cross_branch=True, relabel=True)
    assert made(result)
    for line in made(result):
        assert text_of(line) == LABELED[line["row_id"]]["prompt"]
        assert text_of(line, "completion") == line["answer"]


def test_a_longer_prompt_must_fit_together_with_its_completion(
    pair: dict[str, str], tmp_path: Path
) -> None:
    length = 33  # of every row: 30 words, two marks of the template and the end token
    rows = [
        {**row, "completion": " ".join([row["answer"]] * (30 - len(row["prompt"].split())))}
        for row in ROWS
    ]
    options = {"select": "all", "validate": "none", "edit": "substitute", "widen": "clause"}
    result = run(pair, tmp_path, rows, max_length=length, **options)
    check_sums(result, len(ROWS))
    assert reasons(result, "candidates")["completion_too_long"] and made(result)
    kept = load_examples(result.dataset)
    renderer = Renderer(detect_pair.make_tokenizer())
    render_examples(
        kept,
        dict.fromkeys(ROLES, renderer),
        max_length=length,
        embedding_rows=dict.fromkeys(ROLES, len(detect_pair.WORDS)),
    )
    assert [one.outcome for one in kept] == [None] * len(kept)


@pytest.mark.parametrize("name", ["substituted", "relabeled", "agreed", "crossed"])
def test_stage_2_trains_on_each_dataset(
    name: str, pair: dict[str, str], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    result: DetectResult = request.getfixturevalue(name)
    for one, line in zip(load_examples(result.dataset), table(result.dataset), strict=True):
        student, teacher = (one.as_read_by(role).messages for role in ("student", "teacher"))
        assert list(student) == line["prompt"]
        assert list(teacher) == (line["teacher_prompt"] or line["prompt"])
        assert one.branch == line["branch"] and list(one.inserted) == line["inserted"]
    arguments = DistillArguments(**pair, dataset=str(result.arm))
    trained = distill(arguments, make_config(tmp_path / "student", max_steps=2))
    log = [line for line in trained.metrics["log"] if "loss" in line]
    assert len(log) == 2 and all(line["loss"] > 0 for line in log)
    assert all(line["cd_loss"] > 0 for line in log)
