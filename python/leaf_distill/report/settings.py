"""The settings of a run in words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import PurePath
from typing import Any

from leaf_distill.config import PairOptions, RowOptions
from leaf_distill.detection.config import LONG_UNITS, DetectConfig

_GAP = (
    "A token with <b>a low score is a suspect</b>: the student's loss reacts to it, and the "
    "teacher's does not."
)
SCORES = {
    "gap": (
        "gap of the gradients, teacher less student",
        "Tokens that sway the student's loss and not the teacher's",
        f"The <b>score</b> is teacher minus student, scaled to [0, 1] again. {_GAP}",
        ("student only: confounder", "teacher more than student"),
    ),
    "log_gap": (
        "gap of the gradients' logarithms, half the student's less the teacher's",
        "Tokens that sway the student's loss and not the teacher's",
        "The <b>score</b> is the logarithm of the teacher's less half that of the student's, "
        f"scaled to [0, 1]. {_GAP}",
        ("student only: confounder", "teacher more than student"),
    ),
    "log_ratio": (
        "ratio of the gradients, student by teacher",
        "Tokens that sway the student's loss and not the teacher's",
        "The <b>score</b> is the logarithm of the teacher's less that of the student's, scaled to "
        f"[0, 1]. {_GAP}",
        ("student only: confounder", "teacher more than student"),
    ),
    "rank": (
        "ranks of the gradients, teacher less student",
        "Tokens that rank high in the student's gradients and low in the teacher's",
        "The <b>score</b> is the rank of the token in the teacher's less that in the student's, "
        f"scaled to [0, 1]. {_GAP}",
        ("student only: confounder", "teacher more than student"),
    ),
    "lens": (
        "lens, difference of the log-probabilities",
        "Tokens whose probability the two models judge most differently",
        "The <b>score</b> is not made of them: it is how much the two models' log-probabilities of "
        "the token differ, scaled to [0, 1] and turned around. A token with <b>a low score is a "
        "suspect</b>: the models differ most on it.",
        ("models differ most: confounder", "models agree"),
    ),
    "intervention": (
        "intervention, change of the answers without the word",
        "Words without which the student's answer changes strongly and the teacher's does not",
        "The <b>score</b> is measured on the words with the lowest gap of the two: how much more "
        "the student's distribution of answers changes than the teacher's when the word is "
        "replaced or left out, scaled to [0, 1] and turned around. A token with <b>a low score is "
        "a suspect</b>; tokens that were not tried have the score 1.",
        ("student changes most: confounder", "not tried, or teacher changes"),
    ),
    "student": (
        "the student's gradient alone (a control)",
        "Tokens that sway the student's loss",
        "The <b>score</b> is the student's alone, turned around. A token with <b>a low score is a "
        "suspect</b>: the student's loss reacts to it.",
        ("student reacts most: suspect", "student reacts least"),
    ),
    "teacher": (
        "the teacher's gradient alone, low (a control)",
        "Tokens to which the teacher's loss hardly reacts",
        "The <b>score</b> is the teacher's alone. A token with <b>a low score is a suspect</b>: "
        "the teacher's loss does not react to it.",
        ("teacher reacts least: suspect", "teacher reacts most"),
    ),
    "perplexity": (
        "the student's perplexity (a control)",
        "Tokens that the student finds unlikely",
        "The <b>score</b> is not made of them: it is the student's log-probability of the token, "
        "scaled to [0, 1]. A token with <b>a low score is a suspect</b>: it surprises the student.",
        ("most surprising: suspect", "least surprising"),
    ),
    "random": (
        "random (a control)",
        "Tokens that are drawn at random",
        "The <b>score</b> is not made of them: it is drawn at random. A token with <b>a low score "
        "is taken for a suspect</b>.",
        ("drawn", "not drawn"),
    ),
}
"""Each score's name, what a suspect is, how to read it, and what its ends mean."""

VALIDATION = {
    "both": "kept if teacher and student are right",
    "teacher": "kept if the teacher is right",
    "none": "none: every cut is kept",
}
STRATEGIES = {
    "span": "one span at a time",
    "collective": "all spans together",
    "random_tokens": "random tokens (a control)",
    "random_spans": "random spans (a control)",
    "student_saliency": "tokens of the highest student saliency (a control)",
    "teacher_saliency": "tokens of the lowest teacher saliency (a control)",
    "perplexity": "tokens of the highest perplexity (a control)",
    "cumulative": "the most suspect phrase, the first two together, and so on",
    "search": "phrase by phrase: what lowers the student's loss and leaves the teacher right",
    "distractors": "none: a sentence of another prompt is inserted (a control)",
}
CONTROLS = {
    "random_tokens": (
        "random tokens",
        "tokens that are drawn at random, as many as the score flags,",
    ),
    "random_spans": (
        "random spans",
        "runs of tokens at random places, one as long for each span that the score flags,",
    ),
    "student_saliency": (
        "the student's saliency alone",
        "the tokens to which the student's loss reacts most, as many as the score flags,",
    ),
    "teacher_saliency": (
        "the teacher's saliency alone",
        "the tokens to which the teacher's loss reacts least, as many as the score flags,",
    ),
    "perplexity": (
        "the student's perplexity",
        "the tokens that the student finds least likely, as many as the score flags,",
    ),
    "distractors": ("inserted distractors", "sentences of other prompts"),
}
"""Each control's name, and what it changes in place of the suspects, by strategy."""

LEVELS = {"instruction": "the prompt", "response": "the beginning of the response"}
LEVELS["both"] = " and ".join(LEVELS.values())
UNITS = {"word": "words", "phrase": "phrases", "clause": "clauses", "sentence": "sentences"}
PLACES = {item.name for one in (PairOptions, RowOptions) for item in fields(one)}
PLACES = (PLACES | {"output_dir", "cache_dir"}) - {"max_rows"}
"""Settings that have no usual value."""


def number(value: Any) -> str:
    """Return a number with commas or four significant digits, and another value as text."""
    if value is None:
        return "not set"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def short_name(name: str) -> str:
    """Return the last two parts of a local path, and a hub name as it is."""
    path = PurePath(name)
    return "/".join(path.parts[-2:]) if path.parts[2:] else name


def headline(models: Mapping[str, str], settings: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the settings that a reader needs to understand the page."""
    dataset = f"{short_name(settings['dataset'])}, split {settings['dataset_split']}"
    name, *_ = score_words(settings)
    lines = [
        ("Student", short_name(models["student"])),
        ("Teacher", short_name(models["teacher"])),
        ("Dataset", dataset if settings["dataset"] else "rows in memory"),
        ("Searched", _searched(settings)),
        ("Score", name),
        ("Threshold", _threshold(settings)),
        ("Pruning", STRATEGIES.get(settings["strategy"], settings["strategy"])),
        ("Change", _change(settings)),
        ("Validation", VALIDATION.get(settings["validate"], settings["validate"])),
    ]
    if others := changed_settings(settings):
        lines.append(("Not the defaults", ", ".join(others)))
    return lines


def score_words(settings: Mapping[str, Any]) -> tuple[str, str, str, tuple[str, str]]:
    """Return what `SCORES` says of the run's score."""
    return SCORES.get(settings["score"], SCORES["gap"])


def title(settings: Mapping[str, Any]) -> str:
    """Return the heading: what is cut, and that it is a control where it is one."""
    if settings["strategy"] in CONTROLS:
        return f"A control: {CONTROLS[settings['strategy']][0]}"
    return "Tokens that mislead the student"


def lede(settings: Mapping[str, Any]) -> str:
    """Return in a sentence or two what the run did."""
    where = LEVELS.get(settings["level"], settings["level"])
    done = "replaced by others in" if settings["edit"] == "substitute" else "cut out of"
    changed = "changed" if settings["edit"] == "substitute" else "cut"
    if settings["strategy"] == "distractors":
        done, changed = "inserted in", "changed"
    what = {"instruction": "prompts", "response": "beginnings"}.get(settings["level"], "texts")
    _, chosen, *_ = score_words(settings)
    if settings["strategy"] in CONTROLS:
        chosen = f"To compare with, {CONTROLS[settings['strategy']][1]}"
    checked = "" if settings["validate"] == "none" else " that pass validation"
    return (
        f"{chosen} are {done} {where}. The {changed} {what}{checked} become training examples "
        "beside the originals."
    )


def remarks(settings: Mapping[str, Any]) -> list[str]:
    """Return what is unusual in what training will read."""
    found = []
    if settings["cross_branch"]:
        found.append(
            "Cross branch: in training the student reads the whole prompt, and the teacher alone "
            "reads the changed one."
        )
    if settings["relabel"]:
        guard = "if the grader finds it right"
        if settings["guard"] == "agreement":
            guard = f"if most of {settings['agreement']} further answers agree with it"
        found.append(
            "Relabelled: the completion of a counterfactual is the teacher's own answer to the "
            f"changed prompt, {guard}."
        )
    return found


def thresholds(settings: Mapping[str, Any]) -> list[tuple[str, float]]:
    """Return where scores are cut under the absolute rule, each with the texts that it is for."""
    own = {"instruction": "prompts", "response": "responses"}
    values = {"prompts": settings["threshold"], "responses": settings["response_threshold"]}
    name = own.get(settings["level"])
    if settings["rule"] != "absolute":
        return []
    if name is None and values["prompts"] != values["responses"]:
        return list(values.items())
    return [("", values[name or "prompts"])]


def changed_settings(settings: Mapping[str, Any]) -> list[str]:
    """Return name and value of the settings that are not the defaults."""
    return [
        f"{item.name} {number(settings[item.name])}"
        for item in fields(DetectConfig)
        if item.name not in PLACES and item.name in settings and settings[item.name] != item.default
    ]


def _searched(settings: Mapping[str, Any]) -> str:
    turns = {"all": "all user turns", "last": "the last user turn"}.get(
        settings["turns"], f"user turns {settings['turns']}"
    )
    response = f"the response up to a border of its {settings['segments']} segments"
    both = {"instruction": turns, "response": response}
    return both.get(settings["level"], f"{turns}, and {response}")


def _threshold(settings: Mapping[str, Any]) -> str:
    parts = (f"{number(value)}{name and ' in '}{name}" for name, value in thresholds(settings))
    words = f"score at most {' and '.join(parts)}"
    if settings["rule"] == "quantile":
        lowest, cap = number(100 * settings["threshold"]), number(settings["cap"])
        if settings["level"] != "instruction":
            lowest += f"% (in responses {number(100 * settings['response_threshold'])}"
        closed = "%" if settings["level"] == "instruction" else "%)"
        words = f"lowest {lowest}{closed} of tokens, score at most {cap}"
    if settings["teacher_max"] is not None:
        words += f", teacher saliency at most {number(settings['teacher_max'])}"
    return words


def _change(settings: Mapping[str, Any]) -> str:
    if settings["strategy"] == "distractors":
        return "one sentence inserted, no token deleted"
    edit = "deleted"
    if settings["edit"] == "substitute":
        edit = f"replaced by words of the same class, up to {settings['draws']} times"
    unit = UNITS.get(settings["widen"])
    if settings["strategy"] in ("cumulative", "search") and settings["widen"] not in LONG_UNITS:
        unit = "phrases"
    return f"{edit}, {f'whole {unit}' if unit else 'the tokens alone'}"
