"""Golds accept themselves and their true friends, and refuse false friends; with math-verify."""

from __future__ import annotations

import json
import re

import pytest
from grading_friends import FALSE_FRIENDS, TRUE_FRIENDS
from real_data import data_file

from leaf_distill.grading import Grader, gold_kind, gold_kinds, has_number

# Two rows of GSM8K (MIT License, Copyright (c) 2021 OpenAI).
GSM8K = [
    "Janet sells 16 - 3 - 4 = <<16-3-4=9>>9 duck eggs a day.\n"
    "She makes 9 * 2 = $<<9*2=18>>18 every day at the farmer\u2019s market.\n#### 18",
    "It takes 2/2=<<2/2=1>>1 bolt of white fiber\n"
    "So the total amount of fabric is 2+1=<<2+1=3>>3 bolts of fabric\n#### 3",
]
GOLDS = [
    *{gold for gold, _ in FALSE_FRIENDS + TRUE_FRIENDS},
    r"\frac43",
    r"-\frac{\pi}{6}",
    r"2^{1009}",
    r"\sqrt[3]{7}",
    r"\left[ \frac{\pi^2}{8}, \frac{5 \pi^2}{4} \right]",
    r"\left(\frac{3}{5},\frac{8}{3}\right]",
    r"(-\sqrt{3}, \sqrt{3})",
    r"(2,\infty)",
    r"\begin{pmatrix} -1 & 0 \\ 0 & -1 \end{pmatrix}",
    r"\begin{pmatrix} 1/5 \\ -18/5 \end{pmatrix}",
    r"5x - 7y + 11z + 4 = 0",
    r"\frac{d !}{2 k(d-k) !}",
    r"\left\lfloor\log _{2} n\right\rfloor+1",
    r"m_{\max }=n^{2}-n-1",
    r"$\angle A B C=90$,$\angle D E F=60$",
    r"$90^{\circ}$,$60^{\circ}$",
    r"$f(x)=a x+b$, where $b$ is any integer",
    r"$221,$8$",
    r"$(-\infty, 0) \cup\{1\}$.",
    "$10^{100}$,$10^{1 / 100}$",
    "62.5%",
    "3:30",
    "H_2O",
    "7:4:2",
]


@pytest.fixture(scope="module")
def grader():
    with Grader("math", workers=2) as one:
        yield one


def forms(gold: str) -> list[str]:
    """A gold answer as a model may write it."""
    inside = gold if "$" in gold else f"${gold}$"
    boxed = rf"\boxed{{{gold}}}"
    texts = [gold, boxed, inside, f"The answer is {inside}.", f"The answer is ${boxed}$."]
    return [
        *texts,
        f"First, 17 of them are red, so $x=3$. Then we get\n\\[{boxed}\\]\nThat is all.",
    ]


def refused(grader: Grader, pairs: list[tuple[str, str]]) -> list[tuple[str, str]]:
    return [
        pair for pair, verdict in zip(pairs, grader.grade(pairs), strict=True) if verdict != "right"
    ]


def test_golds_accept_themselves(grader):
    whole = [gold for gold in GOLDS if not re.search(r"####|boxed|answer", gold)]
    assert len(whole) > 100
    assert refused(grader, [(gold, form) for gold in whole for form in forms(gold)]) == []


@pytest.mark.parametrize("rule", ["math", "number", "exact"])
@pytest.mark.parametrize("gold", GSM8K)
def test_what_stands_after_the_mark_is_the_gold_answer(rule, gold):
    number = gold.split()[-1]
    with Grader(rule) as grader:
        assert grader.grade([(gold, rf"\boxed{{{number}}}"), (gold, gold), (gold, "9")]) == [
            "right",
            "right",
            "wrong",
        ]


def test_true_friends_are_accepted(grader):
    assert refused(grader, TRUE_FRIENDS) == []


def plain(table: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """The pairs whose prediction has no words: it can stand in a box or a sentence."""
    words = re.compile(r"[A-Za-z]{4,}|\b(?:is|no|not|so)\b|[.#$*]|[\u4e00-\u9fff]")
    latex = re.compile(r"\\(?!boxed)[a-z]+(?:\{p?matrix\})?|sqrt")
    return [pair for pair in table if not words.search(latex.sub(" ", pair[1]))]


@pytest.mark.parametrize(
    "form", [r"\boxed{%s}", "The answer is %s.", "1 and 2 make 3. It is $%s$."]
)
def test_true_friends_in_an_answer_are_accepted(grader, form):
    pairs = [(gold, form % text) for gold, text in plain(TRUE_FRIENDS) if text != "b"]
    assert len(pairs) > 40
    assert refused(grader, pairs) == []


def test_false_friends_are_refused(grader):
    assert len(FALSE_FRIENDS) > 100
    verdicts = grader.grade(FALSE_FRIENDS)
    accepted = [p for p, v in zip(FALSE_FRIENDS, verdicts, strict=True) if v == "right"]
    assert accepted == []
    assert "timeout" not in verdicts


@pytest.mark.parametrize(
    "form", [r"\boxed{%s}", "The answer is %s.", "1 and 2 make 3. It is $%s$."]
)
def test_false_friends_in_an_answer_are_refused(grader, form):
    pairs = [(gold, form % text) for gold, text in plain(FALSE_FRIENDS)]
    assert len(pairs) > 60
    verdicts = grader.grade(pairs)
    assert [pair for pair, v in zip(pairs, verdicts, strict=True) if v != "wrong"] == []


@pytest.mark.parametrize(
    ("gold", "prediction", "verdict"),
    [
        ("18", "I do not know.", "no_answer"),
        ("18", " \n", "no_answer"),
        ("18", "", "no_answer"),
        ("18", "The answer is unknown.", "no_answer"),
        ("B", "I do not know.", "no_answer"),
        ("yes", "I do not know.", "no_answer"),
        ("Paris", "I do not know.", "no_answer"),
        ("18", "<think>It is 18.</think>", "no_answer"),
        ("Paris", "The answer is London.", "wrong"),
        ("18", r"\boxed{\text{east}}", "wrong"),
        # Gold goes first: math-verify takes a relation for its interval, but not the reverse.
        (r"$x<1$", r"$(-\infty,1)$", "right"),
        (r"$(-\infty,1)$", r"$x<1$", "wrong"),
    ],
)
def test_verdicts(grader, gold, prediction, verdict):
    assert grader.grade([(gold, prediction)]) == [verdict]


@pytest.mark.parametrize("gold", ["", " \n"])
@pytest.mark.parametrize("rule", ["math", "number", "exact"])
def test_empty_gold(rule, gold):
    with (
        Grader(rule) as grader,
        pytest.raises(ValueError, match=r"^gold: must be a text with an answer, got .* in pair 1"),
    ):
        grader.grade([("1", "1"), (gold, "1")])


@pytest.mark.parametrize(
    ("gold", "kind"),
    [
        ("42", "number"),
        (r"\$12.50", "number"),
        ("12 apples", "number"),
        (GSM8K[0], "number"),
        (r"\frac{1}{2}", "math"),
        ("3,5,7", "math"),
        ("x", "math"),
        ("6m", "math"),
        ("B", "choice"),
        (r"\text{(C)}", "choice"),
        ("The answer is (D).", "choice"),
        ("yes", "word"),
        ("No", "word"),
        ("True", "word"),
        (r"\text{even}", "word"),
        ("It rains because the air is moist and cools down.", "text"),
        ("July 4, 1776", "text"),
    ],
)
def test_kind_of_gold(gold, kind):
    assert gold_kind(gold) == kind


def test_kinds_are_counted():
    assert gold_kinds(["1", "2", "B", r"\pi", "yes"]) == {
        "number": 2,
        "choice": 1,
        "math": 1,
        "word": 1,
    }


@pytest.mark.parametrize(
    ("gold", "found"),
    [
        ("about 3,5", True),
        ("so it is 0\n#### no", False),
        (r"\boxed{1{,}000}", True),
        ("ten", False),
    ],
)
def test_golds_without_a_number(gold, found):
    assert has_number(gold) is found


def rows(name: str) -> list[dict[str, object]]:
    lines = data_file(name).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "column"),
    [("math500/test.jsonl", "answer"), ("olympiadbench/test.jsonl", "final_answer")],
)
def test_all_golds_of_a_benchmark_accept_themselves(grader, name, column):
    answers = [row[column] for row in rows(name)]
    golds = [text for item in answers for text in (item if isinstance(item, list) else [item])]
    assert len(golds) >= 500
    assert refused(grader, [(gold, form) for gold in golds for form in forms(gold)]) == []


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["math", "number", "exact"])
def test_all_golds_of_gsm8k_accept_their_number(rule):
    golds = [
        str(row["answer"]) for part in ("train", "test") for row in rows(f"gsm8k/{part}.jsonl")
    ]
    assert len(golds) == 8792
    with Grader(rule) as grader:
        pairs = [(gold, rf"\boxed{{{gold.rpartition('####')[2].strip()}}}") for gold in golds]
        assert refused(grader, pairs) == []
