"""Fills the page's template."""

from __future__ import annotations

import base64
import functools
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup, escape

from leaf_distill.detection.funnel import ROW_STAGES, VIEWS, views_that_left
from leaf_distill.report.data import GROUPS, MODELS, Run
from leaf_distill.report.heat import LEVELS, cut_excerpt, heat, last_lines, score_level
from leaf_distill.report.overview import Overview
from leaf_distill.report.settings import (
    CONTROLS,
    headline,
    lede,
    number,
    remarks,
    score_words,
    short_name,
    thresholds,
    title,
)

GENERATOR = '<meta name="generator" content="leaf report">'
"""The element by which an earlier page is recognized."""

VERDICTS = {
    "right": ("✓", "right"),
    "wrong": ("✗", "wrong"),
    "no_answer": ("✗", "no answer"),
    "timeout": ("?", "grading timed out"),
    "cut_off": ("✗", "cut off at the length limit"),
    "not_finite": ("✗", "not a finite number"),
}
PROGRAM_VERDICTS = {
    "error": ("✗", "ended in an error"),
    "timeout": ("✗", "ran out of time"),
    "memory": ("✗", "ran out of memory"),
    "no_program": ("✗", "no program"),
    "refused": ("?", "cannot be judged"),
}
"""The verdicts of programs: with `grade` "code" a timeout is the program's."""

JUDGES = {"both": MODELS, "teacher": ("teacher",), "none": ()}
"""The models that validation asks."""

WORDS = {"cut_inside_word": "cuts that begin or end inside a word or number"}
DETAILS = ("settings", "models", "versions", "seconds")

STYLES = ("page.css", "overview.css", "layers.css")
"""The files of the page's style, in their order."""

# A parser drops or rewrites these characters, so that they are shown by their picture.
_CONTROLS = {code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\t\n\r"}
_CONTROLS[0x7F] = "\N{SYMBOL FOR DELETE}"


def render_page(run: Run, overview: Overview, results: Mapping[str, Any], example: str) -> str:
    """Return the page, which depends on nothing but its arguments; the example is SVG."""
    script = _read("page.js")
    settings = run.funnel["settings"]
    gains = [line for line in run.funnel.get("sources", []) if line["marked"]]
    return _template().render(
        run=run,
        funnel=run.funnel,
        settings=settings,
        headline=headline(run.models, settings),
        title=title(settings),
        lede=lede(settings),
        control=settings["strategy"] in CONTROLS,
        remarks=remarks(settings),
        score=score_words(settings),
        student=short_name(run.models["student"]),
        details=[(name.capitalize(), _flat(run.funnel[name])) for name in DETAILS],
        results=results,
        example=Markup(example),
        stages=_stages(run.funnel),
        gains=gains,
        overview=overview,
        contents=_contents(overview, gains, results),
        models=MODELS,
        views_left=list(views_that_left(run.funnel["left"])),
        judges=(
            *JUDGES.get(settings["validate"], MODELS),
            *(["teacher"] if settings["relabel"] else []),
        ),
        groups=GROUPS,
        verdicts=VERDICTS | (PROGRAM_VERDICTS if settings["grade"] == "code" else {}),
        levels=range(LEVELS + 1),
        score_scale=[score_level(step / 40) for step in range(41)],
        thresholds=thresholds(settings),
        ticks=_ticks([value for _, value in thresholds(settings)]),
        generator=Markup(GENERATOR),
        css=Markup("".join(map(_read, STYLES)) + _colors()),
        script=Markup(script),
        script_digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def _read(name: str) -> str:
    return files("leaf_distill.report").joinpath(name).read_text(encoding="utf-8")


@functools.cache
def _template() -> Template:
    environment = Environment(
        loader=PackageLoader("leaf_distill.report", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(
        curly=curly,
        verbatim=verbatim,
        words=words,
        number=number,
        signed=signed,
        change=change,
        nats=nats,
        percent=percent,
        last_lines=last_lines,
    )
    environment.globals.update(heat=heat, cut_excerpt=cut_excerpt)
    return environment.get_template("page.html.j2")


def verbatim(text: str) -> Markup:
    """Return text as markup from which a browser reads exactly these characters."""
    return Markup(str(escape(text.translate(_CONTROLS))).replace("\r", "&#13;"))


def curly(text: str) -> str:
    """Return text with curly apostrophes."""
    return text.replace("'", "\N{RIGHT SINGLE QUOTATION MARK}")


def words(code: str) -> str:
    """Return a short code such as `prompt_too_long` in words."""
    return WORDS.get(code) or code.replace("cut_off", "answer cut off").replace("_", " ").strip()


def signed(share: float) -> str:
    """Return a difference of shares in percentage points."""
    return f"{100 * share:+.1f}".replace("-", "\N{MINUS SIGN}")


def change(value: float) -> str:
    """Return a difference of losses."""
    return f"{value:+.3f}".replace("-", "\N{MINUS SIGN}")


def nats(value: float) -> str:
    """Return a KL with two significant digits, and no more than three behind the point."""
    return f"{value:.3f}" if value < 0.01 else f"{value:.2f}"


def percent(shares: Iterable[float]) -> tuple[float, ...]:
    """Return shares in percent."""
    return tuple(100 * share for share in shares)


def _contents(
    overview: Overview, gains: Sequence[object], results: Mapping[str, Any]
) -> list[tuple[str, str]]:
    """Return place and name of the sections that the page has."""
    sections = {
        "overview": ("Overview", True),
        "arms": ("Arms", len(overview.arms) > 1),
        "stages": ("Stages", True),
        "gain": ("Pruning gain", gains),
        "results": ("Distillation", results["trainings"] or results["evaluations"]),
        "curves": ("Deletion curves", results["curves"]),
        "samples": ("Samples", True),
        "run": ("Settings", True),
    }
    return [(place, name) for place, (name, there) in sections.items() if there]


def _ticks(thresholds: Sequence[float]) -> list[float]:
    """Return the numbers of the score's axis that stand clear of the thresholds."""
    numbers = (0.25, 0.5, 0.75)
    return [tick for tick in numbers if all(abs(one - tick) > 0.08 for one in thresholds)]


def _stages(funnel: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the lines of the funnel: how many reached a stage, and what left on the way there.

    `share` is of the most of a unit, rows or candidates.
    """
    stages = funnel["stages"]
    names = [stage["stage"] for stage in stages]
    most: dict[str, int] = {}
    for stage in stages:
        most[stage["unit"]] = max(most.get(stage["unit"], 1), stage["rows"])
    left: dict[str, list[tuple[int, str]]] = {name: [] for name in names}
    for entry in funnel["left"] if names else ():
        if entry["unit"] in VIEWS:
            continue
        left[_line(entry, names)].append((entry["count"], words(entry["reason"])))
    return [
        {
            "name": words(stage["stage"]),
            "count": stage["rows"],
            "unit": stage["unit"],
            "share": stage["rows"] / most[stage["unit"]],
            "left": left[stage["stage"]],
        }
        for stage in stages
    ]


def _line(entry: Mapping[str, Any], names: Sequence[str]) -> str:
    """Return the line of the funnel that is lower because of an entry of `left`."""
    if entry["unit"] == "candidates":
        return names[-1]
    reached = str(ROW_STAGES.get(entry["stage"]) or ROW_STAGES["render"])
    return reached if reached in names else names[0]


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Return nested settings as lines of dotted name and value."""
    lines: list[tuple[str, str]] = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            lines += _flat(value, f"{prefix}{key}.")
        else:
            lines.append((f"{prefix}{key}", number(value)))
    return lines


def _colors() -> str:
    """Return one rule for each color step: saliency `a0`, `a1`, ..., score `b0`, KL `c0`."""
    return "\n".join(
        f".{name}{level} {{ background: rgb(var(--{color}) / {level / LEVELS:g}) }}"
        for name, color in (("a", "saliency"), ("b", "score"), ("c", "kl"))
        for level in range(LEVELS + 1)
    )
