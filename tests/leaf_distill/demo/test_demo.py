"""The embedded demo: its pair is what it claims, its figures are right, it runs to its end.

Nothing here says that LeaF beats plain distillation: that is for the demo to show, or not.
"""

import io
import json
import shlex
from contextlib import redirect_stdout
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import train_pair
from hypothesis import given, settings
from hypothesis import strategies as st

from leaf_distill.cli import parse
from leaf_distill.demo import run
from leaf_distill.demo.measure import Tokens, auc, measure_detection, measure_pruning, read_tokens
from leaf_distill.demo.run import ASSETS, run_demo, start_afresh
from leaf_distill.demo.task import build_tokenizer, make_problems
from leaf_distill.models.loading import load_model

# ---- the shipped pair ----


@pytest.mark.parametrize("name", ["teacher", "student"])
def test_shipped_pair_passes_its_gates_again(name):
    stored = json.loads((ASSETS / "pair.json").read_text())[name]["gates"]
    model = load_model(str(ASSETS / name), device="cpu").eval()
    measured = train_pair.check_gates(model, name, build_tokenizer())
    assert all(gate["passed"] for gate in measured)
    for ours, theirs in zip(measured, stored, strict=True):
        assert ours["kind"] == theirs["kind"]
        # Of 500 problems, two may change sides on another processor's arithmetic.
        assert ours["accuracy"] == pytest.approx(theirs["accuracy"], abs=2 / 500)


def test_assets_are_small():
    assert sum(path.stat().st_size for path in ASSETS.rglob("*") if path.is_file()) <= 3_000_000


def test_student_is_no_teacher():
    """The gates ask for a student that is right without hints and follows a wrong one."""
    accuracy = {
        gate["kind"]: gate["accuracy"]
        for gate in json.loads((ASSETS / "pair.json").read_text())["student"]["gates"]
    }
    assert accuracy["misaligned"] < 0.3 < 0.5 < accuracy["clean"]


# ---- training ----

BRIEF = replace(
    train_pair.STUDENT, phases=(train_pair.Phase(steps=2, mix={"aligned": 1.0}),), batch_size=4
)


def test_training_again_makes_the_same_model():
    tokenizer = build_tokenizer()
    one, same, other = (train_pair.train_model(BRIEF, tokenizer, seed=seed) for seed in (1, 1, 2))
    pairs = list(zip(one.parameters(), same.parameters(), other.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b, _ in pairs)
    assert not all(torch.equal(a, c) for a, _, c in pairs)


def test_a_pair_that_fails_is_not_written(tmp_path, monkeypatch):
    monkeypatch.setattr(train_pair, "TEACHER", BRIEF)
    with pytest.raises(RuntimeError, match=r"seeds 7 to 8.*'seed': 7.*'seed': 8.*nothing was"):
        train_pair.train_pair(tmp_path / "pair", seed=7, attempts=2)
    assert not (tmp_path / "pair").exists()


def test_gates_are_bounds(monkeypatch):
    """A gate is the accuracy of its own model and kind against both of its bounds."""
    model, tokenizer = load_model(str(ASSETS / "student"), device="cpu").eval(), build_tokenizer()
    accuracy = train_pair.accuracy(model, tokenizer, "misaligned")
    gates = [
        train_pair.Gate(model="student", kind="misaligned", at_least=accuracy, at_most=accuracy),
        train_pair.Gate(model="student", kind="misaligned", at_least=accuracy + 0.01),
        train_pair.Gate(model="student", kind="misaligned", at_most=accuracy - 0.01),
        train_pair.Gate(model="teacher", kind="misaligned"),
    ]
    monkeypatch.setattr(train_pair, "GATES", gates)
    passed = [gate["passed"] for gate in train_pair.check_gates(model, "student", tokenizer)]
    assert passed == [True, False, False]


def test_label_logits_are_the_models_own():
    """What is trained on are the completion and the end token, in spite of padding."""
    tokenizer, model = build_tokenizer(), load_model(str(ASSETS / "teacher"), device="cpu").eval()
    problems = make_problems(6, seed=3, mix={"clean": 1.0, "misaligned": 1.0})
    with torch.inference_mode():
        logits, targets = train_pair.label_logits(model, *train_pair.encode(problems, tokenizer))
        for problem in problems:
            text = f"{problem.completion} <end>"
            ids = tokenizer(f"<user> {problem.prompt} <assistant> {text}", return_tensors="pt")
            count = len(text.split())
            alone = model(input_ids=ids.input_ids).logits[0, -count - 1 : -1]
            torch.testing.assert_close(logits[:count], alone, atol=1e-4, rtol=1e-4)
            assert tokenizer.decode(targets[:count]) == text
            logits, targets = logits[count:], targets[count:]
    assert len(targets) == 0


# ---- figures ----


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.booleans()), max_size=30))
def test_auc_is_the_share_of_pairs_in_order(items):
    true = [score for score, truth in items if truth]
    false = [score for score, truth in items if not truth]
    measured = auc(np.array([s for s, _ in items], float), np.array([t for _, t in items], bool))
    if not true or not false:
        assert np.isnan(measured)
        return
    wins = sum((a > b) + (a == b) / 2 for a in true for b in false)
    assert measured == pytest.approx(wins / (len(true) * len(false)))


def tokens(planted, flagged, leaf, rival, number=None):
    return Tokens(
        planted=np.array(planted, bool),
        number=np.array(number or [1] * len(planted), bool),
        flagged=np.array(flagged, bool),
        suspicion={"LeaF": np.array(leaf, float), "rival": np.array(rival, float)},
    )


def test_detection_counts_tokens_and_clauses():
    rows = [
        tokens([0, 1, 1, 0], [0, 1, 0, 1], leaf=[0, 9, 1, 5], rival=[9, 0, 8, 1]),
        tokens([1, 0, 0, 0], [0, 0, 1, 0], leaf=[0, 1, 9, 2], rival=[9, 0, 0, 1]),
        tokens([0, 0, 0, 0], [1, 0, 0, 0], leaf=[9, 0, 0, 0], rival=[0, 0, 0, 9]),
    ]
    leaf, rival = measure_detection(rows)
    assert (leaf.method, rival.method) == ("LeaF", "rival")
    assert leaf.precision == 1 / 4 and leaf.token_recall == 1 / 3
    assert leaf.clause_recall == 1 / 2 and leaf.top_1 == 1 / 2
    # The rival flags its two, one and one most suspicious tokens.
    assert rival.precision == 2 / 4 and rival.token_recall == 2 / 3
    assert rival.clause_recall == 1 and rival.top_1 == 1 / 2


def test_auc_of_numbers_leaves_words_out():
    row = tokens([1, 0, 0], [1, 0, 0], leaf=[5, 9, 1], rival=[0, 0, 0], number=[1, 0, 1])
    leaf = measure_detection([row])[0]
    assert (leaf.auc, leaf.auc_numbers) == (0.5, 1.0)


def test_nothing_scored_is_nothing_measured():
    assert measure_detection([]) == []
    empty = measure_pruning("LeaF spans", [])
    assert (empty.prompts, empty.cuts, empty.prompts_right) == (0, 0, 0)


def test_tokens_are_read_by_their_characters():
    sample = {
        "text": "a note shows 8 . x 3",
        "offsets": [[0, 1], [1, 6], [6, 12], [12, 14], [14, 16], [16, 18], [18, 20]],
        "prunable": [True] * 6 + [False],
        "score": [0.9, 0.8, 0.7, 0.0, 0.6, 1.0, 0.1],
        "student_saliency": [0.1, 0.2, 0.3, 1.0, 0.4, 0.0, 0.5],
        "confounder": [False] * 3 + [True] + [False] * 3,
    }
    read = read_tokens(sample, [[0, 16]], {"random": np.arange(7.0)})
    assert read.planted.tolist() == [True] * 5 + [False]
    assert read.number.tolist() == [False] * 3 + [True] + [False] * 2
    assert read.suspicion["LeaF"].argmax() == 3  # a low score is a suspicious one
    assert read.suspicion["student only"].argmax() == 3
    assert read.suspicion["random"].tolist() == [0, 1, 2, 3, 4, 5]


def test_pruning_counts_cuts_and_prompts():
    def cut(verdict, kept=False):
        return {"student_verdict": verdict, "kept": kept}

    samples = [
        {"candidates": [cut("right", True), cut("right"), cut("wrong")]},
        {"candidates": [cut("wrong")]},
        {"candidates": []},
    ]
    figures = measure_pruning("LeaF spans", samples)
    assert (figures.prompts, figures.cuts, figures.cuts_right) == (3, 4, 2)
    assert (figures.prompts_right, figures.cuts_kept) == (1, 1)


def test_perplexity_is_the_models_own_loss():
    model = load_model(run.STUDENT, device="cpu").eval()
    (problem,) = make_problems(1, seed=0, mix={"misaligned": 1.0})
    sample = {
        "row_id": 0,
        "text": problem.prompt,
        "offsets": [[0, 1]] * len(problem.prompt.split()),
        "prunable": [True] * len(problem.prompt.split()),
        "score": [0.0] * len(problem.prompt.split()),
        "student_saliency": [0.0] * len(problem.prompt.split()),
        "confounder": [False] * len(problem.prompt.split()),
    }
    (row,) = run.tokens_of([sample], [problem])
    surprise = row.suspicion["perplexity"]
    ids = build_tokenizer()(f"<user> {problem.prompt}", return_tensors="pt").input_ids
    with torch.inference_mode():
        loss = model(input_ids=ids, labels=ids).loss
    assert len(surprise) == len(problem.prompt.split())
    assert surprise.mean() == pytest.approx(loss.item(), rel=1e-4)


# ---- the run ----


def test_a_directory_with_other_files_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="output_dir: must be a new or empty directory"):
        start_afresh(tmp_path)
    with pytest.raises(ValueError, match="output_dir: must be a new or empty directory"):
        start_afresh(tmp_path / "thesis.txt")
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_an_earlier_demo_makes_room(tmp_path):
    start_afresh(tmp_path / "demo")
    (tmp_path / "demo" / "rows.jsonl").write_text("{}")
    start_afresh(tmp_path / "demo")
    assert [path.name for path in (tmp_path / "demo").iterdir()] == ["demo.json"]


def test_only_what_a_demo_wrote_is_deleted(tmp_path):
    """A file called demo.json, or a stranger's file beside it, makes no demo's directory."""
    (tmp_path / "demo.json").write_text('{"my": "notes"}')
    (tmp_path / "run").mkdir()
    with pytest.raises(ValueError, match="holds something else"):
        start_afresh(tmp_path)
    start_afresh(tmp_path / "demo")
    (tmp_path / "demo" / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="holds something else"):
        start_afresh(tmp_path / "demo")
    assert (tmp_path / "demo.json").read_text() == '{"my": "notes"}'
    assert (tmp_path / "demo" / "thesis.txt").read_text() == "years of work"


@pytest.fixture(scope="module")
def small_demo(tmp_path_factory):
    """The demo as it is, of fewer rows and steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "ROWS", 80)
        patch.setattr(run, "STEPS", 4)
        patch.setattr(run, "HELD_OUT", {name: (20, mix) for name, (_, mix) in run.HELD_OUT.items()})
        output = tmp_path_factory.mktemp("demo") / "outputs"
        with redirect_stdout(io.StringIO()) as printed:
            results = run_demo(output)
    output.with_name("printed").write_text(printed.getvalue())
    return output, results


def test_demo_finds_what_was_planted(small_demo):
    _, results = small_demo
    found = {row["method"]: row for row in results["detection"]}
    assert list(found) == ["LeaF", "student only", "perplexity", "random"]
    assert found["LeaF"]["auc_numbers"] > 0.9
    assert found["LeaF"]["clause_recall"] > 0.8
    assert 0.3 < found["random"]["auc"] < 0.7
    names = [row["method"] for row in results["pruning"]]
    assert names == ["span (LeaF)", *run.CONTROLS]
    leaf, *_, random_spans = results["pruning"]
    assert leaf["cuts_right"] > random_spans["cuts_right"]
    assert leaf["prompts"] == random_spans["prompts"] == results["scored_prompts"]


def test_demo_compares_all_arms_at_equal_compute(small_demo):
    output, results = small_demo
    assert [arm["name"] for arm in results["arms"]] == ["untrained", *run.ARMS]
    kd, random_spans, leaf = (arm["training"] for arm in results["arms"][1:])
    assert kd["counterfactuals"] == 0 < leaf["counterfactuals"]
    branches = pq.read_table(output / "run/arms/span/dataset.parquet")["branch"].to_pylist()
    assert branches.count("counterfactual") == leaf["counterfactuals"]
    for arm in (kd, random_spans, leaf):
        assert (arm["steps"], arm["originals"]) == (4, 80)
        rows = arm["originals_a_step"] * (1 + arm["counterfactuals"] / arm["originals"])
        assert rows == pytest.approx(run.ROWS_A_STEP, abs=1)
        assert arm["tokens"] == pytest.approx(kd["tokens"], rel=0.1)
        student = load_model(str(arm["model"]))
        assert student.num_parameters() == load_model(run.STUDENT, device="cpu").num_parameters()


def test_demo_evaluates_before_and_after(small_demo):
    output, results = small_demo
    assert list(results["accuracy"]) == ["untrained", *run.ARMS]
    for figures in results["accuracy"].values():
        assert list(figures) == list(results["held_out"]) == list(run.HELD_OUT)
        assert all(0 <= share <= 1 for share in figures.values())
    problems = [json.loads(line) for line in (output / "held-out.jsonl").open()]
    assert [row["kind"] for row in problems[20:]] == ["clean"] * 20 + ["misaligned"] * 20 + [
        "unseen"
    ] * 20
    # The student that was not distilled: its accuracy is that of the gates, within chance.
    before = results["accuracy"]["untrained"]
    assert before["misaligned hint"] < 0.5 < before["clean"]


def test_demo_ends_with_a_command_on_its_own_pair_and_rows(small_demo):
    output, _ = small_demo
    printed = output.with_name("printed").read_text()
    line = printed.replace("\\\n", "").splitlines()[-1]
    leaf, name, *words = shlex.split(line)
    assert (leaf, name) == ("leaf", "detect")
    (config,) = parse("detect", words)
    own = run.detection_config(output / "rows.jsonl", output)
    assert [getattr(config, name) for name in run.BY_HAND] == [
        getattr(own, name) for name in run.BY_HAND
    ]
    assert config.output_dir == f"{output}-by-hand"


def test_demo_leaves_its_results(small_demo):
    output, results = small_demo
    stored = json.loads((output / "demo.json").read_text())
    assert stored["finished"] is True
    assert stored["accuracy"] == results["accuracy"]
    assert stored["page"] == str(results["page"])
    assert results["page"].read_text(encoding="utf-8").startswith("<!")
    assert "trained 4 steps in " in (output / "demo.log").read_text(encoding="utf-8")
    assert {path.name for path in output.iterdir()} == set(run.WRITTEN)
    start_afresh(output)
    assert [path.name for path in output.iterdir()] == ["demo.json"]


@pytest.mark.slow
def test_demo_at_full_size(tmp_path):
    results = run_demo(tmp_path / "demo")
    assert results["scored_prompts"] > 100
    assert {row["method"]: row["auc_numbers"] for row in results["detection"]}["LeaF"] > 0.95
    for arm in results["arms"][1:]:
        assert arm["training"]["kl_last"] < arm["training"]["kl_first"] / 2
