"""`leaf distill --show N` prints the tokens and labels of the training, and trains nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from distill_pair import TEMPLATE, make_config, make_rows, make_student, make_teacher, make_trainer
from distill_pair import make_tokenizer as make_words

from leaf_distill.training.config import DistillArguments
from leaf_distill.training.distill import distill
from leaf_distill.training.show import shown


@pytest.fixture
def pair(tmp_path: Path) -> dict[str, str]:
    """A pair whose weights cannot be read, and whose teacher reads one more word."""
    for name, model in (("student", make_student()), ("teacher", make_teacher())):
        model.save_pretrained(tmp_path / name)
        (tmp_path / name / "model.safetensors").write_bytes(b"broken")
        make_words(TEMPLATE if name == "student" else f"w39 {TEMPLATE}").save_pretrained(
            tmp_path / name
        )
    return {"student": str(tmp_path / "student"), "teacher": str(tmp_path / "teacher")}


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def show(pair: dict[str, str], dataset: str, output: Path, count: int, **settings: Any) -> Any:
    arguments = DistillArguments(**pair, dataset=dataset, show=count)
    return distill(arguments, make_config(output, **settings))


def test_rows_are_shown_as_both_models_read_them(
    tmp_path: Path, pair: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    talk = [
        {"role": role, "content": text}
        for role, text in (("user", "w1 w2"), ("assistant", "w3"), ("user", "w4"))
    ]
    talk.append({"role": "assistant", "content": "w5 w6"})
    dataset = write(tmp_path / "rows.jsonl", [{"messages": talk}])
    output = tmp_path / "out"
    output.mkdir()
    (output / "config.json").write_text("theirs")  # nothing is written, so nothing is in the way
    show(pair, dataset, output, 3, train_on="all")
    assert [one.name for one in output.iterdir()] == ["config.json"]
    lines = capsys.readouterr().out.splitlines()
    assert all(len(line) <= 80 for line in lines)
    assert "row 0, original: 5 labels" in lines
    assert "the student reads 12 tokens" in lines and "the teacher reads 13 tokens" in lines
    table = lines[lines.index("the student reads 12 tokens") + 2 :][:2]
    left, right = zip(*(line.split(" \u2502", 1) for line in table), strict=True)
    tokens = [token for line in left for token in line.strip(" \u2502").split("\u2502")]
    prompt = "<user> w1 w2 <assistant> w3 <eos> <user> w4 <assistant>"
    assert " ".join(tokens) == f"{prompt} w5 w6 <eos>"
    marked = [token for line in right for token in line.strip(" \u2502").split("\u2502") if token]
    assert marked == ["w3", "<eos>", "w5", "w6", "<eos>"]


def test_the_order_is_that_of_the_training(
    tmp_path: Path, pair: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    rows = make_rows(8, 3)
    show(pair, write(tmp_path / "rows.jsonl", rows), tmp_path / "out", 5)
    assert not (tmp_path / "out").exists()
    heads = [line for line in capsys.readouterr().out.splitlines() if line.startswith("row ")]
    batches = make_trainer(tmp_path / "out", rows).get_train_dataloader().batch_sampler
    order = [at for batch in batches for at in batch]
    originals, others = [at for at in order if at < 8], [at for at in order if at >= 8]
    expected = [originals[0], others[0], originals[1], others[1], originals[2]]
    assert [int(head.split()[1].rstrip(",")) for head in heads] == expected
    assert ["counterfactual" in head for head in heads] == [False, True, False, True, False]


def test_tokens_are_readable(make_tokenizer: Any) -> None:
    tokenizer = make_tokenizer("bytes", "chatml")
    text = "<|im_start|>a b\n\u4e16 it's"
    pieces = shown(tokenizer(text)["input_ids"], tokenizer)
    assert pieces[0] == "<|im_start|>" and "\\n" in "".join(pieces) and "\n" not in "".join(pieces)
    assert not any("\ufffd" in piece for piece in pieces)
    spaced = make_tokenizer("metaspace", "chatml")
    assert "".join(shown(spaced("a bc", add_special_tokens=False)["input_ids"], spaced)) == " a bc"


def test_bad_rows_and_models_are_refused_as_in_a_training(
    tmp_path: Path, pair: dict[str, str]
) -> None:
    dataset = write(tmp_path / "rows.jsonl", make_rows(4, 0))
    with pytest.raises(ValueError, match=r"must have a row to train on, got 4 too_long"):
        show(pair, dataset, tmp_path / "out", 1, max_length=3)
    with pytest.raises(ValueError, match=r"^show: must be at least 0, got -1"):
        show(pair, dataset, tmp_path / "out", -1)


def test_a_conversation_with_several_replies_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    talk = [
        {"role": role, "content": f"w{i}"}
        for i, role in enumerate(["user", "assistant", "user", "assistant"])
    ]
    trainers = {
        train_on: make_trainer(tmp_path, [{"messages": talk}] * 8, train_on=train_on, max_steps=1)
        for train_on in ("last", "all")
    }
    said = "8 rows have earlier assistant turns, which are no labels; with train_on all they are"
    assert caplog.text.count(said) == 2  # of the training and of the evaluation rows
    labels = {name: one.train_dataset.label_tokens for name, one in trainers.items()}
    assert labels == {"last": 8 * 2, "all": 8 * 4}
    trainers["all"].train()
    assert trainers["all"].state.log_history[0]["loss"] > 0
