"""Stage 1 on programs: a real pair on MBPP+, and tests that do not work."""

from __future__ import annotations

import copy
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from real_data import data_file

import leaf_distill
from leaf_distill import DetectConfig, detect
from leaf_distill.data.dataset import load_examples
from leaf_distill.grading.code import CodeGrader
from leaf_distill.models.loading import load_model
from leaf_distill.models.tokenizer import load_tokenizer
from leaf_distill.report import write_report

ROWS, LAYERS = 16, 24
VERDICTS = {"right", "wrong", "error", "timeout", "memory", "no_program", "refused", "cut_off"}


@pytest.fixture(scope="module")
def pair(smollm2_path: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """SmolLM2-135M-Instruct, and a student with 24 of its 30 layers."""
    folder = tmp_path_factory.mktemp("pair")
    tokenizer, teacher = load_tokenizer(smollm2_path), load_model(smollm2_path, device="cpu")
    config = copy.deepcopy(teacher.config)
    config.num_hidden_layers = LAYERS
    student = type(teacher)(config)
    last = len(teacher.model.layers) - 1
    kept = [round(at * last / (LAYERS - 1)) for at in range(LAYERS)]
    student.model.embed_tokens.load_state_dict(teacher.model.embed_tokens.state_dict())
    student.model.norm.load_state_dict(teacher.model.norm.state_dict())
    student.lm_head.load_state_dict(teacher.lm_head.state_dict())
    for layer, at in zip(student.model.layers, kept, strict=True):
        layer.load_state_dict(teacher.model.layers[at].state_dict())
    for name, model in (("teacher", teacher), ("student", student)):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return {name: str(folder / name) for name in ("teacher", "student")}


@pytest.mark.slow
def test_a_real_pair_on_programs(
    tmp_path: Path, pair: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    settings: dict[str, Any] = {
        **pair,
        "dataset": str(data_file("mbppplus/MbppPlus.jsonl.gz")),
        "max_rows": ROWS,
        "max_new_tokens": 96,
        "grade": "code",
        "allow_code_execution": True,
        "output_dir": str(tmp_path / "run"),
        "cache_dir": str(tmp_path / "cache"),
    }
    marked = detect(DetectConfig(**settings))
    outcomes = pq.read_table(marked.outcomes).to_pylist()
    assert len({one["row_id"] for one in outcomes}) == ROWS
    reasons = Counter(one["reason"] for one in outcomes if one["candidate_id"] < 0)
    allowed = {f"{role}_{verdict}" for role in pair for verdict in VERDICTS}
    assert set(reasons) <= allowed | {"no_span", "no_valid_cut", "no_usable_cut", "kept"}

    # Few rows are solved by such a teacher; every row is searched to see cuts validated.
    all_rows = detect(
        DetectConfig(**settings, select="all", validate="teacher", strategy="collective")
    )
    samples = pq.read_table(all_rows.samples).to_pylist()
    asked = [cut for row in samples for cut in row["candidates"] if cut["teacher_verdict"]]
    assert asked and {cut["teacher_verdict"] for cut in asked} <= VERDICTS
    kept = load_examples(str(all_rows.dataset))
    assert len([one for one in kept if one.branch == "original"]) == ROWS
    assert all(one.tests is not None for one in kept)
    with CodeGrader() as grader:  # the labels are right programs, also after a round trip
        judged = grader.grade([(one.tests, one.completion) for one in kept if one.tests])
    assert {one.verdict for one in judged} == {"right"}
    page = write_report(all_rows.arm).read_text()
    assert "MbppPlus" in page and "def similar_elements" in page
    with capsys.disabled():
        print("\n16 rows of MBPP+:", dict(reasons))
        print("cut prompts:", dict(Counter(cut["teacher_verdict"] for cut in asked)))


def test_a_row_whose_tests_do_not_work_leaves_before_a_model_is_asked(tmp_path: Path) -> None:
    rows = [
        {"prompt": "Add.", "completion": "x", "tests": ["assert add(1 =="]},
        {"prompt": "Add.", "completion": "x"},
        {
            "prompt": "Add.",
            "completion": "x",
            "tests": ["assert add(1, 2) == 3"],
            "canonical_solution": "def add(a, b):\n    return 0",
        },
        {"prompt": "Add.", "completion": "x", "tests": ["assert add(1, 2) == 3"]},
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assets = Path(leaf_distill.__file__).parent / "demo" / "assets"
    run = detect(
        DetectConfig(
            student=str(assets / "student"),
            teacher=str(assets / "teacher"),
            dataset=str(file),
            grade="code",
            allow_code_execution=True,
            max_new_tokens=8,
            output_dir=str(tmp_path / "run"),
            cache_dir=str(tmp_path / "cache"),
        )
    )
    outcomes = pq.read_table(run.outcomes).to_pylist()
    assert [one["reason"] for one in outcomes[:3]] == ["bad_tests", "no_tests", "bad_tests"]
    assert "it returned 0" in outcomes[2]["detail"]
    assert outcomes[3]["stage"] in ("predict", "mark")
    left = {entry["reason"]: entry["count"] for entry in run.funnel["left"]}
    assert left["bad_tests"] == 2 and left["no_tests"] == 1
