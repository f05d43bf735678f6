"""Stage 1 as a whole: rows in, a dataset of originals and validated counterfactuals out.

    rows -> render -> predict, mark -> saliency -> detect -> prune -> validate -> dataset

Every arrow is a Stage on disk, keyed by what it depends on; a stage that is done is read, not run.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from leaf_distill.config import DetectConfig, package_versions, parse_columns
from leaf_distill.data.dataset import Rejection, load_rows
from leaf_distill.data.prompt import template_differences
from leaf_distill.detection.counterfactual import cut
from leaf_distill.detection.funnel import ROW_STAGES, Funnel, replaced
from leaf_distill.detection.output import CandidateFate, write_dataset, write_samples
from leaf_distill.detection.pair import ROLES, Pair
from leaf_distill.detection.search import Saliencies, cut_messages, detect_spans, prune
from leaf_distill.detection.steps import Answered, Labelled, Prompt, answer, render_rows, score
from leaf_distill.io import claim_run_directory, write_json, write_table

IDENTITY: Final = ("student", "teacher", "dataset", "dataset_split", "columns", "max_rows")
"""Settings that a run directory belongs to; with others it may be run again."""


@dataclass(frozen=True)
class DetectResult:
    """Where the results of a run are, and its funnel (the content of funnel.json)."""

    run_directory: Path
    dataset: Path
    samples: Path
    fates: Path
    funnel: dict[str, Any]


def detect(config: DetectConfig) -> DetectResult:
    """Run stage 1 in config.output_dir, going on where an earlier run of it stopped.

    Writes dataset.parquet and dataset.jsonl (every usable original, each followed by its
    counterfactuals), samples.parquet (what was seen in each scored row), fates.parquet (where each
    row and candidate left, and why) and funnel.json. Another threshold, rule or strategy starts
    from the stored saliencies, and loads a model for validation only. A row without an answer is
    graded against its completion. Raises ValueError for settings or inputs that cannot work or
    leave no usable row, StoreError for a run directory that is damaged or cannot be written.
    """
    return _Run(config).run()


class _Run:
    """The state of one run: the pair, the rows, their labels and answers, and who left where."""

    def __init__(self, config: DetectConfig) -> None:
        self.config = config
        self.root = Path(config.output_dir)
        self.seconds: dict[str, float] = {}
        with self._clock("rows"):
            rows, rejected = load_rows(
                config.dataset,
                split=config.dataset_split,
                columns=parse_columns(config.columns),
                max_rows=config.max_rows,
                need_completion=config.completion_source == "dataset",
            )
            self.pair = Pair(config, self.root)
        # Only now: a directory that a misspelled name had claimed would refuse the right one.
        self.free = claim_run_directory(
            self.root, {name: getattr(config, name) for name in IDENTITY}
        )
        self.rows = {row.row_id: row for row in rows}
        self.completions: dict[int, str] = {}
        self.answers: dict[str, dict[int, Answered]] = {role: {} for role in ROLES}
        self.funnel = Funnel(len(rows) + len(rejected), _stages(config), left=list(rejected))

    @contextmanager
    def _clock(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def run(self) -> DetectResult:
        usable = self._label()
        if not usable:
            raise self._nothing_usable()
        marked = usable if self.config.select == "all" else self._mark(usable)
        with self._clock("saliency"):
            labelled = [
                Labelled(
                    self.rows[row_id],
                    self.completions[row_id],
                    {role: usable[row_id][f"{role}_whole"] for role in ROLES},
                )
                for row_id in marked
            ]
            # The teacher first: where both have predicted, it is the one still in memory.
            saliencies = {
                role: Saliencies(*score(self.pair, role, labelled)) for role in ROLES[::-1]
            }
        with self._clock("detect"):
            detections, fingerprint, left = detect_spans(self.pair, saliencies)
            self.funnel.left += left
        with self._clock("prune"):
            lines, left = prune(self.pair, self.rows, detections, fingerprint)
            self.funnel.left += left
            self.funnel.candidates = len(lines)
        with self._clock("validate"):
            fates = self._validate(lines)
            self.pair.release()
        self._let_rows_go(lines, fates)
        with self._clock("write"):
            originals = [self.rows[row_id] for row_id in usable]
            dataset = write_dataset(
                self.root, originals, self.completions, fates, self.config.strategy
            )
            samples = write_samples(
                self.root, self.rows, self.completions, detections, self.answers, fates
            )
        return self._finish(dataset, samples, fates)

    def _label(self) -> dict[int, dict[str, int]]:
        """Give every row its completion and return the lengths of those that fit."""
        if self.config.completion_source == "dataset":
            self.completions = {row_id: row.completion for row_id, row in self.rows.items()}
            return self._render()
        usable = self._render()
        for row_id, given in self._answer("teacher", usable, list(usable)).items():
            if given.verdict in ("cut_off", "not_finite"):
                self._leave(row_id, "render", f"teacher_{given.verdict}")
            elif not given.text.strip():
                self._leave(row_id, "render", "empty_completion")
            else:
                self.completions[row_id] = given.text
        self.rows = {row_id: row for row_id, row in self.rows.items() if row_id in self.completions}
        return self._render()

    def _render(self) -> dict[int, dict[str, int]]:
        with self._clock("render"):
            fits, left = render_rows(self.pair, list(self.rows.values()), self.completions)
        self.funnel.left += left
        return fits

    def _leave(self, row_id: int, stage: str, reason: str, detail: str = "") -> None:
        self.funnel.left.append(Rejection(row_id, -1, stage, reason, detail))

    def _answer(
        self, role: str, lengths: Mapping[int, Mapping[str, int]], row_ids: Sequence[int]
    ) -> dict[int, Answered]:
        """Ask a model for its answers to originals; they stay in self.answers too."""
        prompts = [
            Prompt(
                row_id,
                self.rows[row_id].messages,
                self._gold(row_id),
                {name: lengths[row_id][f"{name}_prompt"] for name in ROLES},
            )
            for row_id in row_ids
        ]
        with self._clock("predict"):
            self.answers[role] |= answer(self.pair, role, prompts)
        return {row_id: self.answers[role][row_id] for row_id in row_ids}

    def _gold(self, row_id: int) -> str:
        row = self.rows[row_id]
        return row.completion if row.answer is None else row.answer

    def _nothing_usable(self) -> ValueError:
        fates = self._write_fates({})
        if self.free:  # other columns, say, may be what the next run in it needs
            (self.root / "run.json").unlink()
        counts = ", ".join(f"{entry['count']} {entry['reason']}" for entry in self.funnel.reasons())
        return ValueError(
            f"dataset: no row of {self.config.dataset} is usable ({counts}); {fates} says of each "
            "row why"
        )

    def _mark(self, lengths: Mapping[int, Mapping[str, int]]) -> list[int]:
        """Return the rows that the student fails and the teacher solves.

        The student is asked first, and the teacher only where the student's answer is wrong.
        """
        failed = []
        for row_id, given in self._answer("student", lengths, list(lengths)).items():
            if given.verdict in ("wrong", "no_answer"):
                failed.append(row_id)
            else:
                stage = "mark" if given.verdict == "right" else "predict"
                self._leave(row_id, stage, f"student_{given.verdict}")
        if self.config.completion_source == "dataset":
            self._answer("teacher", lengths, failed)
        marked = []
        for row_id in failed:
            verdict = self.answers["teacher"][row_id].verdict
            if verdict == "right":
                marked.append(row_id)
            else:
                stage = "mark" if verdict in ("wrong", "no_answer") else "predict"
                self._leave(row_id, stage, f"teacher_{verdict}")
        return marked

    def _validate(self, lines: Sequence[Mapping[str, Any]]) -> dict[int, list[CandidateFate]]:
        """Ask again on the cut prompts; the cheaper student first, the teacher where it matters."""
        judges = {"both": ROLES, "teacher": ("teacher",), "none": ()}[self.config.validate]
        reasons: list[str | None] = [line["reason"] for line in lines]
        given: dict[str, dict[int, Answered]] = {role: {} for role in ROLES}
        for role in judges:
            prompts = [
                self._cut_prompt(index, line)
                for index, line in enumerate(lines)
                if reasons[index] is None
            ]
            given[role] = answer(self.pair, role, prompts)
            for index, item in given[role].items():
                if item.verdict != "right":
                    reasons[index] = f"{role}_{item.verdict}"
                    key = (lines[index]["row_id"], lines[index]["candidate_id"])
                    self.funnel.left.append(Rejection(*key, "validate", str(reasons[index]), ""))
        fates: dict[int, list[CandidateFate]] = {}
        for index, line in enumerate(lines):
            answers = {role: given[role].get(index) for role in ROLES}
            fate = CandidateFate(
                line["row_id"],
                line["candidate_id"],
                line["cut"] or [],
                reason=reasons[index],
                **answers,
            )
            fates.setdefault(fate.row_id, []).append(fate)
        return fates

    def _cut_prompt(self, index: int, line: Mapping[str, Any]) -> Prompt:
        row = self.rows[line["row_id"]]
        text = cut(row.messages[-1]["content"], [(start, stop) for start, stop in line["cut"]])
        lengths = {role: line[role] for role in ROLES}
        return Prompt(index, cut_messages(row, text), self._gold(row.row_id), lengths)

    def _let_rows_go(
        self, lines: Sequence[Mapping[str, Any]], fates: Mapping[int, Sequence[CandidateFate]]
    ) -> None:
        """A row whose last candidate is gone leaves with it."""
        proposed = {line["row_id"] for line in lines if line["reason"] is None}
        for row_id, group in fates.items():
            if row_id not in proposed:
                self._leave(row_id, "prune", "no_usable_cut", "every cut came to nothing")
            elif all(fate.reason for fate in group):
                self._leave(row_id, "validate", "no_valid_cut", "no cut held before its judges")

    def _finish(
        self, dataset: Path, samples: Path, fates: Mapping[int, Sequence[CandidateFate]]
    ) -> DetectResult:
        table = self._write_fates(fates)
        sides = self.pair.sides
        notes = template_differences(sides["teacher"].renderer, sides["student"].renderer)
        summary: dict[str, Any] = {
            "stages": self.funnel.counts(),
            "left": self.funnel.reasons(),
            "settings": asdict(self.config),
            "templates": notes,
            "versions": package_versions(),
            "seconds": {name: round(value, 3) for name, value in self.seconds.items()},
        }
        earlier = replaced(self.root / "funnel.json", summary["settings"])
        write_json(self.root / "funnel.json", summary)
        self.funnel.show(self.seconds, notes)
        if earlier:
            page = "; `leaf report` writes the page anew"
            print(f"{earlier}{page if (self.root / 'report.html').exists() else ''}")
        print(f"The dataset is {dataset}; samples, fates and funnel are in {self.root}")
        return DetectResult(self.root, dataset, samples, table, summary)

    def _write_fates(self, fates: Mapping[int, Sequence[CandidateFate]]) -> Path:
        gone = {item.row_id for item in self.funnel.left if item.candidate_id < 0}
        kept = [(row_id, -1) for row_id in self.rows if row_id not in gone]
        kept += [
            (fate.row_id, fate.candidate_id)
            for group in fates.values()
            for fate in group
            if fate.reason is None
        ]
        path = self.root / "fates.parquet"
        write_table(path, self.funnel.fates(kept))
        return path


def _stages(config: DetectConfig) -> tuple[str, ...]:
    """Return the stages of the funnel that this configuration has."""
    skipped = {"predict", "mark"} if config.select == "all" else set()
    if config.validate == "none":
        skipped.add("validate")
    return tuple(stage for stage in ROW_STAGES if stage not in skipped)
