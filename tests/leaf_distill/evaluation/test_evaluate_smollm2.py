"""A real model on the first problems of three benchmarks, from local copies of them."""

from __future__ import annotations

import re
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from real_data import data_file

from leaf_distill.evaluation.config import EvaluateConfig
from leaf_distill.evaluation.evaluate import evaluate_benchmarks

FILES = {
    "gsm8k": "gsm8k/test.jsonl",
    "humaneval+": "humanevalplus/HumanEvalPlus.jsonl.gz",
    "mbpp+": "mbppplus/MbppPlus.jsonl.gz",
}
ROWS = 20


@pytest.fixture
def files() -> list[str]:
    return [f"{name}={data_file(file)}" for name, file in FILES.items()]


@pytest.mark.slow
def test_smollm2_on_mathematics_and_code(
    tmp_path: Path, smollm2_path: str, files: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {
        "model": smollm2_path,
        "benchmark": list(FILES),
        "benchmark_file": files,
        "max_rows": ROWS,
        "max_new_tokens": 256,
        "max_batch_tokens": 8192,
        "allow_code_execution": True,
        "output_dir": str(tmp_path / "out"),
        "cache_dir": str(tmp_path / "cache"),
    }
    (table,) = evaluate_benchmarks(EvaluateConfig(**settings)).tables
    assert table.columns == tuple(FILES)
    for path in (tmp_path / "out").rglob("answers.parquet"):
        lines = pq.read_table(path).to_pylist()
        verdicts = [line["verdict"] for line in lines]
        assert len(lines) == ROWS and not {"not_finite", "too_long"} & set(verdicts)
        if path.parent.parent.name == "gsm8k":
            assert sum(bool(re.search(r"\d", line["answer"])) for line in lines) > ROWS / 2
            continue
        # It writes programs; one that fails says in which test, and how.
        assert sum("```python" in line["answer"] for line in lines) > ROWS / 2
        assert {"wrong", "error"} & set(verdicts)
        assert all(line["detail"] for line in lines if line["verdict"] in ("wrong", "error"))
    (scores,) = table.scores.values()
    with capsys.disabled():
        print()
        for name, score in zip(table.columns, scores, strict=True):
            low, high = score.interval
            print(f"SmolLM2-135M, {name}: {score.value:.0%} ({low:.0%} to {high:.0%})")
