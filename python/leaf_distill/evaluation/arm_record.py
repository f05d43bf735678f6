"""The detection that each student of `leaf compare` was trained after, so that others are refused.

students/arms.json      of each arm the settings that decide its examples, and a digest of the rows
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from leaf_distill.config import json_object
from leaf_distill.data.dataset import load_examples
from leaf_distill.detection.arms import INCIDENTAL, NAMING
from leaf_distill.detection.config import DetectConfig
from leaf_distill.evaluation.compared import ARMS
from leaf_distill.io import digest, is_of, read_json, write_json
from leaf_distill.training.identity import digest_of, golds_of

FILE: Final = "arms.json"
_OF_ROWS: Final = ("dataset", "dataset_split", "columns", "max_rows")
_FREE: Final = {
    *(*INCIDENTAL, *_OF_ROWS, "allow_code_execution"),
    *("student_server_url", "teacher_server_url"),
}
"""Settings that may change: without effect, known by the digest, or the address of a server."""
_OF_CUTS: Final = {*NAMING, "strategy", "seed"} - {
    *("turns", "select", "completion_source", "teacher_quantization")
}
"""Settings that change no original."""


class ArmRecord:
    """Compares what decides the examples of some arms with the record of a directory's students.

    Args:
        students: the directory of the students.
        arms: names.
        given: the settings of detection, which those of each arm win over.

    Raises:
        ValueError: the rows cannot be read.
    """

    def __init__(self, students: Path, arms: Sequence[str], given: DetectConfig) -> None:
        self.path = students / FILE
        rows = _digest_rows(given)
        self.dataset = given.dataset
        self.new = {name: {**_settings(name, given), "rows": rows} for name in arms}
        self.old: dict[str, dict[str, Any]] = {}

    def trained(self, name: str) -> bool:
        """Whether the arm's student is there, or its training was begun."""
        return is_of(self.path.parent / name / "run.json", "distill")

    def check(self) -> None:
        """Raise ValueError where a student would be given other examples than it was trained on.

        The record is read here and not before, since another run may write it until the directory
        is locked.
        """
        self.old = _read(self.path)
        for arm in filter(self.trained, self.new):
            old = self.old.get(arm, {})
            for name, value in self.new[arm].items():
                if old.get(name, value) == value:
                    continue
                if name == "rows":
                    raise ValueError(
                        f"dataset: must have the rows that the arm {arm} was trained on, got "
                        f"{self.dataset} with others; give another output_dir, or these rows"
                    )
                raise ValueError(
                    f"{name}: must stay {old[name]} in a directory whose arm {arm} was trained "
                    f"with it, got {value}; give another output_dir, or the old setting"
                )

    def write(self) -> None:
        """Write what the arms without a student are made from."""
        arms = self.old | {name: one for name, one in self.new.items() if not self.trained(name)}
        if arms != self.old:
            write_json(self.path, {"command": "compare", "arms": arms})


def _settings(name: str, given: DetectConfig) -> dict[str, Any]:
    """Return the settings that decide an arm's examples, as JSON holds them."""
    on_originals = ARMS[name].detection is None
    config = given if on_originals else ARMS[name].detects(given)
    free = _FREE | _OF_CUTS if on_originals else _FREE
    settings = {item: value for item, value in asdict(config).items() if item not in free}
    result: dict[str, Any] = json.loads(json.dumps(settings))
    return result


def _digest_rows(given: DetectConfig) -> str:
    rows = load_examples(
        given.dataset,
        split=given.dataset_split,
        columns=json_object(given.columns, "columns"),
        max_rows=given.max_rows,
        need_completion=given.completion_source == "dataset",
    )
    return digest([digest_of(rows), golds_of(rows), *(dict(one.given) for one in rows)])


def _read(path: Path) -> dict[str, dict[str, Any]]:
    arms = read_json(path).get("arms") if is_of(path, "compare") else None
    return arms if isinstance(arms, dict) else {}
