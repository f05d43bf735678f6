"""The arms of `leaf compare` by name: what each changes in detection and in training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from leaf_distill.detection.config import INSERTS, DetectConfig

if TYPE_CHECKING:  # seconds to import
    from leaf_distill.training.config import LeafConfig

FAILED_SHARE = 0.5
"""The share of failed rows in a step of kd_failed, unless `failed_share` is given."""

UNRELABELLED: dict[str, Any] = {"relabel": False, "guard": "grader"}
"""The settings that go with `validate` "none"."""

ORIGINALS: dict[str, Any] = {"strategy": "span", "validate": "none", **UNRELABELLED}
"""A detection for its originals alone, where no other one says what is needed: no cut is asked."""


@dataclass(frozen=True)
class ArmSettings:
    """An arm: a sentence about it, and the settings that win over those given to `leaf compare`.

    detection: of `leaf detect`; None: the arm trains on the originals that another detection found.
    """

    says: str
    detection: Mapping[str, Any] | None
    training: Mapping[str, Any] = field(default_factory=dict)

    def settings(self, training: LeafConfig) -> dict[str, Any]:
        """Return the arm's own settings of detection, or None, and of a training by `trains`."""
        detection = None if self.detection is None else dict(self.detection)
        own = {name: getattr(training, name) for name in self.training}
        return {"detection": detection, "training": own}

    def detects(self, given: DetectConfig) -> DetectConfig:
        """Return the settings of the arm's own detection, or of one that finds its originals."""
        return replace(given, **(ORIGINALS if self.detection is None else self.detection))

    def trains(self, given: LeafConfig) -> LeafConfig:
        """Return the settings of the arm's training; `failed_share` holds where the arm has one."""
        changes = {"failed_share": None, **self.training}
        if changes["failed_share"] is not None:
            changes["failed_share"] = given.failed_share or FAILED_SHARE
        return given.with_changes(**changes)


ARMS: dict[str, ArmSettings] = {
    "kd": ArmSettings("plain distillation, on the originals alone", None),
    "kd_failed": ArmSettings(
        "plain distillation that draws a share of each step (failed_share, by default half) from "
        "rows that the student fails",
        None,
        {"failed_share": FAILED_SHARE},
    ),
    "kd_entropy": ArmSettings(
        "plain distillation on the half of each row's label tokens (token_share) with the highest "
        "student entropy",
        None,
        {"token_selection": "entropy"},
    ),
    "kd_tip": ArmSettings(
        "plain distillation on as many tokens: half of them as kd_entropy, half with a low student "
        "entropy and the highest KL",
        None,
        {"token_selection": "tip"},
    ),
    "sft": ArmSettings(
        "supervised fine-tuning on the completions of the originals, without the teacher",
        None,
        {"ce_weight": 1.0},
    ),
    "augmented": ArmSettings(
        "distractor-augmented distillation: every original, and again with a sentence of another "
        "prompt inserted, whatever the models answer",
        {"strategy": "distractors", "select": "all", "validate": "none", **INSERTS, **UNRELABELLED},
    ),
    "cross": ArmSettings(
        "LeaF's cuts, one span at a time, which the teacher alone reads: the student reads the "
        "whole prompt",
        {"strategy": "span", "cross_branch": True},
    ),
    "release": ArmSettings(
        "the authors' release: its preset of `leaf detect`, and one mean over the tokens of all "
        "rows",
        {"strategy": "span", "edit": "delete", "preset": "release", **UNRELABELLED},
        {"kd_weight": "pool", "span_weighting": "span"},
    ),
    "span": ArmSettings("LeaF: cuts of one span at a time", {"strategy": "span"}),
    "collective": ArmSettings("cuts of all spans of a row together", {"strategy": "collective"}),
    "cumulative": ArmSettings(
        "cuts of the most suspect phrase, of the first two, and so on", {"strategy": "cumulative"}
    ),
    "random_phrases": ArmSettings(
        "a control: as many phrases as cumulative, drawn",
        {"strategy": "cumulative", "score": "random"},
    ),
    "search": ArmSettings(
        "cuts of the phrases without which the student's loss falls most and the teacher stays "
        "right",
        {"strategy": "search"},
    ),
    "random_tokens": ArmSettings(
        "a control: as many tokens, drawn, together", {"strategy": "random_tokens"}
    ),
    "random_spans": ArmSettings(
        "a control: spans as long, at random places", {"strategy": "random_spans"}
    ),
    "student_saliency": ArmSettings(
        "a control: as many tokens, those with the student's highest saliency",
        {"strategy": "student_saliency"},
    ),
    "teacher_saliency": ArmSettings(
        "a control: as many tokens, those with the teacher's lowest saliency",
        {"strategy": "teacher_saliency"},
    ),
    "perplexity": ArmSettings(
        "a control: as many tokens, those that the student finds least likely",
        {"strategy": "perplexity"},
    ),
    "distractors": ArmSettings(
        "as augmented, with the selection and validation of the run", {"strategy": "distractors"}
    ),
}
"""All arms; those with the name of a strategy are `leaf detect` with that strategy."""
