"""Hostile programs reach nothing, outlive nothing, and are never right."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hostile import ATTACKS

from leaf_distill.data.tests import Tests
from leaf_distill.grading.code import CodeGrader, Judged
from leaf_distill.grading.sandbox import process
from leaf_distill.grading.sandbox.process import run_script, unavailable

SECRET = "the user's own secret 8841"
SQUARE = Tests("asserts", code=("assert target(3) == 9", "assert abs(target(4) - 16) < 1e-6"))

pytestmark = pytest.mark.skipif(bool(unavailable()), reason=unavailable())


def test_programs_are_confined_where_they_may_read_the_package(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As where it is installed below the standard library, in site-packages."""
    readable = (*process._readable(), str(process.HERE))
    monkeypatch.setattr(process, "_readable", lambda: readable)
    assert unavailable.__wrapped__() == ""


def test_a_file_that_a_program_can_read_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    readable = (*process._readable(), tempfile.gettempdir())
    monkeypatch.setattr(process, "_readable", lambda: readable)
    told = unavailable.__wrapped__()
    assert f"a confined process could read a file in {tempfile.gettempdir()}; set TMPDIR" in told


def test_a_probe_that_does_not_end_is_no_leak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "PROBE", "{!r}.nothing")
    assert "did not run: AttributeError: 'str' object has no" in unavailable.__wrapped__()


class World:
    """What a program must neither reach nor change, and the verdict on each attack."""

    def __init__(self, folder: Path) -> None:
        self.secret, self.outside = folder / "secret", folder / "outside"
        self.victim = folder / "victim"
        self.secret.write_text(SECRET)
        self.victim.write_text("untouched")
        self.servers = []
        for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
            port = self.servers[0].getsockname()[1] if self.servers else 0
            server = socket.socket(socket.AF_INET, kind)
            server.bind(("127.0.0.1", port))
            server.setblocking(False)
            self.servers.append(server)
        self.servers[0].listen()
        self.process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        names = {
            **{"secret": self.secret, "outside": self.outside, "victim": self.victim},
            **{"folder": folder, "pid": self.process.pid},
            "port": self.servers[0].getsockname()[1],
        }
        self.programs = dict(ATTACKS)
        for name, text in ATTACKS.items():
            for word, value in names.items():
                text = text.replace(f"<{word}>", str(value))
            self.programs[name] = text
        self.verdicts: dict[str, Judged] = {}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    world = World(tmp_path_factory.mktemp("user"))
    own = tmp_path_factory.mktemp("temporary")
    before, tempfile.tempdir = tempfile.tempdir, str(own)
    os.environ["LEAF_TEST_SECRET"] = SECRET
    try:
        with CodeGrader(timeout_s=1.0) as grader:
            pairs = [(SQUARE, program) for program in world.programs.values()]
            verdicts = grader.grade(pairs)
        world.verdicts = dict(zip(world.programs, verdicts, strict=True))
        assert not list(own.iterdir()), "a program's directory was left behind"
        yield world
    finally:
        tempfile.tempdir = before
        del os.environ["LEAF_TEST_SECRET"]
        world.process.kill()
        world.process.wait()
        for server in world.servers:
            server.close()


@pytest.mark.parametrize("name", ATTACKS)
def test_a_hostile_program_is_not_right(world: World, name: str) -> None:
    verdict, detail = world.verdicts[name]
    assert verdict in ("wrong", "error", "timeout", "memory", "refused")
    assert detail and SECRET not in detail and "root:" not in detail


EXPECTED = {
    **dict.fromkeys(("fork", "subprocess", "connection", "datagram", "read a file"), "refused"),
    **dict.fromkeys(("many files", "equal to everything"), "refused"),
    **dict.fromkeys(
        ("kill the parent", "kill a process", "symbolic link", "list a folder"), "refused"
    ),
    **dict.fromkeys(("memory at once", "memory by and by"), "memory"),
    **dict.fromkeys(("endless loop", "endless sleep", "ignored signals"), "timeout"),
    **dict.fromkeys(("endless output", "endless errors", "every exception caught"), "timeout"),
    **dict.fromkeys(("exit", "exit at once", "exit while loading", "crash"), "error"),
    **dict.fromkeys(("a printed verdict", "other assertions", "the tests' text"), "wrong"),
    **dict.fromkeys(("a number equal to everything", "other built-in functions"), "wrong"),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_the_verdict_says_what_happened(world: World, name: str) -> None:
    assert world.verdicts[name].verdict == EXPECTED[name], world.verdicts[name].detail


def test_nothing_of_the_user_was_reached(world: World) -> None:
    assert not world.outside.exists()
    assert world.victim.read_text() == "untouched"
    assert world.victim.stat().st_mtime > time.time() - 3600
    assert world.victim.stat().st_mode & 0o600 == 0o600
    assert world.process.poll() is None
    for server in world.servers:
        with pytest.raises(BlockingIOError):
            server.recv(10) if server.type == socket.SOCK_DGRAM else server.accept()


def processes() -> list[int]:
    """Return the confined processes on this machine that this user may see."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if b"from sandbox.child" in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


def test_no_program_outlives_its_tests(world: World) -> None:
    mine = [pid for pid in processes() if f"PPid:\t{os.getpid()}\n" in _status(pid)]
    assert mine == []


def _status(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return ""


def test_programs_end_with_the_process_that_runs_them() -> None:
    script = (
        "from leaf_distill.grading.sandbox.process import run_script\n"
        "run_script('while True: pass', '', cpu_s=600)"
    )
    parent = subprocess.Popen([sys.executable, "-c", script])
    try:
        children: list[int] = []
        deadline = time.monotonic() + 30
        while not children and time.monotonic() < deadline:
            children = [pid for pid in processes() if f"PPid:\t{parent.pid}\n" in _status(pid)]
            time.sleep(0.02)
        assert children
        time.sleep(0.2)  # until it has confined itself
    finally:
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    deadline = time.monotonic() + 10
    while set(children) & set(processes()) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not set(children) & set(processes())


def test_a_harmless_program_is_right_and_may_use_its_directory_and_threads() -> None:
    program = """
import json, threading, tempfile, os
def target(n):
    with open("notes.json", "w") as file:
        json.dump(n, file)
    found = []
    worker = threading.Thread(target=lambda: found.append(json.load(open("notes.json")) ** 2))
    worker.start()
    worker.join()
    os.remove("notes.json")
    return found[0]
"""
    with CodeGrader() as grader:
        assert grader.grade([(SQUARE, program)]) == [Judged("right", "")]


@pytest.mark.parametrize(
    "fails",
    ["[][1]", "{}['a']", "None - 1", "int('a')", "(lambda: 0).a", "1 / 0", "[].remove(1)"],
)
def test_an_exception_of_the_program_is_its_error_whatever_its_type(fails: str) -> None:
    name = type(_raised(fails)).__name__
    expects = f"try:\n    target(3)\nexcept {name}:\n    pass\nelse:\n    raise AssertionError"
    program = f"def target(n):\n    return {fails}\n"
    with CodeGrader() as grader:
        failed, expected = grader.grade(
            [(SQUARE, program), (Tests("asserts", code=(expects,)), program)]
        )
    assert failed.verdict == "error" and name in failed.detail
    assert expected.verdict == "right"


def _raised(expression: str) -> Exception:
    with pytest.raises(Exception) as caught:
        eval(expression)
    return caught.value


def test_a_script_reads_prints_and_is_confined() -> None:
    printed, error, end = run_script("print(int(input()) + 1)", "41\n", cpu_s=5)
    assert (printed, error, end.status) == (b"42\n", "", 0)
    _, error, end = run_script("open('/etc/passwd')", "", cpu_s=5)
    assert error.startswith("PermissionError") and end.status == 1


# Denies one system call to a process and those that it starts, as an older kernel would.
WITHOUT_LANDLOCK = """
import ctypes, json, struct, sys
libc = ctypes.CDLL(None)
steps = [(0x20, 0, 0, 0), (0x15, 0, 1, 444), (6, 0, 0, 0x00050000 | 38), (6, 0, 0, 0x7FFF0000)]
code = b"".join(struct.pack("HBBI", *step) for step in steps)
kept = ctypes.create_string_buffer(code, len(code))
program = struct.pack("HxxxxxxP", len(steps), ctypes.addressof(kept))
assert libc.prctl(38, 1, 0, 0, 0) == 0 and libc.prctl(22, 2, ctypes.c_char_p(program)) == 0
sys.argv = ["leaf", *json.loads(sys.argv[1])]
from leaf_distill.cli import main
sys.exit(main())
"""


def test_without_isolation_nothing_is_run(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    row = {"prompt": "p", "completion": "c", "tests": ["assert f(1) == 1"]}
    rows.write_text(json.dumps(row) + "\n")
    model = Path(sys.modules["leaf_distill"].__path__[0]) / "demo" / "assets" / "student"
    words = ["evaluate", "--model", str(model), "--dataset", str(rows), "--grade", "code"]
    words += ["--allow_code_execution", "--output_dir", str(tmp_path / "out")]
    done: Any = subprocess.run(
        [sys.executable, "-c", WITHOUT_LANDLOCK, json.dumps(words)],
        capture_output=True,
        text=True,
        env={**os.environ, "LEAF_CACHE_DIR": str(tmp_path / "cache")},
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "Linux 5.13 or newer" in done.stderr and "has no Landlock" in done.stderr
    assert not (tmp_path / "out").exists()
