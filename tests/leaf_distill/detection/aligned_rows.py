"""Rows of the tiny pair, rendered, with both models' gradient norms, and aligned."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import detect_pair

from leaf_distill.data.dataset import load_examples
from leaf_distill.data.example import ROLES, Example, Role
from leaf_distill.detection.answers import PromptedModel, prompted_model
from leaf_distill.detection.cache import RowCache
from leaf_distill.detection.config import DetectConfig
from leaf_distill.detection.scores import score_saliency
from leaf_distill.detection.spans import align
from leaf_distill.models.loading import LazyModel

MISLED = [row for row in detect_pair.make_rows(40) if detect_pair.misled(row)]


def config_of(**changes: Any) -> DetectConfig:
    return DetectConfig(
        **{"grade": "exact", "max_new_tokens": 4, "max_batch_tokens": 150, **changes}
    )


@contextmanager
def aligned(
    pair: dict[str, str], root: Path, rows: list[dict[str, str]] = MISLED
) -> Iterator[tuple[dict[Role, PromptedModel], list[Example], RowCache]]:
    """The two models, aligned rows, and an open cache."""
    config = config_of()
    models = {
        role: prompted_model(role, LazyModel(pair[role], device="cpu", argument=role), config)
        for role in ROLES
    }
    examples = load_examples(rows)
    with RowCache(root) as cache:
        for role, model in models.items():
            for example in examples:
                example.renderings[role] = model.renderer.render(example)
            score_saliency(model, examples, config, cache)
        align(examples)
        yield models, examples, cache


def named_tokens(example: Example) -> list[int]:
    """The tokens of the word that misleads the student."""
    assert example.offsets is not None
    spans = [example.text[start:stop].strip() for start, stop in example.offsets.tolist()]
    return [at for at, word in enumerate(spans) if word in detect_pair.NAMES]
