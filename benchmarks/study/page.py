"""The page of the study: the tables of the steps that are done, and figures."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cutting import ARMS as CUTS
from cutting import BY_HAND
from detection import CONTROL, FALL, GAP, ORACLE, SCORES, WEIGHTS
from distillation import (
    AS_MANY,
    FLOATS,
    KD,
    TEACHER,
    UNTRAINED,
    WITHOUT_CUTS,
    arms_of,
    has_fast_bfloat16,
)
from measures import Estimate, Floats, Row, aucs, first_phrases, from_json, mean
from pair import wanted
from problems import Problem, copied_share, of_split
from run import DEVELOPMENT, SEARCHED, Inputs, best_rate, slug, tests_of
from settings import Study
from tables import bars, is_above, shown, table

from leaf_distill.config import package_versions
from leaf_distill.detection.suspicion import STUDENT_WEIGHT
from leaf_distill.evaluation.charts import interval_chart
from leaf_distill.io import make_directory, write_bytes

TITLES = {
    "B": "PROBLEMATHIC, simple problems",
    "C": "simple",
    "complex": "PROBLEMATHIC, complex problems",
    "gsm8k": "GSM8K with an inserted sentence",
}
RIVALS = (GAP, "teacher's gradient, low")
BRIEF = {
    "top 1, 2, 3 phrases by ": "phrases by ",
    "search among 2 phrases, by ": "search among 2, by ",
    "oracle: the ": "",
    "no model: number": "no model: numbers",
    "fall of the student's loss without the phrase": "fall of the student's loss",
}
REHEARSAL = (
    "**This is a rehearsal: few rows and few steps. It shows that the study runs; its numbers mean "
    "nothing.**"
)


@dataclass(frozen=True)
class Line:
    """What an arm does to a row of a student."""

    student: int
    template: str
    values: Mapping[str, Any]


def write_page(study: Study, inputs: Inputs, path: Path) -> None:
    """Write the page, and its figures beside it."""
    make_directory(path.parent)
    problems = inputs.problems()
    figures: dict[str, str] = {}
    parts = [
        "# Known distractors: scores, cuts and distillation",
        *([REHEARSAL] if study.profile.name == "quick" else []),
        *_head(study, inputs, problems),
        *_pair(study),
        *_weights(study),
        *(
            part
            for name in (SEARCHED, *study.profile.domains)
            for part in _detection(study, name, figures)
        ),
        *_cutting(study, figures),
        *_distillation(study, problems, figures),
        *_settings(study),
    ]
    for name, chart in figures.items():
        write_bytes(path.with_name(f"{path.stem}-{name}.svg"), chart.encode())
        title = chart.partition("<title>")[2].partition("</title>")[0] or name
        link = f"![{title}]({path.stem}-{name}.svg)"
        parts = [part.replace(f"FIGURE {name}", link) for part in parts]
    write_bytes(path, ("\n\n".join(parts) + "\n").encode())


def _head(study: Study, inputs: Inputs, problems: Sequence[Problem]) -> Iterator[str]:
    given = [f" --{name} {name.upper()}" for name in ("base", "data", "gsm8k")
             if getattr(inputs, name)]  # fmt: skip
    yield f"    python benchmarks/study --profile {study.profile.name}{''.join(given)}"
    versions = ", ".join(f"{name} {number}" for name, number in package_versions().items())
    yield f"Written on {date.today()}; {versions}; {_device()}."
    counts: dict[str, int] = {}
    for one in problems:
        counts[one.split] = counts.get(one.split, 0) + 1
    listed = ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))
    copied = [
        f"{100 * copied_share(problems, *pair):.0f} %" for pair in (("C", "A"), ("C", "B"), "BA")
    ]
    yield (
        "The problems are PROBLEMATHIC's (MIT license, github.com/him1411/problemathic), word "
        "problems with irrelevant clauses, and the same ones without, so that the distractors are "
        "known; and GSM8K's (MIT license) that get a sentence with a number from another one. A "
        "model answers with an expression of two "
        'numbers, such as "50 * 7", and is right if it is the gold one. '
        f"Problems: {listed}. A trains the pair, B is searched and distilled on, C is held out; "
        "settings are chosen on B-dev, B and C-dev with the first student, whose other results do "
        "not count. No template of a problem is in two splits. Templates of distractors are: "
        f"{copied[2]} of B's are nearly those of one in A, which the teacher was trained on; of "
        f"C's {copied[0]}, and {copied[1]} those of one in B. log_gap and search were devised on "
        "problems of the same source, the simple ones. A problem's label names every number that "
        "counts, which favours the rule without a model."
    )
    yield (
        "± is a standard error: what other students and other templates of problems would change. "
        f"It is of {len(study.profile.layers) - 1} students, which differ in the order of their "
        "training alone, and of one teacher, and holds for one number: nothing is corrected for "
        "the many comparisons."
    )


def brief(name: str) -> str:
    """Return a name as it fits beside a chart."""
    for long, short in BRIEF.items():
        name = name.replace(long, short)
    return re.sub(r" \(.*?\)", "", name)


def _device() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    known = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.*)", known.read_text()) if known.exists() else None
    return f"{model[1] if model else platform.machine()}, {os.cpu_count()} cores"


def _pair(study: Study) -> Iterator[str]:
    tried = [study.done(name) for name in study.seconds() if name.startswith("pair-")]
    lines = [
        (
            one["role"],
            str(one["seed"]),
            str(one["layers"]),
            f"{100 * one['plain']:.0f}",
            f"{100 * one['adversarial']:.0f}",
            "kept" if one["kept"] else "rejected",
        )
        for one in sorted(tried, key=lambda one: (one["role"] != "teacher", one["seed"]))
    ]
    low, high = study.profile.student_gate
    yield "## The pair"
    yield (
        "SmolLM2-135M-Instruct. The teacher was trained on plain and adversarial problems of A, a "
        "student, which has the lower layers alone, on plain ones. The lowest "
        f"{study.profile.frozen} layers of both stay as they were. Right answers on C-dev, %. "
        "Gates: the "
        f"teacher at least {100 * study.profile.teacher_gate:.0f} on adversarial problems; a "
        f"student at least {100 * low:.0f} on plain ones and at most {100 * high:.0f} on "
        "adversarial ones. The first student is for the choice of settings alone."
    )
    yield table(("model", "seed", "layers", "plain", "adversarial", ""), lines)
    measured = [study.done(f"accuracy-{name}") for name in wanted(study.profile)]
    if any(one is None for one in measured):
        return
    tests = {
        f"{split} {form}": f"{split}, {form}"
        for split in (SEARCHED, "C", *study.profile.domains)
        for form in ("plain", "adversarial")
    }
    yield "Right answers on problems that no model was trained on, %; of the students the mean."
    teacher, students = measured[0], measured[DEVELOPMENT + 2 :]
    yield table(
        ("", *tests.values()),
        [
            ("teacher", *(f"{100 * teacher[test]:.0f}" for test in tests)),
            (
                "students",
                *(f"{100 * np.mean([one[test] for one in students]):.0f}" for test in tests),
            ),
        ],
    )


def _weights(study: Study) -> Iterator[str]:
    rows = [from_json(DEVELOPMENT, one) for one in study.done("weights") or []]
    if not rows:
        return
    draws = study.profile.draws
    lines = [
        (
            name,
            shown(mean(aucs(rows, name, numbers=True), rows, draws=draws)),
            shown(mean(first_phrases(rows, name), rows, draws=draws)),
        )
        for name in (f"{weight:g}" for weight in WEIGHTS)
    ]
    yield "## The student's weight in log_gap"
    yield (
        f"Of the first student and the problems of B-dev and C-dev, {len(rows)} rows, "
        f"{_selected(study)}. The columns are those of the tables of scores. The product's weight, "
        f"{STUDENT_WEIGHT:g}, comes from an earlier study on problems of the same source."
    )
    yield table(("weight", "AUC, numbers", "first phrase"), lines)


def _rows(study: Study, domain: str) -> list[Row]:
    found = []
    for number in range(1, len(study.profile.layers)):
        for row in study.done(f"detection-{number}-{domain}") or []:
            found.append(from_json(number, row))
    return found


def _detection(study: Study, domain: str, figures: dict[str, str]) -> Iterator[str]:
    rows = _rows(study, domain)
    if not rows:
        return
    draws = study.profile.draws
    firsts_of = {name: first_phrases(rows, name) for name in (*SCORES, FALL, CONTROL, ORACLE)}
    lines, numbers, firsts = [], [], []
    for name, first in firsts_of.items():
        numbers.append(mean(aucs(rows, name, numbers=True), rows, draws=draws))
        firsts.append(mean(first, rows, draws=draws))
        changes = [
            None if name == other else mean(first - firsts_of[other], rows, draws=draws)
            for other in RIVALS
        ]
        whole = mean(aucs(rows, name), rows, draws=draws)
        cells = map(shown, (whole, numbers[-1], firsts[-1]))
        lines.append((name, *cells, *(shown(one, sign=True) for one in changes)))
    figures[f"detection-{domain}"] = interval_chart(
        f"{TITLES[domain]}: how well a score finds distractors",
        [brief(name) for name in firsts_of],
        {"AUC of number tokens": bars(numbers), "first phrase": bars(firsts)},
        "%, with two standard errors",
    )
    planted = np.concatenate([row.planted for row in rows]).mean()
    counted = int(np.isfinite(firsts_of[GAP]).sum())
    chosen = _selected(study) if domain == SEARCHED else "all rows, whatever the models answer"
    yield f"## Detection: {TITLES[domain]}"
    yield (
        f"Rows: {len(rows)}, {chosen}; a row is a student with a problem, and there are "
        f"{len({row.student for row in rows})} students. "
        f"{100 * planted:.0f} % of the tokens are in a distractor. AUC: the chance, in %, that a "
        "token of a distractor is more suspect than another one of its problem, of all tokens and "
        "of those with a digit. First phrase: how often the phrase with the highest mean score is "
        "a distractor; the last columns are its paired differences from the gap and from the "
        "teacher's gradient alone. A row without both kinds of tokens or phrases does not "
        f"count: {counted} do in the last columns. "
        "Beside the "
        f"scores of `leaf detect` stands the {FALL}, which the strategy search goes by. "
        "intervention changes 4 words of a row once each, not 8 three times (its default)."
    )
    head = ("score", "AUC", "AUC, numbers", "first phrase", "minus gap", "minus teacher's")
    yield table(head, lines)
    yield f"FIGURE detection-{domain}"


def _selected(study: Study) -> str:
    if study.profile.select == "all":
        return "all rows, whatever the models answer"
    return "those that the student fails and the teacher solves"


def _cutting(study: Study, figures: dict[str, str]) -> Iterator[str]:
    arms = _cut_lines(study)
    if not arms:
        return
    draws = study.profile.draws
    lines, repaired = [], []
    for name, rows in arms.items():
        found = {
            of: mean(np.array([float(row.values[of]) for row in rows]), rows, draws=draws)
            for of in ("first", "any", "both")
        }
        asked, losses = (np.mean([row.values[of] for row in rows]) for of in ("asked", "losses"))
        cut = sum(row.values["cut"] for row in rows)
        inside = sum(row.values["inside"] for row in rows) / cut if cut else None
        shares = [shown(found[of]) for of in ("first", "any", "both")]
        costs = (f"{asked:.1f}", f"{losses:.1f}" if losses else "")
        lines.append((name, *shares, *costs, "" if inside is None else f"{100 * inside:.0f}"))
        repaired.append(found["any"])
    figures["cutting"] = interval_chart(
        f"{TITLES[SEARCHED]}: rows that one of an arm's cuts repairs",
        [brief(name) for name in arms],
        {"": bars(repaired)},
        "%, with two standard errors",
    )
    first = next(iter(arms.values()))
    yield f"## Cuts: {TITLES[SEARCHED]}"
    yield (
        f"The same {len(first)} rows, and no training. How often, in %, the student is right after "
        "the first cut of an arm, after any of them, and both models are right after one (what the "
        "arm keeps). An arm with several cuts has several tries, so compare it with one that has "
        "as many: cumulative arms with the random one and with the oracle that cuts one more "
        "distractor at a time. Search goes by the loss of the label and stops where the student is "
        "right: part of what it repairs is fitted to the label, and no proof that the cut was a "
        "distractor. Answers: of both models to changed prompts, a row. Losses: of the student, "
        "that a search asks for, a row. Not counted: a forward and a backward pass of each model "
        "for the gradients, and the passes of the scores lens, perplexity and intervention. "
        "Inside: the share of the cut characters that are in a distractor, in %. A problem has "
        "about 7 phrases, so that a search among 8 tries all."
    )
    yield table(
        ("cut", "right after the first", "after any", "both right", "answers", "losses", "inside"),
        lines,
    )
    yield "FIGURE cutting"


def _cut_lines(study: Study) -> dict[str, list[Line]]:
    found: dict[str, list[Line]] = {}
    for number in range(1, len(study.profile.layers)):
        done = study.done(f"cutting-{number}") or {}
        for name in (*CUTS, *BY_HAND):
            for one in done.get(name, []):
                found.setdefault(name, []).append(Line(number, one["template"], one))
    return found


def _distillation(
    study: Study, problems: Sequence[Problem], figures: dict[str, str]
) -> Iterator[str]:
    results = _by_student(study)
    if KD not in results:
        return
    profile, places = study.profile, _places(study, problems)
    templates = {
        test: [one.template for one in of_split(problems, test.split()[0], profile.rows)]
        for test in places
    }
    plain, adversarial = list(places)[:2]

    def found(name: str, test: str, other: str | None = None) -> Estimate | None:
        rows = _answered(
            results[name], results[other] if other else None, places[test], templates[test]
        )
        values = np.array([row.values["right"] for row in rows])
        return mean(values, rows, draws=profile.draws)

    lines = []
    for name, arm in results.items():
        runs = [one for orders in arm.values() for one in orders if "tokens" in one]
        counts = [
            f"{np.mean([one[of] for one in runs]) / scale:.0f}" if runs else ""
            for of, scale in (("counterfactuals", 1), ("tokens", 1000))
        ]
        changes = [
            "" if name in (KD, TEACHER) else shown(found(name, test, KD), sign=True)
            for test in (plain, adversarial)
        ]
        lines.append((name, *counts, *(shown(found(name, test)) for test in places), *changes))
    figures["distillation"] = interval_chart(
        "Held-out simple problems: right answers, %",
        list(results),
        {test: bars([found(name, test) for name in results]) for test in (plain, adversarial)},
        "%, with two standard errors",
    )
    arms = arms_of(profile)
    yield "## Distillation"
    yield (
        f"Students: {len(results[KD])}; batch orders of each: {profile.orders}, which its arms "
        f"share. Every arm has {profile.steps} steps of about {profile.distilled_rows} rows, "
        f"counterfactuals among them; all train and answer in {FLOATS[has_fast_bfloat16()]}. The "
        f"learning rate is {best_rate(study):g}, of "
        f"{', '.join(f'{one:g}' for one in profile.rates)}, with which KD was best on C-dev for "
        "the first student. Right answers, %; the last columns are the paired differences from kd "
        "on the simple problems. Counterfactuals: of an arm's dataset, beside the "
        f"{len(of_split(problems, SEARCHED, profile.rows))} originals that all have; tokens: that "
        "an arm has read, in thousands."
    )
    head = ("arm", "counterfactuals", "tokens", *(_title(test) for test in places))
    yield table((*head, "plain, minus kd", "adversarial, minus kd"), lines)
    yield "\n".join(f"- {name}: {arms[name].says}." for name in results if name in arms)
    yield "FIGURE distillation"
    rivals = [name for name in (KD, "kd_failed", AS_MANY) if name in results]
    cut = [name for name in arms if name in results and name not in [*WITHOUT_CUTS, *rivals]]
    differences = {
        name: [
            *(found(name, adversarial, rival) for rival in rivals),
            found(name, plain, KD),
        ]
        for name in cut
    }
    passed = [
        name
        for name, (*gains, lost) in differences.items()
        if all(is_above(one, errors=3) for one in gains) and lost is not None and lost[0] >= -0.01
    ]
    yield (
        "Does an arm beat plain distillation, the reweighted one and random phrases at once? "
        "Paired differences on the simple problems, in points. Asked for: 3 standard errors above "
        f"each on adversarial ones, at no more than 1 point lost on plain ones. {len(cut)} arms "
        f"are tried; passed: {', '.join(passed) or 'none'}."
    )
    yield table(
        ("arm", *(f"adversarial, minus {rival}" for rival in rivals), "plain, minus kd"),
        [
            (name, *(shown(one, sign=True) for one in values))
            for name, values in differences.items()
        ],
    )


def _answered(
    arm: Mapping[int, Sequence[Mapping[str, Any]]],
    other: Mapping[int, Sequence[Mapping[str, Any]]] | None,
    place: tuple[int, int],
    templates: Sequence[str],
) -> list[Line]:
    """Return how often each student is right on each row of a test, minus the same of another arm.

    Students that lack the other arm are left out.
    """
    found = []
    for student, orders in arm.items():
        if other is not None and student not in other:
            continue
        right = _right(orders, place) - (_right(other[student], place) if other else 0)
        found += [
            Line(student, template, {"right": one})
            for template, one in zip(templates, right.tolist(), strict=True)
        ]
    return found


def _right(orders: Sequence[Mapping[str, Any]], place: tuple[int, int]) -> Floats:
    right = np.array([one["right"][slice(*place)] for one in orders], dtype=np.float64)
    mean: Floats = right.mean(axis=0)
    return mean


def _title(test: str) -> str:
    split, form = test.split()
    return f"{TITLES[split].removeprefix('PROBLEMATHIC, ').split()[0]}, {form}"


def _by_student(study: Study) -> dict[str, dict[int, list[dict[str, Any]]]]:
    """Return the results by arm and student, one for each batch order."""
    found: dict[str, dict[int, list[dict[str, Any]]]] = {}
    for name in (TEACHER, UNTRAINED, *arms_of(study.profile)):
        for number in range(1, len(study.profile.layers)):
            for order in range(study.profile.orders):
                one = study.done(f"distillation-{number}-{slug(name)}-{order}")
                if one is not None:
                    found.setdefault(name, {}).setdefault(number, []).append(one)
    return found


def _places(study: Study, problems: Sequence[Problem]) -> dict[str, tuple[int, int]]:
    """Return the answers of each test set, in the order in which they are asked."""
    places, at = {}, 0
    for name, rows in tests_of(study, problems).items():
        for form in ("plain", "adversarial"):
            places[f"{name} {form}"] = (at, at + len(rows))
            at += len(rows)
    return places


def _settings(study: Study) -> Iterator[str]:
    yield "## Settings and time"
    yield "The settings are described in `benchmarks/study/settings.py`, `Profile`."
    yield "\n".join(f"- {name}: {value}" for name, value in asdict(study.profile).items())
    groups: dict[str, float] = {}
    for name, seconds in study.seconds().items():
        groups[name.split("-")[0]] = groups.get(name.split("-")[0], 0.0) + seconds
    yield (
        f"Seconds are summed over {study.profile.workers} workers, and are of a step's last start: "
        "what an earlier one had left in the cache took none."
    )
    yield table(
        ("step", "seconds"),
        [(name, f"{seconds:.0f}") for name, seconds in groups.items()],
    )
