"""Words, phrases, clauses and sentences, cuts widened to them, and seams that read as text."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from text_friends import TEXTS, cut, cuts, marked, texts

from leaf_distill.data.example import Range
from leaf_distill.data.sentences import is_grapheme_border, is_mark
from leaf_distill.detection.units import clauses, phrases, sentences, tidy, widen, words

Find = Callable[[str, Sequence[Range]], tuple[Range, ...]]


def found(find: Find, text: str) -> list[str]:
    return [text[start:stop] for start, stop in find(text, [(0, len(text))])]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "It's Janet\u2019s well-known T-shirt.",
            ["It's", "Janet\u2019s", "well-known", "T-shirt"],
        ),
        (
            "-3 or 3.14, 1,000.50 and 12,34,567",
            ["-3", "or", "3.14", "1,000.50", "and", "12,34,567"],
        ),
        (
            "$2 of -$5, \u20ac1,5 and 20% at 5kg",
            ["$2", "of", "-$5", "\u20ac1,5", "and", "20%", "at", "5kg"],
        ),
        ("16-3=13, f(1,2), [3,5,7]", ["16", "3", "13", "f", "1", "2", "3", "5", "7"]),
        ("a 120-page book at 3:30, 1/2 cup", ["a", "120-page", "book", "at", "3:30", "1/2", "cup"]),
        (r"$\frac{3}{4} x_1 + 5\%$", [r"\frac", "3", "4", "x_1", r"5\%"]),
        ("Dr. No, i.e. a.b@c.org", ["Dr.", "No", "i.e.", "a.b@c.org"]),
        ("see https://a.org/b?c=1.", ["see", "https://a.org/b?c=1"]),
        ("राम के पास ५ हैं।", ["राम", "के", "पास", "५", "हैं"]),
        ("كُتُب، \u0665", ["كُتُب", "\u0665"]),
        ("他有3个iPhone手机", ["3", "iPhone"]),
        ("cafe\u0301 na\u00efve", ["cafe\u0301", "na\u00efve"]),
        ("... --- !", []),
    ],
)
def test_words(text: str, expected: list[str]) -> None:
    assert found(words, text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "He has 5, which cost $1,000; she: none.",
            ["He has 5,", " which cost $1,000;", " she:", " none."],
        ),
        ("A pen (it is red) is here. So", ["A pen", " (it is red)", " is here.", " So"]),
        (
            "A pen (red, old) and f(x, y) at (3, 4)",
            ["A pen", " (red, old)", " and f(x, y) at (3, 4)"],
        ),
        (
            "One \u2013 the first \u2013 is red\u2014or not",
            ["One", " \u2013 the first", " \u2013 is red", "\u2014or not"],
        ),
        ("At 3:30 a well-known $x, y$, z", ["At 3:30 a well-known $x, y$,", " z"]),
        ("If so,\nthen (a (big) one) is", ["If so,\n", "then", " (a (big) one)", " is"]),
        ("小明有三个,他吃了。", ["小明有三个,他吃了。"]),
        ("苹果、梨\uff0c桃\uff1b还。", ["苹果、", "梨\uff0c", "桃\uff1b", "还。"]),
        ("نعم، لدي", ["نعم،", " لدي"]),
        ("Yes, - , no", ["Yes, - ,", " no"]),
    ],
)
def test_clauses(text: str, expected: list[str]) -> None:
    assert found(clauses, text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "Andrew starts with 8 eggs weighing 50 kg. He buys 62 more and the weight is 9 kg.",
            [
                *("Andrew starts", " with 8 eggs", " weighing 50 kg."),
                *(" He buys 62 more", " and the weight is 9 kg."),
            ],
        ),
        (
            "He stored 3 candies in boxes that weigh 5 pounds, by then.",
            ["He stored 3 candies", " in boxes", " that weigh 5 pounds,", " by then."],
        ),
        # A unit, nouns in -ing, and what stands behind an article or a form of "be".
        ("A pole of 5 in or 3", ["A pole of 5 in", " or 3"]),
        ("The following morning he is running home", ["The following morning he is running home"]),
        # A phrase has two words: one at the end of a clause stays with the words before it.
        ("They were there before", ["They were there before"]),
        ("He goes home $x in 3 by x$ in time", ["He goes home $x in 3 by x$", " in time"]),
        ("小明有三个,他吃了。", ["小明有三个,他吃了。"]),
    ],
)
def test_phrases(text: str, expected: list[str]) -> None:
    assert found(phrases, text) == expected


def test_units_stay_within_their_message() -> None:
    text = "He has 5 app" + "les, and so. On"
    parts = [(0, 12), (12, len(text))]
    assert [text[a:b] for a, b in sentences(text, parts)] == ["He has 5 app", "les, and so.", " On"]
    assert [text[a:b] for a, b in widen(text, [(10, 14)], "word", parts)] == ["app", "les"]
    assert [text[a:b] for a, b in widen(text, [(13, 14)], "clause", parts)] == ["les,"]


@pytest.mark.parametrize(
    ("unit", "text", "expected"),
    [
        ("token", "It co<<st>>s", ["st"]),
        ("word", "It<< co>>sts $7<<2>>.5 now", [" costs", "$72.5"]),
        ("word", "a \\fr<<ac>>{1}{2}", ["\\frac"]),
        ("word", "two<< >>words", [" "]),
        ("word", "end<<).>> Go", [")."]),
        ("word", "他有<<三>>个", ["三"]),
        ("word", "a <<b>> <<c d>>", ["b", "c d"]),
        ("phrase", "He has 5 <<with>> a hat, too.", [" with a hat,"]),
        ("clause", "He, who <<has>> 5, goes.", [" who has 5,"]),
        ("clause", "He,<< >>who goes", [" "]),
        ("sentence", "He goes. She, who<< st>>ays, eats.", [" She, who stays, eats."]),
    ],
)
def test_a_cut_is_widened_to_whole_units(unit: str, text: str, expected: list[str]) -> None:
    plain, ranges = marked(text)
    wide = widen(plain, ranges, unit, [(0, len(plain))])  # type: ignore[arg-type]
    assert [plain[start:stop] for start, stop in wide] == expected


def test_an_emoji_or_a_mark_is_never_split_by_a_widened_cut() -> None:
    text = "a \U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea"
    assert widen(text, [(3, 4)], "word", [(0, len(text))]) == ((2, 5),)
    assert widen(text, [(7, 8)], "word", [(0, len(text))]) == ((6, 8),)
    assert widen("e\u0301 a", [(0, 1)], "word", [(0, 4)]) == ((0, 2),)


def test_an_unknown_unit_is_refused() -> None:
    with pytest.raises(ValueError, match="unit: must be one of token, word, phrase, clause, sent"):
        widen("a", [(0, 1)], "line", [(0, 1)])  # type: ignore[arg-type]


@settings(deadline=None)
@example(("\\:\u0e31", [(2, 3)]), "word", 0)  # the mark belongs to the end of a command
@given(
    cuts(), st.sampled_from(["token", "word", "phrase", "clause", "sentence"]), st.integers(0, 40)
)
def test_every_widened_cut_keeps_its_promises(
    case: tuple[str, list[Range]], unit: str, border: int
) -> None:
    text, ranges = case
    parts = [(0, border), (border, len(text))] if 0 < border < len(text) else [(0, len(text))]
    wide = widen(text, ranges, unit, parts)  # type: ignore[arg-type]
    assert widen(text, wide, unit, parts) == wide  # type: ignore[arg-type]
    assert all(any(low <= a < b <= high for low, high in parts) for a, b in wide)
    assert all(b <= c for (_, b), (c, _) in pairwise(wide))
    held = {at for start, stop in wide for at in range(start, stop)}
    assert {at for start, stop in ranges for at in range(start, stop)} <= held
    edges = {at for part in parts for at in part}
    if unit != "token":
        assert all(is_grapheme_border(text, at) or at in edges for one in wide for at in one)


@settings(deadline=None)
@given(texts)
def test_units_cover_the_text_or_leave_out_blanks_and_marks(text: str) -> None:
    for find in (clauses, sentences):
        assert "".join(found(find, text)) == text
    inside = {at for start, stop in words(text, [(0, len(text))]) for at in range(start, stop)}
    assert all(at in inside for at, char in enumerate(text) if char.isalnum() and char.isascii())
    assert all(at not in inside for at, char in enumerate(text) if char.isspace())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a <<b>> c", "a c"),
        ("a<< b>> c", "a c"),
        ("a <<b>>, c", "a, c"),
        ("A, B,<< C.>> D", "A, B. D"),
        ("Tom runs<< and swims.>> He", "Tom runs. He"),
        ("<<Well>>, he", "he"),
        ("A. <<Well>>, he", "A. he"),
        ("he has<< 5,>> 6", "he has 6"),
        ("he has 4,<< 5>>, 6", "he has 4, 6"),
        ("x (<<one>>) y", "x y"),
        ("x (<<one>>, two) y", "x (two) y"),
        ("x (one<< two>>) y", "x (one) y"),
        ('say "<<one>>" y', "say y"),
        ("a $<<x>>$ b", "a b"),
        ("in<< the >>end", "in end"),
        ("super<<man likes cat>>s", "super s"),
        ("one<<\u2014>>two", "one\u2014two"),
        ("3<< and >>4", "3 4"),
        ("two<< >>words", "two words"),
        ("in<<t>>o", "ino"),
        ("a <<b>> <<c>>.", "a."),
        ("<<a>> <<b>>", ""),
        ("says <<8>> . how", "says . how"),
        ("A.<< B.>>\nC", "A.\nC"),
        ("A.<< B.\n>>C", "A.\nC"),
        ("A\n<<B>>\nC", "A\nC"),
        ("A<<\nB>>\nC", "A\nC"),
        ("A\n\n<<B>>\n\nC", "A\n\nC"),
        ("A\n\n<<B\n\n>>C", "A\n\nC"),
        ("A\n<<B>>", "A"),
        ("A\n<<B\n>>", "A\n"),
        ("<<one>> two", "two"),
        ("    <<one>> two", "    two"),
        ("<<    one>> two", "    two"),
        ("x\n<<    one>>\ny", "x\ny"),
        ("x\n <<   >>y", "x\n    y"),
        ("if x:\n    <<y = 1>>\n    z", "if x:\n    z"),
        ("    a\n<<    b\n>>    c", "    a\n    c"),
        ("x = <<1>>\n    y", "x =\n    y"),
        ("f(<<1>>, 2)", "f(2)"),
        ("我<<们>>\uff0c你", "我\uff0c你"),
        ("我有,<<他有。>>你", "我有。你"),
        ("e<<\u0301>>x", "e\u0301x"),
        ("<<e>>\u0301x", "x"),
        ("a \U0001f469<<\u200d>>\U0001f467 b", "a b"),
        ("<<\u0915>>\u094d\u0937", "\u0915\u094d\u0937"),
        ("it costs <<2>>.50", "it costs .50"),
    ],
)
def test_a_tidied_cut_reads_as_text(text: str, expected: str) -> None:
    plain, ranges = marked(text)
    assert cut(plain, tidy(plain, ranges)) == expected


def test_ranges_outside_the_text_are_refused() -> None:
    with pytest.raises(ValueError, match="within 3 characters"):
        tidy("abc", [(2, 4)])
    assert tidy("abc", []) == ()


def seams(text: str, ranges: Sequence[Range]) -> list[tuple[str, str, str]]:
    """What stays before each cut, what it holds, and what stays after it."""
    edges = [0, *(at for one in ranges for at in one), len(text)]
    return [
        (
            "".join(
                text[a:b] for a, b in zip(edges[: at + 1 : 2], edges[1 : at + 1 : 2], strict=False)
            ),
            text[edges[at] : edges[at + 1]],
            "".join(text[a:b] for a, b in zip(edges[at + 1 :: 2], edges[at + 2 :: 2], strict=True)),
        )
        for at in range(1, len(edges) - 1, 2)
    ]


@settings(deadline=None)
@given(cuts())
@example(("a \u200d\U0001f469b", [(1, 3)]))
def test_every_tidied_cut_keeps_its_promises(case: tuple[str, list[Range]]) -> None:
    text, ranges = case
    tidied = tidy(text, ranges)
    assert tidy(text, tidied) == tidied
    assert all(a < b for a, b in tidied) and all(b < c for (_, b), (c, _) in pairwise(tidied))
    asked = {at for start, stop in ranges for at in range(start, stop)}
    held = {at for start, stop in tidied for at in range(start, stop)}
    assert not any(text[at].isalnum() for at in held - asked)
    assert all(is_grapheme_border(text, at) for one in tidied for at in one)
    for before, inside, after in seams(text, tidied):
        a, b = before[-1:], after[:1]
        assert not (a and a in " \t" and b and b in " \t") or not before.strip(" \t"), (
            before,
            after,
        )
        if not before or before[-1] == "\n":
            assert (
                not (b and b in " \t")
                or inside[-1] in "\n\r\u2028"
                or not after.splitlines()[0].strip()
            )
        if a == " " and b and b in ",;?)]":
            assert inside[-1] in " \t\xa0" or not before.splitlines()[-1].strip()
        assert (a, b) not in (("(", ")"), ("[", "]"))
        if a.isalnum() and b.isalnum() and a.isascii() and b.isascii():
            assert all(char.isalnum() or char == "_" or is_mark(char) for char in inside)


@pytest.mark.parametrize("text", TEXTS)
def test_a_long_text_takes_milliseconds(text: str) -> None:
    long = ((text + "\n") * 4000)[:4000]
    whole = [(0, 4000)]
    some = [(at, at + 3) for at in range(0, 3990, 100)]
    for call in (
        lambda: words(long, whole),
        lambda: clauses(long, whole),
        lambda: widen(long, some, "word", whole),
        lambda: tidy(long, some),
    ):
        call()
        assert min(_seconds(call) for _ in range(5)) < 0.02  # 2 to 4 ms on a free core


def _seconds(call: Callable[[], object]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start
