"""What the page of results says of the machine, the versions and the compiled kernels."""

from __future__ import annotations

import importlib.util
import platform
import re
import shutil
import subprocess
from importlib import metadata
from pathlib import Path

import torch

import leaf_ext

from . import peers

_CUDA = Path("/usr/local/cuda/bin")


def tool(name: str) -> str | None:
    """A tool of the CUDA toolkit: from PATH, from where toolkits lie, or from Triton's package."""
    found = shutil.which(name) or shutil.which(name, path=str(_CUDA))
    triton = importlib.util.find_spec("triton")
    if found is None and triton is not None and triton.origin:
        folder = Path(triton.origin).parent / "backends" / "nvidia" / "bin"
        found = shutil.which(name, path=str(folder))
    return found


def output_of(*command: str) -> str:
    """What it prints; nothing where it cannot run."""
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return ""
    return run.stdout if run.returncode == 0 else ""


def gpu_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU (rehearsal)"


def facts() -> dict[str, str]:
    """One line of the page for each entry."""
    query = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    nvcc = re.search(r"release ([\d.]+)", output_of(tool("nvcc") or "nvcc", "--version"))
    found = {"GPU": gpu_name()}
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        cache = getattr(properties, "L2_cache_size", 0)
        found["GPU"] += (
            f", {properties.total_memory / 1e9:.0f} GB, {properties.multi_processor_count} "
            f"multiprocessors, {cache / 2**20:.0f} MiB of L2"
        )
    found["driver"] = (output_of(*query).splitlines() or ["unknown"])[0]
    found["CUDA"] = f"{torch.version.cuda} (torch's), {nvcc[1] if nvcc else 'no'} nvcc"
    found["torch"] = torch.__version__
    found["triton"] = _version("triton")
    found["Python"] = f"{platform.python_version()}, {platform.system()} {platform.release()}"
    try:
        build = leaf_ext.build_info()
        parts = ("version", "compiler", "backends", "architectures", "cuda_architectures")
        words = (dict(build)[part] for part in parts)
        found["leaf_ext"] = ", ".join(w if isinstance(w, str) else " ".join(w) for w in words)
    except RuntimeError as error:
        found["leaf_ext"] = str(error)
    found["peers"] = ", ".join(map(" ".join, peers.versions().items())) or "none installed"
    return found


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"


def kernel_resources() -> list[dict[str, str | int]]:
    """Registers and memory of each compiled CUDA kernel; what is spilled lies on its stack."""
    dump, demangle = tool("cuobjdump"), shutil.which("c++filt")
    module = next(Path(leaf_ext.__file__).parent.glob("_C*.so"), None)
    if dump is None or module is None:
        return []
    text = output_of(dump, "--dump-resource-usage", str(module))
    if demangle:
        run = subprocess.run([demangle], input=text, capture_output=True, text=True)
        text = run.stdout or text
    found: dict[str, dict[str, str | int]] = {}
    pattern = r"Function (.+):\n\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)"
    for name, *numbers in re.findall(pattern, text):
        short = re.sub(r"leaf::(cuda::)?|\(anonymous namespace\)::|^void ", "", name)
        short = re.sub(r"(\w(?:<.*>)?)\(.*", r"\1", short)  # without its arguments
        registers, stack, shared, local = map(int, numbers)
        found[name] = {
            "kernel": short,
            "registers": registers,
            "stack": stack + local,
            "shared": shared,
        }
    return sorted(found.values(), key=lambda kernel: str(kernel["kernel"]))
