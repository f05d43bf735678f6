"""Saliency and perplexity of prompt tokens, kept in the row cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np

from leaf_distill.config import AnswerOptions
from leaf_distill.data.collator import plan_batches
from leaf_distill.data.example import Example, Floats, Rendering
from leaf_distill.detection.answers import PromptedModel
from leaf_distill.detection.cache import RowCache, compute_missing
from leaf_distill.io import digest
from leaf_distill.models.memory import EXACT
from leaf_distill.models.saliency import saliency, token_nll

VERSION: Final = 2
"""Raised with a change of the passes, so that no value of an older one is used."""


def score_saliency(
    scored: PromptedModel, examples: Sequence[Example], config: AnswerOptions, cache: RowCache
) -> None:
    """Set `norms[role]`, on the domain, and `nll[role]` of each example.

    A loss or norm that is not finite stays so; `find_spans` then takes the row out.
    """
    renderings = [example.renderings[scored.role] for example in examples]
    values = _passes("saliency", scored, renderings, config, cache)
    for example, rendering, value in zip(examples, renderings, values, strict=True):
        example.nll[scored.role] = float(value[0])
        example.norms[scored.role] = value[1:][rendering.domain]


def score_perplexity(
    scored: PromptedModel, examples: Sequence[Example], config: AnswerOptions, cache: RowCache
) -> list[Floats]:
    """Return the negative log-likelihood (nats) of each domain token, float32 [d] a row."""
    renderings = [_prompt_only(example.renderings[scored.role]) for example in examples]
    values = _passes("perplexity", scored, renderings, config, cache)
    return [value[one.domain] for one, value in zip(renderings, values, strict=True)]


def _prompt_only(rendering: Rendering) -> Rendering:
    inside = ~rendering.loss_mask
    return Rendering(
        rendering.input_ids[inside],
        rendering.loss_mask[inside],
        rendering.offsets[inside],
        rendering.prunable[inside],
    )


def _passes(
    kind: str,
    scored: PromptedModel,
    renderings: Sequence[Rendering],
    config: AnswerOptions,
    cache: RowCache,
) -> list[Floats]:
    """Return the float32 values of each rendering, from the cache or a pass of the model."""
    plan, keys = plan_passes(kind, scored, renderings, config)
    exact = scored.model.dtype in EXACT

    def compute(batch: list[int]) -> list[bytes]:
        part, model = [renderings[at] for at in batch], scored.model.load()
        if kind == "perplexity":
            rows = token_nll(model, part)
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
    if scored.model.dtype not in EXACT:
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
