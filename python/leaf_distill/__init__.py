"""LeaF: find the tokens that mislead a student, cut them out, distil on both prompts.

    from leaf_distill import DetectConfig, detect, LeafConfig, LeafTrainer

The names are loaded on first use, so that ``import leaf_distill`` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from leaf_distill.data.dataset import load_examples
    from leaf_distill.data.example import Example
    from leaf_distill.data.tests import Tests
    from leaf_distill.detection.config import DetectConfig
    from leaf_distill.detection.pipeline import DetectResult, detect
    from leaf_distill.evaluation.analyze import AnalyzeResult, analyze
    from leaf_distill.evaluation.benchmarks import Benchmark
    from leaf_distill.evaluation.compare import compare
    from leaf_distill.evaluation.compare_table import CompareResult
    from leaf_distill.evaluation.config import AnalyzeConfig, CompareConfig, EvaluateConfig
    from leaf_distill.evaluation.evaluate import evaluate, evaluate_benchmarks
    from leaf_distill.evaluation.measure import EvaluateResult
    from leaf_distill.evaluation.results import BenchmarkResult
    from leaf_distill.grading.code import CodeGrader
    from leaf_distill.models.result import SaliencyResult, saliency
    from leaf_distill.report import write_figure, write_report
    from leaf_distill.training.cache import CacheResult, cache_teacher
    from leaf_distill.training.config import CacheConfig, DistillArguments, LeafConfig
    from leaf_distill.training.distill import DistillResult, distill
    from leaf_distill.training.trainer import LeafTrainer

_HOME = {
    "AnalyzeConfig": "evaluation.config",
    "AnalyzeResult": "evaluation.analyze",
    "Benchmark": "evaluation.benchmarks",
    "BenchmarkResult": "evaluation.results",
    "CacheConfig": "training.config",
    "CacheResult": "training.cache",
    "CodeGrader": "grading.code",
    "CompareConfig": "evaluation.config",
    "CompareResult": "evaluation.compare_table",
    "DetectConfig": "detection.config",
    "DetectResult": "detection.pipeline",
    "DistillArguments": "training.config",
    "DistillResult": "training.distill",
    "EvaluateConfig": "evaluation.config",
    "EvaluateResult": "evaluation.measure",
    "Example": "data.example",
    "LeafConfig": "training.config",
    "LeafTrainer": "training.trainer",
    "SaliencyResult": "models.result",
    "Tests": "data.tests",
    "analyze": "evaluation.analyze",
    "cache_teacher": "training.cache",
    "compare": "evaluation.compare",
    "detect": "detection.pipeline",
    "distill": "training.distill",
    "evaluate": "evaluation.evaluate",
    "evaluate_benchmarks": "evaluation.evaluate",
    "load_examples": "data.dataset",
    "saliency": "models.result",
    "write_figure": "report",
    "write_report": "report",
}

__all__ = [
    "AnalyzeConfig",
    "AnalyzeResult",
    "Benchmark",
    "BenchmarkResult",
    "CacheConfig",
    "CacheResult",
    "CodeGrader",
    "CompareConfig",
    "CompareResult",
    "DetectConfig",
    "DetectResult",
    "DistillArguments",
    "DistillResult",
    "EvaluateConfig",
    "EvaluateResult",
    "Example",
    "LeafConfig",
    "LeafTrainer",
    "SaliencyResult",
    "Tests",
    "analyze",
    "cache_teacher",
    "compare",
    "detect",
    "distill",
    "evaluate",
    "evaluate_benchmarks",
    "load_examples",
    "saliency",
    "write_figure",
    "write_report",
]


def __getattr__(name: str) -> object:
    """Load a public name, or the version, from the module that defines it."""
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("leaf-distill")
        except PackageNotFoundError:  # only then: leaf_ext imports torch
            return import_module("leaf_ext").__version__
    if name not in _HOME:
        raise AttributeError(f"module 'leaf_distill' has no attribute {name!r}")
    return getattr(import_module(f"leaf_distill.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
