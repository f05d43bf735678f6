"""Replacements: the class and form of each word, the draw, and clauses of other prompts."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from real_data import data_file
from text_friends import TEXTS

from leaf_distill.detection.substitution import Vocabulary
from leaf_distill.detection.units import words

PROMPTS = (
    "Yesterday Anna had 12 apples and 3.5 kg of pears, and she paid $1,200 in 1999.",
    "On Monday the trainer told Ben that 47 boys walked -5.2 miles for $3,450 since 2004.",
    "Did Carla quickly eat three of 20% or slowly drink five of 35%? She ran 50kg on Friday.",
    "Since 1999 he was walking, and Dora's cats were jumping at 3:30, or 4:15, on the 3rd or 5th.",
    "How many apples are left? How many boys does she have in total? So Anna sees \\frac{1}{7}.",
    "राम के पास सेब हैं।",
)
VOCABULARY = Vocabulary(PROMPTS)


def drawn(text: str, word: str, vocabulary: Vocabulary = VOCABULARY) -> set[str | None]:
    """All replacements of a word over many draws."""
    at = text.index(word)
    span = (at, at + len(word))
    return {vocabulary.replace(text, span, random.Random(seed)) for seed in range(60)}


@pytest.mark.parametrize(
    ("text", "word", "expected"),
    [
        ("He has 12 pens", "12", {"47", "50"}),
        ("He has 99 pens", "99", {"12", "47", "50"}),
        ("It is -1.2 now", "-1.2", {"-3.5", "-5.2"}),
        ("He paid $4,000 then", "$4,000", {"$1,200", "$3,450"}),
        ("He paid $4000 then", "$4000", {"$1200", "$3450"}),
        ("born in 1999 here", "1999", {"2004"}),
        ("it has 4000 of", "4000", {None}),  # years are no numbers
        ("a 80% share", "80%", {"20%", "35%"}),
        ("a 80kg box", "80kg", {"12kg", "47kg", "50kg"}),
        ("a 60-page book", "60-page", {"12-page", "47-page", "50-page"}),
        ("at 3:30 now", "3:30", {"4:15"}),
        ("the 3rd of", "3rd", {"5th"}),
        ("he ate three now", "three", {"five"}),
        ("Three of them", "Three", {"Five"}),
        ("so Anna went", "Anna", {"Ben", "Carla"}),
        ("so Anna's pen", "Anna's", {"Ben's", "Carla's", "Dora's"}),
        ("on Monday he", "Monday", {"Friday"}),
        ("is walking now", "walking", {"jumping"}),
        ("quickly", "quickly", {"slowly"}),
        ("see \\frac now", "\\frac", {None}),
        ("राम के", "के", {"राम", "पास", "सेब", "हैं"}),
    ],
)
def test_a_word_becomes_another_of_its_class_and_form(
    text: str, word: str, expected: set[str | None]
) -> None:
    found = drawn(text, word)
    if word == "Anna":
        found -= {"Dora"}
    assert found == expected


def test_each_word_of_a_span_is_replaced_and_the_marks_stay() -> None:
    text = "Then Anna had 12 (or 20%), left 4000"
    start, stop = text.index(" had"), text.index(" left")
    new = VOCABULARY.replace(text, (start, stop), random.Random(0))
    assert new is not None and re.fullmatch(r" [a-z]+ (47|50) \([a-z]+ 35%\),", new)
    assert not new.startswith(" had") and "(or" not in new
    # No other number has four digits and is no year, so nothing of the span is replaced.
    assert VOCABULARY.replace(text, (start, len(text)), random.Random(0)) is None


def test_words_are_drawn_as_often_as_the_prompts_use_them() -> None:
    vocabulary = Vocabulary(["he has 11 or 22 or 22 or 22 or 33"])
    draws = [vocabulary.replace("a 33", (2, 4), random.Random(seed)) for seed in range(2000)]
    assert set(draws) == {"11", "22"}
    assert 0.7 < draws.count("22") / 2000 < 0.8


def test_what_has_no_replacement_is_none() -> None:
    assert VOCABULARY.replace("a 12 b", (1, 2), random.Random(0)) is None  # no word
    assert VOCABULARY.replace("a 12 b", (2, 3), random.Random(0)) is None  # half a word
    assert VOCABULARY.replace("他有三个", (2, 3), random.Random(0)) is None  # no word borders
    assert Vocabulary([]).replace("a 12 b", (2, 4), random.Random(0)) is None
    assert Vocabulary([]).replace("He is.", (0, 6), random.Random(0), clause=True) is None


def test_a_clause_becomes_one_of_another_prompt_with_its_mark_and_case() -> None:
    text = "Yesterday Anna had 12 apples and 3.5 kg of pears, and she paid. How old is she?"
    question = (text.index(" How"), len(text))
    found = {
        VOCABULARY.replace(text, question, random.Random(seed), clause=True) for seed in range(60)
    }
    assert found == {
        " How many apples are left?",
        " How many boys does she have in total?",
        " Did Carla quickly eat three of 20% or slowly drink five of 35%?",
    }
    first = VOCABULARY.replace(text, (0, text.index(",") + 1), random.Random(1), clause=True)
    assert first is not None and first.endswith(",") and first[0].isupper()
    assert first != text[: text.index(",") + 1]


def test_a_clause_of_the_prompt_itself_is_never_taken() -> None:
    text = "One is here. Two is here. Three is here."
    vocabulary = Vocabulary([text] * 50 + ["Four is here."])
    for seed in range(20):
        new = vocabulary.replace(text, (0, 12), random.Random(seed), clause=True)
        assert new == "Four is here."
    alone = Vocabulary([text])
    assert alone.replace(text, (0, 12), random.Random(0), clause=True) is None


def test_the_result_depends_on_the_draw_and_not_on_the_order_of_hashes() -> None:
    program = (
        "import random\n"
        "from test_substitution import PROMPTS, VOCABULARY as v\n"
        "print([v.replace(p, (0, len(p)), random.Random(s), clause=c)\n"
        "       for p in PROMPTS for s in range(9) for c in (True, False)])\n"
        "print([v.replace('so Anna had 99', (3, 14), random.Random(s)) for s in range(9)])"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)},
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1 and "47" in outputs.pop()


@settings(deadline=None)
@given(st.sampled_from(TEXTS), st.integers(0, 2**32), st.data())
def test_every_word_changes_and_keeps_its_form(text: str, seed: int, data: st.DataObject) -> None:
    vocabulary = Vocabulary([*TEXTS, *PROMPTS])
    found = words(text, [(0, len(text))])
    first = data.draw(st.integers(0, len(found) - 1))
    start, stop = found[first][0], found[min(first + 2, len(found) - 1)][1]
    new = vocabulary.replace(text, (start, stop), random.Random(seed))
    assert new == vocabulary.replace(text, (start, stop), random.Random(seed))
    if new is None:
        return
    old = [text[a:b] for a, b in found if start <= a < stop]
    after = text[:start] + new + text[stop:]
    fresh = [
        after[a:b] for a, b in words(after, [(0, len(after))]) if start <= a < start + len(new)
    ]
    assert len(fresh) == len(old)
    for before, now in zip(old, fresh, strict=True):
        assert before != now
        if before[0].isdigit():
            assert re.sub(r"\d", "0", before) == re.sub(r"\d", "0", now)


def test_names_and_numbers_of_real_prompts_are_told_apart() -> None:
    rows = data_file("gsm8k/test.jsonl").read_text().splitlines()
    prompts = [json.loads(row)["question"] for row in rows]
    vocabulary = Vocabulary(prompts)
    names = drawn("so Natalia sold", "Natalia", vocabulary)
    assert None in names or all(name and name[0].isupper() for name in names)
    names = drawn("so John sold", "John", vocabulary)
    assert len(names) > 20 and all(name and name[0].isupper() and name != "John" for name in names)
    assert not names & {"How", "The", "Monday", "She"}
    numbers = drawn("for $40.50 now", "$40.50", vocabulary)
    assert len(numbers) > 5
    assert all(number and re.fullmatch(r"\$\d\d\.\d\d", number) for number in numbers)
