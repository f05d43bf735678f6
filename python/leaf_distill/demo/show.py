"""The demo's tables, and what their numbers are and are not evidence of."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table

from leaf_distill.demo.measure import Detection, Pruning
from leaf_distill.evaluation.compare import CompareResult, comparison_tables

EVIDENCE = (
    "In short: without any training, {right:.0%} of LeaF's cuts make the student right, and "
    "{random:.0%} of random spans; whether training on them beats plain distillation is more than "
    "one small demo can tell.\n\n"
    "What these numbers say: on {scored} prompts whose misleading sentences were planted, the "
    "first table shows how far each score finds them, the second what cutting does to a student "
    "whose weights have not changed. What they do not say: that LeaF beats plain distillation. "
    "This is one seed of one toy, a student made to copy hints, and held-out sets of {smallest} "
    "to {largest} problems, on which two models differ by up to {noise:.0%} by chance alone (two "
    "standard errors at one half). All arms start from one student and see the same originals. "
    "Before the credit goes to the detection, compare LeaF with the arm of random spans, which "
    "went through the same validation."
)


def show_results(
    detection: Sequence[Detection],
    pruning: Sequence[Pruning],
    compared: CompareResult,
    accuracy: Mapping[str, Mapping[str, float]],
    held_out: Mapping[str, int],
    scored: int,
) -> None:
    """Print the four tables of the embedded demo."""
    console = Console()
    for table in (
        _detection(detection, scored),
        _pruning(pruning),
        comparison_tables(compared)[0],
        _accuracy(accuracy, held_out),
    ):
        console.print()
        console.print(table)
    sizes = held_out.values()
    noise = 2 * math.sqrt(2 * 0.25 / min(sizes))
    console.print()
    shares = [row.cuts_right / row.cuts if row.cuts else math.nan for row in pruning]
    leaf, control = shares[0], shares[-1]
    console.print(
        EVIDENCE.format(
            right=leaf,
            random=control,
            scored=scored,
            smallest=min(sizes),
            largest=max(sizes),
            noise=noise,
        )
    )


def _detection(rows: Sequence[Detection], scored: int) -> Table:
    table = _table(
        f"Detection against the planted sentences, {scored} prompts",
        ("score", "precision", "clauses", "tokens", "top one", "AUC", "AUC numbers"),
    )
    for row in rows:
        table.add_row(
            row.method,
            *map(_percent, (row.precision, row.clause_recall, row.token_recall, row.top_1)),
            f"{row.auc:.3f}",
            f"{row.auc_numbers:.3f}",
        )
    table.caption = (
        "LeaF flags tokens by its threshold, the others as many in each prompt. Precision: flagged "
        "tokens that are planted. Clauses, tokens: the share of planted ones that is hit. Top one: "
        "prompts whose most suspicious token is planted. AUC: over all tokens, and over numbers."
    )
    return table


def _pruning(rows: Sequence[Pruning]) -> Table:
    table = _table(
        "Pruning alone, on prompts that the student had failed",
        ("what is cut", "cuts", "student right", "passed validation", "prompts helped"),
    )
    for row in rows:
        table.add_row(
            row.method,
            str(row.cuts),
            _part(row.cuts_right, row.cuts),
            _part(row.cuts_kept, row.cuts),
            _part(row.prompts_right, row.prompts),
        )
    return table


def _accuracy(accuracy: Mapping[str, Mapping[str, float]], held_out: Mapping[str, int]) -> Table:
    columns = [f"{name}\n({count})" for name, count in held_out.items()]
    table = _table("Held-out accuracy of the student after", ("", *columns))
    for name, figures in accuracy.items():
        table.add_row(name, *(_percent(figures[held]) for held in held_out))
    return table


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", caption_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left")
    return table


def _percent(share: float) -> str:
    return "-" if math.isnan(share) else f"{share:.1%}"


def _part(count: int, total: int) -> str:
    return f"{count} ({_percent(count / total if total else float('nan'))})"
