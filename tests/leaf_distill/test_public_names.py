"""The names that README promises, also after every module of the package has been imported."""

from __future__ import annotations

import subprocess
import sys


def test_public_names_are_never_hidden_by_a_module() -> None:
    code = (
        "import importlib, pkgutil, leaf_distill\n"
        "for module in pkgutil.iter_modules(leaf_distill.__path__, 'leaf_distill.'):\n"
        "    if not module.name.endswith('__main__'):\n"
        "        importlib.import_module(module.name)\n"
        "from leaf_distill import DetectConfig, LeafConfig, LeafTrainer, detect\n"
        "assert all(map(callable, (DetectConfig, LeafConfig, LeafTrainer, detect)))\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
