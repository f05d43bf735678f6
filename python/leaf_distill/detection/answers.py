"""Answers of a model, graded; both are kept in the row cache."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from leaf_distill.config import (
    AnswerOptions,
    GradingOptions,
    ModelOptions,
    json_object,
)
from leaf_distill.data.collator import plan_batches
from leaf_distill.data.example import Answer, Example, Rendering, Role, UnusableRow, remaining
from leaf_distill.data.prompt import Renderer, tokenizer_fingerprint
from leaf_distill.detection.cache import (
    RowCache,
    compute_missing,
    default_cache_directory,
    numbered,
)
from leaf_distill.detection.room import little_room, warn_of_little_room
from leaf_distill.detection.served import served_answers
from leaf_distill.detection.verdicts import PROGRAMS_A_GRADING, batches, grade_answers
from leaf_distill.grading import gold_kind, gold_kinds, has_number
from leaf_distill.grading.code import CodeGrader
from leaf_distill.io import digest, user_directory
from leaf_distill.models.generation import Draws, generate
from leaf_distill.models.loading import LazyModel
from leaf_distill.models.memory import default_batch_tokens
from leaf_distill.models.quantization import weight_itemsize
from leaf_distill.models.server import Server
from leaf_distill.ranks import current

UNGRADED = ("cut_off", "not_finite", "too_long", "server_refused")
"""Verdicts of answers that no grader sees."""
VERSION = 1
"""Raised with a change of the generation, so that no answer of an older one is used."""


@dataclass(frozen=True)
class PromptedModel:
    """A model, the renderer of the prompts that it reads, and the server of its answers, if any."""

    role: Role
    model: LazyModel
    renderer: Renderer
    server: Server | None = None

    @cached_property
    def identity(self) -> list[object]:
        """Fingerprint and form of the weights, tokenizer, end tokens: for keys of the cache."""
        quantized = [self.model.quantization] if self.model.quantization else []
        return [
            self.model.fingerprint,
            self.model.dtype,
            *quantized,
            tokenizer_fingerprint(self.renderer.tokenizer),
            self.renderer.end_ids,
        ]

    def prompt(self, example: Example) -> Rendering:
        """Render the prompt alone; UnusableRow as the renderer's, or for an unknown token."""
        return self.known(self.renderer.prompt(example))

    def known(self, rendering: Rendering) -> Rendering:
        """Refuse a token that the tokenizer has, and the embedding has not; else return it."""
        rows = int(self.model.config.get_text_config().vocab_size)
        largest = int(rendering.input_ids.max(initial=0))
        if largest >= rows:
            token = self.renderer.tokenizer.convert_ids_to_tokens(largest)
            raise UnusableRow(
                "outside_vocabulary",
                f"token {token!r} (id {largest}) is beyond the {rows} embeddings of the "
                f"{self.model.argument}",
            )
        return rendering

    def batch_tokens(self, config: ModelOptions, *, answers: bool = False) -> int:
        """Return the most tokens of a batch, padding included; the same on all ranks of a run.

        Their free memory may differ, and they share the batches of one plan.
        """
        model, most = self.model, config.max_batch_tokens
        if most is None:
            most = default_batch_tokens(
                model.config,
                model.dtype,
                model.device,
                free=model.free_memory,
                answers=answers,
                weight_itemsize=weight_itemsize(model.dtype, model.quantization),
            )
        return int(current().least(np.asarray([most], dtype=np.int64))[0])


@dataclass(frozen=True)
class Decoding:
    """How answers come from a model's logits: greedily, or at a temperature by drawing.

    Attributes:
        stop: an answer ends before the first of these texts.
        temperature: of drawn answers; 0 answers greedily.
        top_p: draw from the likeliest tokens that together have this probability.
        seed: of the drawing.
    """

    stop: tuple[str, ...] = ()
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    @property
    def settings(self) -> list[object]:
        """The parts of a key that decide an answer beside the prompt; none for a greedy one."""
        drawn = [self.temperature, self.top_p, self.seed] if self.temperature else []
        return [list(self.stop), *drawn] if self.stop or drawn else []


GREEDY = Decoding()


def render_for(
    pair: Mapping[Role, PromptedModel],
    example: Example,
    render: Callable[[Renderer, Example], Rendering],
) -> None:
    """Set the rendering for each model; where they render alike, it is made and held once.

    Args:
        pair: the models.
        example: a row or a candidate.
        render: makes the rendering, such as `Renderer.prompt`.

    Raises:
        UnusableRow: as the renderer's, or for a token that a model does not know.
    """
    made: dict[str, Rendering] = {}
    for role, one in pair.items():
        like = one.renderer.fingerprint
        if like not in made:
            made[like] = render(one.renderer, example)
        example.renderings[role] = one.known(made[like])


def prompted_model(
    role: Role, model: LazyModel, config: ModelOptions, server: Server | None = None
) -> PromptedModel:
    """Return a model with the renderer that the configuration asks for."""
    renderer = Renderer(
        model.tokenizer,
        chat_template=config.chat_template,
        system_prompt=config.system_prompt,
        template_kwargs=json_object(config.chat_template_kwargs, "chat_template_kwargs"),
    )
    return PromptedModel(role, model, renderer, server)


def open_cache(config: GradingOptions) -> RowCache:
    """Open the row cache of a configuration."""
    return RowCache(cache_directory(config))


def cache_directory(config: GradingOptions) -> Path:
    """Return the directory of the row cache of a configuration."""
    return user_directory(config.cache_dir or default_cache_directory(), "cache_dir")


def leave_without_gold(
    examples: Sequence[Example], config: AnswerOptions, cache: RowCache | None
) -> None:
    """Mark the rows that have nothing to grade an answer against.

    That is an answer or a completion; or for `grade` "code" tests that work: those of a row with a
    reference solution are run on it, unless `cache` is None.
    """
    rows = list(remaining(examples))
    if config.grade != "code":
        for example in rows:
            if not example.gold.strip():
                detail = "neither an answer nor a completion's text to grade against"
                example.leave("rows", "no_gold", detail)
        return
    for example in rows:
        if example.tests is None:
            example.leave("rows", "no_tests", "no column with tests for a program")
    if cache is None:
        return
    tested = [(example, example.tests) for example in remaining(rows) if example.tests]
    ranks, problems = current(), dict[int, bytes]()
    with CodeGrader(timeout_s=config.grade_timeout, store=cache) as grader:
        plan = batches(len(tested), PROGRAMS_A_GRADING)
        for index in ranks.share(len(plan)):
            found = grader.check([tested[at][1] for at in plan[index]])
            problems |= zip(plan[index], map(str.encode, found), strict=True)
    for at, problem in ranks.exchange(problems).items():
        example = tested[at][0]
        if problem:
            example.leave("rows", "bad_tests", problem.decode())


def answer(
    asked: PromptedModel,
    examples: Sequence[Example],
    config: AnswerOptions,
    cache: RowCache,
    *,
    decoding: Decoding = GREEDY,
    graded: bool = True,
    grade_cut_off: bool = False,
) -> None:
    """Set `answers[role]` of each example to the model's answer with its verdict.

    Args:
        asked: the model; its weights are loaded only where the cache lacks an answer and no server
            gives it.
        examples: rows or candidates with a rendering for the model's role. Where a row brings an
            answer along, `given`, the model is not asked.
        decoding: greedy or drawn. The n-th row with the same prompt has the prompt's n-th draw.
        graded: whether the examples have what answers are graded against; otherwise an answer keeps
            the verdict None.
        grade_cut_off: whether an answer that is right before it is cut off is "right".

    Raises:
        ServerError: the model's server gives no answers.
    """
    given = _answers(asked, examples, config, cache, decoding)
    if graded:
        gradable = (None, "cut_off") if grade_cut_off else (None,)
        ungraded = [at for at, one in enumerate(given) if one.verdict in gradable]
        texts = [(examples[at], examples[at].prefix + given[at].text) for at in ungraded]
        judged = grade_answers(texts, config, cache)
        for at, (verdict, detail) in zip(ungraded, judged, strict=True):
            if given[at].verdict is None or verdict == "right":
                given[at] = replace(given[at], verdict=verdict, detail=detail)
    for example, one in zip(examples, given, strict=True):
        example.answers[asked.role] = one


def _answers(
    asked: PromptedModel,
    examples: Sequence[Example],
    config: AnswerOptions,
    cache: RowCache,
    decoding: Decoding,
) -> list[Answer]:
    """Return the answer that a row brings along, else that of the server, else of the model."""
    own = [given_answer(asked.role, example) for example in examples]
    rest = [example for example, text in zip(examples, own, strict=True) if text is None]
    if asked.server is not None:
        found = iter(served_answers(asked, asked.server, rest, config, cache, decoding))
    else:
        found = iter(_generate(asked, rest, config, cache, decoding))
    answers = []
    for example, text in zip(examples, own, strict=True):
        if text is None:
            answers.append(next(found))
            continue
        example.notes.append(f"{asked.role}_answer_given")
        ids = asked.renderer.tokenizer(text, add_special_tokens=False)["input_ids"]
        answers.append(Answer(text, len(ids)))
    return answers


def given_answer(role: Role, example: Example) -> str | None:
    """Return the answer that a row brings along, to its prompt as it is."""
    as_it_is = example.branch == "original" and not example.prefix
    return example.given.get(role) if as_it_is else None


def _generate(
    asked: PromptedModel,
    examples: Sequence[Example],
    config: AnswerOptions,
    cache: RowCache,
    decoding: Decoding,
) -> list[Answer]:
    prompts = [prompt_ids(example, asked.role) for example in examples]
    plan, keys = plan_answers(asked, prompts, config, decoding)
    drawn = decoding.temperature > 0
    lengths = list(map(len, prompts))
    little = little_room(lengths, asked.model.max_positions, config.max_new_tokens)

    def compute(batch: list[int]) -> list[bytes]:
        warn_of_little_room(asked.model.name, little, cache)
        answers = generate(
            asked.model.load(),
            asked.renderer.tokenizer,
            [prompts[at] for at in batch],
            end_ids=asked.renderer.end_ids,
            max_new_tokens=config.max_new_tokens,
            stop=decoding.stop,
            draws=Draws(decoding.temperature, decoding.top_p, [int(keys[at], 16) for at in batch])
            if drawn
            else None,
        )
        return [json.dumps([one.text, one.n_tokens, one.verdict]).encode() for one in answers]

    description = f"{asked.role} answers"
    # The other rows of a batch change the last bits of logits, which a draw may depend on.
    values = compute_missing(
        cache, keys, plan, compute, description=description, whole_batches=drawn
    )
    return [Answer(*json.loads(value)) for value in values]


def plan_answers(
    asked: PromptedModel,
    prompts: Sequence[list[int]],
    config: AnswerOptions,
    decoding: Decoding = GREEDY,
) -> tuple[list[list[int]], list[str]]:
    """Return the batches of prompts that are answered together, and each one's key in the cache."""
    settings = ["answer", VERSION, *asked.identity, config.max_new_tokens, *decoding.settings]
    keys = [digest([*settings, prompt]) for prompt in prompts]
    if decoding.temperature > 0:
        keys = numbered(keys)
    lengths = [len(prompt) + config.max_new_tokens for prompt in prompts]
    return plan_batches(lengths, max_tokens=asked.batch_tokens(config, answers=True)), keys


def gold_warning(golds: Sequence[str], config: AnswerOptions) -> list[str]:
    """Return a sentence where `grade` finds in golds no mathematics, or no number, to compare."""
    if config.grade == "math":
        others = [gold for gold in golds if gold_kind(gold) not in ("math", "number")]
        what = "are no mathematics and are graded as what they are"
    elif config.grade == "number":
        others = [gold for gold in golds if not has_number(gold)]
        what = "have no number and are compared as words"
    else:
        return []
    if not others:
        return []
    kinds = gold_kinds(others)
    listed = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
    advice = (
        " A text is right only as a whole; give such rows a short `answer`."
        if kinds["text"]
        else ""
    )
    return [f"{len(others)} of {len(golds)} golds {what}: {listed}.{advice}"]


def prompt_ids(example: Example, role: Role) -> list[int]:
    """Return the token ids of a rendering before its completion."""
    rendering = example.renderings[role]
    ids: list[int] = rendering.input_ids[~rendering.loss_mask].tolist()
    return ids
