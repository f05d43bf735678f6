"""A new completion is checked as a row's own is: it must fit, and be renderable."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest
from aligned_rows import MISLED, aligned, config_of

from leaf_distill.detection.counterfactual import changed
from leaf_distill.detection.judge import Judge
from leaf_distill.detection.pipeline import Run


@pytest.mark.parametrize(("room", "reason"), [(9, None), (1, "completion_too_long")])
def test_a_new_completion_must_fit(
    pair: dict[str, str], tmp_path: Path, room: int, reason: str | None
) -> None:
    with aligned(pair, tmp_path) as (models, examples, cache):
        config = config_of(
            relabel=True, validate="teacher", guard="agreement", output_dir=str(tmp_path / "run")
        )
        run = Run(config, {role: one.model for role, one in models.items()}, MISLED)
        example = examples[0]
        example.candidates = [candidate] = [changed(example, [(0, 4)])]
        candidate.candidate_id = 0
        candidate.renderings = {role: one.prompt(candidate) for role, one in models.items()}
        run.limit = len(candidate.renderings["student"]) + room
        judge = Judge(models, config, cache, lambda stage: nullcontext(), run._check_labels)
        judge.validate([example])
        assert candidate.completion == candidate.answers["teacher"].text != ""
        found = candidate.outcome and candidate.outcome.reason
        assert found == reason and (example.outcome is None) == (reason is None)
