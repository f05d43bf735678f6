"""All that a GPU has to show, in one go: build, tests, compute-sanitizer, benchmarks.

    python benchmarks/gpu.py [--output build/gpu] [--minutes 9.5] [--steps build,tests,...] [--tiny]

Uses the Python that runs it as it is, and installs nothing. Every step has a time limit, and one
that fails does not keep the later ones from running. OUTPUT gets summary.md, a log of each step and
the results as JSON and as a page, which goes to benchmarks/results/ too. `--tiny` rehearses all
of it without a GPU, with the CPU kernels in place of the CUDA ones.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

from steps import (
    Command,
    Outcome,
    exit_when_told,
    judged_by_sanitizer,
    judged_by_status,
    summary,
)

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "gpu-extension"
NEEDED = ("torch", "triton", "pytest", "hypothesis")
STEPS = ("build", "tests", "sanitizer", "benchmarks")
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
# Seconds. All checks run at the same time; the benchmarks have the GPU for themselves.
BUILD_LIMIT, CHECK_LIMIT, BENCHMARK_LIMIT = 180, 180, 240
_CUDA = "/usr/local/cuda/bin"


class Run:
    """One call of this script: its options, its environment, and what has come out so far."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.tiny: bool = arguments.tiny
        self.steps: list[str] = arguments.steps.split(",")
        self.output: Path = arguments.output.resolve()
        self.output.mkdir(parents=True, exist_ok=True)
        BUILD.mkdir(parents=True, exist_ok=True)
        self.deadline = time.monotonic() + 60 * arguments.minutes
        self.commands: list[Command] = []
        self.outcomes: list[Outcome] = []
        self.targets = ""
        self.environment = environment(self.tiny)
        # A rehearsal takes the package that is there, unless it builds one.
        if not self.tiny or "build" in self.steps:
            packages = f"{BUILD / 'python'}{os.pathsep}{self.environment['PYTHONPATH']}"
            self.environment["PYTHONPATH"] = packages

    def limit(self, seconds: float) -> float:
        return max(1.0, min(seconds, self.deadline - time.monotonic()))

    def start(self, name: str, command: list[str], limit: float, **variables: str) -> Command:
        log = self.output / f"{name}.log"
        # Not in a folder that has a package leaf_ext: Python would take that one.
        known = self.environment | variables
        self.commands.append(Command(name, command, log, self.limit(limit), known, BUILD))
        return self.commands[-1]

    def note(self, outcome: Outcome) -> None:
        self.outcomes.append(outcome)
        print(
            f"{outcome.state:13} {outcome.step} ({outcome.seconds:.0f} s): {outcome.note}",
            flush=True,
        )


def environment(tiny: bool) -> dict[str, str]:
    """The tools of this Python and of the CUDA toolkit on PATH; our modules importable."""
    variables = dict(os.environ)
    path = [str(Path(sys.executable).parent), variables.get("PATH", "")]
    if shutil.which("nvcc") is None and Path(_CUDA, "nvcc").exists():
        path.append(_CUDA)
        variables.setdefault("CUDACXX", f"{_CUDA}/nvcc")
    variables["PATH"] = os.pathsep.join(path)
    # The sources come last: after a build that failed what needs no build is measured all the same.
    paths = (str(ROOT / "benchmarks"), variables.get("PYTHONPATH"), str(ROOT))
    variables["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    variables["PYTHONUNBUFFERED"] = "1"
    # Nothing that is compiled here depends on what earlier runs of others left in a home folder.
    variables.setdefault("TRITON_CACHE_DIR", str(BUILD / "triton"))
    variables.setdefault("TORCHINDUCTOR_CACHE_DIR", str(BUILD / "inductor"))
    if tiny:
        variables["TRITON_INTERPRET"] = "1"
    return variables


def missing() -> list[str]:
    """What this Python lacks, packages and tools."""
    tools = [t for t in ("cmake", "ninja") if not shutil.which(t, path=environment(False)["PATH"])]
    return [name for name in NEEDED if find_spec(name) is None] + tools


def architecture(run: Run) -> str | None:
    """The GPU's, as CMake writes it; None without a GPU that torch can use."""
    code = "import torch; print(*torch.cuda.get_device_capability(), sep='')"
    asked = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=run.environment
    )
    return asked.stdout.strip() if asked.returncode == 0 else None


def build(run: Run, arch: str | None) -> None:
    """For this GPU alone: the other architectures are CI's to compile."""
    cuda = ["-DLEAF_CUDA=0"] if run.tiny else ["-DLEAF_CUDA=1", f"-DLEAF_CUDA_ARCHS={arch}"]
    script = str(ROOT / "csrc" / "test_build.py")
    # pytest is only asked for its version: the tests are the next step.
    command = [sys.executable, script, str(BUILD), *cuda, "--", "--version"]
    variables = {} if run.tiny else {"LEAF_BUILD_CUDA": "1", "LEAF_CUDA_ARCHS": str(arch)}
    started = run.start("build", command, BUILD_LIMIT, **variables)
    outcome = judged_by_status(started)
    if outcome.state == "passed" and not run.tiny and "'cuda'" not in started.text():
        outcome = outcome.but("failed", "the build has no CUDA backend")
    run.note(outcome)


def tests(run: Run, backend: str) -> Command:
    """The op tests of one backend, and its one slow case, which only a GPU can run."""
    names = {"cuda": "cuda", "triton": "triton and not every_kernel_compiles"}[backend]
    names += " and (not slow or above_2_31)"
    if run.tiny:
        names = {"cuda": "cpu", "triton": "triton"}[backend] + " and test_grad_norm and one_row"
    ignored = ("leaf_distill", "cuda_emulation", "test_benchmarks.py")
    command = [
        *(sys.executable, "-m", "pytest", "-c", str(ROOT / "pyproject.toml"), str(ROOT / "tests")),
        *(f"--ignore={ROOT / 'tests' / name}" for name in ignored),
        *("-p", "no:cacheprovider", "-m", "", "-k", names, "--durations=5"),
        *options_of_plugins(run),
    ]
    return run.start(f"tests-{backend}", command, CHECK_LIMIT)


def options_of_plugins(run: Run) -> list[str]:
    """With several processes a fault costs one test; with a timeout a hang does too."""
    has_xdist, has_timeout = (find_spec(name) is not None for name in ("xdist", "pytest_timeout"))
    workers = max(2, min(6, (os.cpu_count() or 2) // 3))
    return [
        *(["-n", str(workers)] if has_xdist and not run.tiny else []),
        *(["--timeout=90", "--timeout-method=thread"] if has_timeout else []),
    ]


def sanitize(run: Run, tool: str) -> Command | None:
    """compute-sanitizer on small cases; allocations one by one, so that it sees their borders."""
    program = [sys.executable, "-m", "on_gpu.small_cases"]
    if run.tiny:
        return run.start(tool, [*program, "--backend", "cpu", "--device", "cpu"], CHECK_LIMIT)
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=_CUDA)
    if sanitizer is None:
        run.note(Outcome(tool, "not available", 0, "compute-sanitizer is not on PATH"))
        return None
    options = ["--tool", tool, "--error-exitcode", "86", "--print-limit", "1000"]
    # What torch asks the driver for in vain is no error of ours; what we ask is checked by us.
    options += ["--show-backtrace", "no", "--report-api-errors", "no"]
    return run.start(
        tool, [sanitizer, *options, *program], CHECK_LIMIT, PYTORCH_NO_CUDA_MEMORY_CACHING="1"
    )


def check(run: Run) -> None:
    """The tests of both backends and all tools at once; then what came of each."""
    backends = ("cuda", "triton") if "tests" in run.steps else ()
    tools = TOOLS[: 1 if run.tiny else None] if "sanitizer" in run.steps else ()
    testing = [tests(run, backend) for backend in backends]
    looking = [command for tool in tools if (command := sanitize(run, tool))]
    for command in testing:
        run.note(judged_by_status(command))
    for command in looking:
        run.note(judged_by_sanitizer(command))
    logs = [command.log for command in looking]
    if logs:  # one file of all tools
        text = "".join(f"==> {log.stem}\n{log.read_text(errors='replace')}\n" for log in logs)
        (run.output / "compute-sanitizer.log").write_text(text[-(2**23) :])
        for log in logs:
            log.unlink()


def benchmarks(run: Run) -> None:
    seconds = run.limit(BENCHMARK_LIMIT + 30) - 30  # the rest is for the page
    asked = " ".join(["python", "benchmarks/gpu.py", *sys.argv[1:]])
    command = [sys.executable, "-m", "on_gpu", str(run.output), "--seconds", f"{seconds:.0f}"]
    command += ["--command", asked, *(["--tiny"] if run.tiny else [])]
    started = run.start("benchmarks", command, seconds + 60)
    run.note(judged_by_status(started))
    targets = re.search(r"^## Targets\n.*?(?=^## )", started.text(), re.M | re.S)
    run.targets = targets[0] if targets else ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "gpu")
    parser.add_argument("--minutes", type=float, default=9.5)
    parser.add_argument("--steps", default=",".join(STEPS), help="some of the steps, by comma")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--ready", action="store_true", help="only: has this Python what it takes?")
    arguments = parser.parse_args()
    if arguments.ready:
        print("missing:", ", ".join(missing()) or "nothing")
        return int(bool(missing()))
    run = Run(arguments)
    if unknown := set(run.steps) - set(STEPS):
        parser.error(f"--steps knows {', '.join(STEPS)}, got {', '.join(unknown)}")
    arch = architecture(run)
    if arch is None and not run.tiny:
        parser.error("torch can use no CUDA GPU here; --tiny rehearses without one")
    exit_when_told()
    try:
        if "build" in run.steps:
            build(run, arch)
        check(run)
        if "benchmarks" in run.steps:
            benchmarks(run)
    finally:
        for command in run.commands:
            command.end()
    text = summary(run.outcomes, " ".join(sys.argv[1:])) + "\n" + run.targets
    (run.output / "summary.md").write_text(text)
    print(text)
    return int(any(outcome.is_bad for outcome in run.outcomes))


if __name__ == "__main__":
    sys.exit(main())
