"""Reads arms of a run directory: what each knows of every row and of every cut."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import pyarrow.parquet as pq

from leaf_distill.data.source import find_arm
from leaf_distill.detection.arms import INCIDENTAL
from leaf_distill.detection.gain import AFTER_MARKING
from leaf_distill.io import read_json, reading

State = Literal["solved", "marked", "failed", "unasked", "unusable"]
"""The answers to a row's whole prompt: the student is right; it fails and the teacher is right; it
fails otherwise; it was not asked; the row never reached a question."""

T = TypeVar("T")


@dataclass(frozen=True)
class Whole:
    """A prompt or beginning of a response that is cut: its label and the models' answers to it."""

    label: str
    student_answer: str | None
    teacher_answer: str | None


@dataclass(frozen=True)
class Cut:
    """A candidate of a row: who was asked on the cut prompt, and whether it was kept."""

    whole: Whole
    student_verdict: str | None
    student_answer: str | None
    kept: bool
    characters: int

    @property
    def asked(self) -> bool:
        return self.student_verdict is not None


@dataclass(frozen=True)
class Row:
    """A row of the dataset as an arm knows it.

    Attributes:
        row_id: its position in the dataset.
        state: what the student and the teacher do on the whole prompt.
        groups: all, and its source and difficulty where the dataset names them.
        cuts: its candidates, of all levels together.
        scored: whether the row has scores.
        hit: whether one of the cuts is usable: it did not leave before the validation, as one that
            changes nothing does. The funnel counts these rows as "with candidates".
        length: characters of the texts that were searched.
    """

    row_id: int
    state: State
    groups: tuple[str, ...] = ("all",)
    cuts: tuple[Cut, ...] = ()
    scored: bool = False
    hit: bool = False
    length: int = 0

    @property
    def asked(self) -> list[Cut]:
        """The cuts on which the student was asked."""
        return [cut for cut in self.cuts if cut.asked]

    @property
    def share_right(self) -> float:
        """The chance that the student is right on one of the cuts, taken at random; 0 of none."""
        return _mean([cut.student_verdict == "right" for cut in self.asked])

    @property
    def any_right(self) -> bool:
        """Whether the student is right on one of the cuts."""
        return any(cut.student_verdict == "right" for cut in self.asked)


@dataclass(frozen=True)
class Arm:
    """An arm of `leaf detect`: its settings, and its rows by row_id."""

    name: str
    settings: Mapping[str, Any]
    rows: Mapping[int, Row]

    def of(self, *states: State) -> list[Row]:
        """Return the rows in one of these states."""
        return [row for row in self.rows.values() if row.state in states]

    @property
    def asks_student(self) -> bool:
        """Whether the student was asked on the cuts."""
        return bool(self.settings["validate"] == "both")

    @property
    def marks(self) -> bool:
        """Whether the models were asked on the whole prompts."""
        return bool(self.settings["select"] != "all")

    def differs_in(self, other: Arm) -> set[str]:
        """Return the settings that are not those of another arm, but for those without effect."""
        names = {*self.settings, *other.settings} - set(INCIDENTAL)
        return {name for name in names if self.settings.get(name) != other.settings.get(name)}


def read_arms(run_dir: str | Path, names: Sequence[str] | None = None) -> tuple[Path, list[Arm]]:
    """Read all arms of a run directory, or those that are named.

    Args:
        run_dir: the output directory of `leaf detect`, or one of its arms, which is then read
            alone.
        names: of arms.

    Returns:
        The run directory, and the arms by name.

    Raises:
        ValueError: there is no such arm, or a file in it cannot be read or has another shape.
    """
    directory = Path(run_dir).expanduser().absolute()
    # The originals of `leaf compare`, in arms/kd, are no arm of `leaf detect`.
    found = sorted(path.parent for path in directory.glob("arms/*/funnel.json"))
    if not found:
        found = [find_arm(directory, "run_dir")]
    root = found[0].parent.parent
    known = {path.name: path for path in found}
    for name in names or ():
        if name not in known:
            raise ValueError(
                f"arms: must be of {', '.join(known)}, got {name!r}; give names of directories in "
                f"{root / 'arms'}"
            )
    return root, [_read(known[name]) for name in dict.fromkeys(names or known)]


def paired(first: Sequence[Row], second: Mapping[int, Row]) -> Iterator[tuple[Row, Row]]:
    """Yield the rows of one arm with those of another that have the same row_id."""
    return ((row, second[row.row_id]) for row in first if row.row_id in second)


def _read(path: Path) -> Arm:
    funnel = read_json(path / "funnel.json")
    with reading(path):
        settings = dict(funnel["settings"])
        outcomes = pq.read_table(path / "outcomes.parquet").to_pylist()
        states = _states(outcomes, select=settings["select"])
        hit = {
            int(one["row_id"])
            for one in outcomes
            if one["candidate_id"] >= 0 and one["stage"] != "prune"
        }
        groups = _groups(path)
        samples: dict[int, list[dict[str, Any]]] = {}
        for sample in pq.read_table(path / "samples.parquet").to_pylist():
            samples.setdefault(int(sample["row_id"]), []).append(sample)
        rows = {
            row_id: replace(
                _row(row_id, state, groups.get(row_id, ("all",)), samples.get(row_id, [])),
                hit=row_id in hit,
            )
            for row_id, state in states.items()
        }
    return Arm(path.name, settings, rows)


def _states(outcomes: Sequence[Mapping[str, Any]], *, select: str) -> dict[int, State]:
    """Return the state of each row, from the stage at which it left and the reason.

    A row with views has lines for them behind its own; only marked rows have some.
    """
    states: dict[int, State] = {}
    for line in outcomes:
        row_id = int(line["row_id"])
        if line["candidate_id"] >= 0:
            continue
        if row_id not in states:
            states[row_id] = _state(line["stage"], line["reason"], select)
        elif select != "all":
            states[row_id] = "marked"
    return states


def _state(stage: str, reason: str, select: str) -> State:
    if stage in ("rows", "render"):
        return "unusable"
    if select == "all":
        return "unasked"
    if stage in ("predict", "mark"):
        return "solved" if reason == "student_right" else "failed"
    return "marked" if stage in (*AFTER_MARKING, "dataset") else "unasked"


def _groups(path: Path) -> dict[int, tuple[str, ...]]:
    """Return the groups of each usable row: all, and the values of two columns."""
    file = path / "dataset.parquet"
    names = [name for name in ("source", "difficulty") if name in pq.read_schema(file).names]
    table = pq.read_table(file, columns=["row_id", "branch", *names])
    return {
        int(line["row_id"]): ("all", *(f"{name}: {line[name] or 'none'}" for name in names))
        for line in table.to_pylist()
        if line["branch"] == "original"
    }


def _row(
    row_id: int, state: State, groups: tuple[str, ...], samples: Sequence[Mapping[str, Any]]
) -> Row:
    if not samples:
        return Row(row_id, state, groups)
    return Row(
        row_id=row_id,
        state=state,
        groups=groups,
        cuts=tuple(_cut(one, sample) for sample in samples for one in sample["candidates"]),
        scored=True,
        length=sum(len(sample["text"]) for sample in samples),
    )


def _cut(candidate: Mapping[str, Any], sample: Mapping[str, Any]) -> Cut:
    return Cut(
        whole=Whole(sample["completion"], sample["student_answer"], sample["teacher_answer"]),
        student_verdict=candidate["student_verdict"],
        student_answer=candidate["student_answer"],
        kept=bool(candidate["kept"]),
        characters=sum(stop - start for start, stop in candidate["cut"]),
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
