"""A page as a tree of elements, by the standard library's parser."""

from __future__ import annotations

from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path


@dataclass
class Element:
    tag: str
    attributes: dict[str, str | None]
    children: list[Element | str] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(c if isinstance(c, str) else c.text for c in self.children)

    def find(self, tag: str = "", **wanted: str) -> list[Element]:
        """Descendants by tag and attributes; `cls` is one class among several."""

        def matches(element: Element) -> bool:
            classes = (element.attributes.get("class") or "").split()
            return (not tag or element.tag == tag) and all(
                value in classes
                if key == "cls"
                else element.attributes.get(key.replace("_", "-")) == value
                for key, value in wanted.items()
            )

        found = []
        for child in self.children:
            if isinstance(child, Element):
                found += [child] if matches(child) else []
                found += child.find(tag, **wanted)
        return found


class Page(HTMLParser):
    """A tree of the page that fails on tags that are not closed in order."""

    VOID = frozenset({"meta", "br", "input"})

    def __init__(self, path: Path) -> None:
        super().__init__(convert_charrefs=True)
        self.source = path.read_bytes().decode()
        self.root = Element("document", {})
        self.open = [self.root]
        self.feed(self.source)
        self.close()
        assert self.open == [self.root]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = Element(tag, dict(attrs))
        self.open[-1].children.append(element)
        if tag not in self.VOID:
            self.open.append(element)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open[-1].children.append(Element(tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop().tag == tag

    def handle_data(self, data: str) -> None:
        self.open[-1].children.append(data)

    def samples(self) -> dict[int, Element]:
        articles = self.root.find("article")
        return {int((a.attributes["id"] or "").removeprefix("row-")): a for a in articles}
