"""Fills the page's template from what `data.read_run` found."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import PurePath
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from leaf_distill.detection.funnel import ROW_STAGES
from leaf_distill.report.data import OUTCOMES, Run
from leaf_distill.report.heat import LEVELS, cut_excerpt, heat, score_level, tail
from leaf_distill.report.results import Results

# Shown first and by these names; every other setting follows in the full list.
HEADLINE = {
    "student": "Student",
    "teacher": "Teacher",
    "dataset": "Dataset",
    "threshold": "Threshold",
    "strategy": "Pruning",
    "validate": "Validation",
}
VERDICTS = {
    "right": ("✓", "right"),
    "wrong": ("✗", "wrong"),
    "no_answer": ("✗", "no answer"),
    "timeout": ("?", "grading timed out"),
    "cut_off": ("✗", "cut off at the length limit"),
    "not_finite": ("✗", "not a finite number"),
}
PHRASES = {
    "validate": {
        "both": "kept if teacher and student are right",
        "teacher": "kept if the teacher is right",
        "none": "none: every cut is kept",
    },
    "strategy": {
        "span": "one span at a time",
        "collective": "all spans together",
        "random_tokens": "random tokens (a control)",
        "random_spans": "random spans (a control)",
    },
}
# A parser drops or rewrites these characters, so that they are shown by their picture.
_CONTROLS = {code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\t\n\r"}
_CONTROLS[0x7F] = "\N{SYMBOL FOR DELETE}"


def verbatim(text: str) -> Markup:
    """Text as markup from which a browser reads exactly these characters."""
    return Markup(str(escape(text.translate(_CONTROLS))).replace("\r", "&#13;"))


def words(code: str | None) -> str:
    """A short code such as `prompt_too_long` in words."""
    return (code or "").replace("cut_off", "answer cut off").replace("_", " ").strip()


def number(value: Any) -> str:
    """A number for reading: thousands apart, four significant digits; other values as they are."""
    if value is None:
        return "not set"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)


def short_name(name: Any) -> str:
    """The last two parts of a local path; a hub name as it is. The full list has the whole."""
    path = PurePath(str(name))
    return "/".join(path.parts[-2:]) if path.parts[2:] else str(name)


@dataclass(frozen=True)
class Stage:
    """One line of the funnel: how many reached it, and what left on the way there."""

    name: str
    count: int
    unit: str
    share: float
    left: tuple[tuple[int, str], ...]


def _line(entry: Mapping[str, Any], names: Sequence[str]) -> str:
    """The line of the funnel at which an entry of `left` stands."""
    if entry.get("unit") == "candidates":
        return names[-1]
    reached = ROW_STAGES.get(entry["stage"]) or ROW_STAGES["render"]
    return names[0] if reached not in names else str(reached)


def _stages(funnel: Mapping[str, Any]) -> list[Stage]:
    """Lines of the funnel; bars are shares of the most of one unit, rows or candidates."""
    stages = funnel.get("stages", [])
    names = [stage["stage"] for stage in stages]
    left: dict[str, list[tuple[int, str]]] = {name: [] for name in names}
    for entry in funnel.get("left", []) if names else []:
        left[_line(entry, names)].append((entry["count"], words(entry["reason"])))
    most: dict[str, int] = {}
    for stage in stages:
        unit = stage.get("unit", "rows")
        most[unit] = max(most.get(unit, 1), stage["rows"])
    return [
        Stage(
            name=words(stage["stage"]),
            count=stage["rows"],
            unit=stage.get("unit", "rows"),
            share=stage["rows"] / most[stage.get("unit", "rows")],
            left=tuple(left[stage["stage"]]),
        )
        for stage in stages
    ]


def _headline(settings: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The settings that a reader needs to understand the page."""
    lines = []
    for key, label in HEADLINE.items():
        if key not in settings:
            continue
        value = settings[key]
        if key == "threshold" and settings.get("rule") == "quantile":
            text = f"lowest {100 * value:g}% of tokens, score at most {number(settings.get('cap'))}"
        elif key == "threshold":
            text = f"score at most {number(value)}"
        elif key == "dataset":
            text = f"{short_name(value)}, split {settings.get('dataset_split', 'train')}"
        elif key in ("student", "teacher"):
            text = short_name(value)
        else:
            text = PHRASES.get(key, {}).get(value, str(value))
        if key == "threshold" and settings.get("teacher_max") is not None:
            text += f", teacher saliency at most {number(settings['teacher_max'])}"
        lines.append((label, text))
    return lines


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested settings as lines of dotted name and value."""
    lines: list[tuple[str, str]] = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            lines += _flat(value, f"{prefix}{key}.")
        else:
            lines.append((f"{prefix}{key}", number(value)))
    return lines


def _colors() -> str:
    """One rule per color step: saliency `a0..`, score `b0..`."""
    return "\n".join(
        f".{name}{level} {{ background: rgb(var(--{color}) / {level / LEVELS:g}) }}"
        for name, color in (("a", "saliency"), ("b", "score"))
        for level in range(LEVELS + 1)
    )


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("leaf_distill.report", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(
        verbatim=verbatim, words=words, number=number, short=short_name, tail=tail
    )
    environment.globals.update(heat=heat, cut_excerpt=cut_excerpt)
    return environment


def render_page(run: Run, results: Results) -> str:
    """The whole page as text: no clock, no chance, no file from elsewhere."""
    package = files("leaf_distill.report")
    script = package.joinpath("page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    settings = run.funnel.get("settings", {})
    absolute = settings.get("rule", "absolute") == "absolute"
    return (
        _environment()
        .get_template("page.html.j2")
        .render(
            run=run,
            settings=settings,
            headline=_headline(settings),
            details=[
                (title, _flat(run.funnel.get(key, {})))
                for title, key in (
                    ("Settings", "settings"),
                    ("Versions", "versions"),
                    ("Seconds", "seconds"),
                )
            ],
            results=results,
            stages=_stages(run.funnel),
            templates=run.funnel.get("templates", []),
            outcomes=[(outcome, run.totals[outcome]) for outcome in OUTCOMES],
            verdicts=VERDICTS,
            levels=range(LEVELS + 1),
            score_scale=[score_level(step / 40) for step in range(41)],
            threshold=settings.get("threshold") if absolute else None,
            css=Markup(package.joinpath("page.css").read_text(encoding="utf-8") + _colors()),
            script=Markup(script),
            script_digest=digest,
        )
    )
