"""Asks both models: which rows are confounded, and which changed prompts repair them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager

from leaf_distill.data.example import Answer, Example, Role, remaining
from leaf_distill.detection.answers import (
    GREEDY,
    UNGRADED,
    Decoding,
    PromptedModel,
    answer,
)
from leaf_distill.detection.cache import RowCache
from leaf_distill.detection.config import DetectConfig
from leaf_distill.detection.verdicts import ANSWER_SHOWN, quote
from leaf_distill.grading.code import FAILED as FAILED_PROGRAMS

FAILED = ("wrong", "no_answer")
"""The verdicts of an answer that was judged and is not right; of a program with `grade` "code"."""

JUDGES: Mapping[str, tuple[Role, ...]] = {
    "both": ("student", "teacher"),
    "teacher": ("teacher",),
    "none": (),
}
"""Who is asked on a changed prompt, the cheaper student first."""

SAMPLED_AT = 0.7
"""The temperature of the answers that have to agree."""


class Judge:
    """The two models of a run, asked in turn, so that one alone is in memory.

    Args:
        pair: the models.
        config: the settings.
        cache: where answers and verdicts are kept.
        clock: measures the seconds of a stage, as a context manager.
        check: lets a candidate leave that cannot be trained on with its new completion.
    """

    def __init__(
        self,
        pair: Mapping[Role, PromptedModel],
        config: DetectConfig,
        cache: RowCache,
        clock: Callable[[str], AbstractContextManager[None]],
        check: Callable[[Example], None] = lambda candidate: None,
    ) -> None:
        self.pair, self.config, self.cache, self.clock = pair, config, cache, clock
        self.check = check

    def use(self, role: Role | None) -> PromptedModel:
        """Return the role's model, after the weights of the other one are released."""
        for other, one in self.pair.items():
            if other != role:
                one.model.release()
        return self.pair[role or "student"]

    def answer(
        self,
        role: Role,
        examples: Sequence[Example],
        stage: str,
        decoding: Decoding = GREEDY,
        *,
        graded: bool = True,
    ) -> None:
        """Set the role's answer of each example, with a verdict where it is graded."""
        # A program may stand whole before the prose that is cut off; as a label it would not end.
        programs = self.config.grade == "code" and not self._labels
        with self.clock(stage):
            answer(
                self.use(role),
                examples,
                self.config,
                self.cache,
                decoding=decoding,
                graded=graded,
                grade_cut_off=programs,
            )

    @property
    def _labels(self) -> bool:
        """Whether an answer may become a completion."""
        return self.config.completion_source == "teacher" or self.config.relabel

    @property
    def failed(self) -> tuple[str, ...]:
        """The verdicts of a judged answer that is not right."""
        return FAILED_PROGRAMS if self.config.grade == "code" else FAILED

    def mark(self, examples: Sequence[Example]) -> list[Example]:
        """Return the examples that the student fails and the teacher solves; the others leave.

        The teacher is asked only where the student's answer is wrong and its own is not known.
        """
        self.answer("student", examples, "predict")
        for example in examples:
            self._leave_unless(example, "student", self.failed)
        failed = list(remaining(examples))
        unasked = [one for one in failed if "teacher" not in one.answers]
        if unasked:
            self.answer("teacher", unasked, "predict")
        for example in failed:
            self._leave_unless(example, "teacher", ("right",))
        return list(remaining(failed))

    def _leave_unless(self, example: Example, role: Role, wanted: Sequence[str]) -> None:
        verdict = example.answers[role].verdict
        if verdict not in wanted:
            stage = "mark" if verdict in ("right", *self.failed) else "predict"
            example.leave(stage, f"{role}_{verdict}", said(example, role))

    def validate(self, examples: Sequence[Example]) -> None:
        """Ask again on the changed prompts; a candidate that does not hold leaves."""
        candidates = [one for example in examples for one in remaining(example.candidates)]
        judges = JUDGES[self.config.validate]
        if self.config.relabel:  # the student is graded against the teacher's new answer
            self._relabel(candidates)
            judges = tuple(role for role in judges if role != "teacher")
        for role in judges:
            asked = list(remaining(candidates))
            self.answer(role, asked, "validate")
            for candidate in asked:
                self._leave_unless_right(candidate, role)
        for example in examples:
            if not any(remaining(example.candidates)):
                detail = "no changed prompt was answered correctly"
                example.leave("validate", "no_valid_cut", detail)

    def _leave_unless_right(self, candidate: Example, role: Role) -> None:
        verdict = candidate.answers[role].verdict
        if verdict != "right":
            candidate.leave("validate", f"{role}_{verdict}", said(candidate, role))

    def _relabel(self, candidates: Sequence[Example]) -> None:
        """Give candidates the teacher's answer as their completion, if it passes the guard."""
        asked = list(remaining(candidates))
        self.answer("teacher", asked, "validate")
        for candidate in asked:
            given = candidate.answers["teacher"]
            if given.verdict in UNGRADED:
                candidate.leave("validate", f"teacher_{given.verdict}", said(candidate, "teacher"))
            elif not given.text.strip():
                candidate.leave("validate", "empty_completion", "the teacher's answer is empty")
            elif self.config.guard == "grader":
                self._leave_unless_right(candidate, "teacher")
        asked = list(remaining(asked))
        if self.config.guard == "agreement":
            self._leave_unless_agreed(asked)
        for candidate in remaining(asked):
            text = candidate.answers["teacher"].text
            if self.config.guard == "agreement":
                candidate.answer = text  # the changed prompt may have another answer than the row
            elif self.config.grade != "code":
                candidate.answer = candidate.gold
            candidate.completion, candidate.reply = text, None
            self.check(candidate)

    def _leave_unless_agreed(self, candidates: Sequence[Example]) -> None:
        """Draw more answers of the teacher; most must be graded right against its greedy one."""
        count = self.config.agreement
        drawn = [
            _with_gold(candidate, candidate.answers["teacher"])
            for candidate in candidates
            for _ in range(count)
        ]
        decoding = Decoding(temperature=SAMPLED_AT, seed=self.config.seed)
        self.answer("teacher", drawn, "validate", decoding)
        for at, candidate in enumerate(candidates):
            part = drawn[at * count : (at + 1) * count]
            agree = sum(one.answers["teacher"].verdict == "right" for one in part)
            if 2 * agree <= count:
                detail = f"{agree} of {count} drawn answers agree with the greedy one"
                candidate.leave("validate", "teacher_disagrees", detail)
            else:
                given = candidate.answers["teacher"]
                candidate.answers["teacher"] = Answer(
                    given.text, given.n_tokens, "right", f"{agree} of {count} drawn answers agree"
                )


def _with_gold(candidate: Example, given: Answer) -> Example:
    """Return the candidate once more, to be graded against an answer."""
    again = candidate.derived(answer=given.text)
    again.renderings = candidate.renderings
    return again


def said(example: Example, role: Role) -> str:
    """Quote the end of an answer, and what it was graded by: a failed test or the gold."""
    given = example.answers[role]
    if given.detail:
        return f"{given.detail}; the answer ends {given.text[-ANSWER_SHOWN:]!r}"
    return f"the answer {quote(given.text, example.gold)}"
