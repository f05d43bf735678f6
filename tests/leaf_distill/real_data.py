"""Benchmarks that are not shipped: files of the folder that the variable LEAF_DATA names."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def data_file(name: str) -> Path:
    """Return a file of LEAF_DATA; the test is skipped where there is none."""
    folder = os.environ.get("LEAF_DATA")
    if not folder:
        pytest.skip(f"LEAF_DATA must name a folder with {name}, which is not shipped")
    path = Path(folder) / name
    if not path.is_file():
        pytest.skip(f"LEAF_DATA has no {name}, got {folder}")
    return path.resolve()
