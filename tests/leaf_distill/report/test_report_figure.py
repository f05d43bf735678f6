"""`leaf report --figure`: one row's heat map of a real run of the embedded pair, as SVG."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from report_run import add_cut, scored, write_run

from leaf_distill.cli import main
from leaf_distill.data.example import Answer, Role
from leaf_distill.demo.run import MIX, detection_config, one_thread, write_problems
from leaf_distill.demo.task import make_problems
from leaf_distill.detection.pipeline import detect
from leaf_distill.models.svg import WIDTHS
from leaf_distill.report import write_figure, write_report

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def arm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An arm that `leaf detect` wrote for 40 problems of the demo."""
    directory = tmp_path_factory.mktemp("demo")
    problems = make_problems(40, seed=1, mix=MIX)
    rows = write_problems(directory / "rows.jsonl", problems)
    with one_thread():
        return detect(detection_config(rows, directory)).arm


def texts(path: Path) -> list[str]:
    return [one.text or "" for one in ElementTree.parse(path).getroot().iter(f"{SVG}text")]


def kept(arm: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The first row with a kept cut, and that cut."""
    for row in pq.read_table(arm / "samples.parquet").to_pylist():
        for candidate in row["candidates"]:
            if candidate["kept"]:
                return row, candidate
    raise AssertionError("no row has a kept cut")


@pytest.mark.parametrize("columns", [1, 2])
def test_the_command_draws_the_pages_first_row(arm: Path, tmp_path: Path, columns: int) -> None:
    path = tmp_path / "figures" / "heat.svg"
    words = ["report", f"--run_dir={arm.parent.parent}", f"--figure={path}"]
    assert main([*words, f"--figure_columns={columns}"]) == 0
    row, candidate = kept(arm)
    shown = texts(path)
    letter = WIDTHS[columns][1]
    figure = ElementTree.parse(path).getroot()
    drawn = [x for x in figure.iter(f"{SVG}text") if float(x.attrib["font-size"]) == letter]
    assert len(drawn) == 3 * len(row["text"].split())
    assert sorted(one.text or "" for one in drawn) == sorted(3 * row["text"].split())
    lines = shown.count("teacher")
    assert lines == shown.count("student") == shown.count("score") >= 2
    answers = [one for one in shown if one.startswith("student, ")]
    assert row["student_answer"].strip() in answers[0] and answers[0].endswith("\u2717 wrong")
    assert candidate["student_answer"].strip() in answers[1]
    assert answers[1].endswith("\u2713 right")
    frames = [one for one in figure.iter(f"{SVG}rect") if one.get("rx")]
    assert len(frames) >= 2  # of the cut, and in the legend
    assert not (arm / "report.html").exists()
    assert main([*words, "--row=999"]) == 1


def test_the_same_run_gives_the_same_figure_and_only_a_figure_is_replaced(
    arm: Path, tmp_path: Path
) -> None:
    row, _ = kept(arm)
    path = write_figure(arm, tmp_path / "one.svg", row_id=row["row_id"])
    first = path.read_bytes()
    assert write_figure(arm, path) == path and path.read_bytes() == first
    other = tmp_path / "other.svg"
    other.write_text("<svg/>")
    with pytest.raises(ValueError, match="figure: must be a new file or an earlier figure, got"):
        write_figure(arm, other)
    with pytest.raises(ValueError, match=r"figure: must end in \.svg, got .*rsvg-convert"):
        write_figure(arm, tmp_path / "one.png")


def test_a_row_of_its_own_is_the_page_too(
    arm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row, _ = kept(arm)
    page = tmp_path / "page.html"
    words = ["report", f"--run_dir={arm}", f"--output={page}", f"--row={row['row_id']}"]
    assert main(words) == 0
    assert (
        page.read_text().count("<article") == 1 and f'id="row-{row["row_id"]}"' in page.read_text()
    )
    with pytest.raises(SystemExit):
        main([*words, "--figure=x.svg"])
    assert "figure: must be left out with output" in capsys.readouterr().err


def test_hard_texts_and_rows_without_a_cut(tmp_path: Path) -> None:
    evil = "<b>&amp;\"' \x00 one\ntwo ]]> 漢字"
    plain = scored(3, evil, spans=[], answers={})
    dropped = add_cut(scored(4, "one two three"), [(0, 3)], "student_wrong")
    arm = write_run(tmp_path / "run", [plain, dropped])
    shown = texts(write_figure(arm, tmp_path / "3.svg", row_id=3))
    assert "<b>&amp;\"'" in shown and "\u2400" in shown and not any("student," in x for x in shown)
    shown = texts(write_figure(arm, tmp_path / "4.svg", row_id=4))
    assert [one for one in shown if one.startswith("student, cut text")]
    empty = write_run(tmp_path / "empty", [])
    with pytest.raises(ValueError, match="run_dir: must have a scored row to draw"):
        write_figure(empty, tmp_path / "none.svg")


@pytest.mark.parametrize("columns", [1, 2])
def test_a_long_answer_leaves_room_for_its_verdict(tmp_path: Path, columns: int) -> None:
    answers: dict[Role, Answer] = {"student": Answer("漢字" * 200 + " 41", 2, "no_answer")}
    row = add_cut(scored(3, "one two", answers=answers), [(0, 3)], "student_wrong")
    row.candidates[0].answers = {"student": Answer("word " * 100 + "42", 2, "wrong")}
    arm = write_run(tmp_path / "run", [row])
    shown = texts(write_figure(arm, tmp_path / "one.svg", columns=columns))
    whole, cut = (one for one in shown if one.startswith("student, "))
    assert whole.startswith(("student, whole text:  \u2026漢", "student, whole text:  \u2026字"))
    assert whole.endswith("漢字 41  no answer") and cut.endswith("word 42  \u2717 wrong")
    width, letter = WIDTHS[columns]
    for one in (whole, cut):
        wide = sum(2 if character in "漢字" else 1 for character in one)
        assert width - 30 < 16 + wide * letter * 0.85 * 0.6 <= width


def sequences(page: Path, row_id: int) -> str:
    text = page.read_text()
    start = text.index(f'id="row-{row_id}"')
    stop = text.find("</article>", start)
    return text[start:stop]


def test_the_page_shows_the_sequence_with_the_template(arm: Path) -> None:
    row, _ = kept(arm)
    read = row["student_sequence"]
    assert [part["kind"] for part in read] == ["template", "text", "template", "completion"]
    assert "".join(part["text"] for part in read) == (
        f"<user> {row['text']} <assistant> {row['completion']}<end>"
    )
    part = sequences(write_report(arm), row["row_id"])
    (arm / "report.html").unlink()
    assert "as both models read it" in part and "The teacher</p>" not in part
    assert '<span class="template">&lt;user&gt; </span>' in part
    assert f'<span class="analyzed">{row["text"]}</span>' in part
    assert '<span class="template"> &lt;assistant&gt; </span>' in part


def test_two_renderings_are_both_shown_and_older_runs_have_none(arm: Path, tmp_path: Path) -> None:
    table = pq.read_table(arm / "samples.parquet")
    other = [[{"kind": "text", "text": "of the teacher"}]] * len(table)
    at = table.schema.get_field_index("teacher_sequence")
    kind = table.schema.field(at)
    place = tmp_path / "run" / "arms" / "span"
    place.mkdir(parents=True)
    (tmp_path / "run" / "run.json").write_bytes((arm.parent.parent / "run.json").read_bytes())
    (place / "funnel.json").write_bytes((arm / "funnel.json").read_bytes())
    (place / "dataset.parquet").write_bytes((arm / "dataset.parquet").read_bytes())
    row, _ = kept(arm)
    changed = table.set_column(at, kind, pa.array(other, kind.type))
    pq.write_table(changed, place / "samples.parquet")
    part = sequences(write_report(place), row["row_id"])
    assert '<span class="analyzed">of the teacher</span>' in part
    assert "The teacher</p>" in part and "The student</p>" in part
    pq.write_table(
        table.drop_columns(["teacher_sequence", "student_sequence"]), place / "samples.parquet"
    )
    part = sequences(write_report(place), row["row_id"])
    assert "The whole sequence" not in part and "Student saliency" in part
    pq.write_table(
        changed.set_column(at, "teacher_sequence", pa.array([3] * len(table))),
        place / "samples.parquet",
    )
    with pytest.raises(ValueError, match="teacher_sequence"):
        write_report(place)


def test_report_settings_are_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["report", "--run_dir=x", "--figure_columns=3"])
    assert "figure_columns: must be from 1 to 2, got 3" in capsys.readouterr().err
