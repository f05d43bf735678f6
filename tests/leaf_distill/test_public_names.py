"""The public names, also after every module of the package has been imported."""

from __future__ import annotations

import subprocess
import sys

import leaf_distill


def test_public_names_are_never_hidden_by_a_module() -> None:
    code = (
        "import importlib, pkgutil, leaf_distill\n"
        "for module in pkgutil.walk_packages(leaf_distill.__path__, 'leaf_distill.'):\n"
        "    if not module.name.endswith('__main__'):\n"
        "        importlib.import_module(module.name)\n"
        "for name in leaf_distill.__all__:\n"
        "    assert callable(getattr(leaf_distill, name)), name\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_public_name_has_a_home_and_a_docstring() -> None:
    assert sorted(leaf_distill.__all__) == sorted(leaf_distill._HOME)
    for name in leaf_distill.__all__:
        assert getattr(leaf_distill, name).__doc__, name
    assert leaf_distill.__version__.count(".") == 2
    assert set(leaf_distill.__all__) <= set(dir(leaf_distill))
