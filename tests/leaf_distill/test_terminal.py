"""What commands print: in a file, on a terminal of 80 columns, and what can be typed next."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import pty
import re
import shlex
import struct
import subprocess
import sys
import termios
import warnings
from pathlib import Path

import pytest

from leaf_distill.cli import COMMANDS, main
from leaf_distill.demo.run import STUDENT, TEACHER, write_problems
from leaf_distill.demo.task import make_problems
from leaf_distill.evaluation.tables import printed_table
from leaf_distill.terminal import Progress, plain_console, readable_messages, say, width

MIX = {"clean": 0.3, "aligned": 0.3, "misaligned": 0.4}
MODELS = ["--student", "student", "--teacher", "teacher"]
BAR = re.compile("[\r\x1b\u2588\u258f]|%\\|")


def leaf(directory: Path, *words: str) -> list[str]:
    """Return the lines that a command leaves in a file, stdout and stderr together."""
    environment = {**os.environ, "COLUMNS": "80", "LEAF_CACHE_DIR": str(directory / "cache")}
    done = subprocess.run(
        [sys.executable, "-m", "leaf_distill", *words],
        cwd=directory,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout.splitlines()


def on_terminal(directory: Path, *words: str) -> str:
    """Return all that a command writes to a terminal of 80 columns, stdout and stderr together."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    environment = {**os.environ, "TERM": "xterm"}
    environment.pop("COLUMNS", None)
    environment["LEAF_CACHE_DIR"] = str(directory / "cache")
    command = [sys.executable, "-m", "leaf_distill", *words]
    process = subprocess.Popen(
        command, cwd=directory, env=environment, stdin=theirs, stdout=theirs, stderr=theirs
    )
    os.close(theirs)
    text = b""
    try:
        while piece := os.read(ours, 65536):
            text += piece
    except OSError:  # Linux tells so that the other end is closed
        pass
    os.close(ours)
    assert process.wait() == 0, text.decode()
    return text.decode()


def screen(text: str) -> list[str]:
    """Return the lines as a terminal shows them in the end: a carriage return starts one anew."""
    lines = []
    for line in re.sub("\x1b\\[[0-9;]*m", "", text).replace("\r\n", "\n").split("\n"):
        shown = ""
        for part in line.split("\r"):
            part = part.replace("\x1b[A", "")
            shown = part + shown[len(part) :]
        lines.append(shown.rstrip())
    return lines


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the embedded pair and rows for it."""
    root = tmp_path_factory.mktemp("terminal")
    (root / "student").symlink_to(STUDENT)
    (root / "teacher").symlink_to(TEACHER)
    write_problems(root / "rows.jsonl", make_problems(60, seed=1, mix=MIX))
    write_problems(root / "held-out.jsonl", make_problems(20, seed=2, mix=MIX))
    return root


def next_commands(lines: list[str]) -> list[list[str]]:
    """Return the words of the commands that are printed to be typed next."""
    text = "\n".join(lines).replace("\\\n", "")
    return [shlex.split(line) for line in text.splitlines() if line.startswith("  leaf ")]


def test_each_command_fits_80_columns_in_a_file_and_names_the_next(directory: Path) -> None:
    short = ["--max_new_tokens", "12", "--grade", "number", "--output_dir"]
    detect = ["detect", *MODELS, "--dataset", "rows.jsonl", *short, "run"]
    chain = [detect]
    printed = leaf(directory, *detect)
    report, distill = next_commands(printed)
    assert report == ["leaf", "report", "--run_dir", "run/arms/span"]
    chain += [report[1:], [*distill[1:], "--eval_dataset", "held-out.jsonl", "--max_steps", "4"]]
    for words in chain[1:]:
        lines = leaf(directory, *words)
        printed += lines
    (evaluate,) = next_commands(lines)
    assert evaluate[1:7] == [
        "evaluate",
        "--model",
        "student",
        "run/student",
        "--dataset",
        words[-3],
    ]
    assert "--grade number" in " ".join(evaluate)  # as the detection graded
    printed += leaf(directory, *evaluate[1:])
    cache = ["cache", "--teacher", "teacher", "--dataset", "run", "--output_dir", "run/teacher"]
    printed += leaf(directory, *cache)
    printed += leaf(directory, "sweep", "--run_dir", "run", "--thresholds", "0.05", "0.2")
    printed += leaf(directory, "analyze", "--run_dir", "run")
    again = leaf(directory, *detect)
    assert any("nothing was left to do" in line for line in again)
    assert [line for line in (*printed, *again) if len(line) > 80] == []
    assert not BAR.search("\n".join(printed))


def test_a_comparison_fits_80_columns_and_prints_no_table_for_each_arm(directory: Path) -> None:
    words = ["compare", *MODELS, "--dataset", "rows.jsonl", "--eval_dataset", "held-out.jsonl"]
    words += ["--arms", "kd", "span", "--max_steps", "2", "--originals_per_step", "8"]
    words += ["--grade", "number", "--max_new_tokens", "12", "--output_dir", "compared"]
    lines = leaf(directory, *words)
    assert [line for line in lines if len(line) > 80] == []
    assert not BAR.search("\n".join(lines))
    steps = [line for line in lines if line.endswith(" ...")]  # in order, also with stdout's lines
    assert steps[:3] == ["detection: span ...", "distillation: kd ...", "distillation: span ..."]
    assert lines.index(steps[0]) < next(
        at for at, line in enumerate(lines) if "counterfactuals kept" in line
    )
    assert not any(line.startswith(("verdict", "rows in")) for line in lines)
    assert not any("no counterfactuals" in line for line in lines)  # kd has none on purpose
    assert next_commands(lines) == [["leaf", "analyze", "--run_dir", "compared"]]


def test_a_run_that_scores_nothing_ends_with_the_reason(directory: Path) -> None:
    words = ["--dataset", "rows.jsonl", "--grade", "number", "--max_new_tokens", "1"]
    lines = leaf(directory, "detect", *MODELS, *words, "--output_dir", "empty")
    assert next_commands(lines) == []
    text = " ".join(lines)
    reason = text.index("note: No row is left to search: ")
    assert text.index("The dataset is ") < reason == text.rindex("note: ")
    assert text.endswith("give --select all --validate none.")


def test_on_a_terminal_bars_are_gone_in_the_end(directory: Path) -> None:
    rows = ["--dataset", "rows.jsonl", "--eval_dataset", "held-out.jsonl"]
    words = [*rows, "--max_steps", "3", "--output_dir", "on-terminal"]
    text = on_terminal(directory, "distill", *MODELS, *words)
    assert "\u2588" in text and "steps" in text and "batches" in text  # there were bars
    assert "%|" not in text and "it/s" not in text  # and none of transformers' own
    lines = screen(text)
    assert not any("\u2588" in line or ("steps " in line and "left" in line) for line in lines)
    assert max(map(len, lines)) <= 80


@pytest.mark.parametrize("name", ["", *COMMANDS])
def test_help_fits_80_columns(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    try:
        assert main([name, "--help"] if name else ["--help"]) == 0
    except SystemExit as stop:
        assert not stop.code
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    if name:
        example = " ".join(lines[lines.index("example:") + 1 :]).replace("\\", "")
        assert example.split() == COMMANDS[name].example.split()


def test_an_error_ends_its_lines_between_words(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["evaluate", "--model", "m", "--benchmark", "gsm9k", "--output_dir", "o"]
    assert main(words) == 1
    whole = capsys.readouterr().err
    assert whole.count("\n") == 1  # one line for what reads a file
    monkeypatch.setenv("COLUMNS", "60")
    assert main(words) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) > 2 and max(map(len, lines)) <= 60
    assert " ".join(lines) == whole.strip()


def test_a_file_has_no_width_unless_columns_says_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    with (tmp_path / "file").open("w") as file:
        assert width(file) is None
        monkeypatch.setenv("COLUMNS", "72")
        assert width(file) == 72
        monkeypatch.setenv("COLUMNS", "many")
        assert width(file) is None


def test_progress_in_a_file_is_a_line_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("leaf_distill.terminal.LOG_INTERVAL_S", 0.0)
    with Progress(10, "student answers") as progress:
        progress.update(4)
        progress.update(6)
    lines = capsys.readouterr().err.splitlines()
    assert [re.sub(", [0-9]+ s$", "", line) for line in lines] == [
        "student answers: 4 of 10 rows",
        "student answers: 10 of 10 rows",
        "student answers: all 10 rows",
    ]


def test_progress_that_is_short_leaves_no_line(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(10, "student answers") as progress:
        progress.update(10)
    assert capsys.readouterr().err == ""


def test_messages_are_notes_of_one_line_and_those_for_developers_are_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(logging.getLogger(), "handlers", [])  # pytest has some of its own
    monkeypatch.setattr(sys, "warnoptions", [])
    before = warnings.showwarning
    with readable_messages():
        logging.getLogger("leaf_distill.models").warning("a row is %s", "long")
        logging.getLogger("another.library").warning("something")
        warnings.warn("look out:\n  a step", UserWarning, stacklevel=1)
        warnings.warn("will change", FutureWarning, stacklevel=1)
        hub = logging.getLogger("huggingface_hub.utils._http")
        for attempt in range(5):
            hub.warning("no answer in %.1f s", 2**attempt / 2)
        hub.warning("too many requests")
    assert capsys.readouterr().err.splitlines() == [
        "note: a row is long",
        "another: something",
        "warning: UserWarning: look out: a step",
        "huggingface_hub: no answer in 0.5 s",
        "huggingface_hub: too many requests",
    ]
    assert warnings.showwarning is before and not logging.getLogger().handlers


def test_a_message_has_its_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    with readable_messages():
        try:
            json.loads("{")
        except ValueError:
            logging.getLogger("another.library").exception("it failed")
    first, *lines = capsys.readouterr().err.splitlines()
    assert first == "another: it failed"
    assert lines[0].startswith("Traceback") and lines[-1].startswith("json.decoder.JSONDecodeError")


def test_warnings_that_were_asked_for_are_shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    monkeypatch.setattr(sys, "warnoptions", ["default"])
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        with readable_messages():
            warnings.warn("will change", FutureWarning, stacklevel=1)
    assert capsys.readouterr().err == "warning: FutureWarning: will change\n"


def test_a_path_is_printed_as_it_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = "/tmp/run:100:/[red]/x"
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    say(path)
    plain_console().print(printed_table("runs", [("run", "rows"), (path, "3")], caption=path))
    with readable_messages():
        logging.getLogger("leaf_distill.io").warning("%s is full", path)
    said, shown = capsys.readouterr()
    assert said.count(path) == 3 and shown == f"note: {path} is full\n"
