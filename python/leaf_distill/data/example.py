"""The one record of the loop: a row of a dataset, which gains fields on its way to the loss."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from leaf_distill.data.tests import Tests

Role = Literal["student", "teacher"]
ROLES: tuple[Role, ...] = get_args(Role)
Branch = Literal["original", "counterfactual", "cross"]

Message = dict[str, Any]
"""One turn of a conversation: `role` and `content`, both text, and whatever else a chat template
reads, such as `reasoning_content` or `tool_calls`."""

Range = tuple[int, int]
"""Characters [start, stop) of the analyzed text, or indices [start, stop) of its tokens."""

Ids = NDArray[np.int32]
Mask = NDArray[np.bool_]
Floats = NDArray[np.float32]


class UnusableRow(ValueError):
    """A row that cannot be used: a short reason code, and a sentence."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail


class Outcome(NamedTuple):
    """The stage at which a row or candidate left the search for counterfactuals, and the reason."""

    stage: str
    reason: str  # a short code
    detail: str = ""


@dataclass(frozen=True)
class Answer:
    """A model's answer.

    Attributes:
        text: the decoded tokens.
        n_tokens: their number, without the end token.
        verdict: the grader's ("right", "wrong", "no_answer", "timeout", or one of a program), or
            "cut_off" by the length limit, "not_finite" for invalid logits, "too_long" for the
            server's context or "server_refused"; None if the answer was not graded.
        detail: of a program, the first test that failed, and how; of a server, why it refused.
    """

    text: str
    n_tokens: int
    verdict: str | None = None
    detail: str = ""


@dataclass(frozen=True, eq=False)
class Rendering:
    """A tokenized prompt, with or without its completion.

    Attributes:
        input_ids: int32 [T].
        loss_mask: bool [T], True on the completion's tokens and its end token.
        offsets: int32 [T, 2], characters [start, stop) of the analyzed text on domain tokens, and
            -1 elsewhere. Consecutive domain tokens leave no gap: characters that a tokenizer drops,
            such as a trimmed space, belong to the next token. Tokens that are the bytes of one
            character share it.
        prunable: bool [T], the domain without tokens of whitespace only.
    """

    input_ids: Ids
    loss_mask: Mask
    offsets: NDArray[np.int32]
    prunable: Mask

    @property
    def domain(self) -> Mask:
        """bool [T]: the tokens that lie within the analyzed text."""
        inside: Mask = self.offsets[:, 0] >= 0
        return inside

    def __len__(self) -> int:
        return len(self.input_ids)

    def __getitem__(self, tokens: slice | Mask) -> Rendering:
        """Return a part of it: a range of its tokens, or those where a mask is True."""
        return Rendering(
            self.input_ids[tokens],
            self.loss_mask[tokens],
            self.offsets[tokens],
            self.prunable[tokens],
        )


@dataclass(eq=False)
class Example:
    """A row of the dataset (candidate_id -1), or a counterfactual of it.

    The first block is read from the row; the stages of `leaf detect` fill in the rest. A
    counterfactual is another Example, with the row_id, completion and answer of its original (or a
    new answer of the teacher), and messages whose analyzed turns lack the characters of `cut`, or
    have `inserted` in their place. At the response level (`segment`
    above 0) both models are given the beginning of the response, `prefix`, behind the prompt; it
    carries no label, and it is what the cut is made in. Where `teacher_messages` are given (branch
    "cross"), the teacher reads them and the student reads `messages`.
    """

    row_id: int  # position in the dataset
    messages: tuple[Message, ...]  # the prompt; the last message is the user's
    completion: str
    answer: str | None = None
    tests: Tests | None = None  # of the program that the answer is
    source: str | None = None  # the collection that the row comes from
    difficulty: str | None = None  # how hard the collection says it is
    reply: Message | None = None  # the completion's message, if it holds more than text
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)  # tools and other variables
    given: Mapping[Role, str] = field(default_factory=dict)  # models' answers that the row brings
    verdict: str | None = None  # on the student's answer, as the dataset of `leaf detect` has it
    turns: tuple[int, ...] = ()  # messages that are analyzed; none given: the last one
    segment: int = 0  # segments of the response in `prefix`; 0: the instruction level
    prefix: str = ""  # the response up to the end of this segment; `completion` is what follows
    teacher_messages: tuple[Message, ...] | None = None  # what the teacher reads instead
    candidate_id: int = -1
    cut: tuple[Range, ...] = ()  # sorted, disjoint characters of the original's `text`
    inserted: tuple[str, ...] = ()  # what stands in place of each range of `cut`; (): nothing
    # Where a range is empty, its text was inserted before that character.
    strategy: str | None = None  # the strategy that proposed the cut
    cut_score: float | None = None  # mean score of the tokens that were chosen
    weight: float = 1.0  # of each label token, within its term of the distillation loss
    notes: list[str] = field(default_factory=list)  # alterations, as short codes
    outcome: Outcome | None = None  # None: still in

    renderings: dict[Role, Rendering] = field(default_factory=dict)
    answers: dict[Role, Answer] = field(default_factory=dict)

    # One entry for each of the d domain tokens; where the models have different tokenizers, of the
    # student's, over which the teacher's values are pooled.
    norms: dict[Role, Floats] = field(default_factory=dict)  # gradient norms [d] (Eq. 2)
    nll: dict[Role, float] = field(default_factory=dict)  # nats a label token
    offsets: NDArray[np.int32] | None = None  # characters [d, 2]
    slot: NDArray[np.int32] | None = None  # [d]; neighbors in both sequences differ by 1
    prunable: Mask | None = None  # [d]
    suspicion: Floats | None = None  # [d], high on confounders: another score than the gap
    saliency: dict[Role, Floats] = field(default_factory=dict)  # norms scaled to [0, 1] (Eq. 3)
    score: Floats | None = None  # [d], low on confounders (Eq. 5)
    confounder: Mask | None = None  # [d]
    spans: tuple[Range, ...] = ()  # token indices
    candidates: list[Example] = field(default_factory=list)
    # The levels at which a row is analyzed, each an Example of its own; empty: the row is its own.
    views: list[Example] = field(default_factory=list)

    @property
    def branch(self) -> Branch:
        if self.candidate_id < 0:
            return "original"
        return "counterfactual" if self.teacher_messages is None else "cross"

    @property
    def failed(self) -> bool:
        """Whether the student was asked, as the dataset says, and gave no right answer."""
        return self.verdict not in (None, "right")

    @property
    def places(self) -> tuple[int, ...]:
        """The indices of the analyzed messages; that after the last one is the completion."""
        if self.segment:
            return (len(self.messages),)
        return self.turns or (len(self.messages) - 1,)

    @property
    def text(self) -> str:
        """The text that characters are counted in: the analyzed turns joined, or the prefix."""
        return self.prefix if self.segment else "".join(self._contents())

    @property
    def parts(self) -> tuple[Range, ...]:
        """The characters of `text` that belong to each of `places`; no span crosses a border."""
        lengths = (len(self.prefix),) if self.segment else map(len, self._contents())
        borders = [0, *accumulate(lengths)]
        return tuple(pairwise(borders))

    def _contents(self) -> list[str]:
        return [self.messages[place]["content"] for place in self.places]

    @property
    def gold(self) -> str:
        """The text that an answer is graded against: the known answer, else the completion."""
        return self.completion if self.answer is None else self.answer

    def as_read_by(self, role: Role) -> Example:
        """Return the row with the prompt that a model reads; it shares renderings and notes."""
        if role == "student" or self.teacher_messages is None:
            return self
        return replace(self, messages=self.teacher_messages)

    def derived(self, **changes: Any) -> Example:
        """Return a new Example with what was read from the row, changed, and with nothing else."""
        return Example(**{name: getattr(self, name) for name in ROW_FIELDS} | changes)

    def leave(self, stage: str, reason: str, detail: str = "") -> None:
        """Take the row (or candidate) out of the search for counterfactuals, with a reason."""
        self.outcome = Outcome(stage, reason, detail)


ROW_FIELDS = (
    *("row_id", "messages", "completion", "answer", "tests", "source", "reply"),
    *("difficulty", "template_kwargs", "turns", "segment", "prefix"),
)
"""The fields that `Example.derived` takes over."""


def views_of(examples: Iterable[Example]) -> Iterator[Example]:
    """Yield the views of each row; a row without any is its own."""
    return (view for example in examples for view in example.views or (example,))


def candidates_of(examples: Iterable[Example]) -> Iterator[Example]:
    """Yield the candidates of all views of rows."""
    return (candidate for view in views_of(examples) for candidate in view.candidates)


def remaining(examples: Iterable[Example]) -> Iterator[Example]:
    """Yield the examples that have not left."""
    return (example for example in examples if example.outcome is None)
