"""Stage 1 at the level of the response, with a student that misleads itself in its own answer."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import detect_pair
import detect_run
import pytest
import response_pair
from detect_run import check_sums, reasons, table
from distill_pair import make_config

from leaf_distill.data.dataset import load_examples
from leaf_distill.data.example import Example
from leaf_distill.data.prompt import Renderer
from leaf_distill.data.segments import split_response
from leaf_distill.detection.config import DetectConfig
from leaf_distill.detection.levels import end_with_views, render_view, set_views
from leaf_distill.detection.pipeline import DetectResult
from leaf_distill.detection.warnings import nothing_scored
from leaf_distill.models import loading
from leaf_distill.training.config import DistillArguments
from leaf_distill.training.distill import distill

ROWS = response_pair.make_rows()
WORDS = detect_pair.NAMES


@pytest.fixture(scope="module")
def self_misled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return response_pair.save_pair(tmp_path_factory.mktemp("self_misled"))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of the runs, which share the answers."""
    return tmp_path_factory.mktemp("levels")


def run(pair: dict[str, str], root: Path, rows: Any = ROWS, **changes: Any) -> DetectResult:
    return detect_run.run(pair, root, rows, **{"grade": "number", "max_new_tokens": 20, **changes})


@pytest.fixture(scope="module")
def response(self_misled: dict[str, str], root: Path) -> DetectResult:
    return run(self_misled, root, level="response")


@pytest.fixture(scope="module")
def both(self_misled: dict[str, str], root: Path) -> DetectResult:
    return run(self_misled, root, level="both", segments=3)


def lines_of(result: DetectResult, branch: str = "counterfactual") -> list[dict[str, Any]]:
    return [line for line in table(result.dataset) if line["branch"] == branch]


def test_a_word_of_the_response_that_misleads_is_cut(response: DetectResult) -> None:
    lines = lines_of(response)
    assert len(lines) >= 7
    for line in lines:
        row, said = ROWS[line["row_id"]], line["completion"][0]["content"]
        (span,) = line["spans"]
        assert span["message"] == len(line["prompt"]) == 1
        assert line["prompt"] == [{"role": "user", "content": row["prompt"]}]
        whole, (border,) = row["completion"], split_response(row["completion"], 2)
        assert whole[span["start"] : span["stop"]].split()[0] in WORDS
        assert span["stop"] <= border and line["segment"] == 1
        assert whole[: span["start"]] + whole[span["stop"] :] == said
        assert said[line["context"] :] == whole[border:]
        assert line["answer"] == row["answer"] and line["accepted"]


def test_a_view_counts_where_the_student_goes_on_wrongly_and_the_teacher_rightly(
    response: DetectResult,
) -> None:
    for sample in table(response.samples):
        assert sample["segment"] == 1
        assert (sample["student_verdict"], sample["teacher_verdict"]) == ("wrong", "right")
        said = f"{sample['messages'][0]['content']} {sample['text']}".split()
        assert set(said) & set(WORDS)
    views = [line for line in table(response.outcomes) if line["segment"]]
    right = {line["row_id"] for line in views if line["reason"] == "student_right"}
    # Its own answer is wrong, but behind this beginning it goes on rightly.
    assert right and not any(set(ROWS[at]["completion"].split()) & set(WORDS) for at in right)


def test_validation_goes_on_from_the_cut_beginning(response: DetectResult) -> None:
    digits = {word: str(number) for number, word in enumerate(WORDS)}
    seen = Counter()
    for sample in table(response.samples):
        for candidate in sample["candidates"]:
            text, ((start, stop), *_) = sample["text"], candidate["cut"]
            shorter = text[:start] + text[stop:]
            said = [word for word in shorter.split() if word in digits]
            # The answers are what follows the beginning alone, and begin behind its line.
            assert candidate["teacher_answer" if candidate["kept"] else "student_answer"]
            assert not candidate["student_answer"].startswith("the sticker")
            if said:
                assert candidate["student_answer"].split()[-2] == digits[said[-1]]
            seen[candidate["kept"]] += 1
    assert seen[True] and seen[False]


def test_beginning_and_continuation_are_graded_together(
    self_misled: dict[str, str], root: Path
) -> None:
    """Compared as exact text, a continuation alone is never the whole response."""
    rows = [row for row in ROWS if row["completion"].startswith("the sticker says t")]
    golds = []
    for row in rows:
        _, *rest = row["completion"].split("\n")
        golds.append({**row, "answer": f"the sticker says .\n{' '.join(rest)}"})
    options = {"level": "response", "select": "all", "validate": "teacher", "grade": "exact"}
    result = run(self_misled, root, golds, output_dir=str(root / "exact"), **options)
    check_sums(result, len(rows))
    assert {line["row_id"] for line in lines_of(result)} == set(range(len(rows)))
    tried = table(result.arm / "candidates.parquet")
    assert all(line["teacher_answer"] != line["answer"] for line in tried)


def test_both_levels_stand_side_by_side(both: DetectResult) -> None:
    check_sums(both, len(ROWS))
    kept = Counter(line["segment"] for line in lines_of(both))
    assert kept[0] >= 7 and kept[1] >= 7 and kept[2] >= 7
    for line in lines_of(both):
        whole = ROWS[line["row_id"]]["completion"]
        border = [0, *split_response(whole, 3)][line["segment"]]
        assert line["completion"][0]["content"][line["context"] :] == whole[border:]
        assert [span["message"] for span in line["spans"]] == [1 if line["segment"] else 0]


def test_candidates_of_all_views_have_ids_of_their_own(both: DetectResult) -> None:
    tried = table(both.arm / "candidates.parquet")
    ids = [(line["row_id"], line["candidate_id"]) for line in tried]
    assert len(set(ids)) == len(ids)
    for row_id in {row_id for row_id, _ in ids}:
        numbers = sorted(number for row, number in ids if row == row_id)
        assert numbers == list(range(len(numbers)))
    outcomes = table(both.outcomes)
    keys = [(line["row_id"], line["segment"], line["candidate_id"]) for line in outcomes]
    assert len(set(keys)) == len(keys)
    place = {key[0::2]: key[1] for key in keys if key[2] >= 0}
    assert place == {(line["row_id"], line["candidate_id"]): line["segment"] for line in tried}


def test_a_row_with_views_leaves_where_the_last_of_them_does(both: DetectResult) -> None:
    own: dict[int, dict[str, Any]] = {}
    views: dict[int, list[dict[str, Any]]] = {}
    for line in table(both.outcomes):
        if line["candidate_id"] < 0 and line["row_id"] not in own:
            own[line["row_id"]] = line
        elif line["candidate_id"] < 0:
            views.setdefault(line["row_id"], []).append(line)
    assert views
    for row_id, parts in views.items():
        assert own[row_id]["segment"] is None
        borders = split_response(ROWS[row_id]["completion"], 3)
        assert [line["segment"] for line in parts] == list(range(len(borders) + 1))
        kept = any(line["reason"] == "kept" for line in parts)
        assert (own[row_id]["reason"] == "kept") == kept
        if not kept:
            assert own[row_id]["reason"] in {line["reason"] for line in parts}


def test_the_instruction_level_is_the_same_with_and_without_the_other(
    self_misled: dict[str, str], root: Path, both: DetectResult
) -> None:
    alone = run(self_misled, root)
    drop = ("provenance", "candidate_id")
    lines = [
        [{key: value for key, value in line.items() if key not in drop} for line in part]
        for part in (lines_of(alone), [one for one in lines_of(both) if not one["segment"]])
    ]
    assert lines[0] == lines[1] != []
    samples = [one for one in table(both.samples) if not one["segment"]]
    for one, other in zip(table(alone.samples), samples, strict=True):
        for name in ("score", "spans", "student_answer", "teacher_answer", "student_verdict"):
            assert one[name] == other[name]


def test_a_second_run_computes_nothing(
    self_misled: dict[str, str], root: Path, both: DetectResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path.name: path.read_bytes() for path in both.arm.iterdir()}
    monkeypatch.setattr(loading, "load_model", None)  # would be called for any pass
    again = run(self_misled, root, level="both", segments=3)
    assert {path.name: path.read_bytes() for path in again.arm.iterdir()} == before


def test_the_thresholds_of_prompt_and_response_are_two(
    self_misled: dict[str, str], root: Path, both: DetectResult
) -> None:
    wide = run(self_misled, root, level="both", segments=3, response_threshold=0.9)
    for before, after in zip(table(both.samples), table(wide.samples), strict=True):
        assert (before["row_id"], before["segment"]) == (after["row_id"], after["segment"])
        assert before["score"] == after["score"]
        limit = 0.9 if after["segment"] else 0.15
        inside = zip(after["score"], after["prunable"], strict=True)
        assert after["confounder"] == [score <= limit and cut for score, cut in inside]
        assert (before["spans"] == after["spans"]) or after["segment"]


def test_the_target_is_the_next_segment_or_all_the_rest(
    self_misled: dict[str, str], root: Path, both: DetectResult
) -> None:
    chosen = run(self_misled, root, level="both", segments=3, target="next")
    shorter = 0
    for rest, following in zip(table(both.samples), table(chosen.samples), strict=True):
        borders = split_response(ROWS[rest["row_id"]]["completion"], 3)
        # Behind the last border the next segment is the rest.
        is_shorter = 0 < rest["segment"] < len(borders)
        assert (rest["student_nll"] != following["student_nll"]) == is_shorter
        shorter += is_shorter
    assert shorter


@pytest.mark.parametrize("target", ["next", "rest"])
def test_labels_of_a_view(target: str) -> None:
    row = ROWS[0]
    whole = row["completion"]
    example = Example(0, ({"role": "user", "content": row["prompt"]},), whole, answer="0")
    config = DetectConfig(level="response", segments=3, target=target)  # type: ignore[arg-type]
    set_views(example, config)
    renderer = Renderer(detect_pair.make_tokenizer())
    first, second = split_response(whole, 3)
    assert [view.prefix for view in example.views] == [whole[:first], whole[:second]]
    for view, stop in zip(example.views, (second, len(whole)), strict=True):
        rendering = render_view(renderer, view, config)
        labels = renderer.tokenizer.decode(rendering.input_ids[rendering.loss_mask].tolist())
        wanted = whole[len(view.prefix) : stop if target == "next" else None].split()
        is_end = target == "rest" or stop == len(whole)
        assert labels.split() == [*wanted, *(["<eos>"] if is_end else [])]
        covered = {view.text[a:b].strip() for a, b in rendering.offsets[rendering.domain]}
        assert covered == set(view.prefix.split())


def test_a_response_of_one_sentence_has_no_view(
    self_misled: dict[str, str], tmp_path: Path
) -> None:
    rows = [*ROWS[:4], {"prompt": ROWS[1]["prompt"], "completion": "0", "answer": "0"}]
    result = run(self_misled, tmp_path, rows, level="response", select="all")
    check_sums(result, len(rows))
    assert reasons(result)["response_not_divided"] == 1
    assert result.funnel["notes"]["response_not_divided"] == 1


def test_marked_rows_without_a_view_are_no_fault_of_the_grading(
    pair: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = detect_run.ROWS
    marked = sum(detect_run.CONFOUNDED)
    result = detect_run.run(pair, tmp_path, rows, level="response")
    (note,) = result.funnel["templates"]
    assert f"the {marked} marked rows left as {marked} response not divided. A resp" in note
    assert "--level instruction" in note and "--grade" not in note
    assert "No row is left to search" in capsys.readouterr().out
    result = detect_run.run(pair, tmp_path, rows, level="response", select="all", validate="none")
    assert f"the {len(rows)} usable rows left as" in result.funnel["templates"][0]


def test_beginnings_from_which_the_student_goes_on_rightly_are_told() -> None:
    example = Example(0, ({"role": "user", "content": "1 + 1?"},), "2.\n2", answer="2")
    example.views = [example.derived(segment=1, prefix="2.\n", completion="2")]
    example.views[0].leave("mark", "student_right", "the answer ends '2'")
    end_with_views(example)
    (note,) = nothing_scored([example], DetectConfig(level="response"))
    assert "the 1 marked rows left as 1 response student right" in note
    assert "more --segments" in note and "border" not in note


def test_the_teachers_responses_are_divided_too(self_misled: dict[str, str], root: Path) -> None:
    options = {"level": "response", "completion_source": "teacher", "select": "all"}
    result = run(self_misled, root, validate="none", **options)
    check_sums(result, len(ROWS))
    originals = {line["row_id"]: line for line in lines_of(result, "original")}
    assert lines_of(result)
    for line in lines_of(result):
        # Other than the dataset's, a generated response has no line breaks, but sentences.
        ours, whole = (one["completion"][0]["content"] for one in (line, originals[line["row_id"]]))
        assert whole.endswith(ours[line["context"] :]) and len(ours) < len(whole)


def test_datasets_of_the_response_level_are_trained_on(
    self_misled: dict[str, str], both: DetectResult, tmp_path: Path
) -> None:
    examples = load_examples(both.dataset)
    for one, line in zip(examples, table(both.dataset), strict=True):
        assert one.prefix + one.completion == line["completion"][0]["content"]
        assert len(one.prefix) == line["context"] and one.segment == line["segment"]
        if line["branch"] != "original":
            whole = ROWS[one.row_id]["completion" if one.segment else "prompt"]
            ((start, stop),) = one.cut
            assert whole[start:stop].split()[0] in WORDS
    trained = distill(
        DistillArguments(**self_misled, dataset=str(both.arm)),
        make_config(tmp_path / "student", max_steps=2),
    )
    log = [line for line in trained.metrics["log"] if "loss" in line]
    assert len(log) == 2 and all(line["loss"] > 0 for line in log)
    assert json.loads(json.dumps(trained.metrics))["rows"]
