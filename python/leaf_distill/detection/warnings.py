"""Sentences that a user should read before using a result, or in place of one."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

from leaf_distill.data.example import ROLES, Example, Role, views_of
from leaf_distill.data.template import template_differences
from leaf_distill.detection.answers import PromptedModel, gold_warning
from leaf_distill.detection.config import DetectConfig


def nothing_usable(examples: Sequence[Example]) -> ValueError:
    """Return the error of a dataset of which every row has left."""
    gone = [example for example in examples if example.outcome]
    counts = Counter(example.outcome.reason for example in gone if example.outcome)
    reasons = ", ".join(f"{count} {reason}" for reason, count in counts.most_common())
    first = gone[0]
    why = f"row {first.row_id}: {first.outcome.detail}" if first.outcome else ""
    return ValueError(
        f"dataset: must have a usable row, got {len(gone)} rows that are not ({reasons}); {why}"
    )


def nothing_marked(examples: Sequence[Example], config: DetectConfig) -> list[str]:
    """Say what the models' answers were graded where no row is left to search."""
    if config.select == "all" or any(one.nll for one in views_of(examples)):
        return []
    asked = [one.answers["student"].verdict for one in examples if "student" in one.answers]
    if asked and set(asked) == {"right"}:
        return [f"No row is left to search: the student answers all {len(asked)} correctly."]
    given = []
    for role in ROLES:
        verdicts = [one.answers[role].verdict for one in examples if role in one.answers]
        counts = Counter(str(verdict).replace("_", " ") for verdict in verdicts)
        if counts:
            listed = ", ".join(f"{count} {verdict}" for verdict, count in counts.most_common())
            given.append(f"the {role}'s {len(verdicts)} answers are {listed}")
    return [
        f"No row is left to search: {'; '.join(given)}. outcomes.parquet quotes them; see "
        f"--grade (now {config.grade}), --max_new_tokens and --chat_template."
    ]


def warnings_of(
    examples: Sequence[Example], config: DetectConfig, pair: Mapping[Role, PromptedModel]
) -> list[str]:
    """Return what a user should know of templates, golds, marking and losses."""
    found = template_differences(*(pair[role].renderer.template for role in reversed(ROLES)))
    if config.select != "all" or config.validate != "none":
        found += gold_warning([one.gold for one in examples if one.answers], config)
    found += nothing_marked(examples, config)
    for role, one in pair.items():
        losses = [view.nll[role] for view in views_of(examples) if role in view.nll]
        vocabulary = len(one.model.tokenizer)
        # In a toy's vocabulary, a confident wrong answer costs more than a uniform guess.
        uniform = math.log(vocabulary) if vocabulary >= 1000 else math.inf
        if losses and (mean := sum(losses) / len(losses)) > uniform:
            found.append(
                f"The {role}'s mean loss on the completions is {mean:.1f} nats a token, above "
                f"the {uniform:.1f} of a uniform guess: check the model and its chat template."
            )
    return found
