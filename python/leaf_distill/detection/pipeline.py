"""Stage 1 as a whole: rows in, a dataset of originals and validated counterfactuals out.

    rows -> render -> answer, mark -> saliency -> detect -> prune -> validate -> dataset

Answers, saliencies and verdicts come from the row cache where it has them; everything else is
computed anew in milliseconds.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from leaf_distill.config import json_object, need, package_versions
from leaf_distill.data.dataset import load_examples
from leaf_distill.data.example import (
    ROLES,
    Example,
    Floats,
    Rendering,
    Role,
    UnusableRow,
    remaining,
)
from leaf_distill.data.prompt import Renderer
from leaf_distill.detection.answers import (
    UNGRADED,
    leave_without_gold,
    open_cache,
    prompted_model,
    render_for,
)
from leaf_distill.detection.arms import (
    NAMING,
    arm_name,
    check_models,
    check_run,
    explain_replacement,
    is_unchanged,
)
from leaf_distill.detection.config import DetectConfig
from leaf_distill.detection.counterfactual import propose
from leaf_distill.detection.distractors import Distractors
from leaf_distill.detection.estimate import estimate, show_estimate
from leaf_distill.detection.funnel import (
    UNUSED,
    funnel,
    outcomes_table,
    show_funnel,
    show_notes,
)
from leaf_distill.detection.judge import Judge
from leaf_distill.detection.levels import analyzed_turns, end_with_views, render_view, set_views
from leaf_distill.detection.output import write_dataset, write_samples
from leaf_distill.detection.scores import score_perplexity, score_saliency
from leaf_distill.detection.search import search
from leaf_distill.detection.spans import align, find_spans
from leaf_distill.detection.substitution import Vocabulary
from leaf_distill.detection.suspicion import set_suspicion
from leaf_distill.detection.warnings import (
    nothing_scored,
    nothing_usable,
    warnings_before,
    warnings_of,
)
from leaf_distill.io import locked, make_directory, user_directory, write_json, write_table
from leaf_distill.models.loading import LazyModel
from leaf_distill.models.memory import count_halvings
from leaf_distill.models.server import find_server
from leaf_distill.models.tokenizer import have_same_tokenizer
from leaf_distill.ranks import current, together
from leaf_distill.terminal import say

if TYPE_CHECKING:  # seconds to import
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


UNCHANGED = ", as it was: nothing was left to do"


@dataclass(frozen=True)
class DetectResult:
    """Paths of an arm's files, its funnel (the content of funnel.json), and more.

    different_tokenizers: whether the models have different ones, so that no training takes both.
    """

    run_directory: Path
    arm: Path
    dataset: Path
    samples: Path
    outcomes: Path
    funnel: dict[str, Any] = field(repr=False)
    different_tokenizers: bool = False


@together
def detect(
    config: DetectConfig,
    *,
    dataset: Any = None,
    student: PreTrainedModel | None = None,
    teacher: PreTrainedModel | None = None,
    processing_class: PreTrainedTokenizerBase | None = None,
    teacher_processing_class: PreTrainedTokenizerBase | None = None,
) -> DetectResult:
    """Run stage 1 and write its arm, `config.output_dir`/arms/NAME.

    NAME is the strategy, and each setting of detection that is not the default. The arm has
    dataset.parquet and dataset.jsonl (every usable original, each followed by its counterfactuals),
    candidates.parquet and candidates.jsonl (every changed prompt, accepted or not, with the answers
    to it), samples.parquet (what was measured on each scored row or view of one), outcomes.parquet
    (where each row, view and candidate left, and why) and funnel.json. A row without an answer is
    graded against its completion. With `dry_run` nothing is written: the result names the files
    that the run would write, and its funnel has the entry `estimate` alone.

    Under torchrun or `accelerate launch` the processes share the models' passes and the grading.
    All return the result; the first writes it.

    Args:
        config: the settings.
        dataset: rows in memory in place of config.dataset, a `datasets.Dataset` or dicts.
        student, teacher: models in memory, in place of the names in config; they stay where they
            are, in their dtype.
        processing_class: the student's tokenizer; default: the one beside the model.
        teacher_processing_class: the teacher's; default: the one beside its name, or for a teacher
            in memory the student's.

    Raises:
        ValueError: settings or inputs cannot work, or no row is usable.
        StoreError: a file cannot be written, or another process holds the run directory.
        ServerError: a server gives no answers; those that it gave are kept.
    """
    sources = {"student": student, "teacher": teacher, "dataset": dataset}
    need(config, *(name for name, given in sources.items() if given is None))
    tokenizers = {"student": processing_class, "teacher": teacher_processing_class}
    if teacher is not None and teacher_processing_class is None:
        tokenizers["teacher"] = processing_class
    models: dict[Role, LazyModel] = {}
    for role in ROLES:
        model = sources[role]
        models[role] = LazyModel(
            getattr(config, role) if model is None else model,
            processing_class=tokenizers[role],
            dtype=config.dtype,
            device=config.device,
            trust_remote_code=config.trust_remote_code,
            argument=role,
            quantization=config.teacher_quantization if role == "teacher" else None,
        )
    run = Run(config, models, config.dataset if dataset is None else dataset)
    return run.dry_run() if config.dry_run else run.run()


class Run:
    """The state of one run."""

    def __init__(self, config: DetectConfig, models: dict[Role, LazyModel], rows: Any) -> None:
        self.config = config
        self.root = user_directory(config.output_dir)
        self.seconds: dict[str, float] = {}
        self.searched: dict[str, int] = {}
        check_run(self.root, config)
        with self._clock("rows"):
            rows_in = load_examples(
                rows,
                split=config.dataset_split,
                columns=json_object(config.columns, "columns"),
                max_rows=config.max_rows,
                need_completion=config.completion_source == "dataset",
            )
            # The dataset of an earlier run brings its counterfactuals along.
            self.examples = [one for one in rows_in if one.branch == "original"]
            self.earlier = len(rows_in) - len(self.examples)
            if not self.examples:
                raise ValueError(
                    f"dataset: must have originals, got {self.earlier} counterfactuals alone; give "
                    "the rows that these were cut from"
                )
            self.pair = {
                role: prompted_model(role, models[role], config, find_server(role, config))
                for role in ROLES
            }
        if len({one.row_id for one in self.examples}) < len(self.examples):
            for row_id, example in enumerate(self.examples):  # the rows of several runs together
                example.row_id = row_id
        self.different = not have_same_tokenizer(*(models[role].tokenizer for role in ROLES))
        self.run_json = check_models(self.root, models)
        limits = [model.max_positions for model in models.values()]
        self.limit = min([config.max_length, *(limit for limit in limits if limit)])

    def _provenance(self) -> str:
        """Return how counterfactuals came about, as JSON text: settings, models and version."""
        names = (*NAMING, "strategy", "seed")
        return json.dumps(
            {
                **{name: getattr(self.config, name) for name in sorted(names)},
                **{role: one.model.fingerprint for role, one in self.pair.items()},
                "leaf-distill": package_versions()["leaf-distill"],
            }
        )

    @contextmanager
    def _clock(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def run(self) -> DetectResult:
        lock = nullcontext() if current().rank or self.config.dry_run else locked(self.root)
        with lock, open_cache(self.config) as self.cache, count_halvings() as self.halvings:
            self.judge = self._judge(self.config)
            usable = self._label()
            if not usable:
                raise nothing_usable(self.examples)
            self.told = current().from_first(self._tell_before)
            marked = usable if self.config.select == "all" else self.judge.mark(usable)
            views = self._views(marked)
            with self._clock("saliency"):
                # The teacher first: where both have answered, its weights are still in memory.
                for role in reversed(ROLES):
                    score_saliency(self.judge.use(role), views, self.config, self.cache)
            with self._clock("detect"):
                align(views)
                scored = list(remaining(views))
                self._set_suspicion(scored, self.config)
                scored = list(remaining(scored))
                find_spans(scored, self.config)
            self._propose(scored)
            self.seconds["validate"] = 0.0  # the judge counts its answers there
            self.judge.validate(list(remaining(scored)))
            self.judge.use(None)
            for example in marked:
                end_with_views(example)
            self.halved = self._halved_batches()
            return current().from_first(lambda: self._write(usable, scored))

    def _judge(self, config: DetectConfig) -> Judge:
        return Judge(self.pair, config, self.cache, self._clock, self._check_labels)

    @property
    def _grades(self) -> bool:
        """Whether any answer is graded."""
        return self.config.select != "all" or self.config.validate != "none"

    def dry_run(self) -> DetectResult:
        """Print what the run will take; nothing is computed by a model, and nothing written."""
        self._find_turns()
        if self._grades:
            leave_without_gold(self.examples, self.config, None)
        whole = self.config.completion_source == "dataset"
        usable = self._render(self.examples, whole=whole)
        if not usable:
            raise nothing_usable(self.examples)
        views = self._views(usable) if whole else usable
        found = estimate(self.pair, usable, views, self.config)
        if current().rank == 0:
            show_estimate(found, self.examples, self._warnings_before())
        arm = self.root / "arms" / arm_name(self.config)
        dataset, samples, outcomes = (
            arm / f"{name}.parquet" for name in ("dataset", "samples", "outcomes")
        )
        return DetectResult(self.root, arm, dataset, samples, outcomes, {"estimate": found})

    def _find_turns(self) -> None:
        """Set the user turns of each row that are analyzed."""
        for example in remaining(self.examples):
            try:
                example.turns = analyzed_turns(example, self.config.turns)
            except UnusableRow as problem:
                example.leave("rows", problem.reason, problem.detail)

    def _label(self) -> list[Example]:
        """Give every row its completion and both renderings; return the rows that fit."""
        self._find_turns()
        if self._grades:
            leave_without_gold(self.examples, self.config, self.cache)
        if self.config.completion_source == "dataset":
            return self._render(self.examples, whole=True)
        asked = self._render(self.examples, whole=False)
        self.judge.answer("teacher", asked, "predict", graded=self._grades)
        for example in asked:
            given = example.answers["teacher"]
            if given.verdict in UNGRADED:
                example.leave("render", f"teacher_{given.verdict}", given.detail)
            elif not given.text.strip():
                example.leave("render", "empty_completion", "the teacher's answer is empty")
            else:
                # The completion was what an answer is graded against; with tests there may be none.
                example.answer = example.gold or None
                example.completion, example.reply = given.text, None
        return self._render(asked, whole=True)

    def _views(self, marked: Sequence[Example]) -> list[Example]:
        """Return the views of marked rows that can be analyzed: the rows, if they have no other.

        A beginning of the response counts where the student goes on from it wrongly and the teacher
        rightly, as a row does.
        """
        for example in marked:
            set_views(example, self.config)
            if self.config.level == "response" and not example.views:
                example.leave("detect", "response_not_divided", "the response has no border")
        rows = list(remaining(marked))
        views = self._render([view for one in rows for view in one.views], whole=True)
        begun = [view for view in views if view.segment]
        if begun and self.config.select != "all" and not self.config.dry_run:
            self.judge.mark(begun)
        found = [view for one in rows for view in (one.views or [one])]
        return list(remaining(found))

    def _render(self, examples: Sequence[Example], *, whole: bool) -> list[Example]:
        """Render examples for both models, with their completions or without; return what fits."""
        render = partial(render_view, config=self.config) if whole else Renderer.prompt
        with self._clock("render"):
            for example in remaining(examples):
                try:
                    render_for(self.pair, example, render)
                except UnusableRow as problem:
                    example.leave("render", problem.reason, problem.detail)
                else:
                    self._check_length(example, "render")
        return list(remaining(examples))

    def _check_labels(self, candidate: Example) -> None:
        """Render a candidate with its completion; it leaves where that cannot be trained on."""
        try:
            render_for(self.pair, candidate, Renderer.render)
        except UnusableRow as problem:
            candidate.leave("validate", problem.reason, problem.detail)
        else:
            self._check_length(candidate, "validate")

    def _check_length(self, example: Example, stage: str) -> None:
        prompt = max(map(_prompt_length, example.renderings.values()))
        whole = max(len(one) for one in example.renderings.values())
        limit = f"of the {self.limit} tokens that max_length and the models allow"
        if prompt >= self.limit:
            example.leave(stage, "prompt_too_long", f"the prompt has {prompt} {limit}")
        elif whole > self.limit:
            detail = f"prompt and completion have {whole} {limit}"
            example.leave(stage, "completion_too_long", detail)

    @cached_property
    def _vocabulary(self) -> Vocabulary:
        """The words of the usable rows' prompts, from which replacements are drawn.

        These rows are the originals of the dataset, so that a sweep of it draws the same.
        """
        return Vocabulary(self._texts())

    @cached_property
    def _distractors(self) -> Distractors:
        """The sentences of these prompts that ask nothing."""
        return Distractors(self._texts())

    def _texts(self) -> Iterator[str]:
        """Yield the analyzed turns of the usable rows."""
        for one in self.examples:
            if not one.outcome or one.outcome.stage not in UNUSED:
                yield from (one.text[start:stop] for start, stop in one.parts)

    def _set_suspicion(self, views: Sequence[Example], config: DetectConfig) -> None:
        vocabulary = self._vocabulary if config.score == "intervention" else None
        set_suspicion(self.judge, views, config, vocabulary)

    def _propose(self, scored: Sequence[Example]) -> None:
        """Set the candidates of each view, rendered without their completion."""
        if self.config.strategy == "search":
            self.searched = search(self.judge, scored, self.config, self._render_candidate)
            ids: Counter[int] = Counter()
            for example in scored:
                for candidate in example.candidates:
                    candidate.candidate_id = ids[example.row_id]
                    ids[example.row_id] += 1
            return
        with self._clock("prune"):
            self._propose_at_once(scored)

    def _propose_at_once(self, scored: Sequence[Example]) -> None:
        """Set candidates that depend on no answer."""
        perplexity: Sequence[Floats | None] = [None] * len(scored)
        if self.config.strategy == "perplexity":
            student = self.judge.use("student")
            perplexity = score_perplexity(student, scored, self.config, self.cache)
        ids: Counter[int] = Counter()
        for example, values in zip(scored, perplexity, strict=True):
            propose(
                example,
                self.config,
                perplexity=values,
                vocabulary=self._vocabulary if self.config.edit == "substitute" else None,
                distractors=self._distractors if self.config.strategy == "distractors" else None,
                first_id=ids[example.row_id],
            )
            ids[example.row_id] += len(example.candidates)
            for candidate in remaining(example.candidates):
                self._render_candidate(candidate, example)
            if example.candidates and not any(remaining(example.candidates)):
                example.leave("prune", "no_usable_cut", "no cut leaves a usable prompt")

    def _render_candidate(self, candidate: Example, view: Example) -> None:
        try:
            render_for(self.pair, candidate, Renderer.prompt)
            if not self.config.relabel and _is_longer(candidate, view):
                # The view fits with its completion, but this prompt may not. A new completion is
                # checked when it is there.
                render_for(self.pair, candidate, Renderer.render)
        except UnusableRow as problem:
            candidate.leave("prune", "not_renderable", problem.detail)
        else:
            self._check_length(candidate, "prune")

    def _halved_batches(self) -> int:
        """Return how many batches ran in halves, on all ranks together."""
        ranks = current()
        counts = ranks.exchange({ranks.rank: str(self.halvings.count).encode()})
        return sum(map(int, counts.values()))

    def _write(self, usable: Sequence[Example], scored: Sequence[Example]) -> DetectResult:
        arm = self.root / "arms" / arm_name(self.config)
        write_json(self.root / "run.json", self.run_json)
        make_directory(arm)
        with self._clock("write"):
            dataset = write_dataset(arm, usable, self._provenance(), cross=self.config.cross_branch)
            renderers = {role: one.renderer for role, one in self.pair.items()}
            samples = write_samples(arm, scored, renderers)
            outcomes = arm / "outcomes.parquet"
            write_table(outcomes, outcomes_table(self.examples))
        warnings = self._warnings_after()
        summary: dict[str, Any] = {
            **funnel(self.examples, self.config),
            "arm": arm.name,
            "settings": asdict(self.config),
            "models": {role: one.model.fingerprint for role, one in self.pair.items()},
            "served": {role: one.server.model for role, one in self.pair.items() if one.server},
            "dataset_sha256": hashlib.sha256(dataset.read_bytes()).hexdigest(),
            "templates": [*self.told, *warnings],
            "versions": package_versions(),
            **({"search": self.searched} if self.searched else {}),
            "halved_batches": self.halved,
            "seconds": {name: round(value, 3) for name, value in self.seconds.items()},
        }
        replaced = explain_replacement(arm, summary)
        unchanged = is_unchanged(arm, summary)
        if not unchanged:  # else the seconds stay those of the passes
            write_json(arm / "funnel.json", summary)
        last = nothing_scored(self.examples, self.config)  # what to change stands at the end
        show_funnel(summary, [note for note in (*warnings, *replaced) if note not in last])
        say(
            f"The dataset is {dataset}{UNCHANGED if unchanged else ''}\n"
            "Beside it: dataset.jsonl (the same rows), candidates, samples, outcomes, funnel"
        )
        show_notes(last)
        return DetectResult(self.root, arm, dataset, samples, outcomes, summary, self.different)

    def _tell_before(self) -> list[str]:
        """Print and return what may be a reason to stop the run, before the models are asked."""
        found = self._warnings_before()
        show_notes(found)
        return found

    def _warnings_after(self) -> list[str]:
        """Return what else a user should know before using the result."""
        found = warnings_of(self.examples, self.config, self.pair)
        if self.halved:
            found.append(
                f"{self.halved} batches were too large for the memory and ran in halves; "
                "nothing is missing. A lower max_batch_tokens avoids this."
            )
        return found

    def _warnings_before(self) -> list[str]:
        """Return what is known before a model is asked."""
        found = warnings_before(self.examples, self.config, self.pair)
        if self.earlier:
            found.append(f"{self.earlier} counterfactuals of an earlier run were left out.")
        if self.different:
            found.append(
                "The two models have different tokenizers: the teacher's values are pooled over "
                "the student's tokens, and `leaf distill` cannot train on this pair."
            )
        return found


def _is_longer(candidate: Example, view: Example) -> bool:
    """Whether the changed prompt has more tokens than the view's, for one of the models."""
    return any(
        _prompt_length(one) > _prompt_length(view.renderings[role])
        for role, one in candidate.renderings.items()
    )


def _prompt_length(rendering: Rendering) -> int:
    return int((~rendering.loss_mask).sum())
