"""Every message that docs/troubleshooting.md quotes is one that the sources can say."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text()
QUOTED = re.findall(r"\*\*`([^`]+)`\*\*(?! \(of)", PAGE)
"""The messages; "(of torch)" and the like mark those of others."""


def strings(tree: ast.AST) -> Iterator[str]:
    """Yield the text of each literal, with a null character in the place of what varies."""
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            parts = [one.value if isinstance(one, ast.Constant) else "\0" for one in node.values]
            yield "".join(map(str, parts))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield re.sub(r"%\w", "\0", node.value)


def messages() -> list[str]:
    """Return all texts of the Python sources, and those that CMake says."""
    files = [ROOT / "setup.py", *ROOT.glob("leaf_ext/**/*.py"), *ROOT.glob("python/**/*.py")]
    found = [one for file in files for one in strings(ast.parse(file.read_text()))]
    said = re.findall(r"message\(\w+ (\"[^)]*\")", (ROOT / "CMakeLists.txt").read_text())
    return [*found, *(re.sub(r"\"\s+\"", "", re.sub(r"\$\{\w+\}", "\0", one)) for one in said)]


def test_each_quoted_message_is_in_the_sources() -> None:
    said = messages()
    unknown = [
        quoted
        for quoted in QUOTED
        if not any(
            re.search(".*".join(map(re.escape, filter(None, quoted.split("...")))), one, re.DOTALL)
            for one in said
        )
    ]
    assert not unknown


def test_the_page_has_many_messages() -> None:
    assert len(QUOTED) >= 40
    assert len({*QUOTED}) == len(QUOTED)
