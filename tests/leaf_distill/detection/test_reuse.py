"""Models are asked for what the row cache lacks, and for nothing else; also after a kill."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import detect_pair
import pytest
import torch
from detect_run import CONFOUNDED, ROWS, check_sums, reasons, run, settings, table
from rank_threads import on_each
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from leaf_distill.detection import answers, scores
from leaf_distill.detection.config import DetectConfig
from leaf_distill.detection.pipeline import DetectResult, detect
from leaf_distill.models import loading, saliency
from leaf_distill.ranks import current


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Callable[[], dict[str, int]]:
    """A function that returns how many rows each kind of pass has taken since the last call."""
    count: Counter[str] = Counter()

    def watch(module: Any, name: str, rows_at: int) -> None:
        original = getattr(module, name)

        def watched(*args: Any, **options: Any) -> Any:
            count[name] += len(args[rows_at])
            return original(*args, **options)

        monkeypatch.setattr(module, name, watched)

    watch(answers, "generate", 2)
    watch(scores, "saliency", 1)
    watch(scores, "token_nll", 1)

    def since() -> dict[str, int]:
        found = dict(count)
        count.clear()
        return found

    return since


def content(root: Path) -> dict[str, bytes]:
    """The files of all arms, without the seconds in funnel.json."""
    files = (path for path in (root / "run/arms").glob("*/*") if path.name != "funnel.json")
    return {str(path.relative_to(root)): path.read_bytes() for path in files}


NEW_CUTS = {"threshold": 0.6}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"seed": 1},  # the strategy draws nothing
        {"grade_timeout": 6.0},
        {"grade": "number"},
        {"max_batch_tokens": 99},
        {"max_length": 39},
        {"validate": "none", "threshold": 0.6},
        {"validate": "none", "rule": "quantile", "threshold": 0.3},
        {"validate": "none", "strategy": "collective", "threshold": 0.6},
        {"validate": "none", "strategy": "random_tokens"},
        {"validate": "none", "strategy": "random_spans"},
        {"validate": "none", "strategy": "student_saliency"},
    ],
    ids=str,
)
def test_other_settings_ask_for_nothing(
    pair: dict[str, str],
    copied: Path,
    asked: Callable[[], dict[str, int]],
    changes: dict[str, Any],
) -> None:
    before = content(copied)
    result = run(pair, copied, **changes)
    assert asked() == {}
    check_sums(result, len(ROWS))
    if result.arm.name != "span-threshold-0.15":
        assert before.items() <= content(copied).items()


def test_the_same_command_again_loads_no_model_and_writes_the_same(
    pair: dict[str, str], copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = content(copied)
    monkeypatch.setattr("leaf_distill.models.loading.load_model", None)
    run(pair, copied)
    assert content(copied) == before


def test_other_directories_and_paths_ask_for_nothing(
    pair: dict[str, str],
    finished: DetectResult,
    copied: Path,
    tmp_path: Path,
    asked: Callable[[], dict[str, int]],
) -> None:
    moved = {role: str(shutil.copytree(path, tmp_path / role)) for role, path in pair.items()}
    other = tmp_path / "renamed.jsonl"
    shutil.copy(copied / "rows.jsonl", other)
    result = run(moved, copied, output_dir=str(tmp_path / "elsewhere"))
    assert asked() == {}
    assert result.dataset.read_bytes() == finished.dataset.read_bytes()
    run(pair, copied, dataset=str(other))
    assert asked() == {}


def test_new_rows_are_asked_alone(
    pair: dict[str, str], tmp_path: Path, asked: Callable[[], dict[str, int]]
) -> None:
    rows = detect_pair.make_rows(61)
    old = table(run(pair, tmp_path, rows[:60]).dataset)
    before = asked()
    assert before["generate"] >= 60
    longer = run(pair, tmp_path, rows)
    found = asked()
    # The student, perhaps the teacher, and both on the row's cuts.
    cuts = sum(len(sample["candidates"]) for sample in table(longer.samples)[-1:])
    assert 1 <= found["generate"] <= 2 + 2 * cuts
    assert found.get("saliency", 0) <= 2
    assert [line for line in table(longer.dataset) if line["row_id"] < 60] == old


def test_max_rows_may_grow(
    pair: dict[str, str], tmp_path: Path, asked: Callable[[], dict[str, int]]
) -> None:
    run(pair, tmp_path, max_rows=12, validate="none")
    first = asked()
    run(pair, tmp_path, max_rows=20, validate="none")
    second = asked()
    run(pair, tmp_path / "at_once", max_rows=20, validate="none")
    whole = asked()
    assert {name: first[name] + second[name] for name in whole} == whole
    datasets = [path.read_bytes() for path in sorted(tmp_path.rglob("arms/*/dataset.parquet"))]
    assert len(datasets) == 2 and datasets[0] == datasets[1]


def test_a_changed_prompt_is_asked_alone(
    pair: dict[str, str], copied: Path, asked: Callable[[], dict[str, int]]
) -> None:
    rows = [dict(row) for row in ROWS]
    rows[3]["prompt"] = "rain is loud . " + rows[3]["prompt"]
    run(pair, copied, rows, validate="none")
    found = asked()
    assert 1 <= found["generate"] <= 2 and found.get("saliency", 0) <= 2


LABELLED = [{**row, "completion": f"{row['answer']} apples"} for row in ROWS]
MARKED = 2 * sum(CONFOUNDED)
ANSWERS = len(ROWS) + sum(CONFOUNDED)
EVERYTHING = {"generate": ANSWERS, "saliency": MARKED}


@pytest.mark.parametrize(
    ("changes", "new"),
    [
        ({"dtype": "float64"}, EVERYTHING),
        ({"system_prompt": "be brief ."}, None),
        ({"chat_template": "none"}, None),
        ({"max_new_tokens": 5}, {"generate": ANSWERS}),
        ({"rows": LABELLED}, {"saliency": MARKED}),
        ({"weights": "teacher"}, {"generate": sum(CONFOUNDED), "saliency": sum(CONFOUNDED)}),
        ({"strategy": "perplexity"}, {"token_nll": sum(CONFOUNDED)}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_results_that_depend_on_a_setting_are_computed_anew(
    pair: dict[str, str],
    copied: Path,
    asked: Callable[[], dict[str, int]],
    changes: dict[str, Any],
    new: dict[str, int] | None,
) -> None:
    changes = dict(changes)
    rows = changes.pop("rows", ROWS)
    if role := changes.pop("weights", None):
        pair = pair | {role: other_weights(pair[role], copied)}
    run(pair, copied, rows, validate="none", output_dir=str(copied / "other"), **changes)
    found = asked()
    assert found == new if new is not None else found["generate"] >= len(ROWS)


def other_weights(model: str, root: Path) -> str:
    """A copy of a model with another last norm."""
    other = str(shutil.copytree(model, root / "model"))
    network = AutoModelForCausalLM.from_pretrained(other)
    with torch.no_grad():
        network.model.norm.weight.mul_(1.0001)
    network.save_pretrained(other)
    return other


def test_a_second_student_asks_its_teacher_for_nothing(
    pair: dict[str, str],
    copied: Path,
    asked: Callable[[], dict[str, int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loaded: list[str] = []
    load = loading.load_model

    def recorded(name: str, **options: Any) -> Any:
        loaded.append(name)
        return load(name, **options)

    monkeypatch.setattr(loading, "load_model", recorded)
    second = pair | {"student": other_weights(pair["student"], copied)}
    run(second, copied, output_dir=str(copied / "other"), validate="teacher")
    # Its own answers and saliencies; those of the teacher, also on cut prompts, are there.
    assert asked() == {"generate": len(ROWS), "saliency": sum(CONFOUNDED)}
    assert set(loaded) == {second["student"]}


def test_another_seed_draws_other_random_cuts_into_another_arm(
    pair: dict[str, str], copied: Path
) -> None:
    results = [
        run(pair, copied, validate="none", strategy="random_spans", seed=seed) for seed in (0, 1)
    ]
    cuts = [[line["spans"] for line in table(result.dataset)] for result in results]
    assert cuts[0] != cuts[1]
    assert [result.arm.name for result in results] == [
        "random_spans-threshold-0.15-validate-none",
        "random_spans-threshold-0.15-validate-none-seed-1",
    ]


def test_other_gold_answers_are_graded_anew(
    pair: dict[str, str], copied: Path, asked: Callable[[], dict[str, int]]
) -> None:
    first = CONFOUNDED.index(True)
    (sample, *_) = table(copied / "run/arms/span-threshold-0.15/samples.parquet")
    rows = [dict(row) for row in ROWS]
    rows[first]["answer"] = sample["student_answer"]
    result = run(pair, copied, rows)
    assert asked() == {}
    assert reasons(result)["student_right"] == CONFOUNDED.count(False) + 1


@pytest.mark.parametrize(("function", "call"), [("generate", 2), ("generate", 9), ("saliency", 3)])
def test_interrupted_and_resumed_ends_with_the_same_bytes(
    pair: dict[str, str],
    finished: DetectResult,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    function: str,
    call: int,
) -> None:
    module = answers if function == "generate" else scores
    original, calls = getattr(module, function), 0

    def interrupted(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            raise KeyboardInterrupt
        return original(*args, **options)

    monkeypatch.setattr(module, function, interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(pair, tmp_path)
    monkeypatch.undo()
    assert not list(tmp_path.glob("run/arms/*/dataset.parquet"))
    run(pair, tmp_path)
    assert content(tmp_path) == content(finished.run_directory.parent)


def kill_at_random(pair: dict[str, str], root: Path, times: int) -> int:
    """Start the run again and again, killing each after some batches; return how many died."""
    file = root / "settings.json"
    root.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(settings(pair, root)))
    draw, killed = Random(0), 0
    for _ in range(times):
        command = [sys.executable, detect_pair.__file__, str(file), str(draw.randint(1, 3))]
        killed += subprocess.run(command, capture_output=True).returncode == -signal.SIGKILL
    return killed


@pytest.mark.parametrize("times", [3, pytest.param(25, marks=pytest.mark.slow)])
def test_killed_and_resumed_ends_with_the_same_bytes(
    pair: dict[str, str], finished: DetectResult, tmp_path: Path, times: int
) -> None:
    assert kill_at_random(pair, tmp_path, times) >= min(times, 3)
    run(pair, tmp_path)
    assert content(tmp_path) == content(finished.run_directory.parent)


def test_a_template_is_applied_once_a_row_and_model(
    pair: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls = PreTrainedTokenizerBase.apply_chat_template, []

    def counted(self: Any, *args: Any, **options: Any) -> Any:
        calls.append(self)
        return original(self, *args, **options)

    monkeypatch.setattr(PreTrainedTokenizerBase, "apply_chat_template", counted)
    rows = detect_pair.make_rows(60)
    result = run(pair, tmp_path, rows)
    prompts = len(rows) + sum(len(sample["candidates"]) for sample in table(result.samples))
    assert len(calls) <= 2 * prompts + 12  # with a few probes of each template


def test_a_run_that_lacks_memory_halves_its_batches_and_says_so(
    pair: dict[str, str],
    finished: DetectResult,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    passes = saliency._saliency

    def limited(model: Any, rows: Any) -> Any:
        torch.empty((1 << 50) if len(rows) > 2 else 1)  # the allocator's own error
        return passes(model, rows)

    monkeypatch.setattr(saliency, "_saliency", limited)
    result = run(pair, tmp_path)
    assert result.funnel["halved_batches"] >= 2 and finished.funnel["halved_batches"] == 0
    assert f"{result.funnel['halved_batches']} batches were too large" in capsys.readouterr().out
    assert result.dataset.read_bytes() == finished.dataset.read_bytes()


def test_the_halved_batches_of_all_processes_are_counted(
    pair: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    passes, begun = saliency._saliency, threading.Event()
    halved: list[int] = []

    def limited(model: Any, rows: Any) -> Any:
        if current().rank == 0:
            assert begun.wait(60)  # so that the second gets a batch
        elif len(rows) > 2:
            halved.append(len(rows))
            begun.set()
            torch.empty(1 << 50)  # the allocator's own error
        return passes(model, rows)

    monkeypatch.setattr(saliency, "_saliency", limited)
    config = DetectConfig(**settings(pair, tmp_path, select="all", validate="none"))
    # Loaded beforehand: transformers cannot do so in two threads.
    models = [{role: loading.load_model(path) for role, path in pair.items()} for _ in range(2)]

    def work(joined: Any) -> DetectResult:
        tokenizer = detect_pair.make_tokenizer()
        return detect(config, **models[joined.rank], processing_class=tokenizer)

    first, second = on_each(2, work, monkeypatch)
    assert first.funnel["halved_batches"] == second.funnel["halved_batches"] == len(halved) > 0
    assert f"{len(halved)} batches were too large" in capsys.readouterr().out
