"""What stands in several files of the project is the same in all of them."""

from __future__ import annotations

import importlib.metadata
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.specifiers import SpecifierSet

import leaf_distill
import leaf_ext

ROOT = Path(__file__).resolve().parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
PROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")


def load(path: str | Path) -> Any:
    return yaml.safe_load((ROOT / path).read_text(encoding="utf-8"))


def field(name: str) -> str:
    return re.findall(rf'^{name} = "(.+)"$', PROJECT, re.MULTILINE)[0]


def test_the_version_is_one() -> None:
    version = field("version")
    assert importlib.metadata.version("leaf-distill") == version
    assert leaf_ext.__version__ == leaf_distill.__version__ == version
    assert load("CITATION.cff")["version"] == version


def test_sources_that_are_not_installed_have_a_version(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert leaf_ext.__version__ == leaf_distill.__version__ == field("version")


def test_every_package_is_installed() -> None:
    listed = re.findall(r'"(.+)"', re.findall(r"packages = \[\n([^]]+)", PROJECT)[0])
    folders = (ROOT / "leaf_ext", ROOT / "python" / "leaf_distill")
    found = [
        ".".join(init.relative_to(folder.parent).parent.parts)
        for folder in folders
        for init in folder.rglob("__init__.py")
    ]
    assert sorted(listed) == sorted(found)


def test_the_paper_is_one() -> None:
    paper = load("CITATION.cff")["preferred-citation"]
    assert f'Paper = "{paper["url"]}"' in PROJECT
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert paper["title"] in " ".join(readme.split()) and paper["url"] in readme


def test_the_matrix_is_what_the_project_supports() -> None:
    matrix = load(".github/workflows/ci.yml")["jobs"]["test"]["strategy"]["matrix"]
    classified = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', PROJECT)
    assert matrix["python"] == classified
    assert all(version in SpecifierSet(field("requires-python")) for version in classified)
    oldest, newest = matrix["torch"]
    lower = re.findall(r'^  "torch>=(.+)",$', PROJECT, re.MULTILINE)[0]
    assert (oldest, newest) == (f"torch=={lower}.*", "torch")
    (gate,) = matrix["include"]
    assert gate["command"] == ".ci/run" and gate["python"] in classified


def test_the_torch_of_the_makefile_is_that_of_the_gate_and_of_the_wheels() -> None:
    torch = re.findall(r"^TORCH +\?= (.+)$", MAKEFILE, re.MULTILINE)[0]
    matrix = load(".github/workflows/ci.yml")["jobs"]["test"]["strategy"]["matrix"]
    assert [gate["torch"] for gate in matrix["include"]] == [torch]
    assert set(re.findall(r"torch==[\d.]+", PROJECT)) == {torch}


@pytest.mark.parametrize("path", [*WORKFLOWS, ROOT / ".ci" / "run"], ids=lambda path: path.name)
def test_the_targets_of_the_makefile_exist(path: Path) -> None:
    rules = re.findall(r"^([a-z][a-z0-9 -]*):(?!=)", MAKEFILE, re.MULTILINE)
    targets = {target for rule in rules for target in rule.split()}
    called = re.findall(r"\bmake ([a-z-]+)", path.read_text(encoding="utf-8"))
    assert set(called) <= targets
    assert called or path.name == "wheels.yml"


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_may_only_read(path: Path) -> None:
    workflow = load(path)
    assert workflow["permissions"] == {"contents": "read"}
    for job in workflow["jobs"].values():
        assert "permissions" not in job and job["timeout-minutes"] <= 90


def test_a_gpu_is_used_on_request_only() -> None:
    workflow = load(".github/workflows/ci.yml")
    started = workflow[True]  # YAML reads the key "on" so
    assert started["workflow_dispatch"]["inputs"]["gpu"]["default"] is False
    assert "github.event_name != 'pull_request'" in workflow["jobs"]["gpu"]["if"]


def test_the_hooks_have_the_tools_of_the_dev_extra() -> None:
    (repository,) = load(".pre-commit-config.yaml")["repos"]
    pins = {pin for hook in repository["hooks"] for pin in hook.get("additional_dependencies", ())}
    assert {pin.split("==")[0] for pin in pins} == {"ruff", "clang-format"}
    assert pins <= set(re.findall(r'^  "(.+==.+)",$', PROJECT, re.MULTILINE))
    for hook in repository["hooks"]:
        assert hook["language"] in ("python", "pygrep"), "a hook depends on no environment of ours"
