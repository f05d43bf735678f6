"""Which cuts repair a student that distractors mislead: arms of `leaf detect`, and two by hand.

By hand are the oracle, which cuts the true distractors, and the control without a model. They are
answered by the same judge as the arms.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from detection import CONTROL, GAP, ORACLE, SCORES, SCORING, samples_of
from problems import Problem, numbers, value

from leaf_distill.data.dataset import load_examples
from leaf_distill.data.example import ROLES, Example, Range, Role, remaining
from leaf_distill.data.prompt import Renderer
from leaf_distill.detection.answers import open_cache, prompted_model, render_for
from leaf_distill.detection.config import DetectConfig
from leaf_distill.detection.counterfactual import make_candidate, tidied
from leaf_distill.detection.judge import Judge
from leaf_distill.detection.output import write_dataset
from leaf_distill.detection.pipeline import detect
from leaf_distill.detection.units import phrases
from leaf_distill.io import make_directory, write_table
from leaf_distill.models.loading import LazyModel

TOP = "top 1, 2, 3 phrases by "
ARMS: Mapping[str, Mapping[str, Any]] = {
    "token spans, one at a time (the paper)": {"strategy": "span", "widen": "token"},
    "token spans, together (the paper)": {"strategy": "collective", "widen": "token"},
    "spans widened to words, one at a time (the default)": {"strategy": "span", "widen": "word"},
    "random token spans": {"strategy": "random_spans", "widen": "token"},
    "spans widened to phrases, together": {"strategy": "collective", "widen": "phrase"},
    **{
        f"{TOP}{name}": {"strategy": "cumulative", "widen": "phrase", **changes}
        for name, changes in SCORES.items()
    },
    "search": {"strategy": "search", "widen": "phrase"},
    **{
        f"search among 2 phrases, by {name}": {
            "strategy": "search",
            "widen": "phrase",
            "shortlist": 2,
            **SCORES[name],
        }
        for name in (GAP, "log_gap", "random")
    },
}
"""Arms of `leaf detect`; both models must answer what is left."""

Propose = Callable[[Problem, Example], Sequence[Sequence[Range]]]
"""Returns cuts of a row: the characters that are cut out of it together."""


def absent_numbers(problem: Problem, example: Example) -> list[Sequence[Range]]:
    """Return one cut: the phrases with a number that the label lacks, and with none that it has."""
    known = {value(one) for one in numbers(problem.label)}
    found = []
    for start, stop in phrases(example.text, example.parts):
        own = {value(one) for one in numbers(example.text[start:stop])}
        if own and not own & known:
            found.append((start, stop))
    return [found] if found else []


def all_at_once(problem: Problem, example: Example) -> list[Sequence[Range]]:
    """Return one cut: all true distractors, if there are any."""
    return [problem.ranges] if problem.ranges else []


def one_more(problem: Problem, example: Example) -> list[Sequence[Range]]:
    """Return the first true distractor, the first two, and so on, up to all of them."""
    return [problem.ranges[:count] for count in range(1, len(problem.ranges) + 1)]


BY_HAND: Mapping[str, Propose] = {
    CONTROL: absent_numbers,
    ORACLE: all_at_once,
    f"{ORACLE}, one more at a time": one_more,
}
"""Each cut that is no arm of `leaf detect`."""


def cut_rows(config: DetectConfig, problems: Sequence[Problem]) -> dict[str, list[dict[str, Any]]]:
    """Return what each arm does to the rows that the student fails and the teacher solves.

    Args:
        config: the settings of detection; every arm validates by both models.
        problems: the rows of config.dataset.

    Returns:
        For each arm a line for each row: `template`; `first`, `any`: whether the student is right
        after the first cut, after any; `both`: whether both models are after one cut; `asked`: the
        answers of both models to changed prompts, and `losses`: those that a search asks for (of
        both the mean of its rows); `inside`, `cut`: characters that a cut takes, in distractors
        and in all.
    """
    rows = [one["row_id"] for one in samples_of(replace(config, **SCORING))]
    found: dict[str, list[dict[str, Any]]] = {}
    for name, changes in ARMS.items():
        done = detect(replace(config, validate="both", **changes))
        samples = pq.read_table(done.samples, columns=["row_id", "candidates"]).to_pylist()
        tried = {one["row_id"]: one["candidates"] for one in samples}
        found[name] = [_line(problems[at], tried.get(at) or []) for at in rows]
        if rows and (cost := done.funnel.get("search")):
            answers = cost["student_answers"] + cost["teacher_answers"]
            mean = {"asked": answers / len(rows), "losses": cost["student_losses"] / len(rows)}
            found[name] = [{**line, **mean} for line in found[name]]
    for name in BY_HAND:
        examples = judged(config, problems, name)
        found[name] = [_line(problems[one.row_id], map(_tried, one.candidates)) for one in examples]
    return found


def judged(config: DetectConfig, problems: Sequence[Problem], name: str) -> list[Example]:
    """Return the selected rows with their cuts by hand, about which both models were asked."""
    by_id = {one.row_id: one for one in load_examples(config.dataset)}
    examples = [by_id[one["row_id"]] for one in samples_of(replace(config, **SCORING))]
    pair = {role: _asked(role, config) for role in ROLES}
    for example in examples:
        for number, ranges in enumerate(BY_HAND[name](problems[example.row_id], example)):
            cut = tidied(example, ranges)
            candidate = make_candidate(example, (cut, (), None), config, ())
            candidate.candidate_id = number
            example.candidates.append(candidate)
        for one in remaining(example.candidates):
            render_for(pair, one, Renderer.prompt)
    with open_cache(config) as cache:
        judge = Judge(pair, replace(config, validate="both"), cache, lambda stage: nullcontext())
        judge.validate(examples)
        judge.use(None)
    return examples


def _asked(role: Role, config: DetectConfig) -> Any:
    source = getattr(config, role)
    model = LazyModel(source, dtype=config.dtype, device=config.device, argument=role)
    return prompted_model(role, model, config)


def write_by_hand(
    config: DetectConfig, problems: Sequence[Problem], directory: Path, name: str, *, cross: bool
) -> Path:
    """Write the dataset of an arm by hand, with the originals of an arm of `leaf detect`.

    Args:
        config: the settings of detection.
        problems: the rows of config.dataset.
        directory: of the dataset.
        name: of the cuts, in BY_HAND.
        cross: whether the teacher alone reads the cut problem.
    """
    make_directory(directory)
    path = write_dataset(directory, judged(config, problems, name), "{}", cross=cross)
    table = pq.read_table(path)
    kept = table.filter(pc.not_equal(table["branch"], "original"))
    originals = pq.read_table(detect(replace(config, **SCORING)).dataset)
    originals = originals.filter(pc.equal(originals["branch"], "original"))
    write_table(path, pa.concat_tables([originals, kept.select(originals.column_names)]))
    return path


def _tried(candidate: Example) -> dict[str, Any]:
    verdicts = {
        f"{role}_verdict": candidate.answers[role].verdict if role in candidate.answers else None
        for role in ROLES
    }
    return {"cut": candidate.cut, "kept": candidate.outcome is None, **verdicts}


def _line(problem: Problem, candidates: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    tried = list(candidates)
    right = [one["student_verdict"] == "right" for one in tried]
    truth = {at for start, stop in problem.ranges for at in range(start, stop)}
    cut = {at for one in tried for start, stop in one["cut"] for at in range(start, stop)}
    return {
        "template": problem.template,
        "first": any(right[:1]),
        "any": any(right),
        "both": any(one["kept"] for one in tried),
        "asked": sum(one[f"{role}_verdict"] is not None for one in tried for role in ROLES),
        "losses": 0,
        "inside": sum(at in truth for at in cut),
        "cut": len(cut),
    }
