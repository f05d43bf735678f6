"""Starts confined processes, watches them, and says how they ended."""

from __future__ import annotations

import functools
import json
import os
import platform
import select
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from leaf_distill.grading.sandbox.confine import landlock_abi
from leaf_distill.grading.sandbox.end import DIRECTORY_FILES, FILE_BYTES, THREADS, End, wall_limit
from leaf_distill.grading.sandbox.syscalls import MACHINES

PACKAGES = ("numpy", "sortedcontainers")
"""What a program may import beside the standard library."""

MEMORY = 1 << 30  # bytes of address space that any program may have
RESULT_BYTES = 64 << 20  # of what the tests say
DETAIL = 1000  # characters
LOOK_S = 0.05  # how often a running program is looked at
BUSY_S = 1.0  # of processor time, by which tests that wait are told from tests that compute
GRACE_S = 2.0  # for a program to end after its tests have
ATTEMPTS = 3  # to start a process
HERE = Path(__file__).parent
# This folder as a package of its own, without the modules beside it, one of which is `math`.
# The working directory is taken from the path first: a program may have put modules there.
COMMAND = (
    "import sys; sys.path[:] = [path for path in sys.path if path]; "
    "from importlib.util import module_from_spec, spec_from_file_location; "
    "spec = spec_from_file_location('sandbox', {!r}, submodule_search_locations=[{!r}]); "
    "sys.modules['sandbox'] = module_from_spec(spec); from sandbox.child import main; main()"
)
ENVIRONMENT = {"PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}

UNCONFINED = "programs cannot be confined here: "
NEEDED = (
    "that takes Landlock and seccomp, in Linux 5.13 or newer on x86_64 or aarch64, with `landlock` "
    "in /sys/kernel/security/lsm"
)

PROBE = """
try:
    open({!r})
except PermissionError:
    print("held")
else:
    print("read")
"""


class SandboxError(RuntimeError):
    """Programs cannot be confined here, so that none is run."""


@functools.cache
def unavailable() -> str:
    """Return why programs cannot be confined on this machine; nothing where they can.

    A process is confined for it, and tries to read a file that is for this process alone.
    """
    if platform.system() != "Linux" or platform.machine() not in MACHINES:
        return f"{UNCONFINED}this is {platform.system()} on {platform.machine()}; {NEEDED}"
    if not landlock_abi():
        return f"{UNCONFINED}this kernel, {platform.release()}, has no Landlock; {NEEDED}"
    try:
        with tempfile.NamedTemporaryFile(prefix="leaf-secret-") as secret:
            output, raised, end = run_script(PROBE.format(secret.name), "", cpu_s=10)
            folder = os.path.dirname(secret.name)
    except SandboxError as error:
        return f"{UNCONFINED}{error}; {NEEDED}"
    except OSError as error:
        return f"{UNCONFINED}{error}"
    if output == b"read\n":
        return (
            f"{UNCONFINED}a confined process could read a file in {folder}; set TMPDIR to a folder "
            "outside those of Python and the system's libraries"
        )
    if output != b"held\n":
        said = raised.strip().splitlines() or [end.reason or f"it ended with {end.status}"]
        return f"{UNCONFINED}a confined process did not run: {said[-1]}"
    return ""


@functools.cache
def _readable() -> tuple[str, ...]:
    """Return what a confined process may read: Python, shared libraries and packages."""
    paths = sysconfig.get_paths()
    base = Path(sys.base_prefix)
    libraries = [] if base == Path("/usr") else [str(base / "lib")]
    system = ["/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib", "/etc/ld.so.cache"]
    own = [str(Path(path).with_name("numpy.libs")) for path in _packages().values()]
    return (
        *(paths["stdlib"], paths["platstdlib"], *libraries, *system),
        *("/usr/share/zoneinfo", "/dev/urandom", *_packages().values(), *own),
    )


@functools.cache
def _packages() -> dict[str, str]:
    found = {name: find_spec(name) for name in PACKAGES}
    return {
        name: str(Path(spec.origin).parent) for name, spec in found.items() if spec and spec.origin
    }


@dataclass
class _Process:
    """A confined process and the files that it was given."""

    popen: subprocess.Popen[bytes]
    started: int
    end: End = field(default_factory=End)

    def confined(self) -> str:
        """Return "" if it has confined itself, else why not. Nothing ran if it has not."""
        said = os.pread(self.started, 1000, 0).decode(errors="replace")
        return "" if said == "confined" else said or "it could not be started"

    def ends_within(self, seconds: float) -> bool:
        """Return whether it ends by itself."""
        handle = os.pidfd_open(self.popen.pid)
        try:
            return bool(select.select([handle], [], [], seconds)[0])
        finally:
            os.close(handle)

    def finish(self) -> End:
        """End it if it has not ended, and read what it used."""
        if self.popen.returncode is None:
            os.kill(self.popen.pid, signal.SIGKILL)  # Popen.kill would lose the usage
            _, status, usage = os.wait4(self.popen.pid, 0)
            self.popen.returncode = os.waitstatus_to_exitcode(status)
            self.end.status = self.popen.returncode
            self.end.cpu_s = usage.ru_utime + usage.ru_stime
            self.end.memory = usage.ru_maxrss << 10
        return self.end


def _file(name: str, content: bytes = b"") -> int:
    """Return a file in memory, positioned at its start."""
    descriptor = os.memfd_create(name, os.MFD_CLOEXEC)
    with open(descriptor, "wb", closefd=False) as file:
        file.write(content)
    os.lseek(descriptor, 0, os.SEEK_SET)
    return descriptor


class _Run:
    """The processes of one run, their own directory, and their descriptors here."""

    def __init__(self, stop: threading.Event | None) -> None:
        self.stop = stop
        self.directory = tempfile.mkdtemp(prefix="leaf-program-")
        self.descriptors: list[int] = []
        self.processes: list[_Process] = []

    def file(self, name: str, content: bytes = b"") -> int:
        self.descriptors.append(_file(name, content))
        return self.descriptors[-1]

    def pipe(self) -> tuple[int, int]:
        ends = os.pipe()
        self.descriptors += ends
        return ends

    def close(self, *descriptors: int) -> None:
        for one in descriptors:
            self.descriptors.remove(one)
            os.close(one)

    def start(
        self,
        job: Mapping[str, Any],
        given: Sequence[int],
        *,
        cpu_s: int,
        memory: int,
        file_bytes: int = FILE_BYTES,
        **streams: int,
    ) -> _Process:
        """Start a process on a job; it finds `given` among its arguments."""
        limits = {"directory": self.directory, "readable": _readable(), "memory": memory}
        limits["file_bytes"] = file_bytes
        whole = {
            **job,
            "packages": _packages(),
            "limits": {**limits, "cpu_s": cpu_s, "parent": os.getpid()},
        }
        files = self.file("job", json.dumps(whole).encode()), self.file("started")
        passed = (*files, *given)
        command = COMMAND.format(str(HERE / "__init__.py"), str(HERE))
        options = ["-s", "-S", "-X", "utf8", "-c", command, *map(str, passed)]
        popen = subprocess.Popen(
            [sys.executable, *options],
            stdin=streams.get("stdin", subprocess.DEVNULL),
            stdout=streams.get("stdout", subprocess.DEVNULL),
            stderr=streams.get("stderr", subprocess.DEVNULL),
            cwd=self.directory,
            env=ENVIRONMENT,
            pass_fds=passed,
            start_new_session=True,
        )
        process = _Process(popen, files[1])
        self.processes.append(process)
        return process

    def watch(self, awaited: _Process, program: _Process, wall_s: float) -> None:
        """Wait for a process to end, while the program keeps its limits; then end all."""
        deadline = time.monotonic() + wall_s
        handle = os.pidfd_open(awaited.popen.pid)
        try:
            while not select.select([handle], [], [], LOOK_S)[0]:
                if self.stop is not None and self.stop.is_set():
                    raise SandboxError("the run was stopped")
                if time.monotonic() > deadline:
                    program.end.reason = "timeout"
                elif self._threads(program) > THREADS:
                    program.end.reason = "threads"
                elif self._too_full():
                    program.end.reason = "files"
                if program.end.reason:
                    break
            else:  # the program ends as soon as nobody asks it
                if not program.ends_within(GRACE_S):
                    program.end.reason = "silent"
        finally:
            os.close(handle)
            for process in self.processes:
                process.finish()

    def _threads(self, program: _Process) -> int:
        try:
            return len(os.listdir(f"/proc/{program.popen.pid}/task"))
        except OSError:  # it has just ended
            return 0

    def _too_full(self) -> bool:
        sizes = []
        with os.scandir(self.directory) as entries:
            for entry in entries:
                try:
                    sizes.append(entry.stat(follow_symlinks=False).st_size)
                except OSError:  # it has just been deleted
                    continue
        return len(sizes) > DIRECTORY_FILES or sum(sizes) > FILE_BYTES

    def end(self) -> None:
        for process in self.processes:
            process.finish()
        for descriptor in self.descriptors:
            os.close(descriptor)
        shutil.rmtree(self.directory, ignore_errors=True)


@contextmanager
def _run(stop: threading.Event | None) -> Iterator[_Run]:
    run = _Run(stop)
    try:
        yield run
    finally:
        run.end()


def _content(descriptor: int) -> bytes:
    """Return what a process wrote into a file."""
    parts, at = [], 0
    while part := os.pread(descriptor, 1 << 20, at):
        parts.append(part)
        at += len(part)
    return b"".join(parts)


def run_script(
    program: str,
    stdin: str,
    *,
    cpu_s: int,
    memory: int = MEMORY,
    setup: str = "",
    stop: threading.Event | None = None,
) -> tuple[bytes, str, End]:
    """Run a script, confined.

    Args:
        program: the source, which runs as `__main__`.
        stdin: what it reads.
        cpu_s: seconds of processor time.
        memory: bytes of address space.
        setup: source that runs before it, in the same namespace.
        stop: ends the run from another thread, with SandboxError.

    Returns:
        What it printed, the exception that ended it, and how it ended.

    Raises:
        SandboxError: the process cannot be confined.
    """
    why = ""
    for _ in range(ATTEMPTS):
        with _run(stop) as run:
            streams = {name: run.file(name) for name in ("stdout", "stderr")}
            streams["stdin"] = run.file("stdin", stdin.encode(errors="surrogatepass"))
            job = {"role": "script", "setup": setup, "program": program}
            process = run.start(job, (), cpu_s=cpu_s, memory=memory, **streams)
            run.watch(process, process, wall_limit(cpu_s))
            why = process.confined()
            if not why:
                said = _content(streams["stderr"])[:1000].decode(errors="replace")
                return _content(streams["stdout"]), said, process.end
    raise SandboxError(f"a program could not be confined: {why}")


def run_judged(
    job: Mapping[str, Any],
    program: str,
    *,
    cpu_s: int,
    memory: int = MEMORY,
    stop: threading.Event | None = None,
) -> tuple[dict[str, Any], End]:
    """Run a program in one confined process, and its tests in another one.

    Args:
        job: the tests, as `judge.judge` takes them.
        program: the source.
        cpu_s: seconds of processor time of the program; its tests have 10 more.
        memory: bytes of address space of each.
        stop: ends the run from another thread, with SandboxError.

    Returns:
        What `judge.judge` returned, with the verdict on a program that ended before; and how the
        program ended.

    Raises:
        SandboxError: a process cannot be confined.
    """
    why = ""
    for _ in range(ATTEMPTS):
        with _run(stop) as run:
            to_program, to_judge = run.pipe(), run.pipe()
            served = {"role": "program", "setup": job["setup"], "entry_point": job["entry_point"]}
            theirs, ours = (to_program[0], to_judge[1]), (to_judge[0], to_program[1])
            limits = {"cpu_s": cpu_s, "memory": memory}
            process = run.start({**served, "program": program}, theirs, **limits)
            result = run.file("result")
            limits["cpu_s"] += 10
            limits["file_bytes"] = RESULT_BYTES
            judge = run.start({**job, "role": "judge"}, (*ours, result), **limits)
            run.close(*to_program, *to_judge)
            run.watch(judge, process, wall_limit(cpu_s))
            why = judge.confined() or process.confined()
            if not why:
                found = _judged(_content(result), process.end, judge.end, cpu_s)
                # Half of a surrogate pair could not be stored.
                text = found["detail"][:DETAIL].encode(errors="replace").decode()
                return {**found, "detail": text}, process.end
    raise SandboxError(f"a program could not be confined: {why}")


def _judged(said: bytes, end: End, judge: End, cpu_s: int) -> dict[str, Any]:
    found: dict[str, Any] = {"verdict": "gone", "detail": ""}
    computing = judge.cpu_s > max(BUSY_S, end.cpu_s)  # the tests took the time, not the program
    if said:
        found = json.loads(said)
    elif not end.reason or (end.reason == "timeout" and computing):
        detail = "the tests ended without a verdict, for want of time or memory"
        return {"verdict": "refused", "detail": detail}
    if found["verdict"] == "gone":
        found["verdict"], how = end.verdict(cpu_s)
        found["detail"] = f"{found['detail']}: {how}" if found["detail"] else how
    return found
