"""The pages of files and of metrics name each column and key that a real run writes."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from leaf_distill import DetectConfig, EvaluateConfig, LeafConfig, detect, distill, evaluate
from leaf_distill.demo.run import ASSETS
from leaf_distill.demo.task import make_problems
from leaf_distill.training.config import DistillArguments

DOCS = Path(__file__).parents[2] / "docs" / "reference"
PAIR = {role: str(ASSETS / role) for role in ("student", "teacher")}


def section(page: str, heading: str) -> set[str]:
    """Return the names in a section of a page that are set as code."""
    text = (DOCS / page).read_text()
    level, _, _ = heading.partition(" ")
    (found,) = re.findall(
        rf"^{re.escape(heading)}\n(.*?)(?=^#{{1,{len(level)}}} |\Z)", text, re.DOTALL | re.MULTILINE
    )
    return set(re.findall(r"`(\w+)`", found))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A directory with a run of detection, a training with evaluations, and an evaluation."""
    root = tmp_path_factory.mktemp("pages")
    problems = make_problems(24, seed=1, mix={"clean": 0.2, "misaligned": 0.8})
    rows = [{**problem.as_row(), "source": "demo"} for problem in problems]
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LEAF_CACHE_DIR", str(root / "cache"))
        patch.chdir(root)
        answers: dict[str, Any] = {"grade": "number", "max_new_tokens": 32}
        found = detect(DetectConfig(**PAIR, dataset="rows.jsonl", output_dir="run", **answers))
        config = LeafConfig(
            output_dir="student",
            max_steps=4,
            originals_per_step=8,
            logging_steps=2,
            kd_weight="0.9:0.5",
            eval_strategy="steps",
            eval_steps=2,
            eval_answers=4,
            include_num_input_tokens_seen="non_padding",
            **answers,
        )
        distill(
            DistillArguments(**PAIR, dataset=str(found.arm), eval_dataset=str(found.arm)), config
        )
        evaluate(
            EvaluateConfig(model="student", dataset="rows.jsonl", output_dir="answers", **answers)
        )
    yield root


def test_each_metric_of_a_training_is_on_the_page(run: Path) -> None:
    (state,) = run.glob("student/checkpoint-4/trainer_state.json")
    saved = json.loads(state.read_text())["log_history"]
    metrics = json.loads((run / "student" / "metrics.json").read_text())
    logged = {name for log in [*saved, *metrics["log"]] for name in log}
    logged |= {*metrics["train"], *metrics["eval"]}
    training, evaluation = (
        section("metrics.md", f"## {heading}")
        for heading in ("In training", "In an evaluation of the training")
    )
    assert {name for name in logged if not name.startswith("eval_")} <= training
    assert {name for name in logged if name.startswith("eval_")} <= evaluation
    assert {"eval_cd_loss", "kd_weight", "train_tokens_per_second"} <= logged


def test_each_key_of_a_training_is_on_the_page(run: Path) -> None:
    metrics = json.loads((run / "student" / "metrics.json").read_text())
    named = section("files.md", "## `leaf distill`")
    assert {*metrics} <= named
    assert {*metrics["rows"]} <= named


def test_each_column_of_detection_is_on_the_page(run: Path) -> None:
    arm = run / "run" / "arms" / "span"
    for name in ("samples", "outcomes"):
        schema = pq.read_schema(arm / f"{name}.parquet")
        assert {*schema.names} <= section("files.md", f"### {name}.parquet")
    funnel = json.loads((arm / "funnel.json").read_text())
    named = section("files.md", "### funnel.json")
    assert {*funnel} <= named
    assert {key for line in funnel["sources"] for key in line} <= named


def test_each_column_of_an_evaluation_is_on_the_page(run: Path) -> None:
    named = section("files.md", "## `leaf evaluate`")
    assert {*pq.read_schema(run / "answers" / "answers.parquet").names} <= named
    metrics = json.loads((run / "answers" / "metrics.json").read_text())
    assert {*metrics} - {"answers", "command"} <= named
