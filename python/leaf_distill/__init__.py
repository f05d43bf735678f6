"""LeaF: find the tokens that mislead a student, cut them out, distil on both prompts.

    from leaf_distill import DetectConfig, detect, LeafConfig, LeafTrainer

The names are loaded on first use, so that ``import leaf_distill`` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from leaf_distill.config import DetectConfig
    from leaf_distill.detection.pipeline import detect
    from leaf_distill.training.config import LeafConfig
    from leaf_distill.training.trainer import LeafTrainer

__all__ = ["DetectConfig", "LeafConfig", "LeafTrainer", "detect"]

_HOME = {
    "DetectConfig": "leaf_distill.config",
    "LeafConfig": "leaf_distill.training.config",
    "LeafTrainer": "leaf_distill.training.trainer",
    "detect": "leaf_distill.detection.pipeline",
}


def __getattr__(name: str) -> object:
    """Load a public name from the module it lives in."""
    if name not in _HOME:
        raise AttributeError(f"module 'leaf_distill' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
