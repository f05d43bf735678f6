"""Stage 1 where the teacher splits the text into other tokens than the student; wider cuts."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import detect_pair
import numpy as np
import piece_pair
import pytest
import torch
from detect_run import CONFOUNDED, ROWS, check_sums, counts, reasons, run, table
from transformers import AutoModelForCausalLM

from leaf_distill.detection.alignment import pool
from leaf_distill.detection.config import DetectConfig
from leaf_distill.detection.pipeline import DetectResult
from leaf_distill.training.config import DistillArguments
from leaf_distill.training.distill import distill


@pytest.fixture(scope="module")
def piece_teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    return piece_pair.save_teacher(tmp_path_factory.mktemp("pieces"))


@pytest.fixture(scope="module")
def pooled(
    pair: dict[str, str], piece_teacher: str, tmp_path_factory: pytest.TempPathFactory
) -> DetectResult:
    return run(pair | {"teacher": piece_teacher}, tmp_path_factory.mktemp("pooled"))


def cuts_of(result: DetectResult) -> list[dict[str, Any]]:
    return [line for line in table(result.dataset) if line["branch"] == "counterfactual"]


def test_counterfactuals_with_a_teacher_of_another_tokenizer(pooled: DetectResult) -> None:
    check_sums(pooled, len(ROWS))
    lines = cuts_of(pooled)
    assert len(lines) >= 0.6 * sum(CONFOUNDED)
    for line in lines:
        before, after = ROWS[line["row_id"]]["prompt"], line["prompt"][-1]["content"]
        (span,) = line["spans"]
        assert before[: span["start"]] + before[span["stop"] :] == after
    misled = [set(detect_pair.NAMES) & set(line["prompt"][0]["content"].split()) for line in lines]
    assert not any(misled)  # the student is right again: the word is gone
    assert pooled.funnel["notes"]["tokens_pooled"] == sum(CONFOUNDED)
    assert any("different tokenizers" in sentence for sentence in pooled.funnel["templates"])


def test_the_teachers_values_stand_on_the_students_tokens(pooled: DetectResult) -> None:
    for sample in table(pooled.samples):
        words = [sample["text"][start:stop].strip() for start, stop in sample["offsets"]]
        assert words == sample["text"].split()
        assert len(sample["teacher_saliency"]) == len(sample["student_saliency"]) == len(words)
        # The digit is what the teacher reads, however its words are split.
        assert words[int(np.argmax(sample["teacher_saliency"]))] == sample["answer"]


def test_stage_2_says_that_it_cannot_train_on_the_pair(
    pair: dict[str, str], piece_teacher: str, pooled: DetectResult, tmp_path: Path
) -> None:
    from distill_pair import make_config

    names = {**pair, "teacher": piece_teacher}
    with pytest.raises(ValueError, match="tokenizers: must be the same for teacher and student"):
        distill(DistillArguments(**names, dataset=str(pooled.arm)), make_config(tmp_path / "no"))


def test_a_teacher_with_other_token_numbers_gives_the_same_dataset(
    pair: dict[str, str], finished: DetectResult, tmp_path: Path
) -> None:
    """Its texts are split alike, so nothing is pooled, though the tokenizers differ."""
    other = Path(shutil.copytree(pair["teacher"], tmp_path / "teacher"))
    known, count = len(detect_pair.SPECIALS), len(detect_pair.WORDS)
    order = [*range(known), *range(count - 1, known - 1, -1)]  # new number -> old number
    rules = json.loads((other / "tokenizer.json").read_text())
    rules["model"]["vocab"] = {detect_pair.WORDS[old]: new for new, old in enumerate(order)}
    (other / "tokenizer.json").write_text(json.dumps(rules))
    model = AutoModelForCausalLM.from_pretrained(other)
    with torch.no_grad():
        for weight in (model.get_input_embeddings().weight, model.lm_head.weight):
            weight[:count] = weight[order].clone()
    model.save_pretrained(other)
    result = run(pair | {"teacher": str(other)}, tmp_path)
    assert "tokens_pooled" not in result.funnel["notes"]
    ours, theirs = (
        [{**line, "provenance": None} for line in table(one.dataset)] for one in (result, finished)
    )
    for one, another in zip(ours, theirs, strict=True):
        assert one.pop("score") == pytest.approx(another.pop("score"), abs=1e-5)
        assert one == another


def test_pooling_over_equal_tokens_changes_nothing(finished: DetectResult) -> None:
    for sample in table(finished.samples):
        values, offsets = np.float32(sample["teacher_saliency"]), np.array(sample["offsets"])
        # In two halves, of which each has half of the norm, a token is as salient as whole.
        middle = (offsets[:, 0] + offsets[:, 1] + 1) // 2
        halves = np.stack([offsets[:, 0], middle, middle, offsets[:, 1]], axis=1).reshape(-1, 2)
        inside = halves[:, 0] < halves[:, 1]
        lengths, whole = (halves[:, 1] - halves[:, 0]), np.repeat(offsets[:, 1] - offsets[:, 0], 2)
        shares = np.repeat(values, 2) * lengths / whole
        split = pool(shares[inside].astype(np.float32), halves[inside], offsets)
        np.testing.assert_allclose(split, values, atol=1e-6)
        assert np.array_equal(pool(values, offsets, offsets), values)


@pytest.fixture(scope="module")
def in_pieces(piece_teacher: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A pair that splits words: the teacher, and a student that has learned nothing."""
    student = piece_pair.save(piece_pair.make_model(5), tmp_path_factory.mktemp("blank"))
    return {"student": student, "teacher": piece_teacher}


@pytest.fixture(scope="module")
def wide_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("widened")


LINES = [
    {
        "prompt": f"tom has {digit} apples .\nthe sticker says {word} , rain is loud .\nann is .",
        "completion": digit,
        "answer": digit,
    }
    for digit, word in zip(detect_pair.DIGITS[:6], detect_pair.NAMES[3:9], strict=True)
]


@pytest.mark.parametrize(
    ("unit", "pattern"),
    [
        ("token", None),
        ("word", r"\S+"),
        ("clause", r"[^,\n]+,|[^,\n]+"),
        ("sentence", r"[^\n]+\n?"),
    ],
)
def test_cuts_are_widened_to_whole_units(
    in_pieces: dict[str, str], wide_root: Path, unit: str, pattern: str | None
) -> None:
    options = {"select": "all", "validate": "none", "threshold": 0.3}
    result = run(in_pieces, wide_root, LINES, widen=unit, **options)
    check_sums(result, len(LINES))
    inside_words = 0
    for line in table(result.arm / "candidates.parquet"):
        text = LINES[line["row_id"]]["prompt"]
        for span in line["spans"]:
            start, stop = span["start"], span["stop"]
            inside_words += any(text[at - 1 : at + 1].isalnum() for at in (start, stop) if at)
            if pattern is not None and text[start:stop].strip(" .,\n"):
                units = [one.span() for one in re.finditer(pattern, text)]
                touched = [
                    (a, b) for a, b in units if text[max(a, start) : min(b, stop)].strip(" .,\n")
                ]
                # Blanks and marks at the seam may stay or go.
                assert not text[touched[0][0] : start].strip(" .,\n")
                assert not text[stop : touched[-1][1]].strip(" .,\n")
    assert (inside_words > 0) == (unit == "token")
    assert ("cut_inside_word" in result.funnel["notes"]) == (unit == "token")
    assert result.arm.name.count("widen") == (unit != "word")


def test_wider_units_take_more(in_pieces: dict[str, str], wide_root: Path) -> None:
    options = {"select": "all", "validate": "none", "threshold": 0.3}
    lengths = []
    for unit in ("token", "word", "clause", "sentence"):
        result = run(in_pieces, wide_root, LINES, widen=unit, **options)
        tried = table(result.arm / "candidates.parquet")
        sizes = [sum(s["stop"] - s["start"] for s in line["spans"]) for line in tried]
        lengths.append(sum(sizes) / len(sizes))
    assert lengths == sorted(lengths) and len(set(lengths)) == 4


def test_a_preset_is_its_settings(in_pieces: dict[str, str], wide_root: Path) -> None:
    paper = run(in_pieces, wide_root, LINES, preset="paper", select="all", validate="none")
    plain = run(in_pieces, wide_root, LINES, widen="token", select="all", validate="none")
    assert paper.arm == plain.arm
    release = run(in_pieces, wide_root, LINES, preset="release", threshold=0.2)
    assert counts(release)[1] == len(LINES) and reasons(release, "candidates").keys() <= {
        "unchanged",
        "duplicate",
        "empty_after_cut",
    }
    settings = release.funnel["settings"]
    wanted = {"rule": "quantile", "select": "all", "validate": "none", "widen": "token"}
    assert {name: settings[name] for name in wanted} == wanted
    assert (settings["threshold"], settings["response_threshold"]) == (0.2, 0.05)


def test_a_setting_that_is_not_its_default_wins_over_the_preset() -> None:
    assert DetectConfig(preset="release").threshold == 0.05
    assert DetectConfig(preset="release", threshold=0.3).threshold == 0.3
    assert DetectConfig(preset="release", validate="teacher").validate == "teacher"
    assert DetectConfig(preset="paper", widen="sentence").widen == "sentence"
    code = DetectConfig(preset="release", grade="code", allow_code_execution=True)
    assert (code.threshold, code.response_threshold) == (0.10, 0.05)
