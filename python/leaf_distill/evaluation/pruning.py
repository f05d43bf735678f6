"""The effect of cutting alone, without any training: gains, controls and harm, arm by arm."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Mapping, Sequence

from leaf_distill.evaluation.arms import Arm, Row, paired
from leaf_distill.evaluation.sheets import Estimate, Sheet, Value, estimate, estimated_difference

CONTROLS = {
    "span": ("strategy", ("random_spans",)),
    "collective": ("strategy", ("random_tokens", "random_spans")),
    "cumulative": ("score", ("random",)),
}
"""By strategy, the setting that makes a random control of the same size, and its values; the first
that a run has counts."""

SEEDED = ("seed",)
"""Settings in which a random arm may differ: its own draw."""

HIT = (
    "Hit: scored rows with a usable candidate, called `with candidates` in the funnel of `leaf "
    "detect`. A candidate is not usable where it left at `prune`: it changes nothing, leaves an "
    "empty turn, repeats another, or is too long."
)
INTERVALS = (
    "Percent with 95 % intervals: Wilson's for counts of rows, else of a bootstrap over rows, "
    "which has no width where all rows agree, however few they are. "
)
GAIN = (
    f"{INTERVALS}Asked: rows on whose whole prompt the student was asked. Marked: it fails, and "
    "the teacher solves the prompt. A cut repairs: the chance that the student is right on one of "
    "a row's cuts, taken at random; a row without a cut counts 0. Some cut repairs: it takes the "
    "right answer to choose that cut, so it is an upper bound, and rises with the number of cuts. "
    "Gained: points of accuracy on all asked rows, if a random one of its cuts were made in each "
    "marked row, and no other; that too takes the right answers to know. Empty where no cut was "
    "made."
)
FLATTERY = (
    "Only rows that the student fails are counted here. Among such rows any change of the "
    "prompt can only help: there is nothing left to break. So a gain says nothing by itself. "
    "Read it beside random cuts of the same size, and beside the harm to rows that the student "
    "solves."
)
NO_OP = (
    "Asking again without a cut gains exactly 0: answers are greedy, and the same prompt has "
    "the same answer. So no gain here comes from a second try, as it would with drawn answers "
    "(there is no regression to the mean of a draw). But a student close to the right answer "
    "may be moved to it by any change of the prompt: that part is what random cuts repair."
)
HARM = (
    f"{INTERVALS}From arms with `--select all`, which cut every row; which rows the student "
    "solves is known from an arm of the same settings with `--select student_wrong`. A cut "
    "breaks: the student fails a solved row after a random one of its cuts. Before and after: the "
    "student's accuracy on all rows with cuts, solved or not, where a random one is made in each; "
    "no row is chosen by its answer, so their difference is the effect of cutting alone."
)


def gains(arms: Sequence[Arm]) -> Sheet:
    """Return how many marked rows a cut repairs, for each arm and group of rows (Figure 1)."""
    lines = [
        _gain(group, arm)
        for group in _groups(arms)
        for arm in arms
        if arm.marks and arm.asks_student
    ]
    title = "Failed rows that cutting alone repairs (Figure 1)"
    return Sheet("gain", title, lines, GAIN, detail=("group", "with cuts", "cuts"))


def _gain(group: str, arm: Arm) -> dict[str, Value]:
    asked = _within(group, arm.of("solved", "marked", "failed"))
    marked = [row for row in asked if row.state == "marked"]
    gained = [row.share_right if row.state == "marked" else 0.0 for row in asked]
    cut = any(row.asked for row in marked)
    return {
        "arm": arm.name,
        "group": group,
        "asked": len(asked),
        "solved": sum(row.state == "solved" for row in asked),
        "marked": len(marked),
        "with cuts": sum(bool(row.asked) for row in marked),
        "cuts": sum(len(row.asked) for row in marked),
        "a cut repairs": _repaired(marked),
        "some cut repairs": estimate([row.any_right for row in marked]) if cut else None,
        "gained": estimate(gained) if cut else None,
    }


def _repaired(rows: Iterable[Row]) -> Estimate | None:
    """Return the share of rows that a random cut repairs, None where no cut was made in any."""
    rows = list(rows)
    return estimate([row.share_right for row in rows]) if any(row.asked for row in rows) else None


def against_random(arms: Sequence[Arm]) -> Sheet:
    """Return what each arm repairs less what random cuts of the same size repair, paired by row."""
    lines: list[dict[str, Value]] = []
    for arm, control in _with_controls(arms):
        for group in _groups([arm]):
            marked = _within(group, arm.of("marked"))
            both = [pair for pair in paired(marked, control.rows) if pair[1].state == "marked"]
            own, random = (_repaired(pair[at] for pair in both) for at in (0, 1))
            shares = [[pair[at].share_right for pair in both] for at in (1, 0)]
            lines.append(
                {
                    "arm": arm.name,
                    "group": group,
                    "random arm": control.name,
                    "marked": len(both),
                    "a cut repairs": own,
                    "random repairs": random,
                    "difference": estimated_difference(*shares) if own and random else None,
                }
            )
    note = (
        "Percent; the difference is paired: a resample keeps both arms' shares of a row together. "
        "Empty where an arm made no cut."
    )
    return Sheet("random", "Against random cuts of the same size", lines, note, detail=("group",))


def _with_controls(arms: Sequence[Arm]) -> Iterable[tuple[Arm, Arm]]:
    for arm in arms:
        name, values = CONTROLS.get(arm.settings["strategy"], ("", ()))
        if arm.settings.get(name) in values:  # a control itself
            continue
        for value in values:
            found = [
                other
                for other in arms
                if other.settings[name] == value
                and arm.differs_in(other) <= {name, *SEEDED}
                and arm.marks
                and arm.asks_student
            ]
            if found:
                yield from ((arm, control) for control in found)
                break


def missing_controls(arms: Sequence[Arm]) -> list[str]:
    """Return what to run for the controls that the arms lack, one sentence each.

    An arm without a cut needs none: there is nothing that a control could be compared with.
    """
    sentences = []
    controlled = {arm.name for arm, _ in _with_controls(arms)}
    for arm in arms:
        strategy = arm.settings["strategy"]
        if strategy not in (*CONTROLS, "search") or not arm.marks or not arm.asks_student:
            continue
        if not any(row.asked for row in arm.of("marked")):
            continue
        name, values = CONTROLS.get(strategy, ("strategy", (strategy,)))
        if strategy == "search":
            sentences.append(
                f"{arm.name} has no control: its cuts were found by their effect on these rows. A "
                "random one of a row's cuts may be one that did not repair it yet."
            )
        if arm.name not in controlled and arm.settings[name] not in values:
            near = [
                one
                for one in arms
                if one.settings[name] in values
                and (name == "strategy" or one.settings["strategy"] == strategy)
            ]
            cure = _cure(arm, near, {name: values[0]}, free=SEEDED)
            sentences.append(f"{arm.name} has no random arm{cure}.")
        if not any(arm.differs_in(other) == {"select"} and not other.marks for other in arms):
            near = [one for one in arms if not one.marks and one.settings["strategy"] == strategy]
            cure = _cure(arm, near, {"select": "all"})
            sentences.append(
                f"{arm.name} says nothing of harm to solved rows{cure}, which cuts them too."
            )
    return sentences


def _cure(
    arm: Arm, near: Sequence[Arm], change: Mapping[str, str], *, free: Iterable[str] = ()
) -> str:
    """Return how to run a control of an arm, and by what the nearest arm of its kind is none.

    Args:
        arm: which lacks a control.
        near: arms that would be controls if they had its settings.
        change: the option that makes a control of the arm, and its value.
        free: settings that may differ.
    """
    options, why, without = dict(change), "", ""
    if near:
        other = min(near, key=lambda one: len(arm.differs_in(one)))
        options = {name: str(other.settings[name]) for name in change}
        differing = sorted(arm.differs_in(other) - {*change, *free})
        own, its = (
            {name: _written(one.settings.get(name)) for name in differing} for one in (arm, other)
        )
        listed = ", ".join(f"{name} {its[name]}, not {own[name]}" for name in differing)
        why = f" ({other.name} has {listed})"
        unset = [name for name in differing if arm.settings.get(name) is None]
        options |= {name: shlex.quote(own[name]) for name in differing if name not in unset}
        without = "".join(f" and without `--{name}`" for name in unset)
    words = " ".join(f"--{name} {value}" for name, value in options.items())
    return f"{why}: run the same `leaf detect` with `{words}`{without}"


def _written(value: object) -> str:
    """Return a setting as its option takes it, and "none" where it has no value."""
    if value is None:
        return "none"
    return value if isinstance(value, str) else json.dumps(value)


def unsearched(arms: Sequence[Arm]) -> list[str]:
    """Return a sentence for each arm that searched no row."""
    sentences = []
    for arm in arms:
        if any(row.scored for row in arm.rows.values()):
            continue
        marked, asked = len(arm.of("marked")), len(arm.of("solved", "marked", "failed"))
        why = f" ({marked} of {asked} rows are marked)" if arm.marks else ""
        sentences.append(
            f"{arm.name} searched no row{why}, so it shows no effect of cutting, and no control "
            "would help; `left` in its funnel.json says why rows left."
        )
    return sentences


def without_cuts(arms: Sequence[Arm]) -> list[str]:
    """Return a sentence for each arm that cut none of the rows that the student fails."""
    return [
        f"{arm.name}: no cut was made in any of {len(marked)} marked rows."
        for arm in arms
        if arm.asks_student
        and any(row.scored for row in arm.rows.values())
        and (marked := arm.of("marked"))
        and not any(row.asked for row in marked)
    ]


def harm(arms: Sequence[Arm]) -> Sheet:
    """Return how many solved rows a cut breaks, and the accuracy where every row is cut."""
    lines: list[dict[str, Value]] = []
    for arm in arms:
        marking = next((one for one in arms if arm.differs_in(one) == {"select"}), None)
        if arm.marks or marking is None or not marking.marks or not arm.asks_student:
            continue
        for group in _groups([marking]):
            rows = _within(group, marking.of("solved", "marked", "failed"))
            lines.append(_harm(group, arm, list(paired(rows, arm.rows))))
    title = "Solved rows that cutting breaks, and all rows together"
    return Sheet("harm", title, lines, HARM, detail=("group", "some cut breaks"))


def _harm(group: str, arm: Arm, pairs: Sequence[tuple[Row, Row]]) -> dict[str, Value]:
    """Return a line from rows of the arm that asked on whole prompts, each with its cut row."""
    with_cuts = [(row, cut) for row, cut in pairs if cut.asked]
    solved = [cut for row, cut in with_cuts if row.state == "solved"]
    before = [float(row.state == "solved") for row, _ in with_cuts]
    after = [cut.share_right for _, cut in with_cuts]
    return {
        "arm": arm.name,
        "group": group,
        "solved, cut": len(solved),
        "a cut breaks": estimate([1 - cut.share_right for cut in solved]),
        "some cut breaks": estimate([cut.share_right < 1 for cut in solved]),
        "all cut": len(with_cuts),
        "before": estimate(before),
        "after": estimate(after),
        "difference": estimated_difference(before, after),
    }


def overview(arms: Sequence[Arm]) -> Sheet:
    """Return the arms side by side: what they hit, cut, keep and repair (Figures 7, 9 and 10)."""
    lines = [_overview(arm) for arm in arms]
    note = (
        f"Percent. {HIT} Candidates: all, also those that are not usable. Cut: the share of the "
        "searched characters that one candidate lacks, on average. Kept: candidates that passed "
        "the validation. A cut repairs: as in the table of gains. These are effects of cutting "
        "alone; what an arm is worth in training is measured by `leaf compare`."
    )
    title = "Strategies and thresholds side by side (Figures 7, 9, 10)"
    detail = ("strategy", "threshold", "level", "kept %")
    return Sheet("arms", title, lines, note, detail=detail)


def _overview(arm: Arm) -> dict[str, Value]:
    scored = [row for row in arm.rows.values() if row.scored]
    cuts = [cut for row in scored for cut in row.cuts]
    kept = sum(cut.kept for cut in cuts)
    shares = [cut.characters / row.length for row in scored for cut in row.cuts]
    repaired: Estimate | None = None
    if arm.marks and arm.asks_student:
        repaired = _repaired(arm.of("marked"))
    return {
        "arm": arm.name,
        "strategy": str(arm.settings["strategy"]),
        "threshold": f"{arm.settings[threshold_of(arm)]:g}",
        "level": level(arm),
        "scored": len(scored),
        "hit": sum(row.hit for row in scored),
        "candidates": len(cuts),
        "cut %": f"{100 * sum(shares) / len(shares):.1f}" if shares else None,
        "kept": kept,
        "kept %": f"{100 * kept / len(cuts):.1f}" if cuts else None,
        "rows kept": sum(any(cut.kept for cut in row.cuts) for row in scored),
        "a cut repairs": repaired,
    }


def threshold_of(arm: Arm) -> str:
    """Return the name of the threshold of an arm's level; of both levels that of instructions."""
    return "response_threshold" if arm.settings.get("level") == "response" else "threshold"


def level(arm: Arm) -> str:
    """Return the level at which an arm searches, with the number of segments of a response."""
    name = str(arm.settings.get("level", "instruction"))
    segments = arm.settings.get("segments")
    return name if name == "instruction" or not segments else f"{name}, {segments} segments"


def _within(group: str, rows: Iterable[Row]) -> list[Row]:
    return [row for row in rows if group in row.groups]


def _groups(arms: Sequence[Arm]) -> list[str]:
    """Return the groups of the rows that some arms asked about, "all" first."""
    rows = [row for arm in arms for row in arm.of("solved", "marked", "failed")]
    names = sorted({group for row in rows for group in row.groups} - {"all"})
    return ["all", *names] if rows else []
