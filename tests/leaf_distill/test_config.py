"""Configurations: one sentence for each wrong setting, and a help text for each field."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from leaf_distill.config import DemoConfig, ReportConfig, need
from leaf_distill.detection.config import DetectConfig
from leaf_distill.evaluation.config import CompareConfig, EvaluateConfig
from leaf_distill.training.config import DistillArguments, LeafConfig


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"output_dir": ""}, "output_dir: must be a directory"),
        ({"threshold": 1.5}, "threshold: must be from 0 to 1, got 1.5"),
        ({"threshold": float("nan")}, "threshold: must be from 0 to 1, got nan"),
        ({"threshold": "0.1"}, "threshold: must be from 0 to 1, got '0.1'"),
        ({"threshold": True}, "threshold: must be from 0 to 1, got True"),
        ({"cap": -0.1}, "cap: must be"),
        ({"teacher_max": 2.0}, "teacher_max: must be"),
        ({"rule": "rank"}, "rule: must be one of absolute, quantile, got 'rank'"),
        ({"strategy": "spans"}, "strategy: must be one of"),
        ({"min_length": 0}, "min_length: must be at least 1, got 0"),
        ({"join_gap": -1}, "join_gap: must be at least 0"),
        ({"max_rows": 0}, "max_rows: must be at least 1"),
        ({"max_batch_tokens": 0}, "max_batch_tokens: must be"),
        ({"max_new_tokens": 2**63}, "max_new_tokens: must be from 1 to 2147483647"),
        ({"grade_timeout": 0.0}, "grade_timeout: must be seconds above 0"),
        (
            {"columns": "prompt=question, answer=result"},
            """single ones: --columns '{"prompt": "question", "answer": "result"}'""",
        ),
        (
            {"columns": "{'prompt': 'Frage'}"},
            """put double quotes inside single ones: --columns '{"prompt": "Frage"}'""",
        ),
        ({"chat_template_kwargs": "enable_thinking=false"}, """'{"enable_thinking": false}'"""),
        ({"columns": "{'prompt': 'x=y'}"}, """--columns '{"prompt": "x=y"}'"""),
        ({"columns": "[" * 100_000}, "columns: must be a JSON object"),
        ({"columns": '{"prompt": 3}'}, "columns: must map text to text"),
        ({"chat_template_kwargs": "[1]"}, "chat_template_kwargs: must be a JSON object, got"),
    ],
)
def test_wrong_settings_are_named(wrong: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError) as caught:
        DetectConfig(**wrong)
    assert sentence in str(caught.value)


@pytest.mark.parametrize(
    ("arms", "sentence"),
    [
        (["kd", "spam"], "arms: must be of kd, kd_failed, .*, got 'spam'"),
        ([], "arms: must be different names, got ''"),
        (["span", "span"], "arms: must be different names, got 'span span'"),
    ],
)
def test_wrong_arms_are_named(arms: list[str], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        CompareConfig(arms=arms)


def test_a_missing_name_is_asked_for() -> None:
    with pytest.raises(ValueError, match=r"teacher: must be given, got nothing; give --teacher"):
        need(DetectConfig(student="s"), "student", "teacher", "dataset")


@pytest.mark.parametrize(
    "config",
    [
        DetectConfig,
        EvaluateConfig,
        CompareConfig,
        ReportConfig,
        DemoConfig,
        DistillArguments,
        LeafConfig,
    ],
)
def test_every_field_has_help(config: type) -> None:
    own = config.__annotations__ if config is LeafConfig else [item.name for item in fields(config)]
    for item in fields(config):
        if item.name in own:
            assert item.metadata.get("help"), item.name
            assert f"{item.name}: {item.metadata['help']}" in (config.__doc__ or ""), item.name


def test_columns_as_json_or_mapping() -> None:
    assert DetectConfig().columns is None
    both = [DetectConfig(columns=given) for given in ({"prompt": "q"}, '{"prompt": "q"}')]
    assert both[0].columns == both[1].columns == {"prompt": "q"}


def test_an_evaluation_takes_one_name_or_several() -> None:
    assert EvaluateConfig(model="a").model == EvaluateConfig(model=["a"]).model == ("a",)
    assert EvaluateConfig().model == EvaluateConfig(model="").model == ()
    assert EvaluateConfig(model=Path("a")).model == ("a",)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"benchmark": "gsm8k", "dataset": "d"}, "dataset: must not be given together with"),
        ({"benchmark_file": "a.jsonl"}, "benchmark_file: must be of a benchmark, got 'a.jsonl'"),
        ({"benchmark": "gsm8k", "columns": {"prompt": "q"}}, "columns: must not be given with"),
        ({"benchmark": "gsm8k", "dataset_split": "dev"}, "dataset_split: must not be given with"),
        ({"grade": "maths"}, "grade: must be one of math, number, exact, code, got 'maths'"),
        ({"samples": 0}, "samples: must be at least 1, got 0"),
        ({"temperature": -0.1}, "temperature: must be from 0 to 100, got -0.1"),
        ({"top_p": 0.0}, "top_p: must be above 0, got 0"),
        ({"top_p": 1.1}, "top_p: must be from 0 to 1, got 1.1"),
    ],
)
def test_wrong_settings_of_an_evaluation(wrong: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        EvaluateConfig(**wrong)
