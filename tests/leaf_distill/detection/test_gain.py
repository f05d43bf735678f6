"""The accuracy gained by cutting, counted on answers whose verdicts are known."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from detect_run import CONFOUNDED, ROWS, run, table

from leaf_distill.data.dataset import load_examples
from leaf_distill.data.example import Answer, Example
from leaf_distill.data.tests import Tests
from leaf_distill.detection.config import DetectConfig
from leaf_distill.detection.funnel import funnel, show_funnel
from leaf_distill.detection.gain import pruning_gain
from leaf_distill.detection.pipeline import DetectResult
from leaf_distill.statistics import wilson_interval

CONFIG = DetectConfig(student="s", teacher="t", dataset="d")


def answered(
    student: str, cuts: Sequence[str | None] = (), *, stage: str = "", source: str | None = None
) -> Example:
    """A row with the verdicts of the student on it and on its cuts; None: the cut was not asked."""
    messages = ({"role": "user", "content": "How many?"},)
    example = Example(row_id=0, messages=messages, completion="3", source=source)
    example.answers["student"] = Answer("3", 1, student)
    for at, verdict in enumerate(cuts):
        candidate = Example(row_id=0, messages=messages, completion="3", candidate_id=at)
        if verdict is None:
            candidate.leave("prune", "duplicate")
        else:
            candidate.answers["student"] = Answer("3", 1, verdict)
        example.candidates.append(candidate)
    if stage:
        example.leave(stage, "reason")
    return example


ANSWERED = [
    *(answered("right", stage="mark", source="a") for _ in range(4)),
    answered("cut_off", stage="predict", source="a"),
    answered("wrong", stage="mark", source="a"),  # the teacher fails it too
    answered("wrong", ["right", "wrong", "right", None], source="a"),
    answered("wrong", ["wrong", "cut_off"], stage="validate", source="a"),
    answered("no_answer", stage="detect", source="b"),
    answered("wrong", [None], stage="prune", source="b"),
    answered("wrong", ["right"], stage="validate"),  # the teacher fails on the cut
]
UNASKED = Example(row_id=0, messages=(), completion="")


def test_a_row_is_repaired_where_the_student_is_right_on_any_cut() -> None:
    whole, of_a, of_b, unnamed = pruning_gain([*ANSWERED, UNASKED], CONFIG)
    assert whole == {
        "source": "all",
        **{"asked": 11, "right": 4, "marked": 5, "with_cuts": 3, "repaired": 2},
        **{"cuts": 6, "cuts_right": 3, "repaired_share": 2 / 5, "cut_share": 1 / 2},
        "interval": list(wilson_interval(2, 5)),
        **{"before": 4 / 11, "best_cut": 6 / 11, "mean_cut": pytest.approx((4 + 2 / 3 + 1) / 11)},
    }
    assert [one["source"] for one in (of_a, of_b, unnamed)] == ["a", "b", "no source"]
    for count in ("asked", "right", "marked", "with_cuts", "repaired", "cuts", "cuts_right"):
        assert of_a[count] + of_b[count] + unnamed[count] == whole[count]
    # Its two marked rows have no cut: a cut has no effect there, not one of 0.
    shares = ("repaired_share", "interval", "cut_share", "best_cut", "mean_cut")
    assert (of_b["marked"], [of_b[name] for name in shares]) == (2, [None] * 5)


def test_rows_without_sources_have_one_line_and_no_share_of_nothing() -> None:
    (whole,) = pruning_gain([answered("right", stage="mark")], CONFIG)
    assert (whole["repaired_share"], whole["interval"], whole["cut_share"]) == (None, None, None)
    assert (whole["before"], whole["best_cut"], whole["mean_cut"]) == (1.0, None, None)
    assert pruning_gain([UNASKED], CONFIG) == []


@pytest.mark.parametrize(
    "settings", [{"select": "all"}, {"validate": "teacher"}, {"validate": "none"}]
)
def test_nothing_is_said_where_the_student_was_not_asked_twice(settings: Any) -> None:
    config = DetectConfig(student="s", teacher="t", dataset="d", **settings)
    assert funnel(ANSWERED, config)["sources"] == []


def printed(examples: Sequence[Example], capsys: pytest.CaptureFixture[str]) -> str:
    show_funnel({**funnel(examples, CONFIG), "seconds": {}}, [])
    return capsys.readouterr().out


def test_the_printed_funnel_has_a_line_or_where_rows_have_sources_a_table(
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = printed(ANSWERED, capsys)
    assert "Marked rows that a cut repairs" in text
    row = next(line for line in text.splitlines() if "no source" in line)
    assert [word for word in row.split() if word[0].isdigit()][:2] == ["1", "1"]
    alone = [answered("wrong", ["right"]), answered("wrong", ["wrong"], stage="validate")]
    line = "cutting repairs 1 of 2 marked rows, 50.0% (9.5% to 90.5%)"
    assert line in printed(alone, capsys)
    assert "repairs" not in printed([answered("right", stage="mark")], capsys)


def test_the_printed_funnel_has_no_share_where_no_cut_was_made(
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = printed([*ANSWERED, answered("right", stage="mark", source="c")], capsys)
    lines = text.splitlines()
    head = next(line for line in lines if line.startswith("source"))
    heads = ("marked", "repaired", "share and 95 % interval", "accuracy before", "best cut")
    ends = [head.index(name) + len(name) for name in heads]
    starts = [len("source"), *ends]
    cells = {
        line[0]: [line[start:end].strip() for start, end in zip(starts, ends, strict=False)]
        for line in lines
        if line.startswith(("b ", "c "))
    }
    assert cells == {
        "b": ["2", "", "no cut was made", "0.0%", ""],
        "c": ["0", "", "", "100.0%", ""],
    }
    for source in (None, "a"):
        uncut = [answered("wrong", [None], stage="prune", source=source) for _ in range(6)]
        text = printed(uncut, capsys)
        assert "no cut was made in any of 6 marked rows" in text
        assert "repairs" not in text and "%" not in text


def test_a_run_counts_what_its_samples_show(finished: DetectResult) -> None:
    (whole,) = finished.funnel["sources"]
    samples = table(finished.samples)
    cuts = [[cut["student_verdict"] for cut in sample["candidates"]] for sample in samples]
    asked = [[verdict for verdict in row if verdict is not None] for row in cuts]
    assert (whole["asked"], whole["marked"]) == (len(ROWS), sum(CONFOUNDED))
    assert whole["right"] == len(ROWS) - sum(CONFOUNDED)
    assert whole["repaired"] == sum("right" in row for row in asked) > 0.8 * whole["marked"]
    assert whole["cuts"] == sum(map(len, asked))
    assert json.loads((finished.arm / "funnel.json").read_text())["sources"] == [whole]


def test_tests_and_source_reach_the_counterfactuals_and_read_back(
    pair: dict[str, str], tmp_path: Path
) -> None:
    tests = Tests("asserts", code=("assert add(1, 2) == 3",), setup="import math")
    rows: list[dict[str, Any]] = [
        {**row, "tests": tests.to_json(), "data_source": name} if name else dict(row)
        for row, name in zip(ROWS, ["sticker", "rain", ""] * len(ROWS), strict=False)
    ]
    result = run(pair, tmp_path, rows)
    names = [one["source"] for one in result.funnel["sources"]]
    assert names == ["all", "rain", "sticker", "no source"]
    for name in ("dataset.parquet", "dataset.jsonl"):
        examples = load_examples(str(result.arm / name))
        assert {one.branch for one in examples} == {"original", "counterfactual"}
        for one in examples:
            given = rows[one.row_id].get("data_source")
            assert (one.source, one.tests) == (given, tests if given else None)
    lines = table(result.dataset)
    assert {line["source"] for line in lines} == {"sticker", "rain", None}
    assert not {"tests", "source"} & table(result.samples)[0].keys()


def test_a_dataset_without_tests_or_sources_has_no_such_column(finished: DetectResult) -> None:
    assert not {"tests", "source"} & table(finished.dataset)[0].keys()
