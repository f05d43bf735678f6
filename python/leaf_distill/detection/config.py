"""Settings of `leaf detect`, and its presets."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from leaf_distill.config import (
    LARGEST,
    AnswerOptions,
    PairOptions,
    RowOptions,
    ServerOptions,
    about,
    check_answer_options,
    check_range,
    check_rows,
    check_servers,
    documented,
)

Select = Literal["student_wrong", "all"]
CompletionSource = Literal["dataset", "teacher"]
SpanRule = Literal["absolute", "quantile"]
Strategy = Literal[
    "span",
    "collective",
    "random_tokens",
    "random_spans",
    "student_saliency",
    "teacher_saliency",
    "perplexity",
    "cumulative",
    "search",
    "distractors",
]
Level = Literal["instruction", "response", "both"]
Target = Literal["rest", "next"]
Score = Literal[
    "gap",
    "log_gap",
    "log_ratio",
    "rank",
    "lens",
    "intervention",
    "student",
    "teacher",
    "perplexity",
    "random",
]
Unit = Literal["token", "word", "phrase", "clause", "sentence"]
Edit = Literal["delete", "substitute"]
Guard = Literal["grader", "agreement"]
Preset = Literal["paper", "release"]
Validate = Literal["both", "teacher", "none"]
Quantization = Literal["int8", "bnb8", "nf4"]

PRESETS: dict[str, dict[str, Any]] = {
    "paper": {"widen": "token"},
    "release": {
        "widen": "token",
        "rule": "quantile",
        "threshold": 0.05,
        "response_threshold": 0.05,
        "select": "all",
        "validate": "none",
    },
}
"""Settings of a preset that are not the defaults. The release takes 0.10 for programs."""

LONG_UNITS: tuple[Unit, ...] = ("phrase", "clause", "sentence")
"""The units that hold several words."""

INSERTS: dict[str, Any] = {"level": "instruction", "edit": "delete", "cross_branch": False}
"""The settings that go with the strategy distractors."""

TURNS = re.compile(r"all|last|-?[1-9]\d{0,5}(,-?[1-9]\d{0,5})*")


@documented
@dataclass(frozen=True)
class DetectConfig(AnswerOptions, ServerOptions, RowOptions, PairOptions):
    """Settings of stage 1, from rows to validated counterfactuals.

    Raises:
        ValueError: a setting is outside its range; names the first.
    """

    output_dir: str = field(
        default="leaf-run",
        metadata=about("run directory; each strategy and threshold has an arm of its own in it"),
    )
    select: Select = field(
        default="student_wrong",
        metadata=about("rows to search: student_wrong (and teacher right), or all"),
    )
    completion_source: CompletionSource = field(
        default="dataset",
        metadata=about("whose completion is the label: the dataset's or the teacher's own answer"),
    )
    preset: Preset | None = field(
        default=None,
        metadata=about(
            "settings of the paper (its token cuts, not widened) or of the authors' release "
            "(quantile rule, no filter, no validation); a setting that is not its default wins"
        ),
    )
    level: Level = field(
        default="instruction",
        metadata=about(
            "where confounders are looked for: in the user's turns, in the beginning of the "
            "response, or both"
        ),
    )
    segments: int = field(
        default=2,
        metadata=about(
            "parts of a response; what stands before a border between two is a beginning of it"
        ),
    )
    target: Target = field(
        default="rest",
        metadata=about("labels behind a beginning of the response: all the rest, or the next part"),
    )
    turns: str = field(
        default="all",
        metadata=about(
            "user turns that are analyzed: all, last, or their numbers as in 1,3 (-1: the last)"
        ),
    )
    score: Score = field(
        default="gap",
        metadata=about(
            "gap of the gradients (Eq. 3-5); log_gap, log_ratio, rank: of their logarithms or "
            "ranks; lens: difference of the two models' log-probabilities of the token; "
            "intervention: how the answers' distributions change without it; controls: student, "
            "teacher (one model's gradient), perplexity, random"
        ),
    )
    shortlist: int = field(
        default=8,
        metadata=about(
            "words with the lowest gap that get an intervention score; phrases that the strategy "
            "search tries in a round"
        ),
    )
    draws: int = field(
        default=3,
        metadata=about(
            "replacements drawn for a word (score intervention; 0: it is left out) or for a span "
            "(edit substitute)"
        ),
    )
    threshold: float = field(
        default=0.10, metadata=about("score at or below which a token is a confounder (Eq. 5)")
    )
    response_threshold: float = field(
        default=0.15, metadata=about("the same for tokens of the response")
    )
    rule: SpanRule = field(
        default="absolute",
        metadata=about("absolute: cut at threshold; quantile: at that rank of the scores"),
    )
    cap: float = field(default=0.5, metadata=about("highest cut that the quantile rule may choose"))
    teacher_max: float | None = field(
        default=None,
        metadata=about("highest normalized teacher saliency that a confounder may have"),
    )
    join_gap: int = field(
        default=0, metadata=about("join spans that at most so many prompt tokens separate")
    )
    min_length: int = field(default=1, metadata=about("shortest span, in tokens"))
    strategy: Strategy = field(
        default="span",
        metadata=about(
            "span: one span at a time (the paper); collective: all together; controls of the same "
            "size under the same validation: random_tokens, random_spans, student_saliency, "
            "teacher_saliency, perplexity; cumulative: the most suspect phrase, the first two, "
            "the first three; search: phrase by phrase, what lowers the student's loss most and "
            "leaves the teacher right; distractors: insert a sentence of another prompt"
        ),
    )
    widen: Unit = field(
        default="word",
        metadata=about(
            "what a cut is widened to: token (as found), word, phrase, clause or sentence; the "
            "strategies cumulative and search take phrases, or the longer unit that is given"
        ),
    )
    max_cuts: int = field(
        default=3,
        metadata=about("most phrases of a row that the strategies cumulative and search cut"),
    )
    edit: Edit = field(
        default="delete",
        metadata=about(
            "what is done to a span: delete (the paper), or substitute words of its class"
        ),
    )
    relabel: bool = field(
        default=False,
        metadata=about("take the teacher's answer to the changed prompt as its completion"),
    )
    guard: Guard = field(
        default="grader",
        metadata=about(
            "what a new answer must pass: the grader, or the agreement of most of `agreement` "
            "drawn ones (where a changed prompt may have another answer)"
        ),
    )
    agreement: int = field(
        default=5, metadata=about("answers drawn for the guard agreement, at temperature 0.7")
    )
    cross_branch: bool = field(
        default=False,
        metadata=about(
            "let the teacher read the changed prompt and the student the whole one in training"
        ),
    )
    validate: Validate = field(
        default="both",
        metadata=about(
            "who must answer the cut prompt correctly: both (the paper), teacher or none"
        ),
    )
    seed: int = field(
        default=0,
        metadata=about("seed of all that is drawn: random controls, replacements, answers"),
    )
    teacher_quantization: Quantization | None = field(
        default=None,
        metadata=about(
            "round the weights of a teacher in a directory or on the hub as they are loaded: int8 "
            "(torchao), bnb8 or nf4 (8 and 4 bits of bitsandbytes)"
        ),
    )
    dry_run: bool = field(
        default=False,
        metadata=about("print what the run will take in memory and time, and write nothing"),
    )

    def __post_init__(self) -> None:
        check_answer_options(self)
        check_rows(self)
        check_servers(self)
        _apply_preset(self)
        for name, low, high in (
            *(("min_length", 1, LARGEST), ("join_gap", 0, LARGEST), ("segments", 2, 100)),
            *(
                ("max_cuts", 1, LARGEST),
                ("shortlist", 1, LARGEST),
                ("draws", 0, 1000),
                ("agreement", 1, 1000),
            ),
            *((name, 0, 1) for name in ("threshold", "response_threshold", "cap", "teacher_max")),
        ):
            check_range(self, name, low, high)
        if not TURNS.fullmatch(self.turns):
            raise ValueError(
                f"turns: must be all, last, or numbers of user turns as in 1,3, got {self.turns!r}"
            )
        _check_edits(self)


def _apply_preset(config: DetectConfig) -> None:
    """Give the settings that have their default the preset's value."""
    defaults = {item.name: item.default for item in fields(config)}
    for name, value in PRESETS.get(config.preset or "", {}).items():
        if name == "threshold" and config.grade == "code":
            value = 0.10
        if getattr(config, name) == defaults[name]:
            object.__setattr__(config, name, value)


def _check_edits(config: DetectConfig) -> None:
    """Refuse settings that contradict each other."""
    if config.edit == "substitute" and config.draws < 1:
        raise ValueError("draws: must be at least 1 for edit substitute, got 0")
    if config.strategy == "distractors":
        for name, needed in INSERTS.items():
            if (given := getattr(config, name)) != needed:
                raise ValueError(
                    f"{name}: must be {_text(needed)} with strategy distractors, which inserts a "
                    f"sentence in the prompt, got {_text(given)}"
                )
    if config.strategy == "search" and config.validate == "none":
        raise ValueError(
            "validate: must be both or teacher with strategy search, which asks the teacher, got "
            "none"
        )
    if config.strategy in ("cumulative", "search") and config.edit != "delete":
        raise ValueError(
            f"edit: must be delete with strategy {config.strategy}, which cuts whole phrases, got "
            f"{config.edit}"
        )
    if config.guard == "agreement" and not config.relabel:
        raise ValueError("guard: must be grader without relabel, got agreement; give --relabel")
    if config.guard == "agreement" and config.grade == "code":
        raise ValueError(
            "guard: must be grader with grade code, got agreement: programs are compared by tests"
        )
    if config.guard == "agreement" and config.strategy == "search":
        raise ValueError(
            "guard: must be grader with strategy search, got agreement: a cut is found by answers "
            "that are right for the row"
        )
    if config.guard == "agreement" and config.cross_branch:
        raise ValueError(
            "cross_branch: must be false with guard agreement, got true: the student reads the "
            "whole prompt, which may have another answer"
        )
    if config.relabel and config.validate == "none":
        raise ValueError(
            "validate: must be teacher or both with relabel, whose guard it is, got none"
        )
    if config.level != "instruction" and (config.cross_branch or config.relabel):
        name = "cross_branch" if config.cross_branch else "relabel"
        raise ValueError(
            f"{name}: must be false at the response level, got true; give --level instruction"
        )


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
