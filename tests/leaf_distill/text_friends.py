"""Texts of many scripts, for property tests of what reads and cuts them."""

from __future__ import annotations

from collections.abc import Iterable

from hypothesis import strategies as st

from leaf_distill.data.example import Range

TEXTS = (
    "Janet\u2019s ducks lay 16 eggs per day. She eats three (or 3.5), and bakes muffins with four."
    "\n\n  She sells the rest for $2 per egg.  How much, in dollars, does she make?\n#### 18",
    "Let $f(x) = 3.5x, g. H$ hold.  Then\n\\[ \\sum_{k=1}^n k. \\]\nFind \\frac{1}{2}; it is -3!",
    "def f(x):\n    y = g(x, 1)\n\n    return 'a. b'\n\n\nclass A:\n\tpass\n",
    "Use this:\n\n```python\nprint('Hi. You')\n\nx = 1\n```\n\nSee https://a.org/b.c?d=1, ok.",
    "小明有三个苹果\uff0c他吃了 1 个。还剩几个\uff1f答案\uff08整数\uff09是2。",
    "राम के पास ५ सेब हैं। क्षेत्र 2 है।",
    "هل لديك تفاحة\u061f نعم\u060c لدي \u0665 ك\u064fت\u064fب.",
    "ฉันมี 5 ลูก\nกินไป 2 ลูก กำ",
    "Hi \U0001f469\u200d\U0001f469\u200d\U0001f467 there \U0001f44d\U0001f3fd, "
    "\U0001f1e9\U0001f1ea\U0001f1eb\U0001f1f7! Cafe\u0301 e\u0301. 한.",
)

PIECES = [
    *"ab1 .,;:!?()[]{}$\\\"'`-_/%\n\t\r#*=",
    *"。\uff0c小।क्षि\u061fكกำ\u0301\u200d\xa0\u2028\u2014",
    *"\U0001f469\U0001f3fd\U0001f1e9하",
    *(
        "  ",
        "\n\n",
        "    ",
        "```",
        "$$",
        "\\[",
        "\\]",
        "Dr. ",
        "e.g. ",
        "3.14",
        "1,000",
        "a@b.org ",
    ),
]
texts = st.one_of(
    st.sampled_from(TEXTS),
    st.lists(st.sampled_from(PIECES), max_size=40).map("".join),
    st.text(max_size=40),
)


@st.composite
def cuts(draw: st.DrawFn) -> tuple[str, list[Range]]:
    """A text and some ranges of it, which may overlap."""
    text = draw(texts.filter(bool))
    start = st.integers(0, len(text) - 1)
    ranges = []
    for _ in range(draw(st.integers(1, 4))):
        at = draw(start)
        ranges.append((at, draw(st.integers(at + 1, min(len(text), at + 12)))))
    return text, ranges


def marked(text: str) -> tuple[str, list[Range]]:
    """Return a text without its pairs of << >>, and what stood between them as ranges."""
    plain, ranges = "", []
    for at, piece in enumerate(text.replace(">>", "<<").split("<<")):
        if at % 2:
            ranges.append((len(plain), len(plain) + len(piece)))
        plain += piece
    return plain, ranges


def cut(text: str, ranges: Iterable[Range]) -> str:
    """Return the text without the characters of ranges."""
    gone = {at for start, stop in ranges for at in range(start, stop)}
    return "".join(character for at, character in enumerate(text) if at not in gone)
