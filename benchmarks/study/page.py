"""The page of the study: the tables of the steps that are done, and figures."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from datetime import date
from pathlib import Path

import numpy as np
import torch
from page_scores import cutting_section, detection_section, weights_section
from page_training import distillation_section
from pair import wanted
from problems import Problem, copied_share
from run import DEVELOPMENT, SEARCHED, Inputs
from settings import Study
from tables import table

from leaf_distill.config import package_versions
from leaf_distill.io import make_directory, write_bytes

REHEARSAL = (
    "**This is a rehearsal: few rows and few steps. It shows that the study runs; its numbers mean "
    "nothing.**"
)


def write_page(study: Study, inputs: Inputs, path: Path) -> None:
    """Write the page, and its figures beside it."""
    make_directory(path.parent)
    problems = inputs.problems()
    figures: dict[str, str] = {}
    parts = [
        "# Known distractors: scores, cuts and distillation",
        *([REHEARSAL] if study.profile.name == "quick" else []),
        *_head(study, inputs, problems),
        *_pair(study),
        *weights_section(study),
        *(
            part
            for name in (SEARCHED, *study.profile.domains)
            for part in detection_section(study, name, figures)
        ),
        *cutting_section(study, figures),
        *distillation_section(study, problems, figures),
        *_settings(study),
    ]
    for name, chart in figures.items():
        write_bytes(path.with_name(f"{path.stem}-{name}.svg"), chart.encode())
        title = chart.partition("<title>")[2].partition("</title>")[0] or name
        link = f"![{title}]({path.stem}-{name}.svg)"
        parts = [part.replace(f"FIGURE {name}", link) for part in parts]
    write_bytes(path, ("\n\n".join(parts) + "\n").encode())


def _head(study: Study, inputs: Inputs, problems: Sequence[Problem]) -> Iterator[str]:
    given = [f" --{name} {name.upper()}" for name in ("base", "data", "gsm8k")
             if getattr(inputs, name)]  # fmt: skip
    yield f"    python benchmarks/study --profile {study.profile.name}{''.join(given)}"
    versions = ", ".join(f"{name} {number}" for name, number in package_versions().items())
    yield f"Written on {date.today()}; {versions}; {_device()}."
    counts: dict[str, int] = {}
    for one in problems:
        counts[one.split] = counts.get(one.split, 0) + 1
    listed = ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))
    copied = [
        f"{100 * copied_share(problems, *pair):.0f} %" for pair in (("C", "A"), ("C", "B"), "BA")
    ]
    yield (
        "The problems are PROBLEMATHIC's (MIT license, github.com/him1411/problemathic), word "
        "problems with irrelevant clauses, and the same ones without, so that the distractors are "
        "known; and GSM8K's (MIT license) that get a sentence with a number from another one. A "
        "model answers with an expression of two "
        'numbers, such as "50 * 7", and is right if it is the gold one. '
        f"Problems: {listed}. A trains the pair, B is searched and distilled on, C is held out; "
        "settings are chosen on B-dev, B and C-dev with the first student, whose other results do "
        "not count. No template of a problem is in two splits. Templates of distractors are: "
        f"{copied[2]} of B's are nearly those of one in A, which the teacher was trained on; of "
        f"C's {copied[0]}, and {copied[1]} those of one in B. log_gap and search were devised on "
        "problems of the same source, the simple ones. A problem's label names every number that "
        "counts, which favours the rule without a model."
    )
    yield (
        "± is a standard error: what other students and other templates of problems would change. "
        f"It is of {len(study.profile.layers) - 1} students, which differ in the order of their "
        "training alone, and of one teacher, and holds for one number: nothing is corrected for "
        "the many comparisons."
    )


def _device() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    known = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.*)", known.read_text()) if known.exists() else None
    return f"{model[1] if model else platform.machine()}, {os.cpu_count()} cores"


def _pair(study: Study) -> Iterator[str]:
    tried = [study.done(name) for name in study.seconds() if name.startswith("pair-")]
    lines = [
        (
            one["role"],
            str(one["seed"]),
            str(one["layers"]),
            f"{100 * one['plain']:.0f}",
            f"{100 * one['adversarial']:.0f}",
            "kept" if one["kept"] else "rejected",
        )
        for one in sorted(tried, key=lambda one: (one["role"] != "teacher", one["seed"]))
    ]
    low, high = study.profile.student_gate
    yield "## The pair"
    yield (
        "SmolLM2-135M-Instruct. The teacher was trained on plain and adversarial problems of A, a "
        "student, which has the lower layers alone, on plain ones. The lowest "
        f"{study.profile.frozen} layers of both stay as they were. Right answers on C-dev, %. "
        "Gates: the "
        f"teacher at least {100 * study.profile.teacher_gate:.0f} on adversarial problems; a "
        f"student at least {100 * low:.0f} on plain ones and at most {100 * high:.0f} on "
        "adversarial ones. The first student is for the choice of settings alone."
    )
    yield table(("model", "seed", "layers", "plain", "adversarial", ""), lines)
    measured = [study.done(f"accuracy-{name}") for name in wanted(study.profile)]
    if any(one is None for one in measured):
        return
    tests = {
        f"{split} {form}": f"{split}, {form}"
        for split in (SEARCHED, "C", *study.profile.domains)
        for form in ("plain", "adversarial")
    }
    yield "Right answers on problems that no model was trained on, %; of the students the mean."
    teacher, students = measured[0], measured[DEVELOPMENT + 2 :]
    yield table(
        ("", *tests.values()),
        [
            ("teacher", *(f"{100 * teacher[test]:.1f}" for test in tests)),
            (
                "students",
                *(f"{100 * np.mean([one[test] for one in students]):.1f}" for test in tests),
            ),
        ],
    )


def _settings(study: Study) -> Iterator[str]:
    yield "## Settings and time"
    yield "The settings are described in `benchmarks/study/settings.py`, `Profile`."
    yield "\n".join(f"- {name}: {value}" for name, value in asdict(study.profile).items())
    groups: dict[str, float] = {}
    for name, seconds in study.seconds().items():
        groups[name.split("-")[0]] = groups.get(name.split("-")[0], 0.0) + seconds
    yield (
        f"Seconds are summed over {study.profile.workers} workers, and are of a step's last start: "
        "what an earlier one had left in the cache took none."
    )
    yield table(
        ("step", "seconds"),
        [(name, f"{seconds:.0f}") for name, seconds in groups.items()],
    )
