"""The import rules of the architecture, checked on the sources."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# A part of leaf_ext may import the parts on its right, and nothing else of the project.
ALLOWED = {
    "schema": set(),
    "native": {"schema"},
    "memory": set(),
    "reference": {"schema", "reference"},
    "triton": {"schema", "triton"},
    "dispatch": {"schema", "native", "reference", "triton"},
    "ops": {"schema", "native", "reference", "triton", "dispatch", "ops"},
    "loop": {"ops"},
    "__init__": {"ops", "native", "loop", "memory", "dispatch"},
    "testing": {"schema", "native", "dispatch", "reference", "ops", "testing", "__init__"},
}

# The same for the rooms of the loop.
_BASE = {"io", "config", "ranks", "data"}
_SAYS = {"wording", "terminal"}
_STAGES = _BASE | _SAYS | {"models", "grading", "statistics"}
ROOMS = {
    "io": set(),
    "ranks": set(),
    "config": set(),
    "options": _SAYS | {"config"},
    "statistics": set(),
    "wording": set(),
    "terminal": {"wording"},
    "data": {"io", "config", "data"},
    "models": _BASE | {"models"},
    "grading": _BASE | {"grading"},
    "detection": _STAGES | {"detection"},
    "training": _BASE | _SAYS | {"models", "grading", "training"},
    "evaluation": _STAGES | {"detection", "training", "evaluation"},
    "report": _STAGES | {"detection", "training", "evaluation", "report"},
    "demo": _STAGES | {"detection", "training", "evaluation", "report", "demo"},
    "environment": _STAGES | {"detection"},
    "next_steps": _STAGES | {"detection", "training", "evaluation"},
    "cli": _STAGES
    | {
        "detection",
        "training",
        "evaluation",
        "report",
        "demo",
        "options",
        "environment",
        "next_steps",
    },
    "__main__": {"cli"},
    "__init__": _STAGES - {"io"} | {"detection", "training", "evaluation", "report"},
}


def imported_modules(path: Path) -> Iterator[str]:
    """Yield the absolute names of all modules that a file imports, at any depth."""
    package = ".".join(path.relative_to(ROOT).with_suffix("").parts[:-1])
    package = package.removeprefix("python.")
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1]
            prefix = ".".join(base) if node.level else ""
            module = ".".join(part for part in (prefix, node.module) if part)
            # `from leaf_ext import schema` names a submodule, `from leaf_ext import grad_norm` not.
            yield from (f"{module}.{alias.name}" for alias in node.names)


def python_files(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def part_of(module: str) -> str | None:
    """Map `leaf_ext.ops.dual_kl` to `ops`, and a public name of leaf_ext to `__init__`."""
    parts = module.split(".")
    if parts[0] != "leaf_ext":
        return None
    if len(parts) > 1 and parts[1] in ALLOWED:
        return parts[1]
    return "__init__"


@pytest.mark.parametrize("path", python_files("leaf_ext"), ids=lambda p: str(p.relative_to(ROOT)))
def test_leaf_ext_imports_only_downwards(path: Path) -> None:
    parts = path.relative_to(ROOT / "leaf_ext").parts
    own = parts[0].removesuffix(".py")
    assert own in ALLOWED, f"leaf_ext/{own} is a new part: say in this test what it may import"
    for module in imported_modules(path):
        part = part_of(module)
        assert part is None or part in ALLOWED[own], f"{path.name} may not import {module}"


@pytest.mark.parametrize("path", python_files("leaf_ext"), ids=lambda p: str(p.relative_to(ROOT)))
def test_leaf_ext_knows_nothing_of_the_loop(path: Path) -> None:
    roots = {module.split(".")[0] for module in imported_modules(path)}
    assert not roots & {"leaf_distill", "transformers", "datasets", "accelerate"}


@pytest.mark.parametrize(
    "path", python_files("python/leaf_distill"), ids=lambda p: str(p.relative_to(ROOT))
)
def test_the_loop_uses_only_the_public_names_of_leaf_ext(path: Path) -> None:
    for module in imported_modules(path):
        assert part_of(module) in (None, "__init__"), f"{path.name} reaches into {module}"


@pytest.mark.parametrize(
    "path", python_files("python/leaf_distill"), ids=lambda p: str(p.relative_to(ROOT))
)
def test_the_rooms_of_the_loop_import_only_downwards(path: Path) -> None:
    own = path.relative_to(ROOT / "python/leaf_distill").parts[0].removesuffix(".py")
    assert own in ROOMS, f"leaf_distill/{own} is a new room: say in this test what it may import"
    for module in imported_modules(path):
        parts = module.split(".")
        if parts[0] == "leaf_distill" and len(parts) > 1 and parts[1] in ROOMS:
            assert parts[1] in ROOMS[own], f"{path.name} may not import {module}"


@pytest.mark.parametrize("path", python_files("benchmarks"), ids=lambda p: str(p.relative_to(ROOT)))
def test_a_benchmark_imports_no_test(path: Path) -> None:
    assert not any(module.split(".")[0] == "tests" for module in imported_modules(path))


@pytest.mark.parametrize("folder", ["cpu", "cuda", "include"])
def test_kernels_include_no_torch_header(folder: str) -> None:
    sources = [p for p in (ROOT / "csrc" / folder).rglob("*") if p.is_file()]
    assert sources
    for path in sources:
        assert not re.search(r'#\s*include\s*[<"](torch|ATen|c10)/', path.read_text()), path


def test_kernel_interfaces_include_only_standard_headers() -> None:
    for path in sorted((ROOT / "csrc" / "include").rglob("*.h")):
        for header in re.findall(r'#\s*include\s*([<"].+[>"])', path.read_text()):
            assert re.fullmatch(r'<c?[a-z_]+>|"leaf/[a-z_]+\.h"', header), (path, header)
