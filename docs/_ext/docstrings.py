"""Docstrings are plain text here; this makes reStructuredText of what it would read otherwise."""

from __future__ import annotations

from sphinx.application import Sphinx


def mark_up(
    app: Sphinx, what: str, name: str, item: object, options: object, lines: list[str]
) -> None:
    """Make literal blocks of indented text behind an empty line, and escape stars elsewhere."""
    marked: list[str] = []
    # The last line that is not empty; whether it is of a formula or code.
    above, literal = "", False
    for line, before in zip(lines, ["", *lines], strict=False):
        if line and not line.startswith(" "):
            literal = False
        elif line and not before and above and not above.startswith(" "):
            literal = True
            marked += ["::", ""]
        marked.append(line if literal else line.replace("*", r"\*"))
        above = line or above
    lines[:] = marked


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("autodoc-process-docstring", mark_up, priority=400)  # napoleon's is 500
    return {"parallel_read_safe": True, "parallel_write_safe": True}
