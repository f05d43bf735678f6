"""The tables of the demo, and the limits of their evidence."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from rich.console import Group

from leaf_distill.demo.measure import Detection, Pruning
from leaf_distill.evaluation.compare_table import CompareResult, training_table
from leaf_distill.evaluation.tables import printed_table
from leaf_distill.terminal import plain_console

EVIDENCE = (
    "In short: without any training, {right:.0%} of LeaF's cuts make the student right, "
    "{student:.0%} of cuts by the student's saliency alone, and {random:.0%} of random spans; "
    "whether training on them beats plain distillation is more than one small demo can tell.\n\n"
    "What these numbers say: on {scored} prompts whose misleading sentences were planted, the "
    "first table shows how far each score finds them, the second what cutting does to a student "
    "whose weights have not changed. What they do not say: that LeaF beats plain distillation. "
    "This is one seed of one toy, a student made to copy hints, and held-out sets of {smallest} "
    "to {largest} problems, on which two models differ by up to {noise:.0%} by chance alone (two "
    "standard errors at one half). All arms start from one student and see the same originals. "
    "Before the credit goes to the detection, compare LeaF with the arm of random spans, which "
    "went through the same validation. How far scores find real distractors "
    "is in docs/evidence.md of the sources."
)


def show_results(
    detection: Sequence[Detection],
    pruning: Sequence[Pruning],
    compared: CompareResult,
    accuracy: Mapping[str, Mapping[str, float]],
    held_out: Mapping[str, int],
    scored: int,
) -> None:
    """Print the four tables of the demo, and the limits of their evidence.

    Args:
        detection: one line for each score.
        pruning: one line for each strategy; LeaF's is the first, random spans are the last.
        compared: the arms.
        accuracy: of each arm's student on each held-out set, from 0 to 1.
        held_out: the number of problems in each set.
        scored: the number of prompts that were scored.
    """
    console = plain_console()
    for table in (
        _detection(detection, scored),
        _pruning(pruning),
        training_table(compared),
        _accuracy(accuracy, held_out),
    ):
        console.print("", table)
    sizes = held_out.values()
    shares = {row.method: row.cuts_right / row.cuts if row.cuts else math.nan for row in pruning}
    leaf, *_, control = shares.values()
    text = EVIDENCE.format(
        right=leaf,
        student=shares["student_saliency"],
        random=control,
        scored=scored,
        smallest=min(sizes),
        largest=max(sizes),
        noise=2 * math.sqrt(2 * 0.25 / min(sizes)),
    )
    console.print("", text, sep="\n")


def _detection(rows: Sequence[Detection], scored: int) -> Group:
    lines: list[tuple[str, ...]] = [
        ("score", "precision", "clauses", "tokens", "top one", "AUC", "AUC numbers")
    ]
    for row in rows:
        shares = map(_percent, (row.precision, row.clause_recall, row.token_recall, row.top_1))
        lines.append((row.method, *shares, f"{row.auc:.3f}", f"{row.auc_numbers:.3f}"))
    caption = (
        "LeaF flags tokens by its threshold, the others as many in each prompt. Precision: flagged "
        "tokens that are planted. Clauses, tokens: the share of planted ones that is hit. Top one: "
        "prompts whose most suspicious token is planted. AUC: over all tokens, and over numbers."
    )
    title = f"Detection against the planted sentences, {scored} prompts"
    return printed_table(title, lines, caption=caption)


def _pruning(rows: Sequence[Pruning]) -> Group:
    lines: list[tuple[str, ...]] = [
        ("what is cut", "cuts", "student right", "passed validation", "prompts helped")
    ]
    for row in rows:
        parts = (
            *((row.cuts_right, row.cuts), (row.cuts_kept, row.cuts)),
            (row.prompts_right, row.prompts),
        )
        shares = (f"{n} ({_percent(n / total if total else math.nan)})" for n, total in parts)
        lines.append((row.method, str(row.cuts), *shares))
    return printed_table("Pruning alone, on prompts that the student had failed", lines)


def _accuracy(accuracy: Mapping[str, Mapping[str, float]], held_out: Mapping[str, int]) -> Group:
    lines = [("", *(f"{name}\n({count})" for name, count in held_out.items()))]
    for name, figures in accuracy.items():
        lines.append((name, *(_percent(figures[held]) for held in held_out)))
    return printed_table("Held-out accuracy of the student after", lines)


def _percent(share: float) -> str:
    return "-" if math.isnan(share) else f"{share:.1%}"
