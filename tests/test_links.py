"""Every relative link of the documentation leads to a file, and to a heading where it names one."""

from __future__ import annotations

from pathlib import Path

import pytest
from pages import PAGES, anchors, links, name


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in links(page):
        if link.startswith(("http://", "https://", "mailto:")):
            continue
        place, _, anchor = link.partition("#")
        target = (page.parent / place).resolve() if place else page
        assert target.exists(), f"{link} leads nowhere"
        assert not anchor or anchor in anchors(target), f"{link}: no such heading"


def test_the_pages_have_links() -> None:
    assert sum(len(links(page)) for page in PAGES) > 40
