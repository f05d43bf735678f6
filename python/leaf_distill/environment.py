"""`leaf env`: versions, devices, and which kernels run where; made to be pasted into a report."""

from __future__ import annotations

import os
import platform
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

import leaf_ext
from leaf_distill.config import package_versions
from leaf_distill.terminal import width

NEEDED = (
    "leaf-distill",
    "torch",
    "triton",
    "transformers",
    "accelerate",
    "datasets",
    "pyarrow",
    "math-verify",
)
OPTIONAL = (
    "peft",
    "trl",
    "torchao",
    "bitsandbytes",
    "gguf",
    "reasoning-gym",
    "deepspeed",
    "trackio",
    "tensorboard",
    "wandb",
)

Line = tuple[str, str]

_COLUMN = 18
_GB = 1e9


def show_environment() -> None:
    """Print the lines, at most 80 characters wide where nothing says how wide they may be.

    Each is printed when it is known, and one that cannot be read says why.
    """
    for part in (_versions, _processor, _gpus, _cache, _programs, _build, _kernels):
        for name, text in _guarded(part.__name__.strip("_"), part):
            print(
                textwrap.fill(
                    f"{name:<{_COLUMN}}{text}",
                    width() or 80,
                    subsequent_indent=" " * _COLUMN,
                    break_long_words=False,
                    break_on_hyphens=False,
                )
            )


def _guarded(name: str, part: Callable[..., Iterator[Line]], *arguments: object) -> Iterator[Line]:
    """Yield the lines of a part, and the reason in place of those that cannot be read."""
    try:
        yield from part(*arguments)
    except Exception as error:
        yield name, f"could not be read: {type(error).__name__}: {error}"


def _versions() -> Iterator[Line]:
    yield from package_versions(NEEDED).items()
    yield "python", f"{platform.python_version()} on {platform.platform()}"
    optional = package_versions(OPTIONAL)
    there = [f"{name} {number}" for name, number in optional.items() if number[0].isdigit()]
    yield "optional", ", ".join(there) or "none"
    lacking = [name for name, number in optional.items() if not number[0].isdigit()]
    if lacking:
        yield "not installed", ", ".join(lacking)


def _processor() -> Iterator[Line]:
    from leaf_distill.models.memory import free_memory, machine_memory

    cores, threads = os.cpu_count(), torch.get_num_threads()
    yield "cpu", f"{_cpu_name()}, {cores} cores, of which torch uses {threads}"
    yield "memory", f"{machine_memory() / _GB:.1f} GB, {free_memory() / _GB:.1f} GB free"


def _gpus() -> Iterator[Line]:
    for index in range(torch.cuda.device_count()):
        yield from _guarded(f"cuda:{index}", _gpu, index)
    if not torch.cuda.device_count():
        yield "gpu", f"torch sees none{_why_none()}"


def _gpu(index: int) -> Iterator[Line]:
    one = torch.cuda.get_device_properties(index)
    of_torch = f"HIP {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
    yield (
        f"cuda:{index}",
        f"{one.name}, {one.total_memory / _GB:.1f} GB, compute capability {one.major}."
        f"{one.minor}, torch built with {of_torch}",
    )


def _cache() -> Iterator[Line]:
    from leaf_distill.detection.cache import FILE, default_cache_directory

    cache = default_cache_directory().expanduser() / FILE
    size = cache.stat().st_size if cache.exists() else 0
    yield "cache", f"{cache}, {size / 1e6:.1f} MB"


def _programs() -> Iterator[Line]:
    from leaf_distill.grading.sandbox.process import unavailable

    yield "programs", unavailable() or "can be confined (--grade code)"


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def _why_none() -> str:
    cpu_only = torch.version.cuda is None and torch.version.hip is None
    return ": this torch is built for CPUs alone" if cpu_only else ""


def _build() -> Iterator[Line]:
    if reason := leaf_ext.backends("cpu")["cpu"]:  # a pure-Python installation is a sound one
        yield "leaf_ext", f"nothing is compiled, the reference runs: {reason}"
        return
    info = leaf_ext.build_info()
    other = "" if info["torch"] == torch.__version__ else f" (not {torch.__version__})"
    yield (
        "leaf_ext",
        f"{info['version']}, built by {info['compiler']} for torch {info['torch']}{other}",
    )
    amx = ", with AMX" if info["amx"] else ""
    built = ", ".join(info["architectures"])
    yield "built for CPUs", f"{built}; this one runs {info['instruction_set']}{amx}"
    yield "built for GPUs", ", ".join(info["cuda_architectures"]) or "no"


def _kernels() -> Iterator[Line]:
    """Yield for each device which backend runs, and why no other one does."""
    for index in range(torch.cuda.device_count()):
        yield from _guarded(f"kernels on cuda:{index}", _on, f"cuda:{index}")
    yield from _guarded("kernels on cpu", _on, "cpu")
    if not torch.cuda.device_count():
        for backend, reason in leaf_ext.backends("cuda").items():
            if backend != "reference":
                yield f"  not {backend}", reason or "it is installed, and torch sees no GPU"


def _on(device: str) -> Iterator[Line]:
    reasons = leaf_ext.backends(device)
    yield f"kernels on {device}", next(name for name in reasons if reasons[name] is None)
    yield from ((f"  not {name}", reason) for name, reason in reasons.items() if reason)
