"""The overview in front of the samples: from rows to counterfactuals, and arms side by side."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from leaf_distill.detection.counterfactual import WITHOUT_SPANS
from leaf_distill.detection.funnel import KEPT, ROW_STAGES
from leaf_distill.evaluation.sheets import Estimate
from leaf_distill.io import read_json, reading
from leaf_distill.report.measured import LEVELS, Limits, Measured, read_measured
from leaf_distill.statistics import wilson_interval
from leaf_distill.wording import counted

ROWS, CANDIDATES = "rows in", "candidates"
MARKED, SCORED = (str(ROW_STAGES[stage]) for stage in ("mark", "detect"))


@dataclass(frozen=True)
class Step:
    """A bar of the funnel, or of what became of the candidates.

    Attributes:
        name: of the rows or candidates.
        count: how many.
        width: percent of the widest bar of the chart.
        share: the share in words.
        kind: what the bar counts: "row", "tried", "made" or "lost".
    """

    name: str
    count: int
    width: float
    share: str
    kind: str


@dataclass(frozen=True)
class ArmLine:
    """An arm beside others: its counts, and two shares with intervals; None: nothing to divide."""

    name: str
    own: bool
    marked: int | None
    candidates: int
    kept: int
    kept_share: Estimate | None
    repaired: Estimate | None


@dataclass(frozen=True)
class Overview:
    """What the overview shows.

    Attributes:
        sentence: the run in words.
        steps: the funnel, on one scale.
        fates: what became of the candidates, the kept ones first.
        kept: the share of the candidates that was kept; None without any.
        rows: the share of the rows in that have a kept counterfactual; None without rows.
        with_one: the number of these rows.
        measured: scores, spans and cut strings.
        arms: of the run directory, by name.
    """

    sentence: str
    steps: Sequence[Step]
    fates: Sequence[Step]
    kept: Estimate | None
    rows: Estimate | None
    with_one: int
    measured: Measured
    arms: Sequence[ArmLine]


def read_overview(arm: Path, funnel: Mapping[str, Any], with_one: int) -> Overview:
    """Count what the overview shows.

    Args:
        arm: its directory.
        funnel: what its funnel.json holds.
        with_one: rows with a kept counterfactual.

    Raises:
        ValueError: a file cannot be read or has another shape.
    """
    with reading(arm / "funnel.json"):
        settings, counts = funnel["settings"], _counts(funnel)
        spans = settings["strategy"] not in WITHOUT_SPANS
        limits = _limits(settings) if spans else {}
        fates = list(_fates(counts, funnel["left"]))
        sentence = _sentence(counts, settings)
        kept = _share(counts.get(KEPT, 0), counts.get(CANDIDATES, 0))
        rows = _share(with_one, counts.get(ROWS, 0))
    measured = read_measured(arm, limits, spans=spans)
    steps = list(_steps(counts, measured.spanned))
    return Overview(sentence, steps, fates, kept, rows, with_one, measured, list(_arms(arm)))


def _limits(settings: Mapping[str, Any]) -> Limits:
    """Return the score above which no token is flagged, with its name, for each level."""
    if settings["rule"] == "quantile":
        return dict.fromkeys(LEVELS, ("cap", float(settings["cap"])))
    values = (settings["threshold"], settings["response_threshold"])
    return {name: ("threshold", float(one)) for name, one in zip(LEVELS, values, strict=True)}


def _counts(funnel: Mapping[str, Any]) -> dict[str, int]:
    return {str(stage["stage"]): int(stage["rows"]) for stage in funnel["stages"]}


def _share(part: int, whole: int) -> Estimate | None:
    """Return a share with Wilson's interval, or None where there is nothing to divide."""
    return Estimate(part / whole, *wilson_interval(part, whole)) if whole else None


def _steps(counts: Mapping[str, int], spanned: int | None) -> Iterator[Step]:
    """Yield the bars of the funnel; a stage that the run does not have has none."""
    rows, candidates = counts.get(ROWS, 0), counts.get(CANDIDATES, 0)
    marked, scored = counts.get(MARKED), counts.get(SCORED)
    found: list[tuple[str, str, int | None]] = [
        ("rows", "row", counts.get(ROWS)),
        ("student wrong, teacher right", "row", marked),
        ("searched", "row", scored if marked is None else None),
        ("with suspect spans", "row", spanned if counts else None),
        ("candidates: changed texts", "tried", counts.get(CANDIDATES)),
        ("kept counterfactuals", "made", counts.get(KEPT)),
    ]
    top = max((count for *_, count in found if count), default=1)
    for name, kind, count in found:
        if count is None:
            continue
        share = ""
        if kind == "row" and rows and name != "rows":
            share = f"{count / rows:.1%} of rows"
        elif kind == "made" and candidates:
            share = f"{count / candidates:.1%} of candidates"
        elif kind == "tried" and scored:
            share = f"{count / scored:.1f} a searched row"
        yield Step(name, count, 100 * count / top, share, kind)


def _fates(counts: Mapping[str, int], left: Sequence[Mapping[str, Any]]) -> Iterator[Step]:
    candidates = counts.get(CANDIDATES, 0)
    if not candidates:
        return
    reasons = Counter[str]()
    for one in left:
        if one["unit"] == "candidates":
            reasons[str(one["reason"])] += int(one["count"])
    kept = counts.get(KEPT, 0)
    top = max(kept, *reasons.values(), 1)
    for name, count in (("kept", kept), *reasons.most_common()):
        kind = "made" if name == "kept" else "lost"
        yield Step(name, count, 100 * count / top, f"{count / candidates:.1%}", kind)


def _sentence(counts: Mapping[str, int], settings: Mapping[str, Any]) -> str:
    """Return the run in a sentence or two; nothing where no row came in."""
    rows, marked = counts.get(ROWS, 0), counts.get(MARKED)
    candidates, kept = counts.get(CANDIDATES, 0), counts.get(KEPT, 0)
    if not rows:
        return ""
    first = f"Of {counted(rows, 'row')}, {counts.get(SCORED, 0):,} could be searched."
    if marked is not None:
        first = f"Of {counted(rows, 'row')}, the student fails {marked:,} that the teacher solves."
    if not candidates:
        return f"{first} No changed text was made of them, so there is no counterfactual."
    made = f"The run made {counted(candidates, 'changed text')} of them"
    test = "can be used" if settings["validate"] == "none" else "passed validation"
    return f"{first} {made}, and {kept:,} ({kept / candidates:.1%}) {test}."


def _arms(arm: Path) -> Iterator[ArmLine]:
    """Yield the arms of the run directory; the originals of `leaf compare` are none."""
    for path in sorted(arm.parent.glob("*/funnel.json")):
        funnel = read_json(path)
        with reading(path):
            counts = _counts(funnel)
            candidates, kept = counts.get(CANDIDATES, 0), counts.get(KEPT, 0)
            gain: Mapping[str, Any] = next(iter(funnel.get("sources") or ()), {})
            repaired = int(gain["repaired"]) if gain and gain["cuts"] else None
            yield ArmLine(
                name=path.parent.name,
                own=path.parent == arm,
                marked=counts.get(MARKED),
                candidates=candidates,
                kept=kept,
                kept_share=_share(kept, candidates),
                repaired=None if repaired is None else _share(repaired, int(gain["marked"])),
            )
