"""Files of the repository that pages link to become pages of the site, under repository/.

On GitHub a link such as ../benchmarks/results/study.md leads to the file. The site holds docs/
alone: there it leads to a page with the file's text, so that every link works in both places,
offline too.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

from sphinx.application import Sphinx

DOCS = Path(__file__).resolve().parents[1]
ROOT = DOCS.parent
MADE = DOCS / "repository"
LINK = re.compile(r"(?<=\]\()([^):#\s]+)(?=[)#])")
REMOTE_IMAGE = re.compile(r"!\[([^]]*)\]\(https?:[^)]*\)")
LANGUAGES = {".py": "python", ".yaml": "yaml", ".yml": "yaml", ".toml": "toml"}
ORPHAN = "---\norphan: true\n---\n"


def place(path: Path) -> Path:
    """Return where the site has a file of the repository: itself, or the page that shows it."""
    if path.is_relative_to(DOCS):
        return path
    shown = MADE / path.relative_to(ROOT)
    return shown if shown.suffix == ".md" else shown.with_name(f"{shown.name}.md")


def linked(text: str, base: Path) -> Iterator[tuple[str, Path]]:
    """Yield the relative links of a page, and the files and directories that they lead to."""
    for link in set(LINK.findall(text)):
        path = (base.parent / link).resolve()
        if path.exists() and path.is_relative_to(ROOT):
            yield link, path


def on_site(text: str, base: Path) -> str:
    """Return a page with links out of its side of the repository as paths from the site's root."""
    places = {
        link: place(path).relative_to(DOCS)
        for link, path in linked(text, base)
        if not (base.is_relative_to(DOCS) and path.is_relative_to(DOCS))
    }
    return LINK.sub(lambda found: f"/{places[found[0]]}" if found[0] in places else found[0], text)


def text_of(path: Path) -> str:
    """Return a file as a page; of a directory, a list of its files."""
    title = f"{ORPHAN}\n# `{path.relative_to(ROOT)}`\n\n"
    if path.is_dir():
        files = sorted(item for item in path.iterdir() if item.is_file())
        return title + "".join(f"- [{item.name}]({path.name}/{item.name})\n" for item in files)
    if path.suffix == ".md":
        # The site fetches nothing: a badge is its text.
        return f"{ORPHAN}\n" + REMOTE_IMAGE.sub(r"\1", path.read_text())
    if path.suffix == ".ipynb":
        return f"{ORPHAN}\n{cells_of(path)}"
    language = LANGUAGES.get(path.suffix, "none")
    return f"{title}`````{{code-block}} {language}\n{path.read_text()}\n`````\n"


def cells_of(notebook: Path) -> str:
    """Return the text and code of a notebook as Markdown."""
    kinds = {"markdown": "{}", "code": "```python\n{}\n```"}
    cells = json.loads(notebook.read_text())["cells"]
    return "\n\n".join(kinds[one["cell_type"]].format("".join(one["source"])) for one in cells)


def write(app: Sphinx) -> None:
    made: dict[Path, str] = {}
    pages = [item for item in DOCS.rglob("*.md") if not item.is_relative_to(MADE)]
    texts = {page: page.read_text() for page in pages}
    while texts:
        base, text = texts.popitem()
        for _, path in linked(text, base):
            if not path.is_relative_to(DOCS) and place(path) not in made:
                texts[path] = text_of(path)
                made[place(path)] = on_site(texts[path], path)
    for old in set(MADE.rglob("*.md")) - set(made):
        old.unlink()
    for file, text in made.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        if not file.exists() or file.read_text() != text:  # Sphinx reads again what is newer
            file.write_text(text)


def read(app: Sphinx, docname: str, source: list[str]) -> None:
    page = DOCS / f"{docname}.md"
    if not page.is_relative_to(MADE):
        source[0] = on_site(source[0], page)


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("builder-inited", write)
    app.connect("source-read", read)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
