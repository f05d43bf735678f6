"""Stage 1 from rows to the dataset, with a real pair whose student is really confounded."""

from __future__ import annotations

import gc
import json
import shutil
import weakref
from pathlib import Path
from typing import Any

import detect_pair
import pytest
import torch
from datasets import Dataset
from detect_run import CONFOUNDED, ROWS, check_sums, counts, reasons, run, settings, table
from transformers import AutoModelForCausalLM, AutoTokenizer

from leaf_distill.cli import main
from leaf_distill.data.dataset import load_examples
from leaf_distill.data.example import Example
from leaf_distill.detection.config import DetectConfig
from leaf_distill.detection.output import write_dataset
from leaf_distill.detection.pipeline import DetectResult, detect
from leaf_distill.models import loading


def test_finds_cuts_and_validates(finished: DetectResult) -> None:
    marked = sum(CONFOUNDED)
    assert 10 < marked < len(ROWS)
    assert counts(finished)[:6] == [len(ROWS), len(ROWS), len(ROWS), marked, marked, marked]
    assert reasons(finished)["student_right"] == len(ROWS) - marked
    check_sums(finished, len(ROWS))
    lines = table(finished.dataset)
    cuts = [line for line in lines if line["branch"] == "counterfactual"]
    assert len(cuts) >= 0.8 * marked
    for line in cuts:
        before, after = ROWS[line["row_id"]]["prompt"], line["prompt"][-1]["content"]
        (span,) = line["spans"]
        assert span["message"] == 0 and line["parent_id"] == line["row_id"]
        assert before[: span["start"]] + before[span["stop"] :] == after
        assert before[span["start"] : span["stop"]].split()[0] in detect_pair.NAMES
        assert line["strategy"] == "span" and line["accepted"] and line["score"] <= 0.15
        assert json.loads(line["provenance"])["threshold"] == 0.15
    for line in lines:
        row = ROWS[line["row_id"]]
        assert line["completion"] == [{"role": "assistant", "content": row["completion"]}]
        assert line["answer"] == row["answer"]
        failed = line["branch"] == "original" and CONFOUNDED[line["row_id"]]
        assert line["student_verdict"] == ("wrong" if failed else "right")
        if line["branch"] == "original":
            assert line["prompt"] == [{"role": "user", "content": row["prompt"]}]
            assert line["candidate_id"] == -1 and line["spans"] == [] and line["strategy"] is None
    with (finished.arm / "dataset.jsonl").open() as file:
        assert [json.loads(line) for line in file] == lines


def test_samples_hold_what_was_seen(finished: DetectResult) -> None:
    samples = table(finished.samples)
    assert [sample["row_id"] for sample in samples] == [
        row_id for row_id, confounded in enumerate(CONFOUNDED) if confounded
    ]
    for sample in samples:
        text = sample["text"]
        assert text == ROWS[sample["row_id"]]["prompt"] == sample["messages"][-1]["content"]
        assert "".join(text[start:stop] for start, stop in sample["offsets"]) == text
        for name in ("teacher_saliency", "student_saliency", "score"):
            assert len(sample[name]) == len(sample["offsets"])
            assert min(sample[name]) == 0.0 and max(sample[name]) == 1.0
        lowest = sample["offsets"][sample["score"].index(0.0)]
        assert any(start <= lowest[0] and lowest[1] <= stop for start, stop in sample["spans"])
        assert (sample["teacher_verdict"], sample["student_verdict"]) == ("right", "wrong")
        assert sample["teacher_answer"] == sample["answer"] != sample["student_answer"]
        for candidate in sample["candidates"]:
            right = candidate["teacher_verdict"] == candidate["student_verdict"] == "right"
            assert candidate["kept"] == right == (candidate["reason"] is None)


def test_every_reason_adds_up(pair: dict[str, str], tmp_path: Path) -> None:
    long = " ".join(["rain is loud ."] * 9)
    rows: list[dict[str, Any]] = [
        *({**row, "answer": None} for row in ROWS[:8]),  # the completion is the gold answer then
        {"prompt": "tom has 3 apples .", "completion": "", "answer": "3"},
        {"prompt": long + " tom has 3 apples .", "completion": "3", "answer": "3"},
        {"prompt": "tom has 3 apples .", "completion": long, "answer": "3"},
        {"prompt": "tom has 3 apples . the sticker says 4 nine .", "completion": "8"},
        {"prompt": [{"role": "nobody", "content": "tom has 3 apples ."}], "completion": "3"},
    ]
    result = run(pair, tmp_path, rows)
    check_sums(result, len(rows))
    found = reasons(result)
    assert found["empty_completion"] == found["no_user_turn"] == 1
    assert found["prompt_too_long"] == found["completion_too_long"] == 1
    assert found["teacher_wrong"] == 1
    assert found["student_right"] == 8 - sum(CONFOUNDED[:8])
    details = {line["reason"]: line["detail"] for line in table(result.outcomes)}
    assert f"of the {detect_pair.POSITIONS} tokens" in details["prompt_too_long"]
    assert {line["row_id"] for line in table(result.dataset)} == {*range(8), 11}


def test_answers_cut_off_by_the_length_limit(pair: dict[str, str], tmp_path: Path) -> None:
    result = run(pair, tmp_path, max_new_tokens=1)
    assert reasons(result) == {"student_cut_off": len(ROWS)}
    check_sums(result, len(ROWS))
    assert table(result.samples) == []


def test_never_two_models_in_memory(
    pair: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load, alive, order = loading.load_model, [], []

    def watched(name: str, **options: Any) -> Any:
        gc.collect()
        assert all(reference() is None for reference in alive)
        model = load(name, **options)
        alive.append(weakref.ref(model))
        order.append(Path(name).name)
        return model

    monkeypatch.setattr(loading, "load_model", watched)
    run(pair, tmp_path, ROWS[:6])
    assert order == ["student", "teacher", "student", "teacher"]


def test_select_all_asks_nobody(pair: dict[str, str], tmp_path: Path) -> None:
    result = run(pair, tmp_path, select="all", validate="none")
    check_sums(result, len(ROWS))
    assert str(result.arm) in repr(result) and "stages" not in repr(result)
    samples = table(result.samples)
    assert len(samples) == len(ROWS)
    assert all(sample["student_verdict"] is None for sample in samples)
    assert all(c["kept"] and c["teacher_answer"] is None for s in samples for c in s["candidates"])


def test_validation_by_the_teacher_keeps_more(
    pair: dict[str, str], copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = {"threshold": 0.6}
    both = run(pair, copied, **changes)
    check_sums(both, len(ROWS))
    capsys.readouterr()
    teacher = run(pair, copied, validate="teacher", **changes)
    assert "replaces" not in capsys.readouterr().out
    names = sorted(path.name for path in (copied / "run/arms").iterdir())
    assert names == [
        "span-threshold-0.15",
        "span-threshold-0.6",
        "span-threshold-0.6-validate-teacher",
    ]
    check_sums(teacher, len(ROWS))
    assert counts(both)[-1] < counts(teacher)[-1]
    assert "student_wrong" not in reasons(teacher, "candidates")
    assert "student_wrong" in reasons(both, "candidates")


def test_the_teachers_answers_as_labels(pair: dict[str, str], tmp_path: Path) -> None:
    rows = [{**row, "completion": "9 apples"} for row in ROWS]
    result = run(pair, tmp_path, rows, completion_source="teacher")
    check_sums(result, len(rows))
    for line in table(result.dataset):
        assert line["completion"][0]["content"] == ROWS[line["row_id"]]["answer"]
    assert counts(result)[-1] > 0


def test_nan_in_a_models_output_takes_its_rows_only(pair: dict[str, str], tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(pair["teacher"], broken)
    model = AutoModelForCausalLM.from_pretrained(broken)
    with torch.no_grad():
        model.get_input_embeddings().weight[detect_pair.WORDS.index("loud")] = torch.nan
    model.save_pretrained(broken)
    loud = ["loud" in row["prompt"] for row in ROWS]
    names = pair | {"teacher": str(broken)}
    asked = run(names, tmp_path / "asked")
    both = sum(a and b for a, b in zip(loud, CONFOUNDED, strict=True))
    assert 0 < both == reasons(asked)["teacher_not_finite"] < sum(CONFOUNDED)
    unasked = run(names, tmp_path / "unasked", select="all", validate="none")
    assert reasons(unasked)["teacher_not_finite"] == sum(loud)
    for result in (asked, unasked):
        check_sums(result, len(ROWS))
        assert counts(result)[1] == len(ROWS)  # all of them stay originals


def test_templates_may_differ_and_are_reported(
    pair: dict[str, str], finished: DetectResult, tmp_path: Path
) -> None:
    other = tmp_path / "student"
    shutil.copytree(pair["student"], other)
    template = "<system> be brief . " + detect_pair.TEMPLATE
    (other / "chat_template.jinja").write_text(template)
    result = run(pair | {"student": str(other)}, tmp_path, select="all", validate="none")
    assert finished.funnel["templates"] == []
    assert any("be brief" in sentence for sentence in result.funnel["templates"])
    check_sums(result, len(ROWS))
    assert len(table(result.samples)) == len(ROWS)


def test_a_teacher_may_have_another_tokenizer(
    pair: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "student"
    shutil.copytree(pair["student"], other)
    path = other / "tokenizer.json"
    path.write_text(path.read_text().replace('"tom"', '"tim"'))
    result = run(pair | {"student": str(other)}, tmp_path, select="all", validate="none")
    assert "have different tokenizers" in capsys.readouterr().out
    assert counts(result)[1] == len(ROWS)


def test_the_last_line_says_where_the_results_are(
    pair: dict[str, str], copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = run(pair, copied)
    output = capsys.readouterr().out
    assert str(result.dataset) in output.replace("\n", "")
    assert "student right" in output and "kept counterfactuals" in output
    assert all(name in output for name in ("dataset.jsonl", "candidates", "samples", "funnel"))


def test_the_command_names_the_report_as_the_next_step(
    pair: dict[str, str], copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [f"--{name}={value}" for name, value in settings(pair, copied).items()]
    assert main(["detect", *words]) == 0
    arm, lines = copied / "run/arms/span-threshold-0.15", capsys.readouterr().out.splitlines()
    assert f"  leaf report --run_dir {arm}" in lines
    train = (
        f"  leaf distill --student {pair['student']} --teacher {pair['teacher']} --dataset {arm}"
    )
    assert lines[-1].startswith(f"{train} --output_dir {copied / 'run/student'}")
    assert main(["detect", *words, "--dry_run"]) == 0
    assert "leaf report" not in capsys.readouterr().out


def test_rows_leave_with_their_last_candidate(pair: dict[str, str], copied: Path) -> None:
    # So much is cut that some rows lose what the answer needs.
    result = run(pair, copied, select="all", threshold=0.9)
    check_sums(result, len(ROWS))
    assert reasons(result)["no_valid_cut"] > 0
    everything = {"threshold": 1.0, "strategy": "collective", "validate": "none"}
    result = run(pair, copied, select="all", **everything)
    check_sums(result, len(ROWS))
    assert reasons(result) == {"no_usable_cut": len(ROWS)}
    assert reasons(result, "candidates") == {"empty_after_cut": len(ROWS)}


def test_no_usable_row_is_an_error_with_its_reasons(pair: dict[str, str], tmp_path: Path) -> None:
    rows = [*ROWS[:2], {**ROWS[2], "completion": ""}]
    with pytest.raises(
        ValueError,
        match=r"got 3 rows that are not \(2 prompt_too_long, 1 empty_completion\); row 0: the",
    ):
        run(pair, tmp_path, rows, max_length=5)
    assert not (tmp_path / "run/arms").exists() and not (tmp_path / "run/run.json").exists()
    columns = {"prompt": "prompt", "completion": "answer"}
    assert counts(run(pair, tmp_path, rows, columns=columns))[1] == 3


def test_no_usable_row_leaves_a_finished_arm_alone(pair: dict[str, str], copied: Path) -> None:
    before = {path: path.read_bytes() for path in copied.rglob("arms/*/*")}
    with pytest.raises(ValueError, match="must have a usable row"):
        run(pair, copied, max_length=5)
    assert {path: path.read_bytes() for path in copied.rglob("arms/*/*")} == before


def test_a_teacher_without_an_answer_has_answered(pair: dict[str, str], tmp_path: Path) -> None:
    mute = str(shutil.copytree(pair["teacher"], tmp_path / "mute"))
    model = AutoModelForCausalLM.from_pretrained(mute)
    digits = [detect_pair.WORDS.index(word) for word in detect_pair.DIGITS]
    model.generation_config.eos_token_id = [1, *digits]  # its first word is the end
    model.save_pretrained(mute)
    result = run(pair | {"teacher": mute}, tmp_path)
    check_sums(result, len(ROWS))
    assert reasons(result)["teacher_no_answer"] == sum(CONFOUNDED)
    assert {entry["stage"] for entry in result.funnel["left"]} == {"mark"}
    assert counts(result)[2] == len(ROWS)  # answered


def test_plain_text_does_without_a_template_that_fails(
    pair: dict[str, str], tmp_path: Path
) -> None:
    names = {role: str(shutil.copytree(path, tmp_path / role)) for role, path in pair.items()}
    for path in names.values():
        (Path(path) / "chat_template.jinja").write_text("{{ raise_exception('never') }}")
    result = run(names, tmp_path, select="all", chat_template="none")
    check_sums(result, len(ROWS))


def test_models_tokenizers_and_rows_in_memory(
    pair: dict[str, str], finished: DetectResult, tmp_path: Path
) -> None:
    models = {role: AutoModelForCausalLM.from_pretrained(path) for role, path in pair.items()}
    config = DetectConfig(
        output_dir=str(tmp_path / "run"),
        cache_dir=str(tmp_path / "cache"),
        grade="exact",
        max_new_tokens=4,
        max_batch_tokens=150,
        threshold=0.15,
    )
    tokenizer = detect_pair.make_tokenizer()
    for rows in (Dataset.from_list(ROWS), ROWS):
        result = detect(config, dataset=rows, **models, processing_class=tokenizer)
        lines = (table(one.dataset) for one in (result, finished))
        # The provenance has the fingerprints of weights in memory, which those of files are not.
        here, there = ([{**line, "provenance": None} for line in part] for part in lines)
        assert here == there
    assert all(parameter.requires_grad for parameter in models["student"].parameters())
    with pytest.raises(ValueError, match="teacher: must be given"):
        detect(config, dataset=ROWS, student=models["student"], processing_class=tokenizer)


def test_a_row_with_a_token_that_the_embedding_lacks_leaves(
    pair: dict[str, str], tmp_path: Path
) -> None:
    grown = {role: Path(shutil.copytree(pair[role], tmp_path / role)) for role in pair}
    for path in grown.values():
        tokenizer = AutoTokenizer.from_pretrained(path)
        rows = json.loads((path / "config.json").read_text())["vocab_size"]
        missing = rows - len(tokenizer) + 1
        tokenizer.add_tokens([f"<extra{at}>" for at in range(missing)])
        tokenizer.save_pretrained(path)
    last = f"<extra{missing - 1}>"
    rows_in = [ROWS[0], {**ROWS[1], "prompt": f"{ROWS[1]['prompt']} {last}"}]
    names = {role: str(path) for role, path in grown.items()}
    result = run(names, tmp_path, rows_in, select="all", validate="none")
    assert reasons(result)["outside_vocabulary"] == 1
    assert last in table(result.outcomes)[-1]["detail"]


def test_the_dataset_of_a_run_is_searched_for_its_originals_alone(
    pair: dict[str, str], finished: DetectResult, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    again = run(pair, tmp_path, dataset=str(finished.dataset))
    assert again.dataset.read_bytes() == finished.dataset.read_bytes()
    assert "counterfactuals of an earlier run were left out" in capsys.readouterr().out
    cuts = [line for line in table(finished.dataset) if line["branch"] == "counterfactual"]
    path = detect_pair.write_rows(tmp_path / "cuts.jsonl", cuts)
    with pytest.raises(ValueError, match="dataset: must have originals, got"):
        run(pair, tmp_path, dataset=path)


def test_rows_of_two_runs_keep_their_own_golds(pair: dict[str, str], tmp_path: Path) -> None:
    runs = [run(pair, tmp_path / name, ROWS[at : at + 6]) for name, at in (("a", 0), ("b", 6))]
    lines = [line for result in runs for line in table(result.dataset)]
    result = run(pair, tmp_path, lines)
    golds = {line["row_id"]: line["answer"] for line in table(result.dataset)}
    assert golds == {at: row["answer"] for at, row in enumerate(ROWS[:12])}
    assert reasons(result)["student_right"] == 12 - sum(CONFOUNDED[:12])


def test_a_row_without_a_gold_leaves_where_answers_are_graded(
    pair: dict[str, str], tmp_path: Path
) -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    turns = [
        {"role": "user", "content": ROWS[0]["prompt"]},
        {"role": "assistant", "content": "", "tool_calls": [call]},
    ]
    result = run(pair, tmp_path, [ROWS[1], {"messages": turns}])
    assert reasons(result)["no_gold"] == 1 and counts(result)[0] == 2


def test_the_teachers_labels_keep_the_golds(pair: dict[str, str], tmp_path: Path) -> None:
    rows = [{"prompt": row["prompt"], "completion": row["answer"]} for row in ROWS[:6]]
    result = run(pair, tmp_path, rows, completion_source="teacher", select="all", validate="none")
    for line in table(result.dataset):
        assert line["answer"] == ROWS[line["row_id"]]["answer"]


def test_structured_messages_are_stored_as_they_are(tmp_path: Path) -> None:
    def example(row_id: int, arguments: dict[str, Any]) -> Example:
        call = {"function": {"name": "f", "arguments": arguments}}
        turns = (
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "user", "content": "and now?"},
        )
        return Example(row_id, turns, "4")

    written = [example(0, {"y": 2, "x": 1}), example(1, {"x": 1.5}), example(2, {})]
    read = load_examples(write_dataset(tmp_path, written, "{}"))
    for before, after in zip(written, read, strict=True):
        assert json.dumps(after.messages) == json.dumps(before.messages)
