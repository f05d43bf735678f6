"""The rows of each arm of `leaf compare`: of its own detection, or the originals of another."""

from __future__ import annotations

import contextlib
import io
import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow.compute as pc
import pyarrow.parquet as pq

from leaf_distill.data.dataset import load_examples
from leaf_distill.detection.arms import arm_name
from leaf_distill.detection.config import DetectConfig
from leaf_distill.detection.funnel import KEPT, show_notes, show_sources
from leaf_distill.detection.pipeline import detect
from leaf_distill.evaluation.compared import ARMS
from leaf_distill.io import make_directory, write_table
from leaf_distill.terminal import say
from leaf_distill.training.sampler import check_failed
from leaf_distill.wording import counted

logger = logging.getLogger(__name__)


def plan_detections(arms: Sequence[str], given: DetectConfig) -> dict[str, DetectConfig]:
    """Return the settings of the detection that finds each arm's rows.

    Arms on the originals alone share those of one detection: of the first arm that asks which rows
    the student fails, else of the first one; where there is none, or none asks and an arm needs it,
    a detection runs for its originals.

    Raises:
        ValueError: settings do not go together.
    """
    own = {name: ARMS[name].detects(given) for name in arms if ARMS[name].detection is not None}
    plain = [name for name in arms if name not in own]
    need_marks = any("failed_share" in ARMS[name].training for name in plain)
    if need_marks and given.select == "all":
        raise ValueError(
            "select: must be student_wrong with the arm kd_failed, got all, which does not ask "
            "what the student fails"
        )
    asking = [one for one in own.values() if one.select != "all"]
    known = asking or ([] if need_marks else [*own.values()])
    return own | {name: known[0] if known else ARMS[name].detects(given) for name in plain}


def make_datasets(plan: Mapping[str, DetectConfig], root: Path) -> dict[str, Path]:
    """Run the planned detections, each once, and return the dataset of each arm.

    The arms on the originals alone have them in `root`/arms/kd.

    Raises:
        ValueError: an arm draws rows that the student fails, and it fails none.
    """
    datasets: dict[str, Path] = {}
    made: list[tuple[DetectConfig, Path]] = []
    for name, config in plan.items():
        path = next((path for known, path in made if known == config), None)
        if path is None:
            print(f"detection: {name} ...", file=sys.stderr, flush=True)
            path = _detect(config)
            made.append((config, path))
        datasets[name] = path
    plain = [name for name in plan if ARMS[name].detection is None]
    own = [name for name in plan if name not in plain]
    if own and not any(_counterfactuals(datasets[name]) for name in own):
        logger.warning(
            "%s: no counterfactual was found, and training is plain distillation; you may stop "
            "here (Ctrl-C) and see what the detection said, such as of --grade and --threshold",
            ", ".join(own),
        )
    if plain:
        table = pq.read_table(datasets[plain[0]])
        path = dataset_of(plain[0], plan, root)
        make_directory(path.parent)
        write_table(path, table.filter(pc.equal(table["branch"], "original")))
        datasets |= dict.fromkeys(plain, path)
        if any("failed_share" in ARMS[name].training for name in plain):
            check_failed([one for one in load_examples(path) if one.failed])
    return datasets


def _detect(config: DetectConfig) -> Path:
    """Run a detection, and print in a few lines what it found; funnel.json says all of it."""
    with contextlib.redirect_stdout(io.StringIO()):
        result = detect(config)
    found = {one["stage"]: one["rows"] for one in result.funnel["stages"]}
    cuts = counted(found["candidates"], "cut")
    say(f"{result.arm}: {cuts}, {counted(found[KEPT], 'counterfactual')} kept")
    show_sources(result.funnel["sources"])
    show_notes(result.funnel["templates"])
    return result.dataset


def dataset_of(name: str, plan: Mapping[str, DetectConfig], root: Path) -> Path:
    """Return the file of an arm's rows."""
    directory = "kd" if ARMS[name].detection is None else arm_name(plan[name])
    return root / "arms" / directory / "dataset.parquet"


def _counterfactuals(dataset: Path) -> int:
    branches = pq.read_table(dataset, columns=["branch"])["branch"]
    return int(pc.sum(pc.not_equal(branches, "original")).as_py() or 0)
