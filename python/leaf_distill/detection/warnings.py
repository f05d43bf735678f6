"""Sentences that a user should read before using a result, or in place of one."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

from leaf_distill.data.example import ROLES, Example, Role, candidates_of, views_of
from leaf_distill.data.template import template_differences
from leaf_distill.detection.answers import PromptedModel, gold_warning
from leaf_distill.detection.config import DetectConfig
from leaf_distill.detection.funnel import UNUSED, first_of_each
from leaf_distill.detection.verdicts import quote
from leaf_distill.grading import Grader

MANY_UNKNOWN = 0.25
"""A share of unknown tokens from which a prompt cannot be what its writer meant."""

LABELS_GRADED = 100
"""Rows at most whose own completion is graded: enough to see a wrong column, in a second or two."""

LABEL_SECONDS = 1.0
"""Processor seconds for one of them; a completion that takes longer does not count as wrong."""


def nothing_usable(examples: Sequence[Example]) -> ValueError:
    """Return the error of a dataset of which every row has left."""
    gone = [example for example in examples if example.outcome]
    counts = Counter(example.outcome.reason for example in gone if example.outcome)
    reasons = ", ".join(f"{count} {reason}" for reason, count in counts.most_common())
    return ValueError(
        f"dataset: must have a usable row, got {len(gone)} rows that are not ({reasons}); "
        f"{first_of_each(gone)}"
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
        f"No row is left to search: {'; '.join(given)}.{_first(examples)} outcomes.parquet quotes "
        f"them; {_see(config)}. If your rows have no answer that can be graded, give --select all "
        "--validate none."
    ]


def _first(examples: Sequence[Example]) -> str:
    """Quote the first row that left over an answer: of the teacher where none of its is right."""
    gone = [one for one in examples if one.outcome and one.outcome.stage in ("predict", "mark")]
    answered = [one for one in gone if one.answers]
    failed = [one for one in answered if "teacher" in one.answers]
    if not any(one.answers["teacher"].verdict == "right" for one in failed):
        answered = failed or answered
    for one in answered:
        if one.outcome and not one.outcome.reason.endswith("_right"):
            return f" In row {one.row_id} {one.outcome.detail}."
    return ""


def _see(config: DetectConfig) -> str:
    return f"see --grade (now {config.grade}), --max_new_tokens and --chat_template"


def nothing_kept(examples: Sequence[Example], config: DetectConfig) -> list[str]:
    """Say why no cut was kept where no answer was graded before the cuts were made.

    Where rows were marked, the teacher's answers have passed the grader already.
    """
    if config.select != "all" or any(one.outcome is None for one in candidates_of(examples)):
        return []
    gone = [
        one.outcome
        for one in candidates_of(examples)
        if one.outcome and one.outcome.stage == "validate" and one.answers
    ]
    if not gone:
        return []
    counts = Counter(outcome.reason.replace("_", " ") for outcome in gone)
    listed = ", ".join(f"{count} {reason}" for reason, count in counts.most_common())
    return [
        f"No cut was kept: {listed}. The first: {gone[0].detail}. candidates.parquet quotes them; "
        f"{_see(config)}."
    ]


def wrong_labels(rows: Sequence[Example], config: DetectConfig) -> list[str]:
    """Return a sentence where most completions are wrong by their own rows' answers.

    Then `grade` or a column is not what was meant. No model is asked: a sample of the rows is
    graded. Completions that the teacher gives, programs, and rows without an answer are not.
    """
    if config.grade == "code" or config.completion_source == "teacher":
        return []
    rows = [one for one in rows if one.answer and one.completion.strip()]
    rows = rows[:: max(1, -(-len(rows) // LABELS_GRADED))]
    pairs = [(one.gold, one.completion) for one in rows]
    with Grader(config.grade, timeout_s=LABEL_SECONDS) as grader:
        right = sum(grader.grade_quickly(*pair) == "right" for pair in pairs)
        if 2 * right >= len(pairs):  # as in most datasets: math-verify is not even started
            return []
        verdicts = grader.grade(pairs)
    wrong = [at for at, one in enumerate(verdicts) if one in ("wrong", "no_answer")]
    if 2 * len(wrong) <= len(pairs):
        return []
    gold, completion = pairs[wrong[0]]
    return [
        f"{len(wrong)} of {len(pairs)} completions are wrong by their own answer, and right "
        f"answers of the models may count as wrong too; that of row {rows[wrong[0]].row_id} "
        f"{quote(completion, gold)}: see --grade (now {config.grade}) and --columns."
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
    """Return what a user should know of models, tokens and golds, before a model is asked."""
    found = template_differences(*(pair[role].renderer.template for role in reversed(ROLES)))
    usable = [one for one in examples if not one.outcome or one.outcome.stage not in UNUSED]
    found += unknown_tokens(usable, pair)
    if config.select != "all" or config.validate != "none":
        found += gold_warning([one.gold for one in usable], config)
        found += wrong_labels(usable, config)
    same = pair["student"].model.fingerprint == pair["teacher"].model.fingerprint
    if same and not config.teacher_quantization:
        found.append(
            "The student and the teacher have the same weights: every gap between them is 0. Give "
            "another --teacher."
        )
    return found


def warnings_of(
    examples: Sequence[Example], config: DetectConfig, pair: Mapping[Role, PromptedModel]
) -> list[str]:
    """Return what a user should know of marking and losses, after a run."""
    found = nothing_scored(examples, config) + nothing_kept(examples, config)
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
