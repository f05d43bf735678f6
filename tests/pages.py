"""The pages of the documentation as Markdown: links, headings, blocks of code, code in a line."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).resolve().parents[1]
MADE = (ROOT / "docs/repository", ROOT / "docs/reference/commands.md")  # by the build of the site
PLACES = ("*.md", ".github/**/*.md", "benchmarks/results/*.md", "docs/**/*.md", "examples/**/*.md")
PAGES = sorted(
    page
    for place in (*PLACES, "examples/**/*.ipynb")
    for page in ROOT.glob(place)
    if not any(page.is_relative_to(made) for made in MADE)
)
GUIDES = [page for page in PAGES if page.name != "CHANGELOG.md" and page.parent.name != "results"]
"""Pages that say what to do today: not what changed, nor what a benchmark wrote."""


@dataclass(frozen=True)
class Block:
    """A block of code; one without a language, or indented, has an empty one."""

    page: str
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def text_of(page: Path) -> str:
    """Return a page's Markdown; of a notebook, its cells, where code is fenced."""
    if page.suffix == ".md":
        return re.sub(r"\A---\n.*?\n---\n", "", page.read_text(), flags=re.DOTALL)
    cells = json.loads(page.read_text())["cells"]
    kinds = {"markdown": "{}", "code": "```python\n{}\n```"}
    return "\n\n".join(kinds[cell["cell_type"]].format("".join(cell["source"])) for cell in cells)


@cache
def tokens(page: Path) -> list[Token]:
    return MarkdownIt("commonmark").enable("table").parse(text_of(page))


def inline(page: Path) -> Iterator[Token]:
    for token in tokens(page):
        yield from token.children or ()


@cache
def anchors(page: Path) -> frozenset[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    found: list[str] = []
    seen: Counter[str] = Counter()
    for opened, token in zip(tokens(page), tokens(page)[1:], strict=False):
        if opened.type == "heading_open":
            title = "".join(child.content for child in token.children or ())
            slug = re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
            found.append(f"{slug}-{seen[slug]}" if seen[slug] else slug)
            seen[slug] += 1
    return frozenset(found)


def links(page: Path) -> list[str]:
    """The targets of a page's links and pictures, those in HTML included."""
    found = [
        str(token.attrs.get("href") or token.attrs.get("src"))
        for token in inline(page)
        if token.type in ("link_open", "image")
    ]
    html = [token.content for token in (*tokens(page), *inline(page)) if token.type[:4] == "html"]
    return [*found, *re.findall(r'(?:src|href|srcset)="([^"\s]+)', "\n".join(html))]


def code_in_lines(page: Path) -> list[str]:
    return [token.content for token in inline(page) if token.type == "code_inline"]


def blocks(page: Path) -> list[Block]:
    return [
        Block(name(page), (token.map or [0])[0] + 1, token.info.strip(), token.content)
        for token in tokens(page)
        if token.type in ("fence", "code_block")
    ]
