"""A run with a teacher of rounded weights, in an environment that has torchao."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import detect_pair
import harness
import pytest
from detect_run import run, settings, table


@pytest.mark.slow
def test_a_run_with_a_rounded_teacher_finds_the_same_spans(
    pair: dict[str, str], finished: Any, tmp_path: Path
) -> None:
    file = tmp_path / "settings.json"
    file.write_text(json.dumps(settings(pair, tmp_path, teacher_quantization="int8")))
    harness.run(
        *(detect_pair.__file__, file),
        cwd=tmp_path,
        within="quantize",
        PYTHONPATH=os.pathsep.join(sys.path),
    )
    (arm,) = (tmp_path / "run/arms").iterdir()
    assert arm.name == "span-threshold-0.15-teacher_quantization-int8"
    spans = [
        [line["spans"] for line in table(path)]
        for path in (arm / "dataset.parquet", finished.dataset)
    ]
    assert spans[0] == spans[1]
    # The same directory takes the teacher as it is: the files are the same.
    assert len(list(run(pair, tmp_path).arm.parent.iterdir())) == 2
