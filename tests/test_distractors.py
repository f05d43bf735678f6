"""The benchmark of scores on known distractors: its truth, its measures and its page."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "distractors.py"
_spec = importlib.util.spec_from_file_location("distractors", SCRIPT)
assert _spec is not None and _spec.loader is not None
distractors = importlib.util.module_from_spec(_spec)
sys.modules["distractors"] = distractors  # its dataclasses look themselves up there
_spec.loader.exec_module(distractors)
Row, auc, top = distractors.Row, distractors.auc, distractors.top
precision_and_recall, unmentioned = distractors.precision_and_recall, distractors.unmentioned
read_problems = distractors.read_problems


def planted_rows(count: int = 60, tokens: int = 25) -> list[Row]:
    """Rows in which one score is the truth and another was drawn without it."""
    draw = np.random.default_rng(0)
    rows = []
    for _ in range(count):
        planted = draw.random(tokens) < 0.3
        suspicion = {"truth": planted + draw.random(tokens) / 2, "shuffled": draw.random(tokens)}
        flagged = {name: top(values, 5) for name, values in suspicion.items()}
        rows.append(Row(planted, draw.random(tokens) < 0.5, suspicion, flagged))
    return rows


def test_planted_truth_has_an_auc_of_one_and_a_shuffled_score_one_half() -> None:
    rows = planted_rows()
    assert auc(rows, "truth") == (1.0, 1.0, 1.0)
    assert auc(rows, "truth", numbers=True) == (1.0, 1.0, 1.0)
    mean, low, high = auc(rows, "shuffled") or (0, 0, 0)
    assert mean == pytest.approx(0.5, abs=0.06)
    assert low < mean < high and high - low < 0.15
    unplanted = Row(rows[0].number & False, rows[0].number, rows[0].suspicion, {})
    assert auc([unplanted], "truth") is None


def test_ties_count_half_in_an_auc() -> None:
    planted = np.array([True, True, False, False])
    values = np.array([1.0, 0.0, 0.0, 0.0])
    row = Row(planted, planted, {"score": values}, {})
    # Of the four pairs, the first planted token wins two and the second ties twice.
    assert (auc([row], "score") or [0])[0] == (2 + 2 / 2) / 4


def test_precision_and_recall_are_shares_of_all_tokens_together() -> None:
    rows = [
        Row(np.array([True, True, False]), np.zeros(3, bool), {}, {}),
        Row(np.array([False, False, True]), np.zeros(3, bool), {}, {}),
    ]
    flags = [np.array([True, False, True]), np.array([True, False, False])]
    precision, recall = precision_and_recall(rows, flags)
    assert precision[0] == recall[0] == pytest.approx(1 / 3)
    assert precision[1] <= precision[0] <= precision[2]


def test_the_control_marks_numbers_that_the_label_lacks() -> None:
    text = "Tom has 1,200 apples of 30 grams"
    offsets = np.array([[0, 8], [8, 11], [11, 13], [13, 24], [24, 26], [26, 32]])
    assert unmentioned(text, offsets, "1200 apples").tolist() == [0, -1, -1, 0, 1, 0]


PLAIN = "<<Passage>>tom has 7 apples.<<Question>> how many?"
WHOLE = "<<Passage>>tom has 7 apples. the sticker says three.<<Question>> how many?"
SOLVED = "<<Explanation>>tom has 7.<<FinalAnswer>>7"


def write_pairs(folder: Path, pairs: list[tuple[str, str]]) -> None:
    for name, at in (("adversarial", 1), ("non_adversarial", 0)):
        lines = [
            json.dumps({"id": f"p{number}", "prompt": pair[at], "completion": SOLVED})
            for number, pair in enumerate(pairs)
        ]
        (folder / f"simple_{name}_train.json").write_text("\n".join(lines))


def test_problems_are_pairs_in_which_text_was_only_put_in(tmp_path: Path) -> None:
    write_pairs(
        tmp_path, [(PLAIN, WHOLE), (PLAIN, PLAIN), (PLAIN, WHOLE.replace("apples", "pears"))]
    )
    (problem,) = read_problems(tmp_path)
    assert problem.text == "tom has 7 apples. the sticker says three. how many?"
    (found,) = [problem.text[start:stop].strip() for start, stop in problem.ranges]
    assert found == "the sticker says three."
    assert problem.label == "tom has 7. The answer is 7"


def test_the_command_writes_a_page_with_a_line_for_each_score(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sys.path.append(str(Path(__file__).parent / "leaf_distill"))
    import detect_pair

    sys.path.pop()
    pair = detect_pair.save_pair(tmp_path / "pair")
    texts = [("tom has 7 apples .", "tom has 7 apples . the sticker says three ."), (PLAIN, WHOLE)]
    write_pairs(tmp_path, texts)
    words = [str(tmp_path), "--rows", "2", "--skip_demo", "--cache_dir", str(tmp_path / "cache")]
    words += [word for role in pair for word in (f"--{role}", pair[role])]
    output = tmp_path / "page.md"
    distractors.main([*words, "--output", str(output)])
    page = output.read_text()
    assert page in capsys.readouterr().out
    lines = [line.split(" | ")[0].strip("| ") for line in page.splitlines() if line[:2] == "| "]
    names = ["gap (LeaF)", "student's gradient", "teacher's gradient, low", "student's perplexity"]
    names += ["lens", "random", "no model: number not in the label"]
    assert lines == ["score", *names]
    assert "Neither model was trained for these problems" in page
