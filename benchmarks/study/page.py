"""The page of the study: the tables of the steps that are done, and figures."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from cutting import ARMS as CUTS
from cutting import BY_HAND
from detection import CONTROL, FALL, ORACLE, SCORES, WEIGHTS
from distillation import FLOATS, KD, TEACHER, UNTRAINED, WITHOUT_CUTS, arms_of, has_fast_bfloat16
from measures import Floats, Interval, Row, auc, first_phrases, from_json, share
from problems import Problem
from run import DEVELOPMENT, Inputs, best_rate, slug, tests_of
from settings import Study
from tables import estimates, is_above, percent, short, shown, signed, table

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
GAP = next(iter(SCORES))
REHEARSAL = (
    "**This is a rehearsal: few rows and few steps. It shows that the study runs; its numbers mean "
    "nothing.**"
)


@dataclass(frozen=True)
class Line:
    """The effect of an arm of the cuts on a row of a student."""

    student: int
    problem: str
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
        *(part for name in study.profile.domains for part in _detection(study, name, figures)),
        *(part for name in study.profile.domains for part in _cutting(study, name, figures)),
        *_distillation(study, problems, figures),
        *_settings(study),
    ]
    for name, chart in figures.items():
        write_bytes(path.with_name(f"{path.stem}-{name}.svg"), chart.encode())
        link = f"![{name}]({path.stem}-{name}.svg)"
        parts = [part.replace(f"FIGURE {name}", link) for part in parts]
    write_bytes(path, ("\n\n".join(parts) + "\n").encode())


def _head(study: Study, inputs: Inputs, problems: Sequence[Problem]) -> Iterator[str]:
    given = [f" --{name} {name.upper()}" for name in ("base", "data", "gsm8k")
             if getattr(inputs, name)]  # fmt: skip
    yield f"    python benchmarks/study --profile {study.profile.name}{''.join(given)}"
    versions = ", ".join(f"{name} {number}" for name, number in package_versions().items())
    yield f"Versions: {versions}; {platform.machine()}, {os.cpu_count()} cores, {_device()}."
    counts: dict[str, int] = {}
    for one in problems:
        counts[one.split] = counts.get(one.split, 0) + 1
    listed = ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))
    yield (
        "The problems are PROBLEMATHIC's (MIT license): word problems with irrelevant clauses, and "
        "the same ones without, so that the distractors are known. A model answers with an "
        'expression of two numbers, such as "50 * 7", and is right if it is the gold one. No '
        f"template is in two splits. Problems: {listed}. A trains the pair, B is searched and "
        "distilled on, C is held out; "
        "settings are chosen on B-dev, B and C-dev with the first student, whose other results do "
        "not count."
    )


def _device() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


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


def _weights(study: Study) -> Iterator[str]:
    rows = [from_json(DEVELOPMENT, one) for one in study.done("weights") or []]
    if not rows:
        return
    draws, names = study.profile.draws, [f"{weight:g}" for weight in WEIGHTS]
    lines = [
        (
            name,
            shown(auc(rows, name, numbers=True, draws=draws)),
            shown(share(first_phrases(rows, name), rows, draws=draws)),
        )
        for name in names
    ]
    yield "## The student's weight in log_gap"
    yield (
        f"Of the first student and the problems of B-dev and C-dev, {len(rows)} rows. The columns "
        f"are those of the tables of scores. The product's weight, {STUDENT_WEIGHT:g}, was chosen "
        "before, on other models."
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
    reference = first_phrases(rows, GAP)
    lines, numbers, firsts = [], [], []
    names = [name for name in (*SCORES, FALL, CONTROL, ORACLE) if name in rows[0].suspicion]
    for name in names:
        first = first_phrases(rows, name)
        numbers.append(auc(rows, name, numbers=True, draws=draws))
        firsts.append(share(first, rows, draws=draws))
        change = None if name == GAP else share(first - reference, rows, draws=draws)
        whole = auc(rows, name, draws=draws)
        lines.append((name, *map(shown, (whole, numbers[-1], firsts[-1])), signed(change)))
    figures[f"detection-{domain}"] = interval_chart(
        f"{TITLES[domain]}: a score's truth, %",
        names,
        {"AUC of number tokens": estimates(numbers), "first phrase": estimates(firsts)},
        "%",
    )
    planted = np.concatenate([row.planted for row in rows]).mean()
    yield f"## Detection: {TITLES[domain]}"
    yield (
        f"Rows: {len(rows)}, {_selected(study)}; students: "
        f"{len({row.student for row in rows})}. {100 * planted:.0f} % of the tokens are in a "
        "distractor. AUC: the chance that a token of a distractor is more suspect than another, of "
        "all tokens and of those with a digit. First phrase: how often the phrase with the highest "
        "mean score is a distractor; a row without one, or with no other phrase, does not count. "
        f"Beside the scores of `leaf detect` stands the {FALL}, which the strategy search goes by. "
        "intervention changes 4 words of a row once each, not 8 three times (its default). "
        "Intervals: 95 %, of a bootstrap over problems and students."
    )
    yield table(("score", "AUC", "AUC, numbers", "first phrase", f"minus {GAP.split()[0]}"), lines)
    yield f"FIGURE detection-{domain}"


def _selected(study: Study) -> str:
    if study.profile.select == "all":
        return "all rows, whatever the models answer"
    return "those that the student fails and the teacher solves"


def _cutting(study: Study, domain: str, figures: dict[str, str]) -> Iterator[str]:
    arms = _cut_lines(study, domain)
    if not arms:
        return
    draws = study.profile.draws
    lines, repaired = [], []
    for name, rows in arms.items():
        found = {
            of: share(np.array([float(row.values[of]) for row in rows]), rows, draws=draws)
            for of in ("first", "any", "both")
        }
        asked, losses = (np.mean([row.values[of] for row in rows]) for of in ("asked", "losses"))
        cut = sum(row.values["cut"] for row in rows)
        inside = sum(row.values["inside"] for row in rows) / cut if cut else None
        shares = [shown(found[of]) for of in ("first", "any", "both")]
        costs = (f"{asked:.1f}", f"{losses:.1f}")
        lines.append((name, *shares, *costs, "" if inside is None else short(inside)))
        repaired.append(found["any"])
    figures[f"cutting-{domain}"] = interval_chart(
        f"{TITLES[domain]}: students that a cut repairs, %", [*arms], {"": estimates(repaired)}, "%"
    )
    first = next(iter(arms.values()))
    yield f"## Cuts: {TITLES[domain]}"
    yield (
        f"The same {len(first)} rows, and no training. The student is right after the first cut of "
        "an arm, after any of them, and both models are right after one (what the arm keeps). "
        "Answers, losses: what an arm asks for a row, answers of both models to changed prompts "
        "and losses of the student; for the gradients every row costs a forward and a backward "
        "pass of each model in addition. Inside: the share of the characters of all cuts that are "
        "in a distractor."
    )
    head = (
        "cut",
        "right after the first",
        "after any",
        "both right",
        "answers",
        "losses",
        "inside",
    )
    yield table(head, lines)
    yield f"FIGURE cutting-{domain}"


def _cut_lines(study: Study, domain: str) -> dict[str, list[Line]]:
    found: dict[str, list[Line]] = {}
    for number in range(1, len(study.profile.layers)):
        done = study.done(f"cutting-{number}-{domain}") or {}
        for name in (*CUTS, *BY_HAND):
            for one in done.get(name, []):
                found.setdefault(name, []).append(Line(number, one["problem"], one))
    return found


def _distillation(
    study: Study, problems: Sequence[Problem], figures: dict[str, str]
) -> Iterator[str]:
    results = _by_student(study)
    if KD not in results:
        return
    profile, places = study.profile, _places(study, problems)
    plain, adversarial = list(places)[:2]

    def found(name: str, test: str, other: str | None = None) -> Interval | None:
        rows = _answered(results[name], results[other] if other else None, places[test])
        values = np.array([row.values["right"] for row in rows])
        return share(values, rows, draws=profile.draws)

    lines = []
    for name, arm in results.items():
        counts = [one.get("counterfactuals", 0) for orders in arm.values() for one in orders]
        cells = [percent(found(name, test)) for test in places]
        changes = [
            "" if name == KD else percent(found(name, test, KD), sign=True)
            for test in (plain, adversarial)
        ]
        lines.append((name, f"{np.mean(counts):.0f}", *cells, *changes))
    figures["distillation"] = interval_chart(
        "Held-out simple problems: right answers, %",
        list(results),
        {test: estimates([found(name, test) for name in results]) for test in (plain, adversarial)},
        "%",
    )
    arms = arms_of(profile)
    yield "## Distillation"
    yield (
        f"Students: {len(results[KD])}; batch orders of each: {profile.orders}. Every arm has "
        f"{profile.steps} steps of {profile.distilled_rows} rows, counterfactuals among them; all "
        f"train and answer in {FLOATS[has_fast_bfloat16()]}. The learning rate is "
        f"{best_rate(study):g}, of {', '.join(f'{one:g}' for one in profile.rates)}, with which KD "
        "was best on C-dev for the first student. Right answers, %, the mean of students and batch "
        "orders, with its standard error over problems and students (of a bootstrap); the last "
        "columns are the paired differences from kd on the simple problems. Counterfactuals: the "
        "mean of an arm's dataset, beside as many originals as kd has."
    )
    head = ("arm", "counterfactuals", *(_title(test) for test in places))
    yield table((*head, "plain, minus kd", "adversarial, minus kd"), lines)
    yield "\n".join(f"- {name}: {arms[name].says}." for name in results if name in arms)
    yield "FIGURE distillation"
    rivals = [name for name in (KD, "kd_failed", "random phrases") if name in results]
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
        "Does an arm beat plain distillation, the reweighted one and the random phrases at once? "
        "Paired differences on the simple problems, in points. Asked for: 3 standard errors above "
        f"each on adversarial ones, at no more than 1 point lost on plain ones. Passed: "
        f"{', '.join(passed) or 'none'}."
    )
    yield table(
        ("arm", *(f"adversarial, minus {rival}" for rival in rivals), "plain, minus kd"),
        [
            (name, *(percent(one, sign=True) for one in values))
            for name, values in differences.items()
        ],
    )


def _answered(
    arm: Mapping[int, Sequence[Mapping[str, Any]]],
    other: Mapping[int, Sequence[Mapping[str, Any]]] | None,
    place: tuple[int, int],
) -> list[Line]:
    """Return how often each student is right on each row of a test, minus the same of another arm.

    Students that lack the other arm are left out.
    """
    found = []
    for student, orders in arm.items():
        if other is not None and student not in other:
            continue
        right = _right(orders, place) - (_right(other[student], place) if other else 0)
        found += [Line(student, f"{at}", {"right": one}) for at, one in enumerate(right.tolist())]
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
    yield "\n".join(f"- {name}: {value}" for name, value in asdict(study.profile).items())
    groups: dict[str, float] = {}
    for name, seconds in study.seconds().items():
        groups[name.split("-")[0]] = groups.get(name.split("-")[0], 0.0) + seconds
    yield table(
        ("step", "seconds, of all students together"),
        [(name, f"{seconds:.0f}") for name, seconds in groups.items()],
    )
