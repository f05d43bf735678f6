"""The site of `make docs` builds without a warning, and needs nothing but its own files."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from pages import ROOT

from leaf_distill.cli import COMMANDS, configs_of, hidden_options
from leaf_distill.options import option_names

FETCHED = re.compile(
    r"""<(?:script|img|link|iframe)[^>]*\s(?:src|href)="(?:https?:)?//|url\(["']?(?:https?:)?//"""
)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("sphinx", reason="make docs installs it")
    folder = tmp_path_factory.mktemp("site")
    words = ["-q", "-W", "--keep-going", "-d", str(folder / "trees"), "docs", str(folder / "html")]
    run = subprocess.run(
        [sys.executable, "-m", "sphinx", *words], cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    return folder / "html"


@pytest.mark.slow
def test_no_page_fetches_anything(site: Path) -> None:
    pages = [*site.rglob("*.html"), *site.rglob("*.css")]
    assert len(pages) > 20
    for page in pages:
        assert not FETCHED.search(page.read_text()), page


@pytest.mark.slow
def test_equations_are_mathml(site: Path) -> None:
    text = (site / "method.html").read_text()
    assert text.count("<math ") > 20 and "\\frac" not in text


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_the_page_of_commands_has_every_option(site: Path, command: str) -> None:
    text = (site / "reference/commands.html").read_text()
    configs = configs_of(command)
    hidden = hidden_options(configs)
    for option in (option for config in configs for option in option_names(config)):
        if option in hidden:
            assert f">{option}<" in text
        else:
            anchor = f"cmdoption-leaf-{command}-{option}".replace("_", "[-_]")
            assert re.search(f'id="{anchor}"', text), option
