"""The demo's tables, and what their numbers are and are not evidence of."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table

from leaf_distill.demo.measure import Arm, Detection, Pruning

EVIDENCE = (
    "In short: without any training, {right:.0%} of LeaF's cuts make the student right, and "
    "{random:.0%} of random ones; whether training on them beats plain distillation is more than "
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


def tiny(
    detection: Sequence[Detection],
    pruning: Sequence[Pruning],
    arms: Sequence[Arm],
    accuracy: Mapping[str, Mapping[str, float]],
    held_out: Mapping[str, int],
    scored: int,
) -> None:
    """Print the four tables of the embedded demo."""
    console = Console()
    for table in (
        _detection(detection, scored),
        _pruning(pruning),
        _arms(arms),
        _accuracy(accuracy, held_out),
    ):
        console.print()
        console.print(table)
    sizes = held_out.values()
    noise = 2 * math.sqrt(2 * 0.25 / min(sizes))
    console.print()
    leaf, control = (row.cuts_right / row.cuts if row.cuts else math.nan for row in pruning)
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


def smollm2(
    answers: Mapping[str, Mapping[str, int]],
    max_new_tokens: int,
    kl: Mapping[str, Sequence[float]],
    memory: int,
) -> None:
    """Print what the demo with real models measured."""
    console = Console()
    table = _table("KL(teacher, student) of the distillation", ("rows", "first", "last"))
    table.add_row("of each step", *(f"{kl['steps'][at]:.3f}" for at in (0, -1)))
    table.add_row("held out", *(f"{kl['held_out'][at]:.3f}" for at in (0, -1)))
    console.print()
    console.print(table)
    given = "; ".join(
        f"{name} " + ", ".join(f"{count} {verdict}" for verdict, count in counts.items())
        for name, counts in answers.items()
    ).replace("_", " ")
    console.print(
        f"Answers of up to {max_new_tokens} tokens: {given}. Models this weak can judge neither "
        "rows nor cuts, hence no marking and no validation here: the saliencies and the cuts are "
        "real, whether a cut is a good one is not known. The steps of the first line met different "
        "rows; the held-out rows are the same before and after, and have no counterfactuals."
    )
    console.print(f"Peak memory: {memory / 1e9:.2f} GB")


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


def _arms(arms: Sequence[Arm]) -> Table:
    table = _table(
        "Distillation at equal compute",
        ("arm", "originals", "cut", "steps", "a step", "tokens", "KL"),
    )
    for arm in arms:
        table.add_row(
            arm.name,
            *map(str, (arm.originals, arm.counterfactuals, arm.steps, arm.originals_a_step)),
            f"{arm.tokens:,}",
            f"{arm.kl_first:.3f} > {arm.kl_last:.3f}",
        )
    table.caption = (
        "Cut: counterfactuals; a step: originals in one. Every arm makes as many steps, and reads "
        "as many rows in each as whole originals allow; tokens: all that the student read. "
        "KL(teacher, student): first step > mean of the last quarter."
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
