"""The part of the page on distillation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from detection import MAX_NEW_TOKENS
from distillation import (
    ALL_HAVE,
    AS_MANY,
    FEW,
    FEW_HAVE,
    FLOATS,
    KD,
    KD_OF_FEW,
    TEACHER,
    UNTRAINED,
    WITHOUT_CUTS,
    arms_of,
    has_fast_bfloat16,
)
from measures import Estimate, Floats, mean
from pair import render
from problems import Problem, as_rows, of_split
from run import SEARCHED, best_rate, slug, tests_of
from settings import Study
from tables import TITLES, Line, bars, is_above, shown, table

from leaf_distill.evaluation.charts import interval_chart
from leaf_distill.models.tokenizer import load_tokenizer


def distillation_section(
    study: Study, problems: Sequence[Problem], figures: dict[str, str]
) -> Iterator[str]:
    """Yield the tables of the arms; add their figure."""
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
        arm, base = results[name], results[other] if other else None
        if base and name == TEACHER:  # it is the same one for all students
            arm = dict.fromkeys(base, next(iter(arm.values())))
        rows = _answered(arm, base, places[test], templates[test])
        values = np.array([row.values["right"] for row in rows])
        return mean(values, rows, draws=profile.draws)

    lines = []
    for name, arm in results.items():
        runs = [one for orders in arm.values() for one in orders if "tokens" in one]
        counts = [
            f"{np.mean([one[of] for one in runs]) / scale:.0f}" if runs else ""
            for of, scale in (("counterfactuals", 1), ("originals_a_step", 1), ("tokens", 1000))
        ]
        changes = [
            "" if name == KD else shown(found(name, test, _base(name)), sign=True)
            for test in (plain, adversarial)
        ]
        lines.append((name, *counts, *(shown(found(name, test)) for test in places), *changes))
    figures["distillation"] = interval_chart(
        "Held-out simple problems: right answers, %",
        list(results),
        {
            _title(test): bars([found(name, test) for name in results])
            for test in (plain, adversarial)
        },
        "%, with two standard errors",
    )
    arms = arms_of(profile)
    yield "## Distillation"
    originals = len(of_split(problems, SEARCHED, profile.rows))
    yield (
        f"Students: {len(results[KD])}; orders of the rows of each: {profile.orders}. Every arm "
        f"has {profile.steps} steps of about {profile.distilled_rows} rows, counterfactuals among "
        "them, so that it has fewer originals a step the more counterfactuals there are; the arms "
        f"of a student shuffle the {originals} originals alike. All train and answer in "
        f"{FLOATS[has_fast_bfloat16()]}. All label tokens count the same, but where an arm names "
        f"another weight. The learning rate is {best_rate(study):g}, of "
        f"{', '.join(f'{one:g}' for one in profile.rates)}, with which the first student's KD was "
        "best on C-dev, the lower one if equal; all arms have it. Right answers, %; the last "
        "columns are the paired differences from kd on the simple problems, of the arms with "
        f"{FEW} % from {KD_OF_FEW}. There the {100 - FEW} % are plain, and cuts may be of these "
        "too. Counterfactuals: of an arm's dataset, beside the originals; tokens: that an arm has "
        "read, in thousands. The problems that have distractors are drawn once. An answer has at "
        f"most {MAX_NEW_TOKENS} tokens: the labels of {_too_long(study, problems)} of the "
        f"{len(of_split(problems, 'C', profile.rows))} held-out simple problems are longer, and no "
        "answer in this table equals one; the table of the pair counts them."
    )
    head = (
        "arm",
        "counterfactuals",
        "originals a step",
        "tokens",
        *(_title(test) for test in places),
    )
    yield table((*head, "plain, minus kd", "adversarial, minus kd"), lines)
    yield "\n".join(f"- {name}: {arms[name].says}." for name in results if name in arms)
    yield "FIGURE distillation"
    yield (
        "Does an arm beat plain distillation, the reweighted one and random phrases at once? "
        "Paired differences on the simple problems, in points; asked for were 3 standard errors "
        "above each on adversarial ones, at no more than 1 point lost on plain ones."
    )
    for where, kd, group, end in (
        ("All originals have distractors", KD, ALL_HAVE, ""),
        (f"{FEW} % of the originals have distractors", KD_OF_FEW, FEW_HAVE, f", {FEW} %"),
    ):
        rivals = [one for one in (kd, f"kd_failed{end}", f"{AS_MANY}{end}") if one in results]
        differences = {
            name: [*(found(name, adversarial, one) for one in rivals), found(name, plain, kd)]
            for name in group
            if name in results and name not in [*WITHOUT_CUTS, *rivals]
        }
        passed = [name for name, changes in differences.items() if _is_better(changes)]
        yield (
            f"{where}: {len(differences)} arms are tried; passed: {', '.join(passed) or 'none'}."
        )
        yield table(
            ("arm", *(f"adversarial, minus {one}" for one in rivals), f"plain, minus {kd}"),
            [
                (name, *(shown(one, sign=True) for one in changes))
                for name, changes in differences.items()
            ],
        )


def _too_long(study: Study, problems: Sequence[Problem]) -> int:
    """Return how many held-out simple problems have labels that no answer is long enough for."""
    tokenizer = load_tokenizer(str(study.root / "pair" / TEACHER))
    rows = as_rows(of_split(problems, "C", study.profile.rows), "plain")
    return sum(int(one.loss_mask.sum()) > MAX_NEW_TOKENS for one in render(tokenizer, rows))


def _base(name: str) -> str:
    """Return the plain distillation from the rows that an arm starts from."""
    return KD_OF_FEW if name in FEW_HAVE else KD


def _is_better(changes: Sequence[Estimate | None]) -> bool:
    """Return whether an arm is 3 errors above each rival, and loses at most a point on plain ones.

    Args:
        changes: the differences from the rivals on adversarial problems, and from KD on plain ones.
    """
    *gains, lost = changes
    above = all(is_above(one, errors=3) for one in gains)
    return above and lost is not None and lost[0] >= -0.01


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
    share: Floats = right.mean(axis=0)
    return share


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
