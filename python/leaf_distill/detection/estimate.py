"""Estimates memory and time of a run of stage 1, before any weights are loaded."""

from __future__ import annotations

import logging
import resource
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from leaf_distill.data.example import ROLES, Example, Rendering, Role
from leaf_distill.detection.answers import (
    PromptedModel,
    given_answer,
    plan_answers,
    prompt_ids,
)
from leaf_distill.detection.cache import FILE, RowCache, default_cache_directory
from leaf_distill.detection.config import DetectConfig
from leaf_distill.detection.funnel import UNUSED, show_left, show_notes
from leaf_distill.detection.room import little_room
from leaf_distill.detection.scores import plan_passes
from leaf_distill.io import user_directory
from leaf_distill.models.estimate import (
    PassCost,
    answer_bytes,
    answer_seconds,
    measure_speed,
    rough_cost,
    saliency_cost,
)
from leaf_distill.models.generation import room_for_answer
from leaf_distill.terminal import say
from leaf_distill.wording import counted

logger = logging.getLogger(__name__)


def estimate(
    pair: Mapping[Role, PromptedModel],
    rows: Sequence[Example],
    views: Sequence[Example],
    config: DetectConfig,
) -> dict[str, Any]:
    """Return the memory in bytes and the seconds of a run.

    Args:
        pair: the models, whose weights are not loaded.
        rows: rendered rows, which are asked unless `select` is "all".
        views: what gets a saliency, at most: which rows are marked is not known yet.
        config: the settings.

    Returns:
        For each model `weights`, `memory` at its largest, `passes` and the `scores` that the cache
        lacks, likewise `answer_passes` and `answers`, and `little_room`, a sentence (or None) about
        prompts with little room for an answer; `memory` of the process, in which one model is at a
        time; the seconds of `saliency`; and those of answers as long as the completions (`answers`)
        and of `max_new_tokens` (`answers_at_most`). What a server answers, and answers to cut
        prompts, are not counted; nor are the passes of other scores than `gap`
        and of the strategy "search".
    """
    models: dict[str, dict[str, Any]] = {}
    seconds = {"saliency": 0.0, "answers": 0.0, "answers_at_most": 0.0}
    for role in ROLES:
        models[role] = _of_model(pair[role], rows, views, config, seconds)
    on_host = {role: pair[role].model.device.type == "cpu" for role in ROLES}
    memory = {
        place: max((models[role]["memory"] for role in ROLES if on_host[role] == host), default=0)
        for place, host in (("memory", True), ("gpu_memory", False))
    }
    memory["memory"] += _resident()
    return {
        "models": models,
        **memory,
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
    }


def _of_model(
    one: PromptedModel,
    rows: Sequence[Example],
    views: Sequence[Example],
    config: DetectConfig,
    seconds: dict[str, float],
) -> dict[str, Any]:
    """Return the entry of one model, and add its seconds."""
    renderings = [view.renderings[one.role] for view in views]
    plan, keys = plan_passes("saliency", one, renderings, config)
    known = _known(config, keys)
    lacking = [[at for at in batch if keys[at] not in known] for batch in plan]
    lacking = [batch for batch in lacking if batch]
    unlabelled = config.completion_source == "teacher"
    guess = config.max_new_tokens // 2 if unlabelled else 0
    # No row may have a view; the weights count all the same.
    shapes = (_shape(renderings, batch, guess) for batch in plan)
    area, width, labels = max(shapes, default=(1, 1, 1))
    cost = _cost(one, area // width, width, labels, config.trust_remote_code)
    asked = _answers(one, rows, config)
    speed = measure_speed(
        one.model.config,
        one.model.dtype,
        one.model.device,
        tokens=min(area, 2048),
        rows=max((len(batch) for _, batch in asked), default=1),
    )
    tokens = sum(_shape(renderings, batch, guess)[0] for batch in lacking)
    seconds["saliency"] += cost.flops * tokens / area / speed.flops
    largest = 0
    for room, batch in asked:
        size, prompt, longest = len(batch), *map(max, zip(*batch, strict=True))
        largest = max(largest, size * (prompt + room))
        for name, steps in (("answers", longest), ("answers_at_most", room)):
            seconds[name] += answer_seconds(
                *(one.model.config, one.model.dtype, cost.weights, size, prompt),
                min(steps or room, room),
                speed,
            )
    answering = answer_bytes(one.model.config, one.model.dtype, largest)
    peak = max(cost.kept if lacking else 0, answering)
    prompts = [prompt for _, batch in asked for prompt, _ in batch]
    return {
        "weights": cost.weights,
        "memory": cost.weights + peak if lacking or asked else 0,
        "passes": len(lacking),
        "scores": sum(map(len, lacking)),
        "answer_passes": len(asked),
        "answers": len(prompts),
        "little_room": little_room(prompts, one.model.max_positions, config.max_new_tokens),
    }


def _answers(
    one: PromptedModel, rows: Sequence[Example], config: DetectConfig
) -> list[tuple[int, list[tuple[int, int]]]]:
    """Return the batches of missing answers: the most new tokens, and of each row its tokens.

    These are those of the prompt and of the completion. A batch is answered in parts whose prompts
    leave the same room.
    """
    needed = config.select != "all" or (
        one.role == "teacher" and config.completion_source == "teacher"
    )
    if not needed or one.server is not None:
        return []
    asked = [row for row in rows if given_answer(one.role, row) is None]
    prompts = [prompt_ids(row, one.role) for row in asked]
    plan, keys = plan_answers(one, prompts, config)
    known = _known(config, keys)
    parts: list[tuple[int, list[tuple[int, int]]]] = []
    for batch in plan:
        by_room: dict[int, list[tuple[int, int]]] = defaultdict(list)
        for at in batch:
            if keys[at] not in known:
                length = len(prompts[at])
                room = room_for_answer(length, one.model.max_positions, config.max_new_tokens)
                labels = int(asked[at].renderings[one.role].loss_mask.sum())
                by_room[room].append((length, labels))
        parts += by_room.items()
    return parts


def _shape(
    renderings: Sequence[Rendering], batch: Sequence[int], more: int
) -> tuple[int, int, int]:
    """Return the tokens of a batch with its padding, its width and its labels."""
    width = max(len(renderings[at]) for at in batch) + more
    labels = sum(int(renderings[at].loss_mask.sum()) + more for at in batch)
    return width * len(batch), width, labels


def _cost(one: PromptedModel, rows: int, tokens: int, labels: int, trusted: bool) -> PassCost:
    config, dtype = one.model.config, one.model.dtype
    options: dict[str, Any] = {
        "device": one.model.device.type,
        "quantization": one.model.quantization,
    }
    try:
        return saliency_cost(
            *(config, dtype, rows, tokens, labels),
            trust_remote_code=trusted,
            **options,
        )
    except Exception as error:  # an architecture raises whatever its forward raises
        logger.info("%s is estimated from its sizes: %s", one.model.name, error)
        return rough_cost(config, dtype, rows, tokens, labels, **options)


def _known(config: DetectConfig, keys: Sequence[str]) -> set[str]:
    """Return the keys that the row cache has; a cache that is not there is not made."""
    folder = user_directory(config.cache_dir or default_cache_directory())
    if not Path(folder, FILE).is_file():
        return set()
    with RowCache(folder) as cache:
        return set(cache.get(keys))


def _resident() -> int:
    """Return the bytes that this process holds now: Python and its libraries."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        line = next(one for one in lines if one.startswith("VmRSS:"))
        return int(line.split()[1]) * 1024
    except (OSError, StopIteration):  # macOS counts the peak in bytes, others in KiB
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak * (1 if sys.platform == "darwin" else 1024)


def show_estimate(
    found: Mapping[str, Any], examples: Sequence[Example], warnings: Sequence[str]
) -> None:
    """Print an estimate, the rows that will leave and why, and what else is known before."""
    left = [one.outcome for one in examples if one.outcome and one.outcome.stage in UNUSED]
    usable = f"{len(examples) - len(left)} of {len(examples)} rows are usable"
    say(f"Estimate of the run, which is not started: {usable}")
    show_left(examples)
    for role, one in found["models"].items():
        say(
            f"{role}: weights {one['weights'] / 1e9:.2f} GB, at its largest "
            f"{one['memory'] / 1e9:.2f} GB; "
            f"{counted(one['scores'], 'saliency', 'saliencies')} in "
            f"{counted(one['passes'], 'pass', 'passes')} and {counted(one['answers'], 'answer')} "
            f"in {counted(one['answer_passes'], 'batch', 'batches')} that the cache lacks"
        )
    gpu = f", and {found['gpu_memory'] / 1e9:.2f} GB of the GPU's" if found["gpu_memory"] else ""
    say(f"memory: {found['memory'] / 1e9:.2f} GB in all, one model at a time{gpu}")
    times = found["seconds"]
    say(f"saliency: {times['saliency']:.0f} s, if every row is marked")
    if times["answers_at_most"]:
        say(
            f"answers: {times['answers']:.0f} s if they are as long as the completions, at most "
            f"{times['answers_at_most']:.0f} s"
        )
    say(
        "not counted: answers to cut prompts, answers of servers, passes of other scores than gap "
        "and of the strategy search"
    )
    roles: dict[str, list[str]] = {}
    for role, one in found["models"].items():
        if one["little_room"]:
            roles.setdefault(one["little_room"], []).append(role)
    show_notes([*warnings, *(f"{' and '.join(who)}: {said}" for said, who in roles.items())])
