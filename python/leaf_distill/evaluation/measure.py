"""One model on one set of problems: its answers, their verdicts, and the number they make."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from leaf_distill.config import package_versions
from leaf_distill.data.example import Answer, Example, UnusableRow
from leaf_distill.detection.answers import PromptedModel, answer, gold_warning
from leaf_distill.detection.cache import RowCache
from leaf_distill.detection.verdicts import ANSWER_SHOWN, quote
from leaf_distill.evaluation.config import EvaluateConfig
from leaf_distill.evaluation.problems import Problems, answer_options, decoding
from leaf_distill.io import is_of, make_directory, write_json, write_table
from leaf_distill.statistics import Scores, bootstrap, pass_at_k, wilson_interval

logger = logging.getLogger(__name__)

VERDICTS = (
    *("right", "wrong", "no_answer", "timeout"),
    *("error", "memory", "no_program", "refused"),
    *("cut_off", "not_finite", "too_long", "not_renderable"),
)
"""The grader's verdicts, of texts and of programs; an answer that was not right when the length
limit cut it off; logits that are not_finite; a prompt that is too_long, or not_renderable by the
chat template."""

ANSWERS = pa.schema(
    [
        ("row_id", pa.int64()),
        ("sample", pa.int32()),
        *((name, pa.string()) for name in ("prompt", "gold", "answer", "verdict", "detail")),
        ("n_tokens", pa.int32()),
    ]
)
"""The columns of answers.parquet."""

ROUND = 256
"""Shortened answers have a multiple of so many tokens, lest each longer prompt makes all new."""


@dataclass(frozen=True)
class EvaluateResult:
    """The accuracy of a model on some problems.

    accuracy: the mean over all rows of pass@k, which with one answer is the share that is right.
    interval: its 95 % interval, Wilson's with one answer, else of a bootstrap over the rows.
    counts: how many answers have each verdict. answers: the file of the answers.
    """

    accuracy: float
    interval: tuple[float, float]
    counts: dict[str, int]
    answers: Path
    metric: str = "pass@1"


class Measured(NamedTuple):
    """A result, the score of each row, and what metrics.json holds."""

    result: EvaluateResult
    scores: Scores
    metrics: dict[str, Any]


def measure(
    asked: PromptedModel, problems: Problems, config: EvaluateConfig, cache: RowCache, root: Path
) -> Measured:
    """Let a model answer problems, and write `answers.parquet` and `metrics.json` in a directory.

    Args:
        asked: the model.
        problems: rows, which are left as they are.
        config: the command's settings.
        cache: of answers and verdicts.
        root: the directory.

    Raises:
        ValueError: the model can be asked none of the rows.
        StoreError: a file cannot be written.
    """
    rows, failed = _render(asked, problems, config)
    if count := failed.count("not_renderable"):
        logger.warning("%d rows cannot be rendered by %s", count, asked.model.name)
    fitting = [row for row, verdict in zip(rows, failed, strict=True) if verdict is None]
    problems = _fitted(asked, problems, fitting, config)
    benchmark, options = problems.benchmark, answer_options(problems.benchmark, config)
    copies = [[replace(row, answers={}) for _ in range(benchmark.samples)] for row in fitting]
    answer(
        asked,
        [copy for several in copies for copy in several],
        options,
        cache,
        decoding=decoding(benchmark, config),
        grade_cut_off=True,
    )
    given = iter([copy.answers["student"] for copy in several] for several in copies)
    answers = [
        next(given) if verdict is None else [Answer("", 0, verdict)] * benchmark.samples
        for verdict in failed
    ]
    make_directory(root)
    by_tests = benchmark.grade == "code"
    write_table(root / "answers.parquet", _table(rows, answers, by_tests=by_tests))
    result, scores = _result(problems, answers, root / "answers.parquet")
    metrics = {
        "command": "evaluate",
        **asdict(result),
        "value": result.accuracy,
        "rows": len(rows),
        "unreadable_rows": problems.unreadable,
        "benchmark": asdict(benchmark) if config.benchmark else None,
        "settings": asdict(config)
        | {"max_new_tokens": benchmark.max_new_tokens, "grade": benchmark.grade},
        "model": {"name": asked.model.name, "sha256": asked.model.fingerprint},
        "versions": package_versions(),
    }
    write_json(root / "metrics.json", metrics)
    if "right" not in result.counts:
        _quote(fitting[0], copies[0][0].answers["student"], options.grade)
    for sentence in gold_warning([row.gold for row in rows], options):
        logger.warning("%s", sentence)
    if not by_tests and (tested := sum(row.tests is not None for row in rows)):
        logger.warning("%d rows have tests of programs; --grade code runs them", tested)
    return Measured(result, scores, metrics)


def _quote(row: Example, given: Answer, grade: str) -> None:
    if grade == "code":
        logger.warning(
            "no program is right; the first answer ends %r and is %s: %s",
            *(given.text[-ANSWER_SHOWN:], given.verdict, given.detail or "see --max_new_tokens"),
        )
        return
    logger.warning(
        "no answer is right; the first %s: see --grade (now %s), --max_new_tokens and "
        "--chat_template",
        quote(given.text, row.gold),
        grade,
    )


def check_askable(asked: PromptedModel, problems: Problems, config: EvaluateConfig) -> None:
    """Raise ValueError unless a model can be asked one of the problems."""
    _render(asked, problems, config)


def _render(
    asked: PromptedModel, problems: Problems, config: EvaluateConfig
) -> tuple[list[Example], list[str | None]]:
    """Return the rows with their prompts, and the verdict of those that cannot be asked."""
    rows = [replace(row, renderings={}, answers={}) for row in problems.rows]
    positions = asked.model.max_positions
    limit = min(config.max_length, positions - 1) if positions else config.max_length
    failed: list[str | None] = []
    refused: list[str] = []
    for example in rows:
        try:
            rendering = asked.prompt(example)
        except UnusableRow as problem:
            refused.append(f"row {example.row_id}: {problem.detail}")
            failed.append("not_renderable")
            continue
        example.renderings["student"] = rendering
        failed.append(None if len(rendering) <= limit else "too_long")
    if None not in failed:
        first = refused[0] if refused else f"all prompts have more than {limit} tokens"
        name = f"benchmark {problems.benchmark.name}" if config.benchmark else "dataset"
        raise ValueError(
            f"{name}: must have a row that {asked.model.name} can be asked, got {len(rows)} that "
            f"are not ({first})"
        )
    return rows, failed


def _fitted(
    asked: PromptedModel, problems: Problems, fitting: Sequence[Example], config: EvaluateConfig
) -> Problems:
    """Shorten a benchmark's answers to what the model's positions leave after its prompts.

    Prompts without room for a whole answer would be asked one by one.
    """
    positions, wanted = asked.model.max_positions, problems.benchmark.max_new_tokens
    if positions is None or not config.benchmark or config.max_new_tokens is not None:
        return problems
    longest = max(len(row.renderings["student"]) for row in fitting)
    room = max(positions - longest, positions // 2, 1)
    room -= room % ROUND if room > ROUND else 0
    if room >= wanted:
        return problems
    logger.warning(
        "%s: answers of %s have at most %d tokens in place of %d, for it has %d positions",
        *(problems.benchmark.name, asked.model.name, room, wanted, positions),
    )
    return replace(problems, benchmark=replace(problems.benchmark, max_new_tokens=room))


def _table(
    rows: Sequence[Example], answers: Sequence[Sequence[Answer]], *, by_tests: bool
) -> pa.Table:
    lines = [
        (row, number, one)
        for row, several in zip(rows, answers, strict=True)
        for number, one in enumerate(several)
    ]
    unasked = ("too_long", "not_renderable")
    return pa.table(
        {
            "row_id": [row.row_id for row, _, _ in lines],
            "sample": [number for _, number, _ in lines],
            "prompt": [row.text for row, _, _ in lines],
            "gold": ["" if by_tests else row.gold for row, _, _ in lines],
            "answer": [None if one.verdict in unasked else one.text for _, _, one in lines],
            "verdict": [one.verdict for _, _, one in lines],
            "detail": [one.detail for _, _, one in lines],
            "n_tokens": [one.n_tokens for _, _, one in lines],
        },
        schema=ANSWERS,
    )


def _result(
    problems: Problems, answers: Sequence[Sequence[Answer]], path: Path
) -> tuple[EvaluateResult, Scores]:
    benchmark = problems.benchmark
    right = [sum(one.verdict == "right" for one in several) for several in answers]
    scores = np.array([pass_at_k(benchmark.samples, count, benchmark.k) for count in right])
    counts = Counter(one.verdict for several in answers for one in several)
    if benchmark.samples == 1:
        interval = wilson_interval(sum(right), len(right))
    else:
        interval = bootstrap([scores])[1:]
    result = EvaluateResult(
        accuracy=float(scores.mean()),
        interval=interval,
        counts={name: counts[name] for name in VERDICTS if counts[name]},
        answers=path,
        metric=benchmark.metric,
    )
    return result, scores


def check_directory(root: Path) -> None:
    """Raise ValueError where an evaluation would replace somebody else's files."""
    metrics, answers = root / "metrics.json", root / "answers.parquet"
    for path, ours in ((metrics, is_of(metrics, "evaluate")), (answers, _is_answers(answers))):
        if os.path.lexists(path) and not ours:
            raise ValueError(
                f"output_dir: must be new or of an earlier `leaf evaluate`, got {root}, whose "
                f"{path.name} is damaged or of something else; delete it, or give another "
                "output_dir"
            )


def _is_answers(path: Path) -> bool:
    try:
        # Earlier versions had no samples and no details.
        return {*ANSWERS.names} - {"sample", "detail"} <= {*pq.read_schema(path).names}
    except (pa.ArrowException, OSError):
        return False


def check_inputs(
    directories: Sequence[Path],
    files: Sequence[Path],
    models: Sequence[str],
    datasets: Sequence[str],
) -> None:
    """Refuse a directory in which results would replace an input, or stand in a model's.

    Args:
        directories, files: what is written.
        models, datasets: the inputs.
    """
    written = {path.resolve() for path in files}
    for name, several, taken in (
        ("model", models, written | {path.resolve() for path in directories}),
        ("dataset", datasets, written),
    ):
        for given in filter(None, several):
            try:
                found = Path(given).expanduser().resolve() in taken
            except (OSError, RuntimeError, ValueError):
                continue  # no path; the loader says what is wrong with it
            if found:
                raise ValueError(
                    f"output_dir: must not be an input, but the {name} is {given}; give another one"
                )
