"""Runs what needs a GPU: build, smoke test, timings, distillation, counters, tests, sanitizers.

    python benchmarks/gpu.py [--output build/gpu] [--minutes 8] [--steps build,smoke,...] [--tiny]

It uses the Python that runs it and installs nothing. Every step has a time limit; a step that is
stopped keeps its output, and later steps run after one that fails. OUTPUT gets summary.md,
results.jsonl and its page (also written to benchmarks/results/), distillation/, counters.txt,
failures.txt, sanitizer.txt and logs.txt. `--tiny` rehearses all steps without a GPU, with the CPU
kernels instead of the CUDA kernels.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

from steps import Command, Outcome, judged_by_sanitizer, summary

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / f"gpu-{sys.implementation.cache_tag}"
NEEDED = ("torch", "triton", "pytest", "hypothesis")
# The files with tests of a backend. "-k cuda" alone would match names of files too.
TESTS = (
    *("ops", "contract", "inner_ops", "autograd", "hard_values", "compile"),
    *("detect_spans_properties", "divergences", "topk_kl"),
)
SECTIONS = (
    *("SpeedOfLight", "Occupancy", "SchedulerStats", "WarpStateStats"),
    *("MemoryWorkloadAnalysis", "InstructionStats"),
)
MOST_CRASHES = 6
_CUDA = "/usr/local/cuda/bin"


class Run:
    """One call of this script: its options, its environment and its results so far."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.tiny: bool = arguments.tiny
        self.output: Path = arguments.output.resolve()
        self.results = self.output / "results.jsonl"
        for folder in (self.output, BUILD):
            folder.mkdir(parents=True, exist_ok=True)
        for old in (self.results, *self.output.glob("*.txt")):
            old.unlink(missing_ok=True)
        self.deadline = time.monotonic() + 60 * arguments.minutes
        self.outcomes: list[Outcome] = []
        self.commands: list[Command] = []
        self.targets = ""
        # A rehearsal uses the installed package, unless it builds one.
        built = [] if self.tiny and "build" not in arguments.steps else [str(BUILD / "python")]
        self.environment = environment(self.tiny, built)
        self.environment["LEAF_FAILURES"] = str(self.output / "failures.txt")

    def left(self, limit: float = 600.0) -> float:
        return max(1.0, min(limit, self.deadline - time.monotonic()))

    def start(self, name: str, command: list[str], limit: float, **variables: str) -> Command:
        log, known = BUILD / f"{name}.log", self.environment | variables
        self.commands.append(Command(name, command, log, self.left(limit), known))
        return self.commands[-1]

    def module(self, name: str, *arguments: str) -> list[str]:
        return [sys.executable, "-m", f"on_gpu.{name}", *arguments]

    def smoke(self, *options: str) -> list[str]:
        device = ("--backend", "cpu", "--device", "cpu") if self.tiny else ()
        return self.module("smoke", *options, *device)

    def keep(self, command: Command, into: str = "logs.txt") -> None:
        with (self.output / into).open("a") as file:
            file.write(f"==> {command.name}\n{command.text()[-(2**21) :]}\n")

    def note(self, outcome: Outcome) -> None:
        """Write an outcome at once, so that it is kept if this script is stopped."""
        self.outcomes.append(outcome)
        step, state, seconds, note = outcome
        print(f"{state:13} {step} ({seconds:.0f} s): {note}", flush=True)
        text = summary(self.outcomes, " ".join(sys.argv[1:])) + "\n" + self.targets
        (self.output / "summary.md").write_text(text)

    def judge(self, command: Command) -> None:
        self.note(command.outcome())
        self.keep(command)


def environment(tiny: bool, packages: list[str]) -> dict[str, str]:
    """Return variables with this Python's and CUDA's tools on PATH and our modules importable."""
    known = dict(os.environ)
    path = [str(Path(sys.executable).parent), known.get("PATH", "")]
    if shutil.which("nvcc") is None and Path(_CUDA, "nvcc").exists():
        path.append(_CUDA)
        known.setdefault("CUDACXX", f"{_CUDA}/nvcc")
    # The sources come last: if the build fails, everything that needs no build is still measured.
    folders = [*packages, str(ROOT / "benchmarks"), str(ROOT / "tests"), known.get("PYTHONPATH")]
    known |= {
        "PATH": os.pathsep.join(path),
        "PYTHONPATH": os.pathsep.join(filter(None, [*folders, str(ROOT)])),
        "PYTHONUNBUFFERED": "1",
        # Compilation caches are not shared with other runs in the home folder.
        "TRITON_CACHE_DIR": str(BUILD / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(BUILD / "inductor"),
    }
    return known | ({"TRITON_INTERPRET": "1"} if tiny else {})


def tool(name: str) -> str | None:
    return shutil.which(name) or shutil.which(name, path=_CUDA)


def missing() -> list[str]:
    """Return the packages and tools that this Python lacks."""
    path = environment(False, [])["PATH"]
    tools = [name for name in ("cmake", "ninja") if not shutil.which(name, path=path)]
    return [name for name in NEEDED if find_spec(name) is None] + tools


def architecture() -> str | None:
    """Return the GPU's architecture as CMake writes it, or None if torch can use no GPU."""
    code = "import torch; print(*torch.cuda.get_device_capability(), sep='')"
    asked = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    return asked.stdout.strip() if asked.returncode == 0 else None


def build(run: Run) -> None:
    """Build for this GPU only (CI compiles for the others); ninja keeps what is up to date."""
    cuda = "-DLEAF_CUDA=0" if run.tiny else "-DLEAF_CUDA=1"
    options = [cuda, *([] if run.tiny else [f"-DLEAF_CUDA_ARCHS={architecture()}"])]
    # pytest is only asked for its version: the tests are a step of their own.
    command = [str(ROOT / "tools" / "test_build.py"), str(BUILD), *options, "--", "--version"]
    started = run.start("build", [sys.executable, *command], 150)
    outcome = started.outcome()
    if outcome.state == "passed" and not run.tiny and "'cuda'" not in started.text():
        outcome = outcome.but("failed", "the build has no CUDA backend")
    run.keep(started)
    run.note(outcome)


def smoke(run: Run) -> None:
    run.judge(run.start("smoke", run.smoke(*(["--small"] if run.tiny else [])), 75))


def timings(run: Run, name: str = "timings", limit: float = 170, *options: str) -> None:
    """Run the worker, and another one after a crash; then write the page of all results so far."""
    reserve = 25  # seconds, for the last job and the page
    until, crashes, lines = time.monotonic() + run.left(limit + reserve) - reserve, 0, -1
    options = (str(run.results), *options, *(["--tiny"] if run.tiny else []))
    while True:
        seconds = max(1.0, until - time.monotonic())
        command = run.module("worker", *options, f"--seconds={seconds}")
        started = run.start(name, command, seconds + reserve / 2.5)
        outcome, before = started.outcome(), lines
        run.keep(started)
        lines = len(run.results.read_text().splitlines()) if run.results.exists() else 0
        if outcome.state != "failed" or lines <= before or crashes == MOST_CRASHES:
            break
        crashes += 1
    if outcome.state == "out of time":  # the page lists the jobs without a result
        outcome = outcome.but("unfinished", f"stopped in {outcome.note}")
    if crashes:
        outcome = outcome.but(outcome.state, f"{crashes} workers crashed; {outcome.note}")
    run.note(outcome)
    report = run.start("report", run.module("report", *options), 60)
    outcome = report.outcome()
    run.targets = "".join(report.text().partition("## Targets")[1:])
    run.keep(report)
    run.note(outcome)


def distillation(run: Run) -> None:
    """Time distillation steps, with models of random weights that are made for it."""
    lacking = [name for name in ("transformers", "datasets", "pyarrow") if not find_spec(name)]
    if lacking:
        note = f"{', '.join(lacking)} cannot be imported"
        return run.note(Outcome("distillation", "not available", 0, note))
    script, output = ROOT / "benchmarks" / "gpu_loop.py", run.output / "distillation"
    command = [sys.executable, str(script), "--steps", "distillation", "--output", str(output)]
    limit = run.left(150)
    command += [f"--minutes={limit / 60}", *(["--tiny"] if run.tiny else [])]
    run.judge(run.start("distillation", command, limit))


def counters(run: Run) -> None:
    """Profile one launch of each of our kernels that training runs."""
    ncu = tool("ncu") or next(map(str, Path("/opt/nvidia").glob("nsight-compute/*/ncu")), None)
    if ncu is None:
        return run.note(Outcome("counters", "not available", 0, "ncu is not on PATH"))
    # Every kernel in our namespace is launched once, so no kernel has to be named here.
    options = ["--clock-control", "none", "--kernel-name-base", "demangled", "-k", "regex:leaf"]
    options += ["-c", "12", *(word for name in SECTIONS for word in ("--section", name))]
    started = run.start("counters", [ncu, *options, *run.smoke("--hot")], 60)
    outcome = started.outcome()
    if "ERR_NVGPUCTRPERM" in started.text():
        outcome = outcome.but("not available", "ncu may not read the GPU's counters here")
    run.keep(started, "counters.txt")
    run.note(outcome)


def tests(run: Run, backend: str) -> Command:
    """Run the op tests of one backend, and its slow case, which only a GPU can run."""
    names = backend
    if backend == "triton":
        names = "triton and not every_kernel_compiles"
    if run.tiny:
        names = f"{'triton' if backend == 'triton' else 'cpu'} and test_grad_norm and one_row"
    files = (*TESTS, *(["triton"] if backend == "triton" and not run.tiny else []))
    workers = max(2, min(6, (os.cpu_count() or 2) // 3))
    command = [
        *(sys.executable, "-m", "pytest", "-c", str(ROOT / "pyproject.toml"), "--durations=5"),
        *(str(ROOT / "tests" / f"test_{name}.py") for name in files),
        *("-p", "on_gpu.failures", "-p", "no:cacheprovider", "-m", "", "-k", names),
        # With several processes a fault costs one test; with a timeout so does a hang.
        *(["-n", str(workers)] if find_spec("xdist") and not run.tiny else []),
        *(["--timeout=90", "--timeout-method=thread"] if find_spec("pytest_timeout") else []),
    ]
    return run.start(f"tests-{backend}", command, 120)


def checks(run: Run) -> None:
    """Run tests and compute-sanitizer in parallel, because nothing is timed any more."""
    started, looking, sanitizer = tests(run, "cuda"), [], tool("compute-sanitizer")
    if sanitizer is None and not run.tiny:
        run.note(Outcome("sanitizer", "not available", 0, "compute-sanitizer is not on PATH"))
    # API errors are not reported: torch makes calls that fail, and ours are checked.
    options = ["--show-backtrace", "no", "--report-api-errors", "no", "--print-limit", "200"]
    for name in ("memcheck", "racecheck") if sanitizer and not run.tiny else ():
        command = [str(sanitizer), "--tool", name, *options, *run.smoke("--small")]
        # Allocations are made one by one, so that the sanitizer sees their borders.
        looking.append(run.start(name, command, 120, PYTORCH_NO_CUDA_MEMORY_CACHING="1"))
    if run.tiny:
        looking.append(run.start("smoke-small", run.smoke("--small"), 120))
    run.judge(started)
    for tool_run in looking:
        run.note(judged_by_sanitizer(tool_run.outcome(), tool_run.text()))
        run.keep(tool_run, "sanitizer.txt")


STEPS = {
    "build": build,
    "smoke": smoke,
    "timings": timings,
    "distillation": distillation,
    "counters": counters,
    "checks": checks,
    "sizes": lambda run: timings(run, "sizes", 60, "--late"),
    "triton": lambda run: run.judge(tests(run, "triton")),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "gpu")
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--steps", default=",".join(STEPS), help="some of the steps, by comma")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--ready", action="store_true", help="only: has this Python what it takes?")
    arguments = parser.parse_args()
    if arguments.ready:
        print("missing:", ", ".join(missing()) or "nothing")
        return int(bool(missing()))
    arguments.steps = arguments.steps.split(",")
    if unknown := set(arguments.steps) - set(STEPS):
        parser.error(f"--steps knows {', '.join(STEPS)}, got {', '.join(unknown)}")
    if not arguments.tiny and architecture() is None:
        parser.error("torch can use no CUDA GPU here; --tiny rehearses without one")
    signal.signal(
        signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM)
    )  # runs the `finally` block
    run = Run(arguments)
    try:
        for name in filter(arguments.steps.__contains__, STEPS):
            if run.left() > 5:
                STEPS[name](run)
            else:
                run.note(Outcome(name, "unfinished", 0, "left out: the time was spent"))
    finally:
        for command in run.commands:
            command.end()
    print((run.output / "summary.md").read_text())
    return int(any(outcome.state in ("failed", "out of time") for outcome in run.outcomes))


if __name__ == "__main__":
    sys.exit(main())
