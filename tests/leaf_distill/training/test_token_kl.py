"""The KL of single tokens: that of both models' own logits, before and after, whatever happens."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from distill_pair import make_rows as tiny_rows
from distill_pair import render

from leaf_distill.data.example import Example
from leaf_distill.demo.run import STUDENT, TEACHER
from leaf_distill.demo.task import make_problems
from leaf_distill.models.loading import load_model
from leaf_distill.models.tokenizer import load_tokenizer
from leaf_distill.training.cache import cache_teacher
from leaf_distill.training.config import CacheConfig, DistillArguments, LeafConfig
from leaf_distill.training.distill import distill
from leaf_distill.training.token_kl import CUTS, FILE, ROWS, choose
from leaf_distill.training.trainer import LeafTrainer

STEPS = 4


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> str:
    """20 problems of the demo, some with counterfactuals, as `leaf detect` writes them."""
    rows = []
    for row_id, one in enumerate(make_problems(20, seed=5, mix={"misaligned": 1.0})):
        line = {
            "row_id": row_id,
            "candidate_id": -1,
            "branch": "original",
            "prompt": [{"role": "user", "content": one.prompt}],
            "completion": [{"role": "assistant", "content": one.completion}],
        }
        rows.append(line)
        if row_id % 5 == 4:
            shorter = [{"role": "user", "content": one.prompt.partition(" . ")[2]}]
            rows.append({**line, "candidate_id": 0, "branch": "counterfactual", "prompt": shorter})
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def settings(output: Path, **changes: Any) -> LeafConfig:
    defaults = {
        "use_cpu": True,
        "originals_per_step": 8,
        "per_device_train_batch_size": 8,
        "learning_rate": 2e-3,
        "warmup_steps": 0,
        "max_steps": STEPS,
        "logging_steps": 1,
        "save_steps": 1,
        "disable_tqdm": True,
    }
    return LeafConfig(output_dir=str(output), **{**defaults, **changes})


def run(dataset: str, output: Path, **changes: Any) -> list[dict[str, Any]]:
    arguments = {"student": STUDENT, "teacher": TEACHER, "dataset": dataset}
    arguments |= {name: changes.pop(name) for name in ("teacher_cache",) if name in changes}
    distill(DistillArguments(**arguments), settings(output, **changes))
    return lines(output)


def lines(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / FILE).read_text().split("\n") if line]


def own_kl(student: str, prompt: str, completion: str, temperature: float) -> list[float]:
    """KL(teacher, student) of each label from the models' own logits, in float64."""
    tokenizer = load_tokenizer(STUDENT)
    start = tokenizer(f"<user> {prompt} <assistant> ")["input_ids"]
    ids = torch.tensor([[*start, *tokenizer(completion)["input_ids"], tokenizer.eos_token_id]])
    logs = []
    for name in (TEACHER, student):
        with torch.no_grad():
            logits = load_model(name)(input_ids=ids).logits[0, len(start) - 1 : -1].double()
        logs.append((logits / temperature).log_softmax(-1))
    theirs, ours = logs
    each: list[float] = (theirs.exp() * (theirs - ours)).sum(-1).tolist()
    return each


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_it_is_the_kl_of_the_logits_before_and_after(
    dataset: str, tmp_path: Path, temperature: float
) -> None:
    found = run(dataset, tmp_path / "out", temperature=temperature, divergence="reverse_kl")
    rows = {
        (row["row_id"], row["candidate_id"]): row
        for row in map(json.loads, Path(dataset).read_text().splitlines())
    }
    assert len(found) == ROWS
    for line in found[:3]:
        row = rows[line["row_id"], line["candidate_id"]]
        text = (row["prompt"][0]["content"], row["completion"][0]["content"], temperature)
        for name, student in (("kl_before", STUDENT), ("kl_after", str(tmp_path / "out"))):
            assert line[name] == pytest.approx(own_kl(student, *text), rel=2e-3, abs=2e-5), name
        assert line["branch"] == row["branch"] and line["temperature"] == temperature
        assert line["completion"] == text[1] + "<end>"
        spelled = "".join(line["completion"][start:stop] for start, stop in line["tokens"])
        assert spelled == line["completion"]
    before, after = (sum(sum(line[name]) for line in found) for name in ("kl_before", "kl_after"))
    assert after < before


def test_a_run_that_was_stopped_has_the_numbers_of_its_start(
    dataset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(dataset, tmp_path / "whole")
    killed = tmp_path / "killed"
    plain, count = LeafTrainer.training_step, iter(range(2))

    def deadly(self: LeafTrainer, *words: Any, **options: Any) -> Any:
        if next(count, None) is None:
            raise KeyboardInterrupt
        return plain(self, *words, **options)

    with monkeypatch.context() as patched:
        patched.setattr(LeafTrainer, "training_step", deadly)
        with pytest.raises(KeyboardInterrupt):
            run(dataset, killed)
    begun = lines(killed)
    assert all(line["kl_before"] and line["kl_after"] is None for line in begun)
    run(dataset, killed)
    assert (killed / FILE).read_bytes() == (tmp_path / "whole" / FILE).read_bytes()
    # Killed between the last checkpoint and the end: the student is read back, not trained.
    for name in ("metrics.json", "model.safetensors"):
        (killed / name).unlink()
    (killed / FILE).write_text("".join(json.dumps(line) + "\n" for line in begun))
    assert run(dataset, killed) == lines(tmp_path / "whole")
    # More steps: from the old start to the new end.
    longer = run(dataset, killed, max_steps=STEPS + 1)
    assert [line["kl_before"] for line in longer] == [line["kl_before"] for line in begun]
    assert longer != lines(tmp_path / "whole")


def test_a_run_that_began_without_it_says_so(
    dataset: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    output = tmp_path / "out"
    run(dataset, output)
    (output / FILE).unlink()
    with pytest.raises(FileNotFoundError), caplog.at_level(logging.WARNING):
        run(dataset, output, max_steps=STEPS + 1)
    assert [m for m in caplog.messages if FILE in m] == [
        f"no {FILE}, with the KL of single tokens: the training began without it"
    ]


def test_a_stored_teacher_gives_it_and_labels_alone_give_none(dataset: str, tmp_path: Path) -> None:
    live = run(dataset, tmp_path / "live")
    for signal, more in (("hidden", {}), ("topk", {"student": STUDENT, "top_k": 5})):
        stored = str(tmp_path / signal / "teacher")
        made = {"teacher": TEACHER, "dataset": dataset, "output_dir": stored, "device": "cpu"}
        cache_teacher(CacheConfig(**made, signal=signal, **more))  # type: ignore[arg-type]
        found = run(dataset, tmp_path / signal / "out", teacher_cache=stored)
        for ours, theirs in zip(found, live, strict=True):
            pairs = list(zip(ours["kl_before"], theirs["kl_before"], strict=True))
            assert (ours["stored"], theirs["stored"]) == (signal, None)
            # A coarser partition has a KL that is at most as large.
            assert all(one <= two + 1e-5 for one, two in pairs)
            assert signal == "topk" or all(one == pytest.approx(two) for one, two in pairs)
    with pytest.raises(FileNotFoundError):
        run(dataset, tmp_path / "labels", ce_weight=1.0)


def test_line_separators_of_unicode_split_no_line(dataset: str, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in Path(dataset).read_text().splitlines()]
    for row, mark in zip(rows, "\u2028\u2029\x85", strict=False):
        row["completion"][0]["content"] = f"a{mark}b"
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = run(str(path), tmp_path / "out")
    shown = "".join(line["completion"] for line in found)
    assert all(line["kl_before"] and line["kl_after"] for line in found)
    assert sum(shown.count(f"a{mark}b") for mark in "\u2028\u2029\x85") > 0


def test_rows_with_counterfactuals_come_first_and_with_them() -> None:
    def named(rows: list[Example]) -> list[tuple[int, int]]:
        return [(one.row_id, one.candidate_id) for one in rows]

    originals = tiny_rows(8, 0)
    cuts = [
        {**originals[row_id], "branch": "counterfactual", "candidate_id": at}
        for row_id, at in ((5, 0), (2, 0), (2, 1), (2, 2))
    ]
    examples = render([*originals, *cuts])
    assert CUTS == 2
    expected = [(2, -1), (2, 0), (2, 1), (5, -1), (5, 0), (0, -1), (1, -1)]
    assert named(choose(examples, 7)) == expected
    assert named(choose(examples, 2)) == expected[:2]
    assert len(choose(examples)) == 8 + 3
    assert named(choose(render(originals), 3)) == [(0, -1), (1, -1), (2, -1)]
