"""The accuracy that a student gains where confounding spans are cut out, by source of the rows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from leaf_distill.data.example import Example, candidates_of
from leaf_distill.detection.config import DetectConfig
from leaf_distill.statistics import wilson_interval

ALL, UNNAMED = "all", "no source"
AFTER_MARKING = ("detect", "prune", "validate")
"""The stages at which a marked row may leave."""


def pruning_gain(examples: Sequence[Example], config: DetectConfig) -> list[dict[str, Any]]:
    """Return how often a cut repairs the student's answer: a line for all rows and each source.

    This is Figure 1 of the paper: the student is asked again, without training, on the prompts that
    lack a confounding span. Two things to know before quoting it. `best_cut` counts a row as right
    where any of its cuts is, which takes the right answer to choose the cut: it is an upper bound
    of what one cut would give, and rises with the number of cuts. `mean_cut` takes a cut of the row
    at random. And rows that the student solves are not cut: both accuracies count them as right,
    and so leave out what cuts would break.

    Each line has `source`, and the counts `asked` (rows with an answer of the student), `right`
    (of these), `marked` (student wrong, teacher right), `with_cuts` (marked rows with a cut that
    the student was asked), `repaired` (the student is right on a cut), `cuts` and `cuts_right`; and
    `repaired_share` of the marked rows with its 95 % `interval` (Wilson), `cut_share` of cuts that
    are right, and the student's accuracy on the asked rows, `before`, with the `best_cut` and
    with the `mean_cut`. Where no cut was made, all shares but `before` are None.

    Returns:
        Nothing where no row was asked, or the student was not asked on originals and on cuts
        (`select` "student_wrong" and `validate` "both"). One line where no row has a source.
    """
    if config.select == "all" or config.validate != "both":
        return []
    asked = [one for one in examples if "student" in one.answers]
    if not asked:
        return []
    lines = [_line(ALL, asked)]
    names = sorted({one.source for one in asked if one.source is not None})
    if names:
        for name in (*names, None):
            if of_source := [one for one in asked if one.source == name]:
                lines.append(_line(UNNAMED if name is None else name, of_source))
    return lines


def _line(source: str, asked: Sequence[Example]) -> dict[str, Any]:
    marked = [one for one in asked if one.outcome is None or one.outcome.stage in AFTER_MARKING]
    tried = [verdicts for one in marked if (verdicts := list(_verdicts(candidates_of([one]))))]
    right = sum(verdict == "right" for verdict in _verdicts(asked))
    repaired = sum("right" in verdicts for verdicts in tried)
    cuts, cuts_right = sum(map(len, tried)), sum(one.count("right") for one in tried)
    mean = sum(one.count("right") / len(one) for one in tried)
    total = len(asked)
    return {
        "source": source,
        "asked": total,
        "right": right,
        "marked": len(marked),
        "with_cuts": len(tried),
        "repaired": repaired,
        "cuts": cuts,
        "cuts_right": cuts_right,
        "repaired_share": repaired / len(marked) if cuts else None,
        "interval": list(wilson_interval(repaired, len(marked))) if cuts else None,
        "cut_share": cuts_right / cuts if cuts else None,
        "before": right / total,
        "best_cut": (right + repaired) / total if cuts else None,
        "mean_cut": (right + mean) / total if cuts else None,
    }


def _verdicts(examples: Iterable[Example]) -> Iterable[str | None]:
    return (one.answers["student"].verdict for one in examples if "student" in one.answers)
