"""docs/development/architecture.md has a line for each source file, and for no other."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "development" / "architecture.md").read_text()
TREE = PAGE.partition("## The tree")[2].partition("## Who may import whom")[0]

FOLDERS = ("csrc", "leaf_ext", "python/leaf_distill", "tools")
KINDS = {".py", ".cpp", ".h", ".cu", ".cuh", ".yaml"}
OPS = {path.stem for path in (ROOT / "leaf_ext" / "reference").glob("*.py")}
"""The tree writes <op> for a file that each op has."""


def sections() -> dict[str, str]:
    """Return the lines of each folder, under its path."""
    found: dict[str, str] = {}
    folder = ""
    for line in TREE.splitlines():
        if at := re.match(r"    (\S+)/(?: |$)", line):
            folder = at[1]
        elif at := re.match(r"    (\S+/)?\S+\.(?:py|h)\b", line):
            folder = (at[1] or "").rstrip("/")
        elif not line.startswith("      "):
            folder = ""
        found[folder] = f"{found.get(folder, '')}{line}\n"
    return found


def names(text: str) -> set[str]:
    """Return the files that a section names, with `softmax.{h,cpp}` as two."""
    text = re.sub(r"(\w+)\.\{(\w+),(\w+)\}", r"\1.\2 \1.\3", text)
    return set(re.findall(r"[\w<>]+\.(?:py|cpp|h|cuh|cu|yaml)\b", text))


@pytest.mark.parametrize("top", FOLDERS)
def test_each_source_file_has_a_line(top: str) -> None:
    tree = sections()
    missing = []
    for path in sorted((ROOT / top).rglob("*")):
        if path.suffix not in KINDS or path.name == "__init__.py" or "assets" in path.parts:
            continue
        folder = str(path.parent.relative_to(ROOT))
        text = tree.get(folder, "")
        named = names(text)
        op = path.stem in OPS and f"<op>{path.suffix}" in named
        if path.name not in named and not op and not re.search(r" configs ", text):
            missing.append(str(path.relative_to(ROOT)))
    assert not missing


def test_each_line_is_of_a_file() -> None:
    absent = [
        f"{folder}/{name}"
        for folder, text in sections().items()
        if folder.startswith(FOLDERS[:3])
        for name in names(text)
        if "<" not in name and not any((ROOT / folder).rglob(name))
    ]
    assert not absent
