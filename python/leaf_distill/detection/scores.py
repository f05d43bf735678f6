"""Measures rows and changed prompts by passes of a model, and keeps the values in the row cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Literal

import numpy as np

from leaf_distill.config import AnswerOptions
from leaf_distill.data.collator import plan_batches
from leaf_distill.data.example import Example, Floats, Ids, Rendering, UnusableRow
from leaf_distill.detection.answers import PromptedModel
from leaf_distill.detection.cache import RowCache, compute_missing
from leaf_distill.io import digest
from leaf_distill.models.intervention import answer_kl, answer_nll
from leaf_distill.models.saliency import completion_nll, saliency, token_nll

Measure = Literal["kl", "nll"]
MEASURES: Final = {"kl": ("intervention", answer_kl), "nll": ("trial", answer_nll)}
"""Measures of a changed prompt: the name in the row cache, and the function."""

VERSION: Final = 2
"""Raised with a change of the passes, so that no value of an older one is used."""


def score_saliency(
    scored: PromptedModel, examples: Sequence[Example], config: AnswerOptions, cache: RowCache
) -> None:
    """Set `norms[role]`, on the domain, and `nll[role]` of each example.

    A loss or norm that is not finite stays so; `align` then takes the row out.
    """
    renderings = [example.renderings[scored.role] for example in examples]
    values = _passes("saliency", scored, renderings, config, cache)
    for example, rendering, value in zip(examples, renderings, values, strict=True):
        example.nll[scored.role] = float(value[0])
        example.norms[scored.role] = value[1:][rendering.domain]


def score_perplexity(
    scored: PromptedModel, examples: Sequence[Example], config: AnswerOptions, cache: RowCache
) -> list[Floats]:
    """Return the negative log-likelihood (nats) of each domain token, float32 [d] a row.

    The values of either model are kept for all uses of them: the control "perplexity" and the score
    "lens" share the student's.
    """
    wholes = [example.renderings[scored.role] for example in examples]
    renderings = [whole[~whole.loss_mask] for whole in wholes]
    values = _passes("perplexity", scored, renderings, config, cache)
    return [value[one.domain] for one, value in zip(renderings, values, strict=True)]


def score_completions(
    scored: PromptedModel, renderings: Sequence[Rendering], config: AnswerOptions, cache: RowCache
) -> list[float]:
    """Return the mean negative log-likelihood (nats a label) of each rendering's completion."""
    return [float(value[0]) for value in _passes("nll", scored, renderings, config, cache)]


def score_changes(
    measure: Measure,
    scored: PromptedModel,
    examples: Sequence[Example],
    config: AnswerOptions,
    cache: RowCache,
    proposals: Sequence[Sequence[Example]],
) -> list[Floats]:
    """Return what each change of a row's prompt does to the model's answer.

    Args:
        measure: "kl", how far the answer moves (`answer_kl`), or "nll", the loss of the completion
            behind the changed prompt (`answer_nll`).
        scored: the model.
        examples: rows with a rendering of prompt and completion.
        config, cache: settings of the batches, and where values are kept.
        proposals: for each row, the row with changed prompts.

    Returns:
        float32 for each row and proposal, in nats a label. NaN for a prompt that cannot be
        rendered, or that is too long for the model with the row's completion.
    """
    originals = [example.renderings[scored.role] for example in examples]
    prompts: list[Ids] = []
    rows: list[int] = []
    places: list[list[int | None]] = []
    for at, (original, changes) in enumerate(zip(originals, proposals, strict=True)):
        places.append([])
        for change in changes:
            prompt = _changed_prompt(scored, change, original)
            places[at].append(None if prompt is None else len(prompts))
            if prompt is not None:
                prompts.append(prompt)
                rows.append(at)
    values = _changes(measure, scored, originals, prompts, rows, config, cache)
    return [
        np.asarray([np.nan if one is None else values[one] for one in place], dtype=np.float32)
        for place in places
    ]


def _changed_prompt(scored: PromptedModel, changed: Example, original: Rendering) -> Ids | None:
    try:
        ids = scored.prompt(changed).input_ids
    except UnusableRow:
        return None
    limit, labels = scored.model.max_positions, int(original.loss_mask.sum())
    return ids if len(ids) and (limit is None or len(ids) + labels <= limit) else None


def _changes(
    measure: Measure,
    scored: PromptedModel,
    originals: Sequence[Rendering],
    prompts: Sequence[Ids],
    rows: Sequence[int],
    config: AnswerOptions,
    cache: RowCache,
) -> list[float]:
    """Return the value of each changed prompt; `rows` has the position of its original."""
    batches: dict[int, list[int]] = {}
    for at, row in enumerate(rows):
        batches.setdefault(row, []).append(at)
    plan = [batches[row] for row in sorted(batches, key=lambda row: -len(originals[row]))]
    max_tokens, exact = scored.batch_tokens(config), scored.model.exact
    kind, compute_values = MEASURES[measure]
    keys = [""] * len(prompts)
    for row, batch in batches.items():
        one, shape = originals[row], ""
        if not exact:  # the row's other prompts decide the batches
            others = [prompts[at].tobytes() for at in batch]
            shape = digest([max_tokens, scored.model.device.type, *others])
        head = [kind, VERSION, *scored.identity, one.input_ids.tobytes()]
        for at in batch:
            keys[at] = digest([*head, one.loss_mask.tobytes(), prompts[at].tobytes(), shape])

    def compute(batch: list[int]) -> list[bytes]:
        changed = [prompts[at] for at in batch]
        model = scored.model.load()
        found = compute_values(model, originals[rows[batch[0]]], changed, max_tokens=max_tokens)
        return [value.astype("<f4").tobytes() for value in found]

    values = compute_missing(
        cache,
        keys,
        plan,
        compute,
        description=f"{scored.role} {kind}s",
        whole_batches=not exact,
    )
    return [float(np.frombuffer(value, dtype="<f4")[0]) for value in values]


def _passes(
    kind: str,
    scored: PromptedModel,
    renderings: Sequence[Rendering],
    config: AnswerOptions,
    cache: RowCache,
) -> list[Floats]:
    """Return the float32 values of each rendering, from the cache or a pass of the model."""
    plan, keys = plan_passes(kind, scored, renderings, config)
    exact = scored.model.exact

    def compute(batch: list[int]) -> list[bytes]:
        part, model = [renderings[at] for at in batch], scored.model.load()
        if kind == "perplexity":
            rows = token_nll(model, part)
        elif kind == "nll":
            rows = [np.asarray([value]) for value in completion_nll(model, part)]
        else:
            found = saliency(model, part)
            rows = [np.append(np.float32(row.nll), row.norms) for row in found]
        return [row.astype("<f4").tobytes() for row in rows]

    values = compute_missing(
        cache,
        keys,
        plan,
        compute,
        description=f"{scored.role} {kind}",
        whole_batches=not exact,
    )
    return [np.frombuffer(value, dtype="<f4") for value in values]


def plan_passes(
    kind: str, scored: PromptedModel, renderings: Sequence[Rendering], config: AnswerOptions
) -> tuple[list[list[int]], list[str]]:
    """Return the batches of a pass over renderings, and each one's key in the row cache."""
    lengths = [len(rendering) for rendering in renderings]
    plan = plan_batches(lengths, max_tokens=scored.batch_tokens(config))
    shape: dict[int, list[int]] = {}
    if not scored.model.exact:
        # 16-bit kernels of another batch shape or device change norms by up to 2 % of the largest.
        device = 0 if scored.model.device.type == "cpu" else 1
        shape = {at: [len(batch), lengths[batch[0]], device] for batch in plan for at in batch}
    keys = [
        digest(
            [
                kind,
                VERSION,
                *scored.identity,
                rendering.input_ids.tobytes(),
                rendering.loss_mask.tobytes(),
                shape.get(at),
            ]
        )
        for at, rendering in enumerate(renderings)
    ]
    return plan, keys
