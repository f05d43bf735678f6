"""`dry_run` says what a run takes, before it is started."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import detect_pair
import pytest
from detect_run import ROWS, counts, reasons, run, settings
from transformers import LlamaConfig, LlamaForCausalLM

from leaf_distill.models import generation

LABELS = {"completion_source": "teacher", "select": "all", "validate": "none"}


def dry(capsys: pytest.CaptureFixture[str], *args: Any, **changes: Any) -> str:
    """Return what a dry run prints, in one line."""
    capsys.readouterr()
    run(*args, dry_run=True, **changes)
    return " ".join(capsys.readouterr().out.split())


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


def test_rows_that_leave_are_listed_with_their_reasons(
    pair: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    silent = {"role": "assistant", "content": "", "tool_calls": [call]}
    rows: list[dict[str, Any]] = [
        *ROWS[:4],
        {"prompt": "tom has 3 apples .", "completion": ""},
        {"prompt": "ann has 3 apples .", "completion": " "},
        {"prompt": "rain is loud . " * 12, "completion": "3"},
        {"messages": [{"role": "user", "content": ROWS[4]["prompt"]}, silent]},
    ]
    output = dry(capsys, pair, tmp_path, rows)
    assert "4 of 8 rows are usable" in output
    assert "left: 2 empty completion, 1 prompt too long, 1 no gold; row 4: the comp" in output
    assert "empty; where there is an answer, `leaf detect --completion_source" in output
    assert "; row 6: the prompt has " in output and "; row 7: neither an answer nor" in output
    assert "(rows are counted from 0, without blank lines)" in output
    assert output.count("left:") == 1
    done = run(pair, tmp_path, rows)
    assert counts(done)[:2] == [8, 4]
    assert [reasons(done)[name] for name in ("empty_completion", "prompt_too_long", "no_gold")] == [
        *(2, 1, 1)
    ]


@pytest.mark.parametrize(
    ("grade", "golds", "sentence"),
    [
        ("math", "rain is loud is the sticker", "3 of 8 golds are no mathematics"),
        ("number", "rain is loud is the sticker", "3 of 8 golds have no number and are compared"),
        ("number", "be", "as words: 3 word."),
        ("exact", "rain is loud is the sticker", None),
        ("math", "7", None),
    ],
)
def test_golds_that_are_no_numbers_are_counted(
    pair: dict[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    grade: str,
    golds: str,
    sentence: str | None,
) -> None:
    rows = [{**row, "answer": golds} for row in ROWS[:3]] + ROWS[3:8]
    output = dry(capsys, pair, tmp_path, rows, grade=grade)
    assert sentence in output if sentence else "golds" not in output
    assert ("A text is right only as a whole" in output) == (
        "sticker" in golds and grade != "exact"
    )
    assert "golds" not in dry(capsys, pair, tmp_path, rows, grade=grade, preset="release")


WORKED = [
    {
        **row,
        "completion": f"0 + {row['answer']} = {row['answer']} # {row['answer']}",
        "half": "two apples",
        "at": 100 + at,
    }
    for at, row in enumerate(ROWS)
]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"grade": "exact"},
            "right answers of the models may count as wrong too; that of row 0 ends ",
        ),
        ({"grade": "math"}, "see --grade (now math) and --columns."),
        ({"grade": "number"}, None),
        ({"grade": "number", "columns": '{"answer": "at"}'}, "24 of 24 completions are wrong by"),
        ({"grade": "number", "columns": '{"answer": "half"}', "max_rows": 2}, "2 of 2 completions"),
        ({"grade": "exact", "completion_source": "teacher"}, None),
        ({"grade": "exact", "preset": "release"}, None),  # which grades nothing
    ],
)
def test_completions_that_are_wrong_by_their_own_answer_are_told(
    pair: dict[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, Any],
    sentence: str | None,
) -> None:
    output = dry(capsys, pair, tmp_path, WORKED, **changes)
    assert sentence in output if sentence else "own answer" not in output


def test_wrong_completions_are_told_before_a_model_is_loaded(
    pair: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    sentence = "24 of 24 completions are wrong by their own answer"
    done = run(pair, tmp_path, WORKED, grade="exact")
    output = " ".join(capsys.readouterr().out.split())
    assert output.count(sentence) == 1 and output.index(sentence) < output.index("LeaF, stage 1")
    assert any(sentence in one for one in done.funnel["templates"])
    monkeypatch.setattr("leaf_distill.models.loading.load_model", None)
    with pytest.raises(TypeError):  # at the first model
        run(pair, tmp_path / "other", WORKED, grade="exact", cache_dir=str(tmp_path / "empty"))
    assert sentence in " ".join(capsys.readouterr().out.split())


def test_some_wrong_completions_are_no_wrong_column(
    pair: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for wrong in (12, 13):
        rows = [{**row, "answer": "11"} for row in ROWS[:wrong]] + ROWS[wrong:]
        told = f"{wrong} of 24 completions" in dry(capsys, pair, tmp_path, rows)
        assert told == (wrong > 12)


def test_the_same_model_twice_is_told(
    pair: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "same weights" not in dry(capsys, pair, tmp_path)
    twice = dict.fromkeys(pair, pair["student"])
    assert "the teacher have the same weights" in dry(capsys, twice, tmp_path)


def test_prompts_that_a_tokenizer_does_not_know_are_told(
    pair: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    strange = [{**row, "prompt": f"combien vaut {row['prompt']}"} for row in ROWS]
    assert "unknown" not in dry(capsys, pair, tmp_path, strange, max_length=39)
    strange = [{**row, "prompt": f"combien vaut tout cela {row['answer']} ?"} for row in ROWS[:6]]
    sentence = "83 % of the prompts' tokens are unknown to the student's and the teacher's tokenize"
    assert sentence in dry(capsys, pair, tmp_path, strange)
    run(pair, tmp_path, strange)
    assert sentence in " ".join(capsys.readouterr().out.split())


def test_prompts_with_little_room_are_costed_as_they_are_answered(
    pair: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    room = {"max_new_tokens": 25, "max_batch_tokens": 400, **LABELS}
    output = dry(capsys, pair, tmp_path, **room)
    told = re.search(r"teacher: (\d+) of 24 prompts have room for fewer than 25 new tokens", output)
    assert told and 0 < int(told[1]) < 24
    models = run(pair, tmp_path, dry_run=True, **room).funnel["estimate"]["models"]
    batches, original = [], generation._batch

    def counted(*args: Any, **options: Any) -> Any:
        batches.append(options["max_new_tokens"])
        return original(*args, **options)

    monkeypatch.setattr(generation, "_batch", counted)
    run(pair, tmp_path, **room)
    assert models["teacher"]["answer_passes"] == len(batches) > len(set(batches)) > 1
    assert models["student"]["answer_passes"] == 0


def test_little_room_is_logged_once_with_a_number_that_avoids_it(
    pair: dict[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run(pair, tmp_path, max_new_tokens=30)  # asked on rows, and on changed prompts
    said = [record.getMessage() for record in caplog.records if "have room" in record.getMessage()]
    assert [line.split(": ")[0] for line in said] == [pair["student"]]
    numbers = re.findall(r"--max_new_tokens (\d+) fits all", said[0])
    assert len(numbers) == 1
    caplog.clear()
    run(pair, tmp_path, max_new_tokens=int(numbers[0]))
    assert not caplog.records
    run(pair, tmp_path, max_new_tokens=int(numbers[0]) + 1)
    assert any("have room" in record.getMessage() for record in caplog.records)


def test_answers_that_rows_bring_along_cost_nothing(pair: dict[str, str], tmp_path: Path) -> None:
    rows = [{**row, "student_answer": "1"} for row in ROWS[:5]] + ROWS[5:]
    models = run(pair, tmp_path, rows, dry_run=True).funnel["estimate"]["models"]
    assert models["student"]["answers"] == len(ROWS) - 5
    assert models["teacher"]["answers"] == len(ROWS)


def test_no_second_of_a_run_is_counted_twice(pair: dict[str, str], tmp_path: Path) -> None:
    start = time.monotonic()
    seconds = run(pair, tmp_path).funnel["seconds"]
    assert seconds["validate"] > 0 and sum(seconds.values()) <= time.monotonic() - start


# A process begins with the peak of the one that starts it, which here is a small one.
MEASURED = """
import os, subprocess, sys
_, status, usage = os.wait4(subprocess.Popen(sys.argv[1:]).pid, 0)
print(usage.ru_maxrss)
sys.exit(status != 0)
"""


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
        command = [sys.executable, "-c", MEASURED, sys.executable, detect_pair.__file__, str(file)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        peaks[dry] = int(done.stdout.splitlines()[-1]) * 1024
    estimate = run(pair, tmp_path, long, dry_run=True, cache_dir=str(tmp_path / "empty"), **options)
    # This process holds more libraries than the run's; the estimate counts what is there.
    found = estimate.funnel["estimate"]
    above = max(one["memory"] for one in found["models"].values())
    assert (peaks[True] + above) / peaks[False] == pytest.approx(1, abs=0.25)
