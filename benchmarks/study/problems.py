"""The problems of the study: pairs with known distractors, short answers, and splits by template.

    python benchmarks/study/problems.py PROBLEMATHIC GSM8K    (makes the files in data/ anew)

PROBLEMATHIC is a folder of its JSON files (MIT license, github.com/him1411/problemathic): word
problems with irrelevant clauses, and the same ones without. What only the first has is the truth.
GSM8K is a folder of its train.jsonl and test.jsonl (MIT license,
github.com/openai/grade-school-math), whose problems get a sentence of another one.
An answer is the one expression of two numbers of the problem that gives the gold number, such as
"50 * 7", so that arithmetic plays no role.
"""

from __future__ import annotations

import gzip
import json
import random
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

from leaf_distill.data.example import Range
from leaf_distill.data.sentences import sentences
from leaf_distill.detection.truth import distractors
from leaf_distill.io import write_bytes

DATA = Path(__file__).with_name("data")
PROBLEMATHIC, GSM8K = DATA / "problemathic.jsonl.gz", DATA / "gsm8k.jsonl.gz"
"""The shipped rows."""
KINDS = ("simple", "complex")
SIMILAR = 0.7
"""The share of common words at which two problems are of one template."""
LARGEST_TEMPLATE = 12
"""A template with more problems only trains models: it would dominate a small split."""
SIZES = {"C": 200, "C-dev": 50, "B": 200, "B-dev": 40}
"""Problems of each split; all others are in A."""

NUMBER = re.compile(r"\d+(?:,\d{3})*(?:\.\d+)?")
EQUAL = 1e-6


@dataclass(frozen=True)
class Problem:
    """A problem with and without distractors.

    Attributes:
        name: where it is from, and its number there.
        plain, adversarial: its text without the distractors, and with them.
        ranges: characters of the distractors in `adversarial`.
        exact: whether `adversarial` without `ranges` is `plain`, but for punctuation marks.
        label: the expression.
        split: "A" trains models, "B" is searched and distilled on, "C" is held out; "B-dev" and
            "C-dev" are for the choice of settings; "complex" and "gsm8k" are further test sets.
        template: the name of a problem that stands for all of its template.
    """

    name: str
    plain: str
    adversarial: str
    ranges: tuple[Range, ...]
    exact: bool
    label: str
    split: str = ""
    template: str = ""


def clean(text: str) -> str:
    """Return text without PROBLEMATHIC's tags, and with single spaces."""
    return " ".join(re.sub(r"<<\w+>>", " ", text).split())


def value(number: str) -> float:
    """Return the value of a match of NUMBER."""
    return float(number.replace(",", ""))


def numbers(text: str) -> list[str]:
    """Return the numbers of a text, as they are written, in order."""
    return NUMBER.findall(text)


def expressions(text: str, gold: float) -> set[str]:
    """Return the expressions of two numbers of a text that have a value.

    Sums and products name the earlier number first.
    """
    found = set()
    for first, second in combinations(numbers(text), 2):
        a, b = value(first), value(second)
        results = {f"{first} + {second}": a + b, f"{first} * {second}": a * b}
        results |= {f"{first} - {second}": a - b, f"{second} - {first}": b - a}
        results |= {f"{first} / {second}": a / b} if b else {}
        results |= {f"{second} / {first}": b / a} if a else {}
        found |= {name for name, result in results.items() if abs(result - gold) < EQUAL}
    return found


def read_folder(folder: Path) -> list[dict[str, str]]:
    """Return the rows of PROBLEMATHIC that the study uses.

    These are the pairs whose gold number exactly one expression of the plain text gives, with both
    numbers in the adversarial text too. The solution of a simple problem must name these two
    numbers of its text and no other.
    """
    rows = []
    for kind in KINDS:
        whole, plain = (
            _by_id(folder / f"{kind}_{name}_train.json")
            for name in ("adversarial", "non_adversarial")
        )
        for name in sorted(whole.keys() & plain.keys(), key=lambda one: int(one.split("_")[1])):
            texts = [clean(side[name]["prompt"]) for side in (plain, whole)]
            solution, _, answer = plain[name]["completion"].partition("<<FinalAnswer>>")
            label = _label(texts[0], solution, answer, strict=kind == "simple")
            if label and {*numbers(label)} <= {*numbers(texts[1])}:
                row = {"plain": texts[0], "adversarial": texts[1], "label": label}
                rows.append({"name": f"{kind}/{name}", **row})
    return rows


def _by_id(path: Path) -> dict[str, dict[str, str]]:
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]
    return {line["id"]: line for line in lines}


def _label(text: str, solution: str, answer: str, *, strict: bool) -> str | None:
    """Return the one expression of a problem, None where there are none or several."""
    try:
        found = expressions(text, value(answer.strip()))
    except ValueError:
        return None
    if len(found) != 1:
        return None
    (label,) = found
    said = {value(one) for one in numbers(solution)} & {value(one) for one in numbers(text)}
    used = {value(one) for one in numbers(label)}
    return label if used <= said and (said <= used or not strict) else None


def write_packed(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows as packed JSON lines; the same rows give the same bytes."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_bytes(path, gzip.compress(text.encode(), 9, mtime=0))


def read_packed(path: Path) -> list[dict[str, Any]]:
    """Return the rows that `write_packed` has written."""
    return [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]


def load_problems(source: Path | None = None, *, seed: int = 0) -> list[Problem]:
    """Return PROBLEMATHIC's problems with their splits.

    Args:
        source: a folder of its JSON files, or a file like the shipped one, which is the default.
        seed: decides which templates are in which split.
    """
    source = source or PROBLEMATHIC
    rows = read_folder(source) if source.is_dir() else read_packed(source)
    problems = []
    for row in rows:
        found = distractors(row["plain"], row["adversarial"])
        exact = bool(found.ranges) and _is_rest(row["plain"], row["adversarial"], found.ranges)
        problems.append(
            Problem(
                row["name"], row["plain"], row["adversarial"], found.ranges, exact, row["label"]
            )
        )
    return _with_splits(problems, seed)


def _is_rest(plain: str, adversarial: str, ranges: Sequence[Range]) -> bool:
    """Return whether a text without ranges has the letters and digits of another one."""
    kept, end = "", 0
    for start, stop in ranges:
        kept, end = kept + adversarial[end:start], stop
    texts = (plain, kept + adversarial[end:])
    first, second = ("".join(filter(str.isalnum, text.lower())) for text in texts)
    return first == second


def _with_splits(problems: Sequence[Problem], seed: int) -> list[Problem]:
    """Set the splits. No template is in two of them; all but A have exact truth alone."""
    templates = [
        [problems[at] for at in group] for group in group_similar([one.plain for one in problems])
    ]
    random.Random(seed).shuffle(templates)
    left = dict(SIZES)
    found = []
    for similar in templates:
        group = [replace(one, template=similar[0].name) for one in similar]
        exact = [one for one in group if one.exact]
        if all(one.name.startswith("complex") for one in group):
            found += [replace(one, split="complex") for one in exact]
            continue
        simple = [one for one in group if one.name.startswith("simple")]
        split = next((name for name, count in left.items() if count > 0), "A")
        if split == "A" or len(group) > LARGEST_TEMPLATE:
            found += [replace(one, split="A") for one in simple]
            continue
        kept = [one for one in exact if one in simple]
        left[split] -= len(kept)
        found += [replace(one, split=split) for one in kept]
    order = {one.name: at for at, one in enumerate(problems)}
    return sorted(found, key=lambda one: order[one.name])


def group_similar(texts: Sequence[str]) -> list[list[int]]:
    """Return groups of positions: texts with SIMILAR of their words in common are in one group.

    Numbers count as one word, and words with a capital, mostly names, not at all.
    """
    kept = [_words(text) for text in texts]
    parent = list(range(len(texts)))

    def root(at: int) -> int:
        while parent[at] != at:
            parent[at] = at = parent[parent[at]]
        return at

    for first, second in combinations(range(len(texts)), 2):
        if _are_similar(kept[first], kept[second]):
            parent[root(second)] = root(first)
    groups: dict[int, list[int]] = {}
    for at in range(len(texts)):
        groups.setdefault(root(at), []).append(at)
    return list(groups.values())


def copied_share(problems: Sequence[Problem], split: str, other: str) -> float:
    """Return the share of a split's distractors of three words or more that another one has.

    Two are the same if they have SIMILAR of their words in common; numbers count as one word.
    """
    mine, theirs = ([*_phrases(of_split(problems, name))] for name in (split, other))
    return sum(any(_are_similar(one, two) for two in theirs) for one in mine) / max(len(mine), 1)


def _phrases(problems: Iterable[Problem]) -> Iterator[frozenset[str]]:
    for one in problems:
        for start, stop in one.ranges:
            words = _words(one.adversarial[start:stop])
            if len(words) >= 3:
                yield words


def _are_similar(one: frozenset[str], two: frozenset[str]) -> bool:
    common = len(one & two)
    return common >= SIMILAR * (len(one) + len(two) - common)


def _words(text: str) -> frozenset[str]:
    names_out = re.sub(r"\b[A-Z]\w*", "", NUMBER.sub("#", text))
    return frozenset(re.findall(r"[a-z]+|#", names_out.lower()))


def load_gsm8k(folder: Path | None = None, *, seed: int = 0) -> list[Problem]:
    """Return GSM8K's problems that one expression answers, each with an inserted sentence.

    They are those of train.jsonl and test.jsonl whose solution ends with the calculation of this
    expression. The sentence is of another problem, has one number, which is not in this one, and
    stands before the question.

    Args:
        folder: where the two files are; None: the shipped problems, made of them with seed 0.
        seed: of the sentences.
    """
    if folder is None:
        shipped = read_packed(GSM8K)
        return [Problem(**{**row, "ranges": (tuple(row["ranges"][0]),)}) for row in shipped]
    rows = []
    for name in ("train", "test"):
        lines = (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        rows += [(f"gsm8k/{name}_{at}", json.loads(line)) for at, line in enumerate(lines)]
    pool = sorted(set(_insertable(row["question"] for _, row in rows)))
    problems = []
    for name, row in rows:
        solution, _, answer = row["answer"].partition("####")
        text = " ".join(row["question"].split())
        label = _label(text, re.sub(r"<<.*?>>", "", solution), answer, strict=False)
        if label and not _ends_with(solution, label):
            continue
        if label and len(sentences(text)) > 1:
            draw = random.Random(f"{seed}/{name}")
            problems.append(_inserted(name, text, label, pool, draw))
    return problems


def _ends_with(solution: str, label: str) -> bool:
    """Return whether the last calculation of a worked solution is an expression."""
    last = re.findall(r"<<([^=]*)=", solution)[-1:]
    known = sorted(value(one) for one in numbers(label))
    return bool(last) and sorted(value(one) for one in numbers(last[0])) == known


def _insertable(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        for start, stop in sentences(text)[:-1]:
            sentence = " ".join(text[start:stop].split())
            if len(numbers(sentence)) == 1 and sentence.endswith("."):
                yield sentence


def _inserted(
    name: str, text: str, label: str, pool: Sequence[str], draw: random.Random
) -> Problem:
    known = {value(one) for one in numbers(text)}
    while value(numbers(sentence := draw.choice(pool))[0]) in known:
        pass
    at = sentences(text)[-1][0]
    at += len(text[at:]) - len(text[at:].lstrip())
    whole = f"{text[:at]}{sentence} {text[at:]}"
    return Problem(name, text, whole, ((at, at + len(sentence) + 1),), True, label, "gsm8k", name)


def of_split(problems: Sequence[Problem], split: str, count: int | None = None) -> list[Problem]:
    """Return the problems of a split, the first `count` of them."""
    return [one for one in problems if one.split == split][:count]


def as_rows(problems: Sequence[Problem], form: str) -> list[dict[str, str]]:
    """Return problems in a form, "plain" or "adversarial", as rows of a dataset."""
    return [{"prompt": getattr(one, form), "completion": one.label} for one in problems]


if __name__ == "__main__":
    write_packed(PROBLEMATHIC, read_folder(Path(sys.argv[1])))
    write_packed(GSM8K, map(asdict, load_gsm8k(Path(sys.argv[2]))))
    for made in (PROBLEMATHIC, GSM8K):
        print(f"{len(read_packed(made))} problems are in {made}")
