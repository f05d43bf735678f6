"""LeaF's kernels: gradient saliency, spans of confounders, losses over large vocabularies."""

from __future__ import annotations

from leaf_ext.dispatch import backends
from leaf_ext.loop import CapturedGrad, capture_embedding_grad, cut_spans
from leaf_ext.memory import use_cpu_memory_pool
from leaf_ext.native import build_info
from leaf_ext.ops import (
    DualKLRows,
    Spans,
    detect_spans,
    dual_kl,
    grad_norm,
    linear_dual_kl,
    linear_topk_kl,
    row_weights,
    topk_kl,
    vocab_parallel_dual_kl,
)

__all__ = [
    "CapturedGrad",
    "DualKLRows",
    "Spans",
    "backends",
    "build_info",
    "capture_embedding_grad",
    "cut_spans",
    "detect_spans",
    "dual_kl",
    "grad_norm",
    "linear_dual_kl",
    "linear_topk_kl",
    "row_weights",
    "topk_kl",
    "use_cpu_memory_pool",
    "vocab_parallel_dual_kl",
]


def __getattr__(name: str) -> object:
    if name == "__version__":
        return _version()
    raise AttributeError(f"module 'leaf_ext' has no attribute {name!r}")


def _version() -> str:
    """Return the version in pyproject.toml, by way of the installation where there is one."""
    import re
    from importlib.metadata import PackageNotFoundError, version
    from pathlib import Path

    try:
        return version("leaf-distill")
    except PackageNotFoundError:  # sources that are on Python's path, but not installed
        project = (Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")
        return str(re.findall(r'^version = "(.+)"$', project, re.MULTILINE)[0])
