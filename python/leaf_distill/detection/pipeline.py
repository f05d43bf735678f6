"""Stage 1 as a whole: rows in, a dataset of originals and validated counterfactuals out.

    rows -> render -> answer, mark -> saliency -> detect -> prune -> validate -> dataset

Answers, saliencies and verdicts come from the row cache where it has them; everything else is
computed anew in milliseconds.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from leaf_distill.config import DetectConfig, json_object, need, package_versions
from leaf_distill.data.dataset import load_examples
from leaf_distill.data.example import ROLES, Example, Floats, Role, UnusableRow, remaining
from leaf_distill.data.template import template_differences
from leaf_distill.detection.answers import (
    ANSWER_SHOWN,
    PromptedModel,
    answer,
    gold_warning,
    leave_without_gold,
    open_cache,
    prompted_model,
    render_for,
)
from leaf_distill.detection.arms import (
    arm_name,
    check_models,
    check_run,
    explain_replacement,
    is_unchanged,
)
from leaf_distill.detection.counterfactual import propose
from leaf_distill.detection.funnel import funnel, outcomes_table, show_funnel
from leaf_distill.detection.output import write_dataset, write_samples
from leaf_distill.detection.scores import score_perplexity, score_saliency
from leaf_distill.detection.spans import find_spans
from leaf_distill.grading.code import FAILED as FAILED_PROGRAMS
from leaf_distill.io import locked, make_directory, user_directory, write_json, write_table
from leaf_distill.models.loading import LazyModel
from leaf_distill.models.tokenizer import check_same_tokenizer
from leaf_distill.ranks import current, together

if TYPE_CHECKING:  # seconds to import
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


FAILED = ("wrong", "no_answer")
"""The verdicts of an answer that was judged and is not right; of a program with `grade` "code"."""


@dataclass(frozen=True)
class DetectResult:
    """Paths of an arm's files, and its funnel (the content of funnel.json)."""

    run_directory: Path
    arm: Path
    dataset: Path
    samples: Path
    outcomes: Path
    funnel: dict[str, Any]


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
    samples.parquet (what was measured on each scored row), outcomes.parquet (where each row and
    candidate left, and why) and funnel.json. A row without an answer is graded against its
    completion.

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
        )
    return _Run(config, models, config.dataset if dataset is None else dataset).run()


class _Run:
    """The state of one run."""

    def __init__(self, config: DetectConfig, models: dict[Role, LazyModel], rows: Any) -> None:
        self.config = config
        self.root = user_directory(config.output_dir)
        self.seconds: dict[str, float] = {}
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
            self.pair = {role: prompted_model(role, models[role], config) for role in ROLES}
        if len({one.row_id for one in self.examples}) < len(self.examples):
            for row_id, example in enumerate(self.examples):  # the rows of several runs together
                example.row_id = row_id
        check_same_tokenizer(models["teacher"].tokenizer, models["student"].tokenizer)
        self.run_json = check_models(self.root, models)
        limits = [model.max_positions for model in models.values()]
        self.limit = min([config.max_length, *(limit for limit in limits if limit)])

    @contextmanager
    def _clock(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def run(self) -> DetectResult:
        lock = nullcontext() if current().rank else locked(self.root)
        with lock, open_cache(self.config) as self.cache:
            usable = self._label()
            if not usable:
                raise self._nothing_usable()
            marked = usable if self.config.select == "all" else self._mark(usable)
            with self._clock("saliency"):
                # The teacher first: where both have answered, its weights are still in memory.
                for role in reversed(ROLES):
                    score_saliency(self._use(role), marked, self.config, self.cache)
            with self._clock("detect"):
                find_spans(marked, self.config)
            scored = list(remaining(marked))
            with self._clock("prune"):
                self._propose(scored)
            with self._clock("validate"):
                self._validate(list(remaining(scored)))
                self._use(None)
            return current().from_first(lambda: self._write(usable, scored))

    def _use(self, role: Role | None) -> PromptedModel:
        """Return the role's model, after the weights of the other one are released."""
        for other, one in self.pair.items():
            if other != role:
                one.model.release()
        return self.pair[role or "student"]

    @property
    def _grades(self) -> bool:
        """Whether any answer is graded."""
        return self.config.select != "all" or self.config.validate != "none"

    @property
    def _failed(self) -> tuple[str, ...]:
        """The verdicts of a judged answer that is not right."""
        return FAILED_PROGRAMS if self.config.grade == "code" else FAILED

    def _label(self) -> list[Example]:
        """Give every row its completion and both renderings; return the rows that fit."""
        if self._grades:
            leave_without_gold(self.examples, self.config, self.cache)
        if self.config.completion_source == "dataset":
            return self._render(self.examples, whole=True)
        asked = self._render(self.examples, whole=False)
        self._answer("teacher", asked, "predict")
        for example in asked:
            given = example.answers["teacher"]
            if given.verdict in ("cut_off", "not_finite"):
                example.leave("render", f"teacher_{given.verdict}")
            elif not given.text.strip():
                example.leave("render", "empty_completion", "the teacher's answer is empty")
            else:
                # The completion was what an answer is graded against; with tests there may be none.
                example.answer = example.gold or None
                example.completion, example.reply = given.text, None
        return self._render(asked, whole=True)

    def _render(self, examples: Sequence[Example], *, whole: bool) -> list[Example]:
        """Render examples for both models, with their completions or without; return what fits."""
        with self._clock("render"):
            for example in remaining(examples):
                try:
                    render_for(self.pair, example, whole=whole)
                except UnusableRow as problem:
                    example.leave("render", problem.reason, problem.detail)
                else:
                    self._check_length(example)
        return list(remaining(examples))

    def _check_length(self, example: Example) -> None:
        prompt = max(int((~one.loss_mask).sum()) for one in example.renderings.values())
        whole = max(len(one) for one in example.renderings.values())
        limit = f"of the {self.limit} tokens that max_length and the models allow"
        stage = "render" if example.candidate_id < 0 else "prune"
        if prompt >= self.limit:
            example.leave(stage, "prompt_too_long", f"the prompt has {prompt} {limit}")
        elif whole > self.limit:
            detail = f"prompt and completion have {whole} {limit}"
            example.leave(stage, "completion_too_long", detail)

    def _answer(self, role: Role, examples: Sequence[Example], step: str) -> None:
        # A program may stand whole before the prose that is cut off; as a label it would not end.
        programs = self.config.grade == "code" and self.config.completion_source == "dataset"
        with self._clock(step):
            model = self._use(role)
            answer(model, examples, self.config, self.cache, grade_cut_off=programs)

    def _mark(self, usable: Sequence[Example]) -> list[Example]:
        """Return the rows that the student fails and the teacher solves.

        The teacher is asked only where the student's answer is wrong.
        """
        self._answer("student", usable, "predict")
        for example in usable:
            self._leave_unless(example, "student", self._failed)
        failed = list(remaining(usable))
        if self.config.completion_source == "dataset":
            self._answer("teacher", failed, "predict")
        for example in failed:
            self._leave_unless(example, "teacher", ("right",))
        return list(remaining(failed))

    def _leave_unless(self, example: Example, role: Role, wanted: Sequence[str]) -> None:
        verdict = example.answers[role].verdict
        if verdict not in wanted:
            stage = "mark" if verdict in ("right", *self._failed) else "predict"
            example.leave(stage, f"{role}_{verdict}", self._said(example, role))

    def _said(self, example: Example, role: Role) -> str:
        """Quote the end of an answer, and what it was graded by: a failed test or the gold."""
        given, gold = example.answers[role], example.gold
        text = given.text
        if given.detail:
            return f"{given.detail}; the answer ends {text[-ANSWER_SHOWN:]!r}"
        return f"the answer ends {text[-ANSWER_SHOWN:]!r}, the gold ends {gold[-ANSWER_SHOWN:]!r}"

    def _propose(self, scored: Sequence[Example]) -> None:
        """Set the candidates of each row, rendered without their completion."""
        strategy = self.config.strategy
        perplexity: Sequence[Floats | None] = [None] * len(scored)
        if strategy == "perplexity":
            perplexity = score_perplexity(self._use("student"), scored, self.config, self.cache)
        for example, values in zip(scored, perplexity, strict=True):
            propose(example, strategy=strategy, seed=self.config.seed, perplexity=values)
            for candidate in remaining(example.candidates):
                self._render_candidate(candidate)
            if example.candidates and not any(remaining(example.candidates)):
                example.leave("prune", "no_usable_cut", "no cut leaves a usable prompt")

    def _render_candidate(self, candidate: Example) -> None:
        try:
            render_for(self.pair, candidate, whole=False)
        except UnusableRow as problem:
            candidate.leave("prune", "not_renderable", problem.detail)
        else:
            self._check_length(candidate)

    def _validate(self, examples: Sequence[Example]) -> None:
        """Ask again on the cut prompts, the cheaper student first."""
        judges: dict[str, tuple[Role, ...]] = {
            "both": ("student", "teacher"),
            "teacher": ("teacher",),
            "none": (),
        }
        candidates = [one for example in examples for one in remaining(example.candidates)]
        for role in judges[self.config.validate]:
            asked = list(remaining(candidates))
            self._answer(role, asked, "validate")
            for candidate in asked:
                verdict = candidate.answers[role].verdict
                if verdict != "right":
                    candidate.leave("validate", f"{role}_{verdict}", self._said(candidate, role))
        for example in examples:
            if not any(remaining(example.candidates)):
                detail = "no cut prompt was answered correctly"
                example.leave("validate", "no_valid_cut", detail)

    def _nothing_usable(self) -> ValueError:
        gone = [example for example in self.examples if example.outcome]
        counts = Counter(example.outcome.reason for example in gone if example.outcome)
        reasons = ", ".join(f"{count} {reason}" for reason, count in counts.most_common())
        first = gone[0]
        why = f"row {first.row_id}: {first.outcome.detail}" if first.outcome else ""
        return ValueError(
            f"dataset: must have a usable row, got {len(gone)} rows that are not ({reasons}); {why}"
        )

    def _write(self, usable: Sequence[Example], scored: Sequence[Example]) -> DetectResult:
        arm = self.root / "arms" / arm_name(self.config)
        write_json(self.root / "run.json", self.run_json)
        make_directory(arm)
        with self._clock("write"):
            dataset = write_dataset(arm, usable)
            samples = write_samples(arm, scored)
            outcomes = arm / "outcomes.parquet"
            write_table(outcomes, outcomes_table(self.examples))
        warnings = self._warnings()
        summary: dict[str, Any] = {
            **funnel(self.examples, self.config),
            "arm": arm.name,
            "settings": asdict(self.config),
            "models": {role: one.model.fingerprint for role, one in self.pair.items()},
            "dataset_sha256": hashlib.sha256(dataset.read_bytes()).hexdigest(),
            "templates": warnings,
            "versions": package_versions(),
            "seconds": {name: round(value, 3) for name, value in self.seconds.items()},
        }
        replaced = explain_replacement(arm, summary)
        if not is_unchanged(arm, summary):  # else the seconds stay those of the passes
            write_json(arm / "funnel.json", summary)
        show_funnel(summary, [*warnings, *replaced])
        print(f"The dataset is {dataset}; samples, outcomes and funnel are beside it")
        return DetectResult(self.root, arm, dataset, samples, outcomes, summary)

    def _nothing_marked(self) -> list[str]:
        """Say what the models' answers were graded where no row is left to search."""
        if self.config.select == "all" or any(one.nll for one in self.examples):
            return []
        asked = [one.answers["student"].verdict for one in self.examples if one.answers]
        if asked and set(asked) == {"right"}:
            return [f"No row is left to search: the student answers all {len(asked)} correctly."]
        given = []
        for role in ROLES:
            verdicts = [one.answers[role].verdict for one in self.examples if role in one.answers]
            counts = Counter(str(verdict).replace("_", " ") for verdict in verdicts)
            if counts:
                listed = ", ".join(f"{count} {verdict}" for verdict, count in counts.most_common())
                given.append(f"the {role}'s {len(verdicts)} answers are {listed}")
        return [
            f"No row is left to search: {'; '.join(given)}. outcomes.parquet quotes them; see "
            f"--grade (now {self.config.grade}), --max_new_tokens and --chat_template."
        ]

    def _warnings(self) -> list[str]:
        """Return what a user should know before using the result."""
        templates = [self.pair[role].renderer.template for role in ("teacher", "student")]
        found = template_differences(*templates)
        if self.earlier:
            found.append(f"{self.earlier} counterfactuals of an earlier run were left out.")
        if self._grades:
            golds = [one.gold for one in self.examples if one.answers]
            found += gold_warning(golds, self.config)
        found += self._nothing_marked()
        for role, one in self.pair.items():
            losses = [example.nll[role] for example in self.examples if role in example.nll]
            vocabulary = len(one.model.tokenizer)
            # In a toy's vocabulary, a confident wrong answer costs more than a uniform guess.
            uniform = math.log(vocabulary) if vocabulary >= 1000 else math.inf
            if losses and (mean := sum(losses) / len(losses)) > uniform:
                found.append(
                    f"The {role}'s mean loss on the completions is {mean:.1f} nats a token, above "
                    f"the {uniform:.1f} of a uniform guess: check the model and its chat template."
                )
        return found
