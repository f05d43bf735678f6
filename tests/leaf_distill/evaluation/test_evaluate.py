"""`leaf evaluate` on a model that really knows its answers."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from answering import save_model
from datasets import Dataset
from distill_pair import TEMPLATE, make_tokenizer
from transformers import AutoModelForCausalLM

from leaf_distill.data.example import Example
from leaf_distill.detection import answers
from leaf_distill.detection.cache import RowCache
from leaf_distill.evaluation.config import EvaluateConfig
from leaf_distill.evaluation.evaluate import evaluate
from leaf_distill.io import digest
from leaf_distill.models.loading import LazyModel
from leaf_distill.statistics import wilson_interval


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Trained for a moment to answer `w_n` with `w_(n+1)`, for n below 20, and w39 without end."""
    return save_model(tmp_path_factory.mktemp("model"), lambda n: n + 1)


def config(tmp_path: Path, model: str, rows: list[dict[str, Any]], **settings: Any) -> Any:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return EvaluateConfig(
        model=model,
        dataset=str(file),
        output_dir=str(tmp_path / "out"),
        grade="exact",
        cache_dir=str(tmp_path / "cache"),
        **{"max_new_tokens": 4, "device": "cpu", **settings},
    )


ROWS: list[dict[str, Any]] = [
    *({"prompt": f"w{n}", "completion": "unused", "answer": f"w{n + 1}"} for n in range(8)),
    {"prompt": "w8", "completion": "w9"},  # graded against the completion
    {"prompt": "w9", "completion": "w10", "answer": "w11"},
    {"prompt": "w39", "completion": "w39 w39", "answer": "w39"},
    {"prompt": "w1 " * 20, "completion": "w2"},
]


def test_answers_are_graded_and_counted(
    tmp_path: Path, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    result = evaluate(config(tmp_path, model, ROWS, max_length=10))
    assert result.counts == {"right": 9, "wrong": 1, "cut_off": 1, "too_long": 1}
    assert result.accuracy == 0.75
    assert result.interval == wilson_interval(9, 12)
    lines = pq.read_table(result.answers).to_pylist()
    assert [line["row_id"] for line in lines] == list(range(12))
    assert lines[3]["prompt"] == "w3" and lines[3]["answer"].strip() == "w4"
    assert lines[8]["verdict"] == "right" and lines[9]["verdict"] == "wrong"
    assert lines[10]["verdict"] == "cut_off" and lines[10]["n_tokens"] == 4
    assert lines[11]["verdict"] == "too_long" and lines[11]["answer"] is None
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["accuracy"] == 0.75 and metrics["counts"] == result.counts
    last = capsys.readouterr().out.splitlines()[-1]
    assert "Accuracy 75.0%" in last and last.endswith(str(result.answers))


def copy_with_template(model: str, path: Path, template: str) -> str:
    shutil.copytree(model, path)
    make_tokenizer(template).save_pretrained(path)
    return str(path)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows each call of generate was given."""
    sizes: list[int] = []
    original = answers.generate

    def watched(model: Any, tokenizer: Any, prompts: Any, **options: Any) -> Any:
        sizes.append(len(prompts))
        return original(model, tokenizer, prompts, **options)

    monkeypatch.setattr(answers, "generate", watched)
    return sizes


def test_known_answers_are_not_asked_again(tmp_path: Path, model: str, asked: list[int]) -> None:
    first = evaluate(config(tmp_path, model, ROWS[:4]))
    assert sum(asked) == 4
    assert evaluate(config(tmp_path, model, ROWS[:4], max_batch_tokens=6)) == first
    graded = replace(config(tmp_path, model, ROWS[:4]), grade="number", grade_timeout=9.0)
    evaluate(graded)
    assert sum(asked) == 4
    assert sum(evaluate(config(tmp_path, model, ROWS[:5])).counts.values()) == 5
    assert sum(asked) == 5
    evaluate(config(tmp_path, model, ROWS[:5], max_new_tokens=5))
    evaluate(config(tmp_path, model, ROWS[:5], system_prompt="w1"))
    assert sum(asked) == 15


def test_a_greedy_answer_has_the_key_that_it_always_had(tmp_path: Path, model: str) -> None:
    settings = config(tmp_path, model, ROWS[:1])
    evaluate(settings)
    asked = answers.prompted_model("student", LazyModel(model, device="cpu"), settings)
    example = Example(0, ({"role": "user", "content": "w0"},), "")
    prompt = asked.prompt(example).input_ids.tolist()
    key = digest(["answer", 1, *asked.identity, settings.max_new_tokens, prompt])
    with RowCache(tmp_path / "cache") as cache:
        assert json.loads(cache.get([key])[key]) == ["w1", 1, None]


def test_another_grade_grades_the_known_answers(
    tmp_path: Path, model: str, asked: list[int]
) -> None:
    rows = [{"prompt": "w3", "completion": "w4", "answer": "the w4"}]
    assert evaluate(config(tmp_path, model, rows)).counts == {"wrong": 1}
    assert evaluate(replace(config(tmp_path, model, rows), grade="number")).counts == {"right": 1}
    assert sum(asked) == 1


def test_a_model_and_rows_in_memory(tmp_path: Path, model: str) -> None:
    named = evaluate(config(tmp_path, model, ROWS[:9]))
    settings = replace(config(tmp_path, model, ROWS), model="", dataset="")
    loaded = AutoModelForCausalLM.from_pretrained(model)
    given = evaluate(
        settings,
        dataset=Dataset.from_list(ROWS[:9]),
        model=loaded,
        processing_class=make_tokenizer(),
    )
    assert given == named and given.counts == {"right": 9}
    with pytest.raises(ValueError, match="model: must be given"):
        evaluate(settings, dataset=ROWS)


def test_files_of_others_are_left_alone(tmp_path: Path, model: str) -> None:
    settings = config(tmp_path, model, ROWS[:2])
    root = tmp_path / "out"
    root.mkdir()
    for name, content in (
        ("metrics.json", '{"log": [], "rows": {}}'),
        ("metrics.json", "no JSON"),
        ("answers.parquet", "mine"),
    ):
        (root / name).write_text(content)
        with pytest.raises(ValueError, match=rf"output_dir: must be new.*{name}"):
            evaluate(settings)
        assert (root / name).read_text() == content
        (root / name).unlink()
    evaluate(settings)
    evaluate(settings)
    (root / "metrics.json").unlink()  # as a run does that is killed between its two files
    evaluate(settings)


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"dtype": "foo"}, "dtype: must be one of"),
        ({"device": "foo"}, "device: must be"),
        ({"chat_template": "foo"}, "chat_template: must be"),
        ({"grade_timeout": 0.0}, "grade_timeout: must be seconds above 0"),
        ({"grade_timeout": float("nan")}, "grade_timeout: must be seconds above 0"),
        ({"grade_timeout": float("inf")}, "grade_timeout: must be seconds above 0"),
        ({"max_rows": 0}, "max_rows: must be at least 1"),
    ],
)
def test_a_wrong_setting_claims_no_directory(
    tmp_path: Path, model: str, wrong: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence):
        evaluate(config(tmp_path, model, ROWS[:2], **wrong))
    assert not (tmp_path / "out").exists()


def test_inputs_are_never_outputs(tmp_path: Path, model: str) -> None:
    settings = config(tmp_path, model, ROWS[:2])
    evaluate(settings)
    own = replace(settings, dataset=str(tmp_path / "out/answers.parquet"))
    for wrong in (own, replace(settings, output_dir=model)):
        with pytest.raises(ValueError, match="output_dir: must not be an input"):
            evaluate(wrong)
    assert not (Path(model) / "metrics.json").exists()


def test_a_damaged_model_claims_no_directory(tmp_path: Path, model: str) -> None:
    broken = Path(shutil.copytree(model, tmp_path / "broken"))
    whole = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(whole[:-100])
    with pytest.raises(ValueError, match="from which no model can be read"):
        evaluate(config(tmp_path, str(broken), ROWS[:2]))
    (broken / "model.safetensors").write_bytes(whole)
    assert evaluate(config(tmp_path, str(broken), ROWS[:2])).accuracy == 1.0


def test_rows_that_the_template_refuses_are_counted(tmp_path: Path, model: str) -> None:
    template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    strict = copy_with_template(model, tmp_path / "strict", template + TEMPLATE)
    turns = [{"role": "system", "content": "w5"}, {"role": "user", "content": "w1"}]
    rows = [*ROWS[:2], {"prompt": turns, "completion": "w2"}]
    result = evaluate(config(tmp_path, strict, rows))
    assert result.counts == {"right": 2, "not_renderable": 1}
    assert result.accuracy == 2 / 3
    (*_, last) = pq.read_table(result.answers).to_pylist()
    assert (last["row_id"], last["verdict"], last["answer"]) == (2, "not_renderable", None)


@pytest.mark.parametrize(
    ("settings", "reason"), [({"max_length": 1}, "more than 1 tokens"), ({}, "row 0: the chat")]
)
def test_a_dataset_of_which_nothing_can_be_asked(
    tmp_path: Path, model: str, settings: dict[str, Any], reason: str
) -> None:
    shouting = copy_with_template(model, tmp_path / "shouting", TEMPLATE.replace("content", "role"))
    with pytest.raises(ValueError, match=rf"must have a row that .* can be asked, .*{reason}"):
        evaluate(config(tmp_path, model if settings else shouting, ROWS[:2], **settings))
    assert not (tmp_path / "out/metrics.json").exists()


def test_plain_text_does_without_a_template_that_fails(tmp_path: Path, model: str) -> None:
    broken = copy_with_template(model, tmp_path / "broken", "{{ raise_exception('never') }}")
    result = evaluate(config(tmp_path, broken, ROWS[:2], chat_template="none"))
    assert sum(result.counts.values()) == 2 and "not_renderable" not in result.counts
    with pytest.raises(ValueError, match="never"):
        evaluate(config(tmp_path, broken, ROWS[:2]))


def test_wilsons_interval() -> None:
    # Newcombe 1998, table I: 81 of 263, 15 of 148, 0 of 20, 1 of 29, method 3.
    published = {(81, 263): (0.2553, 0.3662), (15, 148): (0.0624, 0.1605)}
    published |= {(0, 20): (0.0, 0.1611), (1, 29): (0.0061, 0.1718)}
    for counts, interval in published.items():
        assert wilson_interval(*counts) == pytest.approx(interval, abs=5e-5)
    with pytest.raises(ValueError, match="total >= 1"):
        wilson_interval(0, 0)


def test_settings_are_checked(tmp_path: Path, model: str) -> None:
    with pytest.raises(ValueError, match="model: must be given"):
        evaluate(config(tmp_path, "", ROWS))
    with pytest.raises(ValueError, match="max_new_tokens: must be at least 1"):
        config(tmp_path, model, ROWS, max_new_tokens=0)


def test_where_nothing_is_right_an_answer_is_quoted(
    tmp_path: Path, model: str, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"prompt": "w3", "completion": "-", "answer": "the w4"}]
    assert evaluate(config(tmp_path, model, rows)).counts == {"wrong": 1}
    assert "the first ends 'w4', and its gold ends 'the w4': see --grade (now exact)" in caplog.text
