"""How much of the loss a stored top k misses, measured on a sample of rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from leaf_distill.config import LARGEST
from leaf_distill.data.collator import pad
from leaf_distill.data.example import Example
from leaf_distill.models.lm_head import logit_rows
from leaf_distill.models.loading import load_model
from leaf_distill.training.cache_columns import rendering_key
from leaf_distill.training.config import CacheConfig
from leaf_distill.training.teacher import Hidden, LiveTeacher, signal_kl
from leaf_distill.training.teacher_cache import StoredTeacher

SAMPLE_TOKENS = 2048
ROWS = 4  # that are read at a time


def load_student(config: CacheConfig, device: torch.device) -> Any:
    """Load the student in float32, as a training does."""
    return load_model(
        config.student,
        dtype="float32",
        device=str(device),
        trust_remote_code=config.trust_remote_code,
    )


def shared_vocabulary(teacher: Any, student: Any) -> int:
    """Return how many tokens both models make logits for."""
    return min(logit_rows(model) or LARGEST for model in (teacher, student))


def difference(
    stored: StoredTeacher, teacher: LiveTeacher, student: Any, examples: Sequence[Example]
) -> Mapping[str, float]:
    """Compare the KL from a stored top k with that over the whole vocabulary.

    Args:
        stored, teacher: the same teacher twice, from the cache and live.
        student: on the device of the teacher's hidden states.
        examples: rendered rows, of which about SAMPLE_TOKENS label tokens are taken.

    Returns:
        `label_tokens` of the sample, and means over them in nats: the KL `whole` and `stored`.
    """
    ours = LiveTeacher(student.requires_grad_(False), teacher.device)
    temperature = stored.cache.manifest["temperature"]
    whole: list[torch.Tensor] = []
    kept: list[torch.Tensor] = []
    rows_of = sorted(examples, key=lambda one: rendering_key(one.renderings["teacher"]))
    for begin in range(0, len(rows_of), ROWS):
        some = rows_of[begin : begin + ROWS]
        theirs, own = (
            pad([one.renderings[role] for one in some]) for role in ("teacher", "student")
        )
        states = Hidden(ours.hidden(*own.values()), ours.head)
        weight = torch.ones(len(states.states), device=teacher.device)
        batch = {f"teacher_{name}": x for name, x in theirs.items()}
        for source, found in ((teacher, whole), (stored, kept)):
            _, rows = signal_kl(states, source(batch), weight, temperature=temperature)
            found.append(rows.kl.double())
        if sum(map(len, kept)) >= SAMPLE_TOKENS:
            break
    means = {"whole": float(torch.cat(whole).mean()), "stored": float(torch.cat(kept).mean())}
    return {"label_tokens": sum(map(len, kept)), **means}
