"""The part of the page on scores and cuts."""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np
from cutting import ARMS as CUTS
from cutting import BY_HAND
from detection import CONTROL, FALL, GAP, ORACLE, SCORES, WEIGHTS
from measures import Row, aucs, first_phrases, from_json, mean
from run import DEVELOPMENT, SEARCHED
from settings import Study
from tables import TITLES, Line, bars, shown, table

from leaf_distill.detection.suspicion import STUDENT_WEIGHT
from leaf_distill.evaluation.charts import interval_chart

RIVALS = (GAP, "teacher's gradient, low")
BRIEF = {
    "top 1, 2, 3 phrases by ": "phrases by ",
    "search among 2 phrases, by ": "search among 2, by ",
    "oracle: the ": "",
    "no model: number": "no model: numbers",
    "fall of the student's loss without the phrase": "fall of the student's loss",
}


def brief(name: str) -> str:
    """Return a name as it fits beside a chart."""
    for long, short in BRIEF.items():
        name = name.replace(long, short)
    return re.sub(r" \(.*?\)", "", name)


def weights_section(study: Study) -> Iterator[str]:
    """Yield the table of the weights that were tried in log_gap."""
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
        f"Measured on {len(rows)} rows of the first student and the problems of B-dev and C-dev, "
        f"{_selected(study, SEARCHED)}. The columns are those of the tables of scores. The "
        f"product's weight, {STUDENT_WEIGHT:g}, comes from an earlier study on problems of the "
        "same source."
    )
    yield table(("weight", "AUC, numbers", "first phrase"), lines)


def _rows(study: Study, domain: str) -> list[Row]:
    found = []
    for number in range(1, len(study.profile.layers)):
        for row in study.done(f"detection-{number}-{domain}") or []:
            found.append(from_json(number, row))
    return found


def detection_section(study: Study, domain: str, figures: dict[str, str]) -> Iterator[str]:
    """Yield the table of the scores on a domain; add its figure."""
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
    yield f"## Detection: {TITLES[domain]}"
    yield (
        f"Rows: {len(rows)}, {_selected(study, domain)}; a row is a student with a problem, and "
        f"there are {len({row.student for row in rows})} students. "
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


def _selected(study: Study, domain: str) -> str:
    if study.profile.select == "all" or domain in study.profile.domains:
        return "all rows, whatever the models answer"
    return "those that the student fails and the teacher solves"


def cutting_section(study: Study, figures: dict[str, str]) -> Iterator[str]:
    """Yield the table of the cuts; add its figure."""
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
        "7 phrases on average and at most 11, so that a search among 8 tries all of most problems."
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
