"""Sentences that a user should read before using a result, or in place of one."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

from leaf_distill.data.example import ROLES, Example, Role, views_of
from leaf_distill.data.template import template_differences
from leaf_distill.detection.answers import PromptedModel, gold_warning
from leaf_distill.detection.config import DetectConfig
from leaf_distill.detection.funnel import UNUSED

MANY_UNKNOWN = 0.25
"""A share of unknown tokens from which a prompt cannot be what its writer meant."""


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


def nothing_scored(examples: Sequence[Example], config: DetectConfig) -> list[str]:
    """Say why no row is left to search: what answers were graded, or where marked rows left."""
    if any(one.nll for one in views_of(examples)):
        return []
    marked = [one for one in examples if not one.outcome or one.outcome.stage == "detect"]
    if marked:
        return [_marked_and_left(marked, config)]
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


def _marked_and_left(marked: Sequence[Example], config: DetectConfig) -> str:
    """Say why marked rows were not scored."""
    counts = Counter(one.outcome.reason for one in marked if one.outcome)
    listed = ", ".join(f"{n} {reason.replace('_', ' ')}" for reason, n in counts.most_common())
    kind = "usable" if config.select == "all" else "marked"
    sentences = [f"No row is left to search: the {len(marked)} {kind} rows left as {listed}."]
    if "response_not_divided" in counts:
        sentences.append("A response that is not divided has no border between sentences.")
    if "response_student_right" in counts:
        sentences.append(
            "The student goes on rightly from the beginnings it was given; more --segments give "
            "shorter ones."
        )
    if config.level == "response":
        sentences.append("--level instruction searches the prompts.")
    return " ".join(sentences)


def unknown_tokens(examples: Sequence[Example], pair: Mapping[Role, PromptedModel]) -> list[str]:
    """Return a sentence where a tokenizer does not know much of the analyzed prompts."""
    roles: dict[str, list[str]] = {}
    for role, one in pair.items():
        unknown = one.model.tokenizer.unk_token_id
        rendered = [row.renderings[role] for row in examples if role in row.renderings]
        texts = [rendering.input_ids[rendering.domain] for rendering in rendered]
        total = sum(map(len, texts))
        count = sum(int((ids == unknown).sum()) for ids in texts) if unknown is not None else 0
        if total and count >= MANY_UNKNOWN * total:
            roles.setdefault(f"{count / total:.0%}".replace("%", " %"), []).append(f"{role}'s")
    return [
        f"{share} of the prompts' tokens are unknown to the {' and the '.join(names)} tokenizer: "
        "each is read as the same token; choose models that know these words."
        for share, names in roles.items()
    ]


def warnings_before(
    examples: Sequence[Example], config: DetectConfig, pair: Mapping[Role, PromptedModel]
) -> list[str]:
    """Return what a user should know of templates, tokens and golds, before a model is asked."""
    found = template_differences(*(pair[role].renderer.template for role in reversed(ROLES)))
    usable = [one for one in examples if not one.outcome or one.outcome.stage not in UNUSED]
    found += unknown_tokens(usable, pair)
    if config.select != "all" or config.validate != "none":
        found += gold_warning([one.gold for one in usable], config)
    return found


def warnings_of(
    examples: Sequence[Example], config: DetectConfig, pair: Mapping[Role, PromptedModel]
) -> list[str]:
    """Return what a user should know of marking and losses, after a run."""
    found = nothing_scored(examples, config)
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
