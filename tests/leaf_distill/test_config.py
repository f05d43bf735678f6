"""DetectConfig: one sentence for each wrong setting, and a command line that fills it."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import HfArgumentParser

from leaf_distill.config import DetectConfig, parse_columns

NAMES = {"student": "s", "teacher": "t", "dataset": "d"}


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"student": ""}, "student: is needed"),
        ({"dataset": ""}, "dataset: is needed"),
        ({"threshold": 1.5}, "threshold: needs a value from 0 to 1, came 1.5"),
        ({"threshold": float("nan")}, "threshold: needs"),
        ({"cap": -0.1}, "cap: needs"),
        ({"teacher_max": 2.0}, "teacher_max: needs"),
        ({"rule": "rank"}, "rule: needs one of absolute, quantile, came 'rank'"),
        ({"strategy": "spans"}, "strategy: needs one of"),
        ({"min_length": 0}, "min_length: needs at least 1, came 0"),
        ({"join_gap": -1}, "join_gap: needs at least 0"),
        ({"max_rows": 0}, "max_rows: needs at least 1"),
        ({"max_batch_tokens": 0}, "max_batch_tokens"),
        ({"grade_timeout": 0.0}, "grade_timeout"),
        ({"columns": "prompt=question"}, "columns: needs a JSON object"),
        ({"columns": '{"prompt": 3}'}, "columns: needs text to text"),
    ],
)
def test_wrong_settings_are_named(wrong: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError) as caught:
        DetectConfig(**(NAMES | wrong))
    assert sentence in str(caught.value)


def test_the_command_line_fills_every_field() -> None:
    words = "--student s --teacher t --dataset d --max_rows 3 --teacher_max 0.4 --threshold 0.2"
    columns = ["--columns", '{"prompt": "question"}', "--system_prompt", "Be brief."]
    (config,) = HfArgumentParser(DetectConfig).parse_args_into_dataclasses(words.split() + columns)
    assert config == DetectConfig(
        **NAMES,
        max_rows=3,
        teacher_max=0.4,
        threshold=0.2,
        columns={"prompt": "question"},
        system_prompt="Be brief.",
    )


def test_every_field_has_help() -> None:
    help_text = HfArgumentParser(DetectConfig).format_help()
    for name, field in DetectConfig.__dataclass_fields__.items():
        assert field.metadata["help"], name
        assert f"--{name}" in help_text


def test_columns_as_json_or_mapping() -> None:
    assert parse_columns(None) is None
    assert parse_columns({"prompt": "q"}) == parse_columns('{"prompt": "q"}') == {"prompt": "q"}
