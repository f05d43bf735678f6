"""Broken and foreign run directories give one sentence, whatever is wrong with them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from report_run import add_cut, scored, write_run

from leaf_distill.report import write_report

SHAPES: list[Any] = [None, True, 1, 0.5, "x", [], [None], {}, {"a": {}}]


@pytest.fixture
def arm(tmp_path: Path) -> Path:
    row = add_cut(scored(0, "one two three"), [(0, 3)])
    return write_run(tmp_path / "run", [row], notes={"cut_inside_word": 1})


def sentence(directory: Path) -> str:
    """The error as the command prints it; anything but a ValueError fails."""
    with pytest.raises(ValueError) as caught:
        write_report(directory)
    text = str(caught.value)
    assert type(caught.value) is ValueError and "\n" not in text and len(text) < 600
    return text


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths to all values inside a JSON value, and of a list to its first."""
    entries = value.items() if isinstance(value, dict) else enumerate(value[:1])
    for key, item in entries:
        yield (*path, key)
        if isinstance(item, dict | list):
            yield from places(item, (*path, key))


def replaced(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    copy = json.loads(json.dumps(value))
    inner = copy
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = new
    return copy


@pytest.mark.parametrize("name", ["funnel.json", "run.json"])
def test_every_wrong_shape_is_a_page_or_a_sentence(arm: Path, name: str) -> None:
    path = arm / name if name == "funnel.json" else arm.parent.parent / name
    good = json.loads(path.read_text())
    refused = 0
    for where in places(good):
        for shape in SHAPES:
            path.write_text(json.dumps(replaced(good, where, shape)))
            try:
                write_report(arm)
            except ValueError as error:
                assert str(error).startswith(f"{path}: ") and "\n" not in str(error)
                refused += 1
    assert refused > 10
    for shape in SHAPES:
        path.write_text(json.dumps(shape))
        assert str(path) in sentence(arm)


@pytest.mark.parametrize(
    ("part", "value"),
    [
        (("stages", 0, "rows"), "many"),
        (("stages",), None),
        (("settings", "threshold"), [1]),
        (("nll", "student"), []),
        (("left",), None),
        (("settings",), "none"),
    ],
)
def test_the_sentence_names_the_file(arm: Path, part: tuple[Any, ...], value: Any) -> None:
    path = arm / "funnel.json"
    path.write_text(json.dumps(replaced(json.loads(path.read_text()), part, value)))
    wanted = f"{path}: must be as LeaF writes it, got something else ("
    assert sentence(arm).startswith(wanted)


def test_a_file_cut_short_is_a_sentence(arm: Path) -> None:
    for path in (arm / "funnel.json", arm.parent.parent / "run.json", arm / "samples.parquet"):
        good = path.read_bytes()
        for size in {0, 1, 5, len(good) // 2, len(good) - 9}:
            path.write_bytes(good[:size])
            assert str(path) in sentence(arm)
        path.write_bytes(b"\xff\xfe" + good)
        assert str(path) in sentence(arm)
        path.unlink()
        assert str(path) in sentence(arm)
        path.write_bytes(good)
    write_report(arm)


def test_deep_values_are_a_sentence(arm: Path) -> None:
    path = arm / "funnel.json"
    text = path.read_text()
    for depth in (400, 950, 5000):
        for deep in ('{"a":' * depth + "1" + "}" * depth, "[" * depth + "]" * depth):
            path.write_text(text.replace('"columns": null', f'"columns": {deep}'))
            assert path.read_text() != text
            try:
                write_report(arm)
            except ValueError as error:
                assert str(arm) in str(error)


def test_flipped_bytes_of_the_samples_are_noticed(arm: Path) -> None:
    path = arm / "samples.parquet"
    good = path.read_bytes()
    page = write_report(arm).read_bytes()
    for at in range(0, len(good), 97):
        path.write_bytes(good[:at] + bytes([good[at] ^ 0x55]) + good[at + 1 :])
        try:
            assert write_report(arm).read_bytes() == page
        except ValueError as error:
            assert str(error).startswith(f"{path}: ")


def test_samples_of_another_kind_are_a_sentence(arm: Path) -> None:
    path = arm / "samples.parquet"
    good = pq.read_table(path)
    pq.write_table(pa.table({"row_id": [1]}), path)
    assert "no or another type for the columns segment, messages, text" in sentence(arm)
    for at, field in enumerate(good.schema):
        pq.write_table(good.set_column(at, field.name, [[b"\xff"]]), path)
        assert f"for the columns {field.name}" in sentence(arm)
        if field.name not in ("segment", "answer", "prunable", "teacher_nll", "student_nll"):
            empty = pa.nulls(1, field.type)
            pq.write_table(good.set_column(at, field.name, empty), path)
            if not any(word in field.name for word in ("answer", "verdict", "sequence")):
                assert f"{path}: must be as LeaF writes it" in sentence(arm)


def test_what_is_not_a_run_directory_is_said(arm: Path, tmp_path: Path) -> None:
    for directory, words in (
        (
            tmp_path / "nowhere",
            "must be the run directory of a `leaf detect`, got a path that does",
        ),
        (tmp_path, "must be the run directory of a finished `leaf detect`, got one without an arm"),
        (arm / "funnel.json", "must be a directory"),
        (tmp_path / ("x" * 300), "must be a directory"),
    ):
        text = sentence(directory)
        assert text.startswith("run_dir: ") and words in text
