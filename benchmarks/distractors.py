"""How well scores of prompt tokens find distractors that are known, on PROBLEMATHIC and the demo.

    python benchmarks/distractors.py FOLDER --student DIR --teacher DIR [--rows N] [--output FILE]

FOLDER holds simple_adversarial_train.json and simple_non_adversarial_train.json of PROBLEMATHIC
(MIT license, github.com/him1411/problemathic): word problems with irrelevant clauses, and the same
ones without. What only the first has is the truth. Model passes are kept in the row cache.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext, redirect_stdout
from dataclasses import dataclass, replace
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

import leaf_ext
from leaf_distill.config import package_versions
from leaf_distill.data.dataset import load_examples
from leaf_distill.data.example import ROLES, Example, Range, remaining
from leaf_distill.demo.measure import Tokens
from leaf_distill.demo.run import MIX, detection_config, read_samples, tokens_of, write_problems
from leaf_distill.demo.run import ROWS as DEMO_ROWS
from leaf_distill.demo.run import SEED as DEMO_SEED
from leaf_distill.demo.task import make_problems
from leaf_distill.detection.answers import open_cache, prompted_model
from leaf_distill.detection.config import DetectConfig
from leaf_distill.detection.judge import Judge
from leaf_distill.detection.pipeline import detect
from leaf_distill.detection.scores import score_perplexity, score_saliency
from leaf_distill.detection.spans import align, find_spans
from leaf_distill.detection.substitution import Vocabulary
from leaf_distill.detection.suspicion import set_suspicion
from leaf_distill.detection.truth import distractors, tokens_inside
from leaf_distill.models.loading import LazyModel

RESULTS = Path(__file__).parent / "results" / "distractors.md"
DRAWS = 1000
NUMBER = re.compile(r"\d+(?:[.,]\d+)*")

Mask = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float64]
Interval = tuple[float, float, float]


@dataclass(frozen=True)
class Problem:
    """A problem with distractors: its text, their characters, and the label of the plain one."""

    text: str
    ranges: tuple[Range, ...]
    label: str
    answer: str


@dataclass(frozen=True)
class Row:
    """The prunable tokens of a row.

    planted, number: bool [n]; suspicion: float64 [n] by score, high for a distractor; flagged: what
    detection flags by each score at the default threshold.
    """

    planted: Mask
    number: Mask
    suspicion: Mapping[str, Floats]
    flagged: Mapping[str, Mask]


def read_problems(folder: Path) -> list[Problem]:
    """Return the pairs of the simple problems in which text was inserted and nothing else done."""
    files = ("simple_adversarial_train.json", "simple_non_adversarial_train.json")
    whole, plain = (_by_id(folder / name) for name in files)
    problems = []
    for name in sorted(whole.keys() & plain.keys()):
        text = clean(whole[name]["prompt"])
        found = distractors(clean(plain[name]["prompt"]), text)
        label, _, answer = plain[name]["completion"].partition("<<FinalAnswer>>")
        if found.ranges and not found.lost and answer.strip():
            problems.append(
                Problem(text, found.ranges, f"{clean(label)} The answer is {answer}", answer)
            )
    return problems


def _by_id(path: Path) -> dict[str, dict[str, str]]:
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]
    return {line["id"]: line for line in lines}


def clean(text: str) -> str:
    """Return text without PROBLEMATHIC's tags, and with single spaces."""
    return " ".join(re.sub(r"<<\w+>>", " ", text).split())


def score_rows(
    problems: Sequence[Problem],
    config: DetectConfig,
    scores: Sequence[str] = ("lens",),
    *,
    seed: int = 0,
) -> list[Row]:
    """Return the tokens of each problem that both models can read, with all scores.

    Args:
        problems: the rows.
        config: the models, and the settings of detection.
        scores: those of `leaf detect` beside the gap.
        seed: of the random score.
    """
    lines = [{"prompt": p.text, "completion": p.label, "answer": p.answer} for p in problems]
    examples = load_examples(lines)
    pair = {
        role: prompted_model(role, LazyModel(getattr(config, role), argument=role), config)
        for role in ROLES
    }
    with open_cache(config) as cache:
        judge = Judge(pair, config, cache, lambda stage: nullcontext())
        for role in reversed(ROLES):
            for example in examples:
                example.renderings[role] = pair[role].renderer.render(example)
            score_saliency(judge.use(role), examples, config, cache)
        align(examples)
        aligned = list(remaining(examples))
        find_spans(aligned, config)
        surprise = score_perplexity(judge.use("student"), aligned, config, cache)
        others = {name: _suspicion(judge, aligned, config, name) for name in scores}
    draw = np.random.default_rng(seed)
    rows = []
    for at, example in enumerate(aligned):
        given = {"student's perplexity": surprise[at]}
        given |= {name: values[at] for name, values in others.items()}
        rows.append(_row(example, problems[example.row_id], given, draw, config))
    return rows


def _suspicion(
    judge: Judge, examples: Sequence[Example], config: DetectConfig, name: Any
) -> list[npt.NDArray[Any]]:
    """Return a score of `leaf detect` beside the gap, high for a distractor."""
    copies = [replace(example, suspicion=None) for example in examples]
    vocabulary = Vocabulary(example.text for example in examples)
    set_suspicion(judge, copies, replace(config, score=name), vocabulary)
    values = [copy.suspicion for copy in copies if copy.suspicion is not None]
    if len(values) < len(copies):
        raise ValueError(f"scores: must give each token a value, got none of {name!r}")
    return values


def _row(
    example: Example,
    problem: Problem,
    given: Mapping[str, npt.NDArray[Any]],
    draw: np.random.Generator,
    config: DetectConfig,
) -> Row:
    assert example.offsets is not None and example.prunable is not None
    assert example.score is not None
    offsets, prunable = example.offsets, example.prunable
    suspicion = {
        "gap (LeaF)": -example.score.astype(np.float64),
        "student's gradient": example.saliency["student"].astype(np.float64),
        "teacher's gradient, low": -example.saliency["teacher"].astype(np.float64),
        **{name: values.astype(np.float64) for name, values in given.items()},
        "random": draw.random(len(offsets)),
        "no model: number not in the label": unmentioned(example.text, offsets, problem.label),
    }
    number = [any(char.isdigit() for char in example.text[a:b]) for a, b in offsets]
    return Row(
        planted=tokens_inside(offsets, problem.ranges)[prunable],
        number=np.array(number)[prunable],
        suspicion={name: values[prunable] for name, values in suspicion.items()},
        flagged={
            name: _flagged(values, prunable, config)[prunable] for name, values in suspicion.items()
        },
    )


def unmentioned(text: str, offsets: npt.NDArray[np.int64], label: str) -> Floats:
    """Return 1 on the tokens of numbers that the label lacks, -1 on those that it has, else 0."""
    known = {_value(number) for number in NUMBER.findall(label)}
    values = np.zeros(len(offsets))
    for match in NUMBER.finditer(text):
        inside = (offsets[:, 0] < match.end()) & (match.start() < offsets[:, 1])
        values[inside] = -1.0 if _value(match.group()) in known else 1.0
    return values


def _value(number: str) -> float | str:
    try:
        return float(number.replace(",", ""))
    except ValueError:
        return number


def _flagged(suspicion: Floats, prunable: Mask, config: DetectConfig) -> Mask:
    """Return what detection flags by a score of one value, high for a distractor."""
    low = suspicion - suspicion.min()
    found = leaf_ext.detect_spans(
        torch.zeros(1, len(low)),
        torch.from_numpy(low[None]).float(),
        torch.ones(1, len(low), dtype=torch.bool),
        prunable=torch.from_numpy(prunable[None]),
        threshold=config.threshold,
    )
    flags: Mask = found.confounder[0].numpy()
    return flags


def demo_rows(folder: Path) -> list[Row]:
    """Return the scored rows of `leaf demo`: planted sentences, and a student that they mislead."""
    problems = make_problems(DEMO_ROWS, seed=DEMO_SEED + 1, mix=MIX)
    with redirect_stdout(StringIO()):
        result = detect(detection_config(write_problems(folder / "rows.jsonl", problems), folder))
    tokens = tokens_of(read_samples(result.samples), problems)
    return [_of_demo(row) for row in tokens]


def _of_demo(row: Tokens) -> Row:
    flagged = {name: row.flagged for name in row.suspicion}
    return Row(row.planted, row.number, row.suspicion, flagged)


def auc(rows: Sequence[Row], name: str, *, numbers: bool = False, seed: int = 0) -> Interval | None:
    """Return the chance that a token of a distractor is more suspicious than another one.

    Tokens of all rows together; ties count half. With the 95 % interval of a bootstrap over rows.
    None where there are not both kinds of tokens.
    """
    keep = [row.number if numbers else np.ones_like(row.number) for row in rows]
    owner = np.repeat(np.arange(len(rows)), [int(one.sum()) for one in keep])
    values = np.concatenate([row.suspicion[name][one] for row, one in zip(rows, keep, strict=True)])
    truth = np.concatenate([row.planted[one] for row, one in zip(rows, keep, strict=True)])
    if truth.all() or not truth.any():
        return None
    _, place = np.unique(values, return_inverse=True)

    def once(weights: Floats) -> float:
        weight = weights[owner]
        true = np.bincount(place, weight * truth)
        false = np.bincount(place, weight * ~truth, minlength=len(true))
        true = np.pad(true, (0, len(false) - len(true)))
        pairs = true.sum() * false.sum()
        return float(true @ (np.cumsum(false) - false / 2) / pairs) if pairs else np.nan

    return _interval(once, len(rows), seed)


def precision_and_recall(
    rows: Sequence[Row], flags: Sequence[Mask], *, seed: int = 0
) -> tuple[Interval, Interval]:
    """Return the share of flagged tokens in distractors, and of the latter that are flagged."""
    flagged = np.array([flag.sum() for flag in flags], dtype=np.float64)
    planted = np.array([row.planted.sum() for row in rows], dtype=np.float64)
    pairs = zip(rows, flags, strict=True)
    both = np.array([(row.planted & flag).sum() for row, flag in pairs], dtype=np.float64)

    def ratio(below: Floats) -> Interval:
        def once(weights: Floats) -> float:
            total = weights @ below
            return float(weights @ both / total) if total else np.nan

        return _interval(once, len(rows), seed)

    return ratio(flagged), ratio(planted)


def _interval(once: Any, count: int, seed: int) -> Interval:
    draw = np.random.default_rng(seed)
    drawn = [once(draw.multinomial(count, np.full(count, 1 / count))) for _ in range(DRAWS)]
    low, high = np.nanquantile(drawn, (0.025, 0.975))
    return once(np.ones(count)), float(low), float(high)


def top(values: Floats, count: int) -> Mask:
    """Return which tokens are the `count` most suspicious ones."""
    flags = np.zeros(len(values), dtype=np.bool_)
    flags[np.argsort(-values, kind="stable")[:count]] = True
    return flags


HEAD = (
    "score",
    "AUC",
    "AUC, numbers",
    "flagged a row",
    "precision",
    "recall",
    "precision, equal size",
    "recall, equal size",
)


def table(rows: Sequence[Row], *, reference: str, thresholds: bool = True) -> Iterator[str]:
    """Yield a Markdown table; equal size: as many tokens of a row as `reference` flags."""
    yield f"| {' | '.join(HEAD)} |"
    yield f"|---{'|---:' * (len(HEAD) - 1)}|"
    for name in rows[0].suspicion:
        cells = [_shown(auc(rows, name)), _shown(auc(rows, name, numbers=True))]
        if thresholds or name == reference:
            own = [row.flagged[name] for row in rows]
            count = np.mean([flag.sum() for flag in own])
            cells += [f"{count:.1f}", *map(_shown, precision_and_recall(rows, own))]
        else:
            cells += [""] * 3
        equal = [top(row.suspicion[name], int(row.flagged[reference].sum())) for row in rows]
        cells += map(_shown, precision_and_recall(rows, equal))
        yield f"| {' | '.join([name, *cells])} |"


def _shown(value: Interval | None) -> str:
    if value is None:
        return ""
    mean, low, high = (f"{one:.2f}".replace("0.", ".", 1) for one in value)
    return f"{mean} ({low} to {high})"


NOTES = (
    "Tokens that may be cut, of all rows together; ties count half. Intervals: 95 %, of a "
    "bootstrap over rows. Numbers: tokens with a digit. Flagged: by detection at its default "
    "threshold, each score scaled to [0, 1] in its row. Equal size: each score flags as many "
    "tokens of a row as the first one does, those that it finds the most suspicious."
)


def page(rows: Sequence[Row], demo: Sequence[Row], args: argparse.Namespace, total: int) -> str:
    """Return the page of results."""
    versions = ", ".join(f"{name} {number}" for name, number in package_versions().items())
    planted = sum(int(row.planted.sum()) for row in rows)
    tokens = sum(len(row.planted) for row in rows)
    names = [Path(getattr(args, role)).name for role in ROLES]
    parts = [
        "# Known distractors: which scores find them",
        f"    python benchmarks/distractors.py FOLDER --student {names[0]} --teacher {names[1]} "
        f"--rows {args.rows}" + (f" --scores {' '.join(args.scores)}" if args.scores else ""),
        f"Versions: {versions}; CPU. {args.about}".strip(),
        "## PROBLEMATHIC",
        f"{len(rows)} of the {total} simple problems that are their plain form with insertions, "
        f"drawn with seed {args.seed}: {tokens} tokens, {planted} of them in a distractor: "
        f"{planted / tokens:.2f} is the precision of chance. The truth is what "
        "`detection/truth.py` finds inserted by comparing words with the plain form. The label is "
        "the plain form's solution, which names no distractor. **Neither model was trained for "
        "these problems, and rows are not selected by answers**: this says what the scores of "
        "these two models see, not what a confounded student would show.",
        "\n".join(table(rows, reference="gap (LeaF)")),
        NOTES,
        "*No model* flags each number of the prompt that is not in the label. Where labels name "
        "their numbers this control needs no gradient; read every other line beside it.",
    ]
    if demo:
        parts += [
            "## The demo",
            f"{len(demo)} scored rows of `leaf demo`, whose small student was trained to be misled "
            "by the planted sentences, and whose models were trained on such rows: easier than "
            "real data.",
            "\n".join(table(demo, reference="LeaF", thresholds=False)),
        ]
    return "\n\n".join(parts) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="PROBLEMATHIC's JSON files")
    parser.add_argument("--student", required=True)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--rows", type=int, default=120)
    parser.add_argument("--seed", type=int, default=0, help="of the choice of rows")
    parser.add_argument("--scores", nargs="*", default=["lens"], help="of leaf detect, beside gap")
    parser.add_argument("--cache_dir", default=None)
    parser.add_argument("--about", default="", help="a sentence about the models, for the page")
    parser.add_argument("--skip_demo", action="store_true", help="measure PROBLEMATHIC alone")
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    problems = read_problems(args.folder)
    if not problems:
        parser.error(f"folder: must hold pairs of problems, got none in {args.folder}")
    chosen = random.Random(args.seed).sample(problems, min(args.rows, len(problems)))
    config = DetectConfig(
        student=args.student, teacher=args.teacher, cache_dir=args.cache_dir, grade="number"
    )
    rows = score_rows(chosen, config, args.scores, seed=args.seed)
    demo: list[Row] = []
    if not args.skip_demo:
        with tempfile.TemporaryDirectory() as folder:
            demo = demo_rows(Path(folder))
    text = page(rows, demo, args, len(problems))
    args.output.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
