"""The table of `leaf compare`: arms, their trainings at equal compute, and their accuracies."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Group

from leaf_distill.evaluation.tables import printed_table
from leaf_distill.training.model_card import markdown_table
from leaf_distill.wording import counted


@dataclass(frozen=True)
class Training:
    """One distillation: its rows and its cost.

    tokens: all that the student read, without padding. kl_first, kl_last: the first and the last
    logged KL of the originals, nats a label token; they are means over different rows. None where
    no teacher was asked.
    """

    model: Path
    steps: int
    originals: int
    counterfactuals: int
    originals_a_step: int
    tokens: int
    kl_first: float | None
    kl_last: float | None


@dataclass(frozen=True)
class Arm:
    """One line of the comparison.

    says: what the arm is. settings: the arm's own, of detection (None: it has the originals alone)
    and of training. interval: Wilson's 95 % interval of the accuracy. difference: the accuracy less
    that of the reference, on the same problems, with the 95 % interval of a paired bootstrap over
    problems.
    """

    name: str
    says: str
    settings: dict[str, Any]
    training: Training | None
    accuracy: float
    interval: tuple[float, float]
    difference: tuple[float, float, float] | None


@dataclass(frozen=True)
class CompareResult:
    """The arms, the reference of their differences, and the written table.

    unreadable: rows of the evaluation that could not be used, and are not among the problems.
    """

    arms: tuple[Arm, ...]
    reference: str
    problems: int
    table: Path
    unreadable: int = 0

    @property
    def notes(self) -> list[str]:
        """A sentence about rows that could not be used, and each arm that kept nothing."""
        left_out = f"{counted(self.unreadable, 'row')} of the evaluation could not be used."
        return [left_out] * bool(self.unreadable) + [
            f"{arm.name} has no counterfactuals: it was trained on the originals alone, as kd is."
            for arm in self.arms
            if arm.training and arm.settings["detection"] is not None
            if not arm.training.counterfactuals
        ]


Lines = list[tuple[str, ...]]

COMPUTE = (
    "All arms make as many steps, and read as many rows in each as whole originals allow; their "
    "tokens, and the passes of the teacher, differ. Cut: counterfactuals, also those with an "
    "insertion; a step: originals in one; tokens: all that the student read, without padding. "
    "KL(teacher, student) of the originals, a token that counts: the first and the last logged "
    "mean, over different rows."
)
CHANCE = (
    "Accuracy with Wilson's 95 % interval. Differences in points, with the 95 % interval of a "
    "paired bootstrap over the problems, which says little where fewer than ten changed. Chance in "
    "training is in no interval: there is one seed."
)


def _training_lines(result: CompareResult) -> Lines:
    lines: Lines = [("arm", "originals", "cut", "steps", "a step", "tokens", "KL")]
    for arm in result.arms:
        if (done := arm.training) is not None:
            counts = done.originals, done.counterfactuals, done.steps, done.originals_a_step
            kl = "" if done.kl_first is None else f"{done.kl_first:.3f} to {done.kl_last:.3f}"
            lines.append((arm.name, *map(str, counts), f"{done.tokens:,}", kl))
    return lines


def _accuracy_lines(result: CompareResult) -> Lines:
    lines: Lines = [("arm", "accuracy", "95 %", f"less {result.reference}", "95 %")]
    for arm in result.arms:
        low, high = (f"{100 * value:.1f}" for value in arm.interval)
        difference, between = "", ""
        if arm.difference is not None:
            difference, least, most = (f"{100 * value:+.1f}" for value in arm.difference)
            between = f"{least} to {most}"
        lines.append((arm.name, f"{arm.accuracy:.1%}", f"{low} to {high}", difference, between))
    return lines


def training_table(result: CompareResult) -> Group:
    """Return the printed table of the arms' distillations."""
    title = "Distillation at equal compute"
    return printed_table(title, _training_lines(result), caption=COMPUTE)


def accuracy_table(result: CompareResult) -> Group:
    """Return the printed table of the arms' accuracies."""
    title = f"Accuracy on {result.problems} problems"
    return printed_table(title, _accuracy_lines(result), caption=CHANCE)


def markdown(result: CompareResult) -> str:
    """Return the tables, and what each arm is, as Markdown."""
    accuracies, trainings = _accuracy_lines(result), _training_lines(result)
    parts = ("# Arms at equal compute", markdown_table(accuracies), f"{result.problems} problems.")
    arms = "\n".join(map(_listed, result.arms))
    return (
        "\n\n".join(
            [*parts, CHANCE, markdown_table(trainings), COMPUTE, *result.notes, "## The arms", arms]
        )
        + "\n"
    )


def _listed(arm: Arm) -> str:
    """Return an arm's line: what it is, and its own settings."""
    own = {**(arm.settings.get("detection") or {}), **arm.settings.get("training", {})}
    listed = ", ".join(f"{name} {value}" for name, value in own.items())
    return f"- `{arm.name}`: {arm.says}{f' ({listed})' if listed else ''}."
