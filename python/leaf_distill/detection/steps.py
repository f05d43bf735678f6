"""The steps of stage 1 that need a model or a tokenizer, each one a Stage on disk."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from leaf_distill.config import GradeRule
from leaf_distill.data.dataset import Message, Rejection, Row
from leaf_distill.detection.pair import ROLES, Pair, chunks
from leaf_distill.grading import Grader
from leaf_distill.io import Stage, digest
from leaf_distill.models.generation import generate, plan_batches
from leaf_distill.models.saliency import saliency

LENGTHS = pa.schema(
    [
        ("row_id", pa.int64()),
        *((f"{role}_{part}", pa.int32()) for role in ROLES for part in ("prompt", "whole")),
        ("reason", pa.string()),
        ("detail", pa.string()),
    ]
)
ANSWERS = pa.schema(
    [
        ("id", pa.int64()),
        ("text", pa.string()),
        ("finished", pa.bool_()),
        ("n_tokens", pa.int32()),
        ("invalid", pa.bool_()),
    ]
)
VERDICTS = pa.schema([("id", pa.int64()), ("verdict", pa.string())])
SALIENCY = pa.schema(
    [
        ("row_id", pa.int64()),
        ("nll", pa.float32()),
        ("invalid", pa.bool_()),
        ("norms", pa.list_(pa.float32())),
        ("position", pa.list_(pa.int64())),
        ("start", pa.list_(pa.int64())),
        ("stop", pa.list_(pa.int64())),
        ("prunable", pa.list_(pa.bool_())),
    ]
)


@dataclass(frozen=True)
class Labelled:
    """A row with the completion that is its label, and its length in tokens for each role."""

    row: Row
    completion: str
    whole: Mapping[str, int]


@dataclass(frozen=True)
class Prompt:
    """A conversation to be answered, what counts as right, and its length for each role."""

    id: int
    messages: tuple[Message, ...]
    gold: str
    length: Mapping[str, int]


@dataclass(frozen=True)
class Answered:
    """An answer and its verdict: the grader's, or cut_off or not_finite, which come first."""

    text: str
    verdict: str


def render_rows(
    pair: Pair, rows: Sequence[Row], completions: Mapping[int, str]
) -> tuple[dict[int, dict[str, int]], list[Rejection]]:
    """Measure rows with both templates: the lengths by row, and the rows that do not fit.

    A row without an entry in completions is measured as a prompt alone.
    """
    by_id = {row.row_id: row for row in rows}
    stage = pair.stage(
        "render",
        LENGTHS,
        {
            "rows": digest([r.row_id, r.messages, completions.get(r.row_id)] for r in rows),
            "max_length": pair.max_length,
            **{role: side.rendering for role, side in pair.sides.items()},
        },
    )
    table = stage.run(
        chunks([row.row_id for row in rows]),
        lambda batch: (_measure(pair, by_id[item], completions.get(item)) for item in batch),
        desc="render",
    )
    fits: dict[int, dict[str, int]] = {}
    left: list[Rejection] = []
    for line in table.to_pylist():
        if line["reason"]:
            left.append(Rejection(line["row_id"], -1, "render", line["reason"], line["detail"]))
        else:
            fits[line["row_id"]] = line
    return fits, left


def _measure(pair: Pair, row: Row, completion: str | None) -> dict[str, object]:
    line: dict[str, object] = dict.fromkeys(LENGTHS.names)
    line["row_id"] = row.row_id
    try:
        prompt = whole = pair.prompt_lengths(row.messages)
        if completion is not None:
            whole = {
                role: len(side.renderer.render(row.messages, completion).input_ids)
                for role, side in pair.sides.items()
            }
    except ValueError as error:
        return line | {"reason": "not_renderable", "detail": str(error)}
    for role in ROLES:
        line |= {f"{role}_prompt": prompt[role], f"{role}_whole": whole[role]}
    limit = f"{pair.max_length} tokens that max_length and the models allow"
    if max(prompt.values()) >= pair.max_length:
        detail = f"the prompt has {max(prompt.values())} of the {limit}"
        return line | {"reason": "prompt_too_long", "detail": detail}
    if max(whole.values()) > pair.max_length:
        detail = f"prompt and completion have {max(whole.values())} of the {limit}"
        return line | {"reason": "completion_too_long", "detail": detail}
    return line


def answer(pair: Pair, role: str, prompts: Sequence[Prompt]) -> dict[int, Answered]:
    """Let a model answer greedily, grade what it says, and return both by the prompts' ids."""
    config, side = pair.config, pair.sides[role]
    by_id = {prompt.id: prompt for prompt in prompts}
    stage = pair.stage(
        f"predict-{role}",
        ANSWERS,
        {
            **pair.model_settings(role),
            "max_new_tokens": config.max_new_tokens,
            "prompts": digest([prompt.id, prompt.messages] for prompt in prompts),
        },
    )
    plan = plan_batches(
        [prompt.length[role] + config.max_new_tokens for prompt in prompts],
        max_tokens=config.max_batch_tokens,
    )

    def compute(batch: Sequence[int]) -> Iterator[dict[str, object]]:
        ids = [side.renderer.prompt(by_id[item].messages).input_ids for item in batch]
        texts = generate(
            pair.model(role),
            side.tokenizer,
            ids,
            end_ids=side.renderer.end_ids,
            max_new_tokens=config.max_new_tokens,
        )
        for item, text in zip(batch, texts, strict=True):
            yield {
                "id": item,
                "text": text.text,
                "finished": text.finished,
                "n_tokens": text.n_tokens,
                "invalid": text.invalid,
            }

    table = stage.run(
        [[prompts[index].id for index in batch] for batch in plan],
        compute,
        desc=f"{role} answers",
    )
    answered = {line["id"]: _ungraded(line) for line in table.to_pylist()}
    verdicts = grade_answers(
        pair.root,
        f"grade-{role}",
        stage.fingerprint,
        {
            item: (by_id[item].gold, given.text)
            for item, given in answered.items()
            if not given.verdict
        },
        rule=config.grade,
        timeout_s=config.grade_timeout,
    )
    graded = {item: Answered(answered[item].text, verdict) for item, verdict in verdicts.items()}
    return answered | graded


def _ungraded(line: Mapping[str, Any]) -> Answered:
    verdict = "not_finite" if line["invalid"] else "" if line["finished"] else "cut_off"
    return Answered(line["text"], verdict)


def grade_answers(
    root: Path,
    name: str,
    upstream: str,
    pairs: Mapping[int, tuple[str, str]],
    *,
    rule: GradeRule,
    timeout_s: float,
) -> dict[int, str]:
    """Return the verdicts of (gold, answer) pairs by id, as a stage of the run directory.

    upstream: the fingerprint of the stage that the answers are from.
    """
    ids = sorted(pairs)
    golds = digest([item, pairs[item][0]] for item in ids)
    settings = {"answers": upstream, "golds": golds, "rule": rule, "timeout": timeout_s}
    stage = Stage(root / "stages", name, settings, VERDICTS)
    with Grader(rule, timeout_s=timeout_s) as grader:

        def compute(batch: Sequence[int]) -> Iterator[dict[str, object]]:
            verdicts = grader.grade([pairs[item] for item in batch])
            for item, verdict in zip(batch, verdicts, strict=True):
                yield {"id": item, "verdict": verdict}

        table = stage.run(chunks(ids), compute, desc=name)
    return dict(zip(table["id"].to_pylist(), table["verdict"].to_pylist(), strict=True))


def score(pair: Pair, role: str, rows: Sequence[Labelled]) -> tuple[pa.Table, str]:
    """Return one model's raw saliencies of the rows, and the fingerprint of this table."""
    config, side = pair.config, pair.sides[role]
    by_id = {item.row.row_id: item for item in rows}
    stage = pair.stage(
        f"saliency-{role}",
        SALIENCY,
        {
            **pair.model_settings(role),
            "rows": digest([r.row.row_id, r.row.messages, r.completion] for r in rows),
        },
    )
    plan = plan_batches([item.whole[role] for item in rows], max_tokens=config.max_batch_tokens)

    def compute(batch: Sequence[int]) -> Iterator[dict[str, object]]:
        items = [by_id[row_id] for row_id in batch]
        renderings = [side.renderer.render(item.row.messages, item.completion) for item in items]
        scored = saliency(pair.model(role), renderings)
        for row_id, rendering, result in zip(batch, renderings, scored, strict=True):
            domain = [at for at, inside in enumerate(rendering.domain) if inside]
            yield {
                "row_id": row_id,
                "nll": result.nll,
                "invalid": result.invalid,
                "norms": result.norms,
                "position": domain,
                "start": [rendering.offsets[at][0] for at in domain],
                "stop": [rendering.offsets[at][1] for at in domain],
                "prunable": [rendering.prunable[at] for at in domain],
            }

    ids = [[rows[index].row.row_id for index in batch] for batch in plan]
    return stage.run(ids, compute, desc=f"{role} saliency"), stage.fingerprint
