"""While a student trains: graded answers, the best weights, early stop, bad numbers."""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from distill_pair import (
    WORDS,
    answer,
    assert_same,
    make_config,
    make_rows,
    make_student,
    make_teacher,
    make_tokenizer,
    make_trainer,
    weights,
)
from transformers import LlamaForCausalLM, TrainerCallback

from leaf_distill.training.callbacks import StopEarly
from leaf_distill.training.config import DistillArguments, LeafConfig
from leaf_distill.training.distill import distill
from leaf_distill.training.trainer import LeafTrainer

ANSWERS = {"grade": "exact", "max_new_tokens": 7, "eval_answers": 6}


def test_the_student_answers_held_out_rows_and_is_graded(tmp_path: Path) -> None:
    student, rows = make_student(attention_dropout=0.5), make_rows(8, 3)
    for number, row in enumerate(rows[:8]):
        row["answer"] = answer(student.eval(), row) if number in (0, 2, 3, 5, 7) else "nothing"
    assert len({row["answer"] for row in rows[:8]}) > 3
    student.train()
    config = make_config(tmp_path, max_batch_tokens=40, **ANSWERS)  # several batches of answers
    trainer = LeafTrainer(student, make_teacher(), config, rows, rows, make_tokenizer())
    measured = trainer.evaluate()
    assert (measured["eval_accuracy"], measured["eval_accuracy_n"]) == (4 / 6, 6)


def test_answers_change_nothing_in_the_training(tmp_path: Path) -> None:
    """Neither the weights nor the random state: the student has dropout."""
    runs = []
    for number in (0, 6):
        trainer = LeafTrainer(
            make_student(attention_dropout=0.2),
            make_teacher(),
            make_config(
                tmp_path, max_steps=4, eval_strategy="steps", eval_steps=1, **ANSWERS
            ).with_changes(eval_answers=number),
            make_rows(),
            make_rows(),
            make_tokenizer(),
        )
        trainer.train()
        runs.append(weights(trainer.model))
    assert_same(*runs)


def test_answers_that_are_all_wrong_point_to_the_grading(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{**row, "answer": "nothing"} for row in make_rows(8, 0)]
    config = make_config(tmp_path, **ANSWERS)
    trainer = LeafTrainer(make_student(), make_teacher(), config, rows, rows, make_tokenizer())
    assert trainer.evaluate()["eval_accuracy"] == 0
    assert "none of 6 answers is right: see --grade (now exact)" in caplog.text


@pytest.mark.skipif(torch.accelerator.is_available(), reason="bfloat16 runs on the accelerator")
def test_bfloat16_without_a_gpu_needs_no_other_setting(tmp_path: Path) -> None:
    assert LeafConfig(output_dir=str(tmp_path), bf16=True).use_cpu


def test_rows_that_no_answer_can_be_graded_against_have_no_share(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, **{**ANSWERS, "grade": "code", "allow_code_execution": True})
    measured = trainer.evaluate()
    assert measured["eval_accuracy_n"] == 0 and "eval_accuracy" not in measured


def save_pair(directory: Path, **config: Any) -> dict[str, str]:
    for name, model in (("student", make_student(**config)), ("teacher", make_teacher())):
        model.save_pretrained(directory / name)
        make_tokenizer().save_pretrained(directory / name)
    return {name: str(directory / name) for name in ("student", "teacher")}


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


# A large rate makes the later weights worse than the earlier ones.
WORSENING = {
    "learning_rate": 0.3,
    "lr_scheduler_type": "constant",
    "warmup_steps": 0,
    "max_steps": 6,
    "eval_strategy": "steps",
    "eval_steps": 1,
    "save_strategy": "steps",
    "save_steps": 1,
    "load_best_model_at_end": True,
}


def test_answers_without_rows_to_answer_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config, rows = make_config(tmp_path, **ANSWERS), make_rows()
    LeafTrainer(make_student(), make_teacher(), config, rows, None, make_tokenizer())
    assert "eval_answers has no effect without an eval_dataset" in caplog.text
    caplog.clear()
    LeafTrainer(make_student(), make_teacher(), config, rows, rows, make_tokenizer())
    assert "eval_answers" not in caplog.text


@pytest.mark.parametrize("limit", [1, 2])
def test_the_best_weights_are_kept_written_and_told(
    tmp_path: Path, limit: int, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = DistillArguments(
        **save_pair(tmp_path),
        dataset=write_rows(tmp_path / "rows.jsonl", make_rows(12, 0)),
        eval_dataset=write_rows(tmp_path / "held.jsonl", make_rows(6, 0, seed=1)),
    )
    output = tmp_path / "out"
    settings = {**WORSENING, "save_total_limit": limit}
    result = distill(arguments, make_config(output, metric_for_best_model="loss", **settings))
    logs = [log for log in result.metrics["log"] if "eval_loss" in log][:6]
    best = min(logs, key=lambda log: log["eval_loss"])
    assert best["step"] < 6
    lines = capsys.readouterr().out.splitlines()
    told = lines.index(f"the best weights are those of step {best['step']}:")
    assert " eval " in lines[told + 1]
    assert sum(" eval " in line for line in lines[:told]) == 6
    assert result.metrics["best"] == {
        "step": best["step"],
        "measure": "eval_loss",
        "value": best["eval_loss"],
    }
    kept = {path.name for path in output.glob("checkpoint-*")}
    assert f"checkpoint-{best['step']}" in kept and len(kept) <= 2
    saved = (output / "model.safetensors").read_bytes()
    assert saved == (output / f"checkpoint-{best['step']}" / "model.safetensors").read_bytes()
    assert result.metrics["eval"]["eval_loss"] == pytest.approx(best["eval_loss"])
    assert f"The weights are those after step {best['step']}" in (output / "README.md").read_text()

    # Killed between the last checkpoint and the end: what is left is to take the best one.
    if limit == 2:
        (output / "metrics.json").unlink()
        (output / "model.safetensors").unlink()
        again = distill(arguments, make_config(output, metric_for_best_model="loss", **settings))
        assert (output / "model.safetensors").read_bytes() == saved
        assert again.metrics["best"] == result.metrics["best"]


def test_a_run_goes_on_with_its_new_intervals(tmp_path: Path) -> None:
    def train(resume: bool, **settings: Any) -> LeafTrainer:
        config = make_config(tmp_path, save_strategy="steps", save_total_limit=None, **settings)
        rows = make_rows(8, 0)
        trainer = LeafTrainer(
            *(make_student(), make_teacher(), config, rows, rows, make_tokenizer())
        )
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    train(False, max_steps=4, save_steps=4)
    trainer = train(True, max_steps=8, save_steps=3, eval_strategy="steps", eval_steps=2)
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {
        f"checkpoint-{step}" for step in (4, 6, 8)
    }
    evaluated = [log["step"] for log in trainer.state.log_history if "eval_loss" in log]
    assert evaluated[:2] == [6, 8]


def test_an_evaluation_before_the_training_is_not_of_the_best_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config(tmp_path, metric_for_best_model="loss", **WORSENING)
    held = make_rows(4, 0, seed=1)
    LeafTrainer(
        *(make_student(), make_teacher(), config, make_rows(8, 0), held, make_tokenizer())
    ).evaluate()
    lines = capsys.readouterr().out.splitlines()
    assert sum(" eval " in line for line in lines) == 1
    assert not any("best weights" in line for line in lines)


def test_a_run_that_gets_no_better_stops_and_one_that_goes_on_keeps_its_count(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    settings = {**WORSENING, "learning_rate": 1.0, "max_steps": 30, "save_total_limit": None}
    straight = make_trainer(tmp_path / "straight", early_stopping_patience=3, **settings)
    straight.train()
    values = [log["eval_loss"] for log in straight.state.log_history if "eval_loss" in log]
    best = values.index(min(values)) + 1
    assert straight.state.global_step == best + 3 < 30
    assert f"stopped early at step {best + 3}: no better loss in 3 evaluations" in caplog.text
    assert "missing keys" not in caplog.text  # the head that is tied to the embedding

    class Kill(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == best + 2:
                raise KeyboardInterrupt

    killed = make_trainer(tmp_path / "killed", early_stopping_patience=3, **settings)
    killed.add_callback(Kill())
    with pytest.raises(KeyboardInterrupt):
        killed.train()
    resumed = make_trainer(tmp_path / "killed", early_stopping_patience=3, **settings)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == best + 3
    assert_same(weights(resumed.model), weights(straight.model))

    # Killed after the stop, before the end: it does not train on.
    again = make_trainer(tmp_path / "killed", early_stopping_patience=3, **settings)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == best + 3
    assert StopEarly.count(again.state) == 3
    assert_same(weights(again.model), weights(straight.model))


def test_a_run_that_stopped_goes_on_with_more_patience(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    arguments = DistillArguments(
        **save_pair(tmp_path),
        dataset=write_rows(tmp_path / "rows.jsonl", make_rows(12, 0)),
        eval_dataset=write_rows(tmp_path / "held.jsonl", make_rows(6, 0, seed=1)),
    )
    settings = {**WORSENING, "learning_rate": 1.0, "max_steps": 30}

    def run(name: str, patience: int) -> tuple[list[Any], bytes]:
        config = make_config(tmp_path / name, early_stopping_patience=patience, **settings)
        log = distill(arguments, config).metrics["log"]
        losses = [(one["step"], one["eval_loss"]) for one in log if "eval_loss" in one]
        return losses, (tmp_path / name / "model.safetensors").read_bytes()

    stopped, straight = run("out", 1), run("straight", 3)
    longer = run("out", 3)
    assert "early_stopping_patience was 1 and is now 3; the steps so far stay" in caplog.text
    assert longer == straight and len(longer[0]) == len(stopped[0]) + 2
    with pytest.raises(ValueError, match="early_stopping_patience was 3 and is now 2"):
        run("out", 2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"eval_answers": -1}, "eval_answers: must be a number of at least 0, got -1"),
        ({"max_new_tokens": 0}, "max_new_tokens: must be at least 1, got 0"),
        ({"grade": "nope"}, "grade: must be one of math, number, exact, code, got 'nope'"),
        ({"grade_timeout": 0.0}, "grade_timeout: must be a number above 0, got 0"),
        ({"eval_answers": 2, "grade": "code"}, "allow_code_execution: must be true to run"),
        ({"early_stopping_patience": 0}, "early_stopping_patience: must be at least 1, got 0"),
        ({"early_stopping_patience": 2}, "eval_strategy: must be steps or epoch with early_stop"),
        ({"load_best_model_at_end": True}, "eval_strategy: must be steps or epoch with load_best"),
        ({**WORSENING, "save_strategy": "epoch"}, "save_strategy: must be best or steps, as eval"),
        ({**WORSENING, "save_steps": 2}, "save_steps: must be eval_steps, 1, with load_best"),
        ({"train_on": "first"}, "train_on: must be one of last, all, got 'first'"),
        ({"report_to": "nope"}, "report_to: must be of none, all, .*wandb.*, got 'nope'"),
    ],
)
def test_settings_are_checked(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        make_config(tmp_path, **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"eval_answers": 2}, "eval_dataset: must be given with eval_answers, got nothing"),
        (
            {"early_stopping_patience": 2, "eval_strategy": "epoch"},
            "eval_dataset: must be given with early_stopping_patience, got nothing",
        ),
        (
            {"eval_strategy": "steps", "eval_steps": 1},
            "eval_dataset: must be given with eval_strategy, got nothing; give rows",
        ),
        ({"metric_for_best_model": "accuracy"}, "metric_for_best_model: .*; give --eval_answers N"),
    ],
)
def test_settings_that_need_others_are_refused_before_anything_is_read(
    tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    arguments = DistillArguments(student="no", teacher="no", dataset="no")
    with pytest.raises(ValueError, match=f"^{message}"):
        distill(arguments, make_config(tmp_path / "out", **settings))


@pytest.mark.parametrize("strategy", ["steps", "epoch"])
def test_evaluations_without_rows_are_refused_before_a_model_is_loaded(
    tmp_path: Path, strategy: str
) -> None:
    config = make_config(tmp_path, eval_strategy=strategy, eval_steps=1)
    with pytest.raises(ValueError, match=r"^eval_dataset: must be given with eval_strategy, got N"):
        LeafTrainer("no", "no", config, make_rows(8, 0))


def test_the_last_step_is_evaluated_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluated: list[int] = []
    evaluate = LeafTrainer.evaluation_loop

    def counted(trainer: LeafTrainer, *arguments: Any, **settings: Any) -> Any:
        evaluated.append(trainer.state.global_step)
        return evaluate(trainer, *arguments, **settings)

    monkeypatch.setattr(LeafTrainer, "evaluation_loop", counted)
    arguments = DistillArguments(
        **save_pair(tmp_path),
        dataset=write_rows(tmp_path / "rows.jsonl", make_rows(12, 4)),
        eval_dataset=write_rows(tmp_path / "held.jsonl", make_rows(6, 3, seed=1)),
    )

    def run(name: str, **settings: Any) -> tuple[list[int], dict[str, Any], list[str]]:
        evaluated.clear()
        config = make_config(tmp_path / name, max_steps=4, eval_strategy="steps", **settings)
        metrics = distill(arguments, config).metrics
        return evaluated.copy(), metrics, capsys.readouterr().out.splitlines()

    once, metrics, lines = run("once", eval_steps=2)
    assert once == [2, 4]
    # It is printed once, but logged again as the last one, and the file has its measures.
    *_, at_step, at_end = [log for log in metrics["log"] if "eval_loss" in log]
    assert sum(" eval " in line for line in lines) == 2
    assert at_end == at_step and at_end["step"] == 4
    assert metrics["eval"] == {name: at_end[name] for name in at_end if name != "step"}
    trained = LeafTrainer(
        *(str(tmp_path / "once"), arguments.teacher, make_config(tmp_path / "again")),
        *(None, arguments.eval_dataset),
    )
    again = trained.evaluate()
    for name in ("eval_loss", "eval_kd_loss", "eval_cd_loss", "eval_agreement"):
        assert metrics["eval"][name] == pytest.approx(again[name], rel=1e-6)

    assert run("other", eval_steps=3)[0] == [3, 4]
    # In bfloat16 the weights are rounded for the evaluation at the end alone.
    rounded, metrics, lines = run("rounded", eval_steps=2, bf16_full_eval=True)
    assert sum(" eval " in line for line in lines) == 3
    *_, at_step, at_end = [log["eval_loss"] for log in metrics["log"] if "eval_loss" in log]
    assert rounded == [2, 4, 4] and at_end != at_step

    # Weights of an earlier step are evaluated as they were loaded; those of the last one were.
    best = {"save_strategy": "best", "load_best_model_at_end": True, "warmup_steps": 0}
    best |= {"eval_steps": 1, "metric_for_best_model": "loss", "lr_scheduler_type": "constant"}
    worse, metrics, _ = run("worse", learning_rate=0.3, **best)
    assert metrics["best"]["step"] < 4 and worse == [1, 2, 3, 4, 4]
    better, metrics, lines = run("better", learning_rate=1e-4, **best)
    assert metrics["best"]["step"] == 4 and better == [1, 2, 3, 4]
    head, line = lines[lines.index("the best weights are those of step 4:") :][:2]
    assert head and " eval " in line


def test_a_reporter_that_is_not_installed_is_named(tmp_path: Path) -> None:
    if importlib.util.find_spec("wandb"):
        pytest.skip("wandb is installed")
    with pytest.raises(
        ValueError, match=r"^report_to: must name an installed package, got 'wandb'"
    ):
        make_config(tmp_path, report_to=["none", "wandb"])


def test_accuracy_is_better_when_it_is_greater(tmp_path: Path) -> None:
    config = make_config(tmp_path, metric_for_best_model="accuracy", eval_answers=1)
    assert config.greater_is_better
    config = make_config(tmp_path, early_stopping_patience=1, eval_strategy="epoch")
    assert config.metric_for_best_model == "loss" and not config.greater_is_better
    for name, greater in (("eval_nll", False), ("agreement", True)):
        assert make_config(tmp_path, metric_for_best_model=name).greater_is_better is greater


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"metric_for_best_model": "cd_loss"}, "metric_for_best_model: must be one of loss, kd"),
        (
            {"metric_for_best_model": "agreement", "ce_weight": 1.0},
            r"metric_for_best_model: must be one of loss, nll, got 'agreement'",
        ),
        ({**ANSWERS, "grade": "code"}, "eval_answers: must find a row of eval_dataset"),
    ],
)
def test_what_no_evaluation_measures_is_refused_before_the_training(
    tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", make_rows(4, 0))  # no counterfactual, no tests
    arguments = DistillArguments(
        student="no", teacher="no", dataset=rows, eval_dataset=rows, eval_split="train"
    )
    config = make_config(tmp_path / "out", allow_code_execution=True, **settings)
    with pytest.raises(ValueError, match=f"^{message}"):
        distill(arguments, config)


@pytest.mark.parametrize("tested", [False, True])
def test_other_golds_of_the_evaluation_are_another_run_where_they_decide(
    tmp_path: Path, tested: bool
) -> None:
    pair, rows = save_pair(tmp_path), make_rows(8, 0)
    train = write_rows(tmp_path / "rows.jsonl", rows)
    settings = {**ANSWERS, "eval_strategy": "steps", "eval_steps": 2, "save_steps": 2}
    settings |= {"max_steps": 2, "load_best_model_at_end": True, "save_strategy": "steps"}
    for number in range(2):
        gold = {"test_list": [f"assert f({number})"]} if tested else {"answer": f"w{number}"}
        held_out = [{**row, **gold} for row in rows]
        arguments = DistillArguments(
            **pair,
            dataset=train,
            eval_dataset=write_rows(tmp_path / "held_out.jsonl", held_out),
            eval_split="train",
        )
        if number:
            with pytest.raises(ValueError, match=r"the content of graded_rows .* has changed"):
                distill(arguments, make_config(tmp_path / "out", **settings))
        else:
            distill(arguments, make_config(tmp_path / "out", **settings))


# ---- numbers that are not finite ----


def poisoned(word: str, value: float) -> LlamaForCausalLM:
    student = make_student(tie_word_embeddings=False)
    with torch.no_grad():
        student.model.embed_tokens.weight[WORDS.index(word)] = value
    return student


def rows_with_one(word: str) -> list[dict[str, Any]]:
    rows = make_rows(8, 2)
    for row in rows:
        for turn in (*row["prompt"], *row["completion"]):
            turn["content"] = turn["content"].replace(word, "w1")
    rows[3]["prompt"][0]["content"] += f" {word}"
    return rows


def broken_batch(error: pytest.ExceptionInfo[BaseException], directory: Path) -> Any:
    place = re.search(r"in (\S+broken_batch\.json)$", str(error.value))
    assert place and Path(place[1]).parent == directory
    return json.loads(Path(place[1]).read_text())


def test_a_batch_with_a_loss_that_is_no_number_is_written(tmp_path: Path) -> None:
    config = make_config(tmp_path / "new", per_device_train_batch_size=8)
    rows = rows_with_one("w30")
    models = poisoned("w30", torch.nan), make_teacher()
    trainer = LeafTrainer(*models, config, rows, None, make_tokenizer())
    with pytest.raises(RuntimeError, match=r"^the loss is NaN on the rows .*\[3\].*") as error:
        trainer.train()
    batch = broken_batch(error, tmp_path / "new")
    assert batch["after_step"] == 0 and "row_id [3]" in batch["reason"]
    assert len(batch["rows"]) == 10
    by_id = {row["row_id"]: row for row in batch["rows"]}
    assert set(by_id[3]["kl"]) == {"nan"}
    assert all(isinstance(value, float) for value in by_id[2]["kl"])
    prompt = f"<user> {rows[3]['prompt'][0]['content']} <assistant>".split()
    answer = [*rows[3]["completion"][0]["content"].split(), "<eos>"]
    for role in ("student", "teacher"):
        assert by_id[3][role]["tokens"] == prompt + answer
        assert by_id[3][role]["labels"] == list(range(len(prompt), len(prompt + answer)))
    assert len(by_id[3]["kl"]) == len(answer)


def test_an_infinite_loss_stops_too(tmp_path: Path) -> None:
    """After one word the student's logit of another is -inf, as a masked one is."""
    student = make_student(tie_word_embeddings=False)
    with torch.no_grad():
        for layer in student.model.layers:  # each position then reads its own token only
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        student.model.embed_tokens.weight[:, 0] = 0
        student.model.embed_tokens.weight[WORDS.index("w30"), 0] = 1
        student.lm_head.weight[7, 0] = -3e38
    rows = rows_with_one("w30")
    rows[3]["completion"][0]["content"] = "w30 w2"
    trainer = LeafTrainer(
        student, make_teacher(), make_config(tmp_path), rows, None, make_tokenizer()
    )
    with pytest.raises(RuntimeError, match=r"^the loss is infinite on .* \[3\]: .*") as error:
        trainer.train()
    by_id = {row["row_id"]: row["kl"] for row in broken_batch(error, tmp_path)["rows"]}
    assert by_id[3][1] == "inf" and "inf" not in (by_id[3][0], by_id[3][2])
    assert "the student rules out what the teacher does not" in str(error.value)
    sft = make_config(tmp_path / "sft", ce_weight=1.0)
    trainer = LeafTrainer(student, make_teacher(), sft, rows, None, make_tokenizer())
    with pytest.raises(RuntimeError, match="the student rules out a label"):
        trainer.train()


def test_a_gradient_that_is_not_finite_stops_before_the_step(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, per_device_train_batch_size=4)
    trainer.model.lm_head.weight.register_hook(lambda gradient: gradient * math.inf)
    before = weights(trainer.model)
    with pytest.raises(RuntimeError, match=r"^the gradient is not finite") as error:
        trainer.train()
    assert_same(weights(trainer.model), before)
    assert len(broken_batch(error, tmp_path)["rows"]) >= 8  # the step's, of both its batches


def test_a_run_that_goes_on_removes_the_broken_batch(tmp_path: Path) -> None:
    arguments = DistillArguments(
        **save_pair(tmp_path), dataset=write_rows(tmp_path / "rows.jsonl", make_rows(8, 0))
    )
    output = tmp_path / "out"
    with pytest.raises((RuntimeError, ValueError), match="not finite"):
        settings = {"learning_rate": 1e25, "max_steps": 4, "warmup_steps": 0}
        distill(arguments, make_config(output, lr_scheduler_type="constant", **settings))
    assert (output / "broken_batch.json").is_file()
    settings["learning_rate"] = 1e-3
    distill(arguments, make_config(output, lr_scheduler_type="constant", **settings))
    assert not (output / "broken_batch.json").exists()


# ---- lines and logs ----


def test_tensorboard_gets_every_measure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    settings = {"max_steps": 2, "eval_strategy": "steps", "eval_steps": 1, **ANSWERS}
    trainer = make_trainer(tmp_path / "out", report_to="tensorboard", **settings)
    trainer.train()
    board = EventAccumulator(str(next((tmp_path / "board").rglob("events*")).parent))
    board.Reload()
    tags = set(board.Tags()["scalars"])
    assert {"train/loss", "train/kd_loss", "train/agreement", "eval/loss", "eval/accuracy"} <= tags
    logged = [log["kd_loss"] for log in trainer.state.log_history if "kd_loss" in log]
    assert [event.value for event in board.Scalars("train/kd_loss")] == pytest.approx(logged)
