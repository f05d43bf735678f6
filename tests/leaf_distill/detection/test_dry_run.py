"""`dry_run` says what a run takes, before it is started."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import detect_pair
import pytest
from detect_run import ROWS, run, settings
from transformers import LlamaConfig, LlamaForCausalLM


def test_an_estimate_loads_no_weights_and_writes_nothing(
    pair: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("leaf_distill.models.loading.load_model", None)
    result = run(pair, tmp_path, dry_run=True)
    found = result.funnel["estimate"]
    assert [found["models"][role]["answers"] for role in pair] == [len(ROWS)] * 2
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]
    assert "24 of 24 rows are usable" in capsys.readouterr().out
    assert found["seconds"]["answers"] <= found["seconds"]["answers_at_most"]


def test_what_the_cache_has_is_not_estimated(pair: dict[str, str], tmp_path: Path) -> None:
    options = {"select": "all", "validate": "none"}
    before = run(pair, tmp_path, dry_run=True, **options).funnel["estimate"]
    run(pair, tmp_path, max_rows=10, **options)
    part = run(pair, tmp_path, dry_run=True, **options).funnel["estimate"]
    run(pair, tmp_path, **options)
    after = run(pair, tmp_path, dry_run=True, **options).funnel["estimate"]
    scores = [one["models"]["student"]["scores"] for one in (before, part, after)]
    assert scores == [len(ROWS), len(ROWS) - 10, 0]
    assert after["seconds"] == {"saliency": 0.0, "answers": 0.0, "answers_at_most": 0.0}


def test_no_response_that_can_be_divided_is_nothing_to_score(
    pair: dict[str, str], tmp_path: Path
) -> None:
    found = run(pair, tmp_path, dry_run=True, level="response").funnel["estimate"]
    assert [found["models"][role]["scores"] for role in pair] == [0, 0]
    assert found["seconds"]["saliency"] == 0 and found["models"]["student"]["answers"] == len(ROWS)
    done = run(pair, tmp_path, level="response")
    assert {line["reason"] for line in done.funnel["left"]} >= {"response_not_divided"}


def test_answers_that_rows_bring_along_cost_nothing(pair: dict[str, str], tmp_path: Path) -> None:
    rows = [{**row, "student_answer": "1"} for row in ROWS[:5]] + ROWS[5:]
    models = run(pair, tmp_path, rows, dry_run=True).funnel["estimate"]["models"]
    assert models["student"]["answers"] == len(ROWS) - 5
    assert models["teacher"]["answers"] == len(ROWS)


def test_no_second_of_a_run_is_counted_twice(pair: dict[str, str], tmp_path: Path) -> None:
    start = time.monotonic()
    seconds = run(pair, tmp_path).funnel["seconds"]
    assert seconds["validate"] > 0 and sum(seconds.values()) <= time.monotonic() - start


@pytest.mark.slow
def test_the_memory_of_a_real_run_is_within_a_quarter_of_its_estimate(tmp_path: Path) -> None:
    config = LlamaConfig(
        **{"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 24},
        **{"num_attention_heads": 8, "vocab_size": 4096, "eos_token_id": 1},
    )
    network, tokenizer = LlamaForCausalLM(config), detect_pair.make_tokenizer()
    pair = {}
    for role in ("teacher", "student"):
        pair[role] = str(tmp_path / role)
        network.save_pretrained(pair[role])
        tokenizer.save_pretrained(pair[role])
    long = [{**row, "prompt": " ".join([row["prompt"]] * 12)} for row in ROWS[:8]]
    options = {"select": "all", "validate": "none", "max_batch_tokens": 512}
    peaks = {}
    for dry in (True, False):
        file = tmp_path / f"{dry}.json"
        file.write_text(json.dumps(settings(pair, tmp_path, long, dry_run=dry, **options)))
        process = subprocess.Popen([sys.executable, detect_pair.__file__, str(file)])
        _, status, usage = os.wait4(process.pid, 0)
        assert status == 0
        peaks[dry] = usage.ru_maxrss * 1024
    estimate = run(pair, tmp_path, long, dry_run=True, cache_dir=str(tmp_path / "empty"), **options)
    # This process holds more libraries than the run's; the estimate counts what is there.
    found = estimate.funnel["estimate"]
    above = max(one["memory"] for one in found["models"].values())
    assert (peaks[True] + above) / peaks[False] == pytest.approx(1, abs=0.25)
