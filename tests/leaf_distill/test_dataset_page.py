"""The guides about data and other trainers run on the embedded pair; the columns are as written."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest

from leaf_distill.cli import main
from leaf_distill.data.dataset import load_examples
from leaf_distill.data.example import ROLES
from leaf_distill.demo.run import ASSETS
from leaf_distill.demo.task import make_problems

DOCS = Path(__file__).parents[2] / "docs"
DATA = (DOCS / "guides" / "data.md").read_text()
TRAINERS = (DOCS / "guides" / "other-trainers.md").read_text()
PAGE = (DOCS / "reference" / "dataset.md").read_text()
COLUMNS = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \|", PAGE, flags=re.MULTILINE)


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page, flags=re.DOTALL)


def commands() -> list[list[str]]:
    """The words of the page's commands, without `leaf`."""
    (text,) = blocks(DATA, "sh")
    lines = [shlex.split(line) for line in text.replace("\\\n", " ").splitlines()]
    assert all(line[0] == "leaf" for line in lines)
    return [line[1:] for line in lines]


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with the models and the rows of the guide."""
    for role in ("student", "teacher"):
        shutil.copytree(ASSETS / role, tmp_path / role)
    problems = make_problems(24, seed=1, mix={"clean": 0.2, "misaligned": 0.8})
    rows = [
        {"id": i, "text": one.prompt, "solution": one.completion, "result": one.answer}
        for i, one in enumerate(problems)
    ]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_stage_1_alone_on_rows_of_ones_own(mine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in commands():
        assert main(words) == 0, capsys.readouterr().err
    capsys.readouterr()
    names: dict[str, Any] = {}
    exec(blocks(DATA, "python")[0], names)
    printed = capsys.readouterr().out.splitlines()
    rows, originals = names["rows"], names["originals"]
    cuts = [row for row in rows if row["branch"] != "original"]
    assert len(originals) == 24 and len(printed) == len(cuts) > 0
    for row, line in zip(cuts, printed, strict=True):
        number, *texts = line.split(" | ")
        (span,), (text,) = row["spans"], texts
        before = originals[int(number)]["prompt"][span["message"]]["content"]
        after = row["prompt"][span["message"]]["content"]
        assert before[span["start"] : span["stop"]] == text
        assert before[: span["start"]] + before[span["stop"] :] == after


def test_the_page_describes_the_columns_that_are_written(mine: Path) -> None:
    main(commands()[0])
    (arm,) = (mine / "runs/mine/arms").iterdir()
    listed = [name for names in COLUMNS for name in re.findall(r"\w+", names)]
    optional = {"tools", "chat_template_kwargs", "tests", "source", "difficulty"}
    answers = {f"{role}_{what}" for role in ROLES for what in ("answer", "verdict")}
    assert all(f"`{name}`" in PAGE for name in answers)
    for name, more in (("dataset", set()), ("candidates", answers)):
        lines = [json.loads(line) for line in (arm / f"{name}.jsonl").read_text().splitlines()]
        assert {*listed} - optional | more == {*lines[0]} == {*lines[-1]}
        assert {line["branch"] for line in lines} - {"original"} == {"counterfactual"}
        assert any(line["branch"] == "original" for line in lines) is (name == "dataset")


def test_stage_2_takes_all_candidates_and_leaves_out_the_rejected(mine: Path) -> None:
    main(commands()[0])
    (arm,) = (mine / "runs/mine/arms").iterdir()
    dataset, candidates = (
        (arm / f"{name}.jsonl").read_text() for name in ("dataset", "candidates")
    )
    originals = [line for line in dataset.splitlines() if '"branch": "original"' in line]
    (mine / "both.jsonl").write_text("\n".join(originals) + "\n" + candidates)
    examples = load_examples("both.jsonl")
    kept = [[e.row_id, e.candidate_id, e.messages, e.cut] for e in examples if e.outcome is None]
    whole = [[e.row_id, e.candidate_id, e.messages, e.cut] for e in load_examples(arm)]
    assert sorted(kept, key=repr) == sorted(whole, key=repr)
    assert {e.outcome.reason for e in examples if e.outcome} == {"not_accepted"}


def test_the_rows_become_messages_for_other_trainers(mine: Path) -> None:
    row = {"prompt": [{"role": "user", "content": "Hi"}], "branch": "original", "context": 0}
    row["completion"] = [{"role": "assistant", "content": "Ho"}]
    lines = [row, {**row, "branch": "cross"}, {**row, "branch": "counterfactual", "context": 1}]
    (mine / "dataset.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (code,) = (block for block in blocks(TRAINERS, "python") if "messages.jsonl" in block)
    exec(code, {})
    (line,) = (mine / "messages.jsonl").read_text().splitlines()
    assert json.loads(line) == {"messages": [*row["prompt"], *row["completion"]]}


def test_the_settings_of_other_trainers_are_well_formed() -> None:
    import yaml

    (axolotl,) = blocks(TRAINERS, "yaml")
    (rows,) = yaml.safe_load(axolotl)["datasets"]
    (factory,) = blocks(TRAINERS, "json")
    assert rows["path"] == json.loads(factory)["leaf"]["file_name"] == "messages.jsonl"
