"""Our verdicts on answers to GSM8K are lm-evaluation-harness's, and our checkpoints load there."""

from __future__ import annotations

import re
from collections.abc import Mapping
from decimal import Decimal, InvalidOperation
from pathlib import Path
from random import Random
from types import MappingProxyType
from typing import Any, NamedTuple

import harness
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from distill_pair import make_config, make_model, make_tokenizer
from real_data import data_file

from leaf_distill.evaluation.config import EvaluateConfig
from leaf_distill.evaluation.evaluate import evaluate
from leaf_distill.grading import Grader
from leaf_distill.models.loading import load_model
from leaf_distill.models.tokenizer import load_tokenizer
from leaf_distill.training.config import DistillArguments
from leaf_distill.training.distill import distill

pytestmark = pytest.mark.slow

ROWS, SHOTS = 50, 2
STRICT, FLEXIBLE = "strict-match", "flexible-extract"


class Form(NamedTuple):
    """A way to write an answer, and why a filter or rule does not read it."""

    text: str
    unread: Mapping[str, str] = MappingProxyType({})


DIGITLESS = "it takes the punctuation after the formula for a number"
AS_TEXT = "it compares the numbers' texts"
GROUPS = "it takes the digits after the comma for a number"
LATER = "it reads the last number of the text"
FORMS = {
    "mark": Form("{worked}\n#### {n}"),
    "mark with a full stop": Form("{worked}\n#### {n}."),
    "mark with commas": Form("{worked}\n\n#### {commas}\n"),
    "mark with money": Form("{worked}\n#### ${commas}"),
    "mark with a unit": Form("{worked}\n#### {n} miles"),
    "mark before a check": Form("#### {n}\n\nCheck: 1 + 2 = 3 and {n} > 2.", {FLEXIBLE: LATER}),
    "phrase": Form("{worked}\nThe answer is {n}."),
    "phrase with a unit": Form("{worked}\nSo the answer is {commas} apples in total."),
    "phrase with money": Form("{worked} Therefore, the final answer is ${commas}.00.",
                              {FLEXIBLE: AS_TEXT}),
    "phrase in bold": Form("{worked}\n\n**Final Answer:** {n}"),
    "phrase with a reason": Form("The answer is {n}, as a week has 7 days.",
                                 {FLEXIBLE: LATER, "number": LATER}),
    "phrase after a thought": Form("<think>Is it 5? Or 12?</think>{worked}\nAnswer: {n}"),
    "decimals": Form("{worked}\n#### {n}.0", {STRICT: AS_TEXT, FLEXIBLE: AS_TEXT}),
    "box": Form("{worked}\n\\[\\boxed{{{n}}}\\]"),
    "box in a sentence": Form("{worked} So the answer is $\\boxed{{{n}}}$.", {FLEXIBLE: DIGITLESS}),
    "box with money": Form("{worked}\n$$\\boxed{{\\${commas}}}$$", {FLEXIBLE: DIGITLESS}),
    "box with a unit": Form("{worked}\nIt is \\(\\boxed{{{n}\\text{{ hours}}}}\\)"),
    "box with LaTeX's comma": Form("{worked}\n\\boxed{{{latex}}}", {FLEXIBLE: GROUPS}),
}  # fmt: skip


def write_task(folder: Path, rows: list[Any], shots: list[Any]) -> Path:
    """Write lm-eval's own GSM8K, its filters and metric unchanged, for rows from files."""
    where = harness.run("-c", "import lm_eval; print(lm_eval.__path__[0])", cwd=folder)
    (tasks := folder / "tasks").mkdir()
    files = {
        "test": str(harness.write_lines(folder / "test.jsonl", rows)),
        "train": str(harness.write_lines(folder / "train.jsonl", shots)),
    }
    task = {
        "include": str(Path(where.strip()) / "tasks" / "gsm8k" / "gsm8k.yaml"),
        "task": "rows",
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": files},
        "num_fewshot": len(shots),
        "fewshot_config": {"sampler": "first_n"},
    }
    (tasks / "rows.yaml").write_text(yaml.safe_dump(task))
    return tasks


def lm_eval(folder: Path, tasks: Path, model: Path | str, *arguments: str) -> list[Any]:
    """Run lm-eval's command on a checkpoint, and return the samples that it logs."""
    harness.run(
        *("-m", "lm_eval", "run", "--model", "hf", "--device", "cpu", "--batch_size", "16"),
        *("--model_args", f"pretrained={model},dtype=float32", "--include_path", str(tasks)),
        *("--tasks", "rows", "--log_samples", "--output_path", "out", *arguments),
        cwd=folder,
    )
    (file,) = (folder / "out").rglob("samples_rows_*.jsonl")
    return harness.read_lines(file.read_text())


def gsm8k() -> list[dict[str, str]]:
    return harness.read_lines(data_file("gsm8k/test.jsonl").read_text())


def ours(rule: Any, samples: list[Any]) -> list[bool]:
    pairs = [(sample["doc"]["answer"], sample["resps"][0][0]) for sample in samples]
    with Grader(rule, workers=2) as grader:
        return [verdict == "right" for verdict in grader.grade(pairs)]


def extracted(sample: Any) -> str:
    """Return what a filter has found in an answer, an empty text if nothing."""
    (found,) = sample["filtered_resps"]
    return "" if found == "[invalid]" else str(found)


def number(text: str) -> Decimal | None:
    try:
        return Decimal(re.sub(r"[$,]", "", text).removesuffix("."))
    except InvalidOperation:
        return None


def why_they_differ(sample: Any, marked: str) -> str:
    """Return which weakness of lm-eval explains that its verdict is another one, if any does.

    Args:
        sample: one answer by one filter.
        marked: what the strict filter found in the same answer.
    """
    found, gold = number(extracted(sample)), number(sample["doc"]["answer"].split("#### ")[1])
    if found is None:
        return DIGITLESS
    if found == gold and not sample["exact_match"]:
        return AS_TEXT
    if sample["filter"] == FLEXIBLE and marked and number(marked) != found:
        return LATER
    return ""


def test_verdicts_on_a_real_models_answers_are_lm_evals(tmp_path: Path, smollm2_path: str) -> None:
    problems = gsm8k()
    model = tmp_path / "smollm2"
    load_model(smollm2_path, device="cpu").save_pretrained(model)
    load_tokenizer(smollm2_path).save_pretrained(model)
    tasks = write_task(tmp_path, problems[:ROWS], problems[ROWS : ROWS + SHOTS])
    samples = lm_eval(tmp_path, tasks, model, "--gen_kwargs", "max_gen_toks=256")
    assert len(samples) == 2 * ROWS

    marked = {one["doc_id"]: extracted(one) for one in samples if one["filter"] == STRICT}
    found = [one for one in samples if extracted(one)]
    assert sum(map(bool, marked.values())) > ROWS / 2 and len(found) > ROWS
    for rule in ("math", "number"):
        assert [
            (rule, sample["filter"], extracted(sample), sample["resps"][0][0][-200:])
            for sample, right in zip(found, ours(rule, found), strict=True)
            if right != bool(sample["exact_match"])
            and not why_they_differ(sample, marked[sample["doc_id"]])
        ] == []


def written(problem: dict[str, str], form: Form, change: int) -> str:
    """Write a worked solution in a form that models use, with another result if `change`."""
    worked, _, gold = problem["answer"].rpartition("\n#### ")
    worked = re.sub(r"<<.*?>>", "", worked)
    n = int(gold.replace(",", "")) + change
    commas = f"{n:,}"
    return form.text.format(worked=worked, n=n, commas=commas, latex=commas.replace(",", "{,}"))


def test_verdicts_on_reworded_solutions_are_lm_evals(tmp_path: Path) -> None:
    problems, random = gsm8k(), Random(0)
    cases = [
        (name, problem, change)
        for name in FORMS
        for problem in problems[:ROWS]
        for change in (0, random.choice([-1, 1, 2, 10, 1000]))
    ]
    tasks = write_task(tmp_path, [problem for _, problem, _ in cases], problems[ROWS : ROWS + 1])
    texts = [written(problem, FORMS[name], change) for name, problem, change in cases]
    answers = harness.write_lines(tmp_path / "answers.jsonl", texts)
    program = Path(__file__).with_name("lm_eval_verdicts.py")
    harness.run(program, tasks, "rows", answers, tmp_path / "samples.jsonl", cwd=tmp_path)
    samples = harness.read_lines((tmp_path / "samples.jsonl").read_text())
    assert len(samples) == 2 * len(cases)

    disagree: dict[str, set[str]] = {}
    for rule in ("math", "number"):
        by_filter = {one: [s for s in samples if s["filter"] == one] for one in (STRICT, FLEXIBLE)}
        for sample, right in zip(by_filter[STRICT], ours(rule, by_filter[STRICT]), strict=True):
            name, _, change = cases[sample["doc_id"]]
            if right != (change == 0):
                disagree.setdefault(name, set()).add(rule)
    for sample in filter(extracted, samples):
        name, _, change = cases[sample["doc_id"]]
        if bool(sample["exact_match"]) != (change == 0):
            disagree.setdefault(name, set()).add(sample["filter"])
    assert disagree == {name: set(form.unread) for name, form in FORMS.items() if form.unread}


def knowing_teacher() -> Any:
    """Train a teacher for a moment to answer `w_n` with `w_(n+1)`."""
    teacher, tokenizer = make_model(1, hidden=32), make_tokenizer()
    texts = [f"<user> w{n} <assistant> w{n + 1} <eos>" for n in range(30)]
    ids = tokenizer(texts, return_tensors="pt")["input_ids"]
    optimizer = torch.optim.AdamW(teacher.parameters(), lr=1e-2)
    for _ in range(60):
        teacher(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return teacher


def test_a_checkpoint_of_leaf_distill_gives_lm_eval_the_answers_that_it_gives_us(
    tmp_path: Path,
) -> None:
    for name, model in (("student", make_model(0)), ("teacher", knowing_teacher())):
        model.save_pretrained(tmp_path / name)
        make_tokenizer().save_pretrained(tmp_path / name)
    pair = {name: str(tmp_path / name) for name in ("student", "teacher")}
    rows = [{"prompt": f"w{n}", "completion": f"w{n + 1}"} for n in range(30)]
    data = str(harness.write_lines(tmp_path / "train-rows.jsonl", rows[:25]))
    checkpoint = tmp_path / "distilled"
    distill(DistillArguments(**pair, dataset=data), make_config(checkpoint, num_train_epochs=20))

    # Some answers that the student has learned, some that it has not, and some wrong golds.
    graded = [{**row, "answer": row["completion"]} for row in rows] + [
        {**row, "answer": "w39"} for row in rows[:10]
    ]
    data = str(harness.write_lines(tmp_path / "rows.jsonl", graded))
    settings = {"grade": "exact", "max_new_tokens": 8, "device": "cpu"}
    result = evaluate(
        EvaluateConfig(
            model=str(checkpoint), dataset=data, output_dir=str(tmp_path / "ours"), **settings
        )
    )
    task = {
        "task": "rows",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": data}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{prompt}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "exact_match"}],
        "generation_kwargs": {"until": ["<eos>"], "do_sample": False, "max_gen_toks": 8},
    }
    (tasks := tmp_path / "tasks").mkdir()
    (tasks / "rows.yaml").write_text(yaml.safe_dump(task))
    samples = lm_eval(tmp_path, tasks, checkpoint, "--apply_chat_template")
    theirs = sorted(samples, key=lambda sample: sample["doc_id"])
    lines = pq.read_table(result.answers).to_pylist()
    assert [sample["resps"][0][0].strip() for sample in theirs] == [
        line["answer"].strip() for line in lines
    ]
    assert [bool(sample["exact_match"]) for sample in theirs] == [
        line["verdict"] == "right" for line in lines
    ]
    assert 0.4 < result.accuracy < 0.8
