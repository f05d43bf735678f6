"""Two ranks under the accelerate configs that we ship: nothing changes but where things are."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import ranks_training
import torch
from distill_pair import answer, assert_same, make_rows
from ranks_training import CONFIGS, DEEPSPEED, launch, measured, saved_weights, train

# Ranks need different numbers of passes, and the last step of an epoch has rows on one rank only.
SETTINGS = {"per_device_train_batch_size": 2, "max_batch_tokens": 60, "kd_weight": 0.4}
SAVING = {"save_strategy": "steps", "save_steps": 1}
# Sums of two ranks have another order than those of one: float64 differs in the last digits, which
# AdamW's division by the gradient's own size keeps small.
TOLERANCE = 1e-10


def alone(directory: Path, **settings: Any) -> dict[str, Any]:
    """Train in this process, and save."""
    trainer, result = train({**SETTINGS, **settings}, directory)
    trainer.save_model(str(directory / "saved"))
    return result


def assert_equal_runs(ours: Path, theirs: Path, our_log: Any, their_log: Any) -> None:
    assert_same(saved_weights(theirs), saved_weights(ours), TOLERANCE)
    assert_logs_agree(our_log, their_log, "agreement", "cf_rows")


def assert_logs_agree(our_log: Any, their_log: Any, *more: str) -> None:
    names = {"loss", "kd_loss", "cd_loss", "eval_loss", "grad_norm", *more}
    for one, two in zip(our_log, their_log, strict=True):
        for name in names & one.keys():
            assert two[name] == pytest.approx(one[name], rel=1e-5), name


@pytest.mark.parametrize("tied", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_fsdp2_changes_nothing_and_gathers_the_head_once_a_pass(tmp_path: Path, tied: bool) -> None:
    settings = {**SETTINGS, "max_steps": 3, "tied": tied}
    launch(tmp_path / "two", "fsdp2", **settings)
    result, single = measured(tmp_path / "two"), alone(tmp_path / "one", **settings)
    assert_equal_runs(tmp_path / "one", tmp_path / "two", single["log"], result["log"])
    assert result["train"]["gathers"] == result["train"]["passes"] > 3
    assert result["eval"]["gathers"] <= result["eval"]["passes"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "kind"),
    [("ddp", None), ("fsdp2", "FULL_STATE_DICT"), ("fsdp2", "SHARDED_STATE_DICT")],
)
def test_a_killed_run_goes_on_and_ends_as_one_process_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: str, kind: str | None
) -> None:
    if kind is not None:
        plain = ranks_training.environment
        monkeypatch.setattr(
            ranks_training, "environment", lambda name: plain(name) | {"FSDP_STATE_DICT_TYPE": kind}
        )
    settings = {**SETTINGS, **SAVING, "max_steps": 5}
    directory = tmp_path / "two"
    launch(directory, config, killed=True, kill_after=4, **settings)
    launch(directory, config, resume=True, **settings)
    result = measured(directory)
    assert result["began"] == 3  # the kill came before step 4 was saved
    single = alone(tmp_path / "one", max_steps=5)
    assert_equal_runs(tmp_path / "one", directory, single["log"], result["log"])
    # And once more, from the checkpoint of the last step: nothing is left to train.
    launch(directory, config, resume=True, **settings)
    assert measured(directory)["train"]["passes"] == 0
    assert_same(saved_weights(directory), saved_weights(tmp_path / "one"), TOLERANCE)


def token_kl(directory: Path) -> list[dict[str, Any]]:
    lines = (directory / "token_kl.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def assert_same_token_kl(ours: Path, theirs: Path, tolerance: float) -> None:
    one, two = token_kl(ours), token_kl(theirs)
    assert len(one) == 16
    for mine, yours in zip(one, two, strict=True):
        for name in ("kl_before", "kl_after"):
            assert yours.pop(name) == pytest.approx(mine.pop(name), rel=tolerance, abs=tolerance)
        assert mine == yours


@pytest.mark.slow
@pytest.mark.parametrize("config", ["ddp", "fsdp2"])
def test_the_kl_of_tokens_is_that_of_one_process_and_changes_nothing(
    tmp_path: Path, config: str
) -> None:
    settings = {**SETTINGS, "max_steps": 3}
    launch(tmp_path / "two", config, token_kl=True, **settings)
    single = alone(tmp_path / "one", **settings)
    assert_equal_runs(
        tmp_path / "one", tmp_path / "two", single["log"], measured(tmp_path / "two")["log"]
    )
    alone(tmp_path / "measured", token_kl=True, **settings)
    assert_same(saved_weights(tmp_path / "measured"), saved_weights(tmp_path / "one"))
    assert_same_token_kl(tmp_path / "measured", tmp_path / "two", 1e-5)


@pytest.mark.slow
def test_an_evaluation_before_the_training_changes_nothing(tmp_path: Path) -> None:
    settings = {**SETTINGS, "max_steps": 2, "evaluate_first": True}
    launch(tmp_path / "two", "fsdp2", **settings)
    single = alone(tmp_path / "one", **settings)
    result = measured(tmp_path / "two")
    assert_equal_runs(tmp_path / "one", tmp_path / "two", single["log"], result["log"])


@pytest.mark.slow
def test_bfloat16_rounds_neither_the_loss_nor_the_sums_of_gradients(tmp_path: Path) -> None:
    settings = {**SETTINGS, "max_steps": 2, "double": False, "bf16": True}
    launch(tmp_path / "two", "fsdp2", **settings)  # which checks the dtype of the sums
    logs = [log for log in measured(tmp_path / "two")["log"] if "loss" in log]
    for log in logs:  # the terms are measured beside the loss that is trained on
        assert log["loss"] == pytest.approx(0.4 * log["kd_loss"] + 0.6 * log["cd_loss"], rel=1e-5)
    assert len(logs) == 2
    assert {one.dtype for one in saved_weights(tmp_path / "two").values()} == {torch.float32}


@pytest.mark.slow
def test_two_ranks_share_the_answers_and_count_them_together(tmp_path: Path) -> None:
    settings = {**SETTINGS, "max_steps": 2}
    trainer, _ = train(settings, tmp_path / "first")
    student, rows = trainer.model.eval(), make_rows()
    # An odd number of them: the second rank has one less.
    right = [answer(student, row) if at in (0, 3, 5, 6) else "" for at, row in enumerate(rows[:7])]
    given = [text or "nothing" for text in right]
    settings |= {"eval_answers": 7, "grade": "exact", "max_new_tokens": 7, "answers": given}
    launch(tmp_path / "two", "ddp", **settings)
    single = alone(tmp_path / "one", **settings)
    assert_equal_runs(
        tmp_path / "one", tmp_path / "two", single["log"], measured(tmp_path / "two")["log"]
    )
    for log in (single["log"][-1], measured(tmp_path / "two")["log"][-1]):
        assert (log["eval_accuracy"], log["eval_accuracy_n"]) == (4 / 7, 7)


@pytest.mark.slow
def test_a_sharded_student_cannot_answer(tmp_path: Path) -> None:
    launch(tmp_path, "fsdp2", killed=True, **SETTINGS, max_steps=1, eval_answers=7)
    assert (
        "eval_answers: must be 0 with FSDP or DeepSpeed, whose shards of a model cannot answer "
        "alone, got 7; use `leaf evaluate` afterwards"
    ) in (tmp_path / "ranks.log").read_text()


@pytest.mark.slow
@pytest.mark.skipif(not DEEPSPEED.is_dir(), reason="DeepSpeed is not installed: make test-slow")
@pytest.mark.parametrize("tied", [True, False])
def test_zero3_trains_as_one_process_does(tmp_path: Path, tied: bool) -> None:
    settings = {**SETTINGS, "max_steps": 2, "double": False, "tied": tied, "warmup_steps": 0}
    on_gloo = {"use_cpu": False, "ddp_backend": "gloo"}  # else accelerate takes no DeepSpeed
    python = DEEPSPEED / "bin" / "python"
    launch(tmp_path / "two", "deepspeed_zero3", python=python, token_kl=True, **settings, **on_gloo)
    result, single = measured(tmp_path / "two"), alone(tmp_path / "one", token_kl=True, **settings)
    assert_same_token_kl(tmp_path / "one", tmp_path / "two", 1e-2)
    # DeepSpeed keeps gradients in float32. Where one is as small as its rounding, the first steps
    # of Adam, which divide by its size, differ by a share of the learning rate of 1e-2.
    assert_same(saved_weights(tmp_path / "two"), saved_weights(tmp_path / "one"), 1e-4)
    assert_logs_agree(single["log"], result["log"])


@pytest.mark.slow
@pytest.mark.skipif(not DEEPSPEED.is_dir(), reason="DeepSpeed is not installed: make test-slow")
def test_a_killed_run_goes_on_under_zero3(tmp_path: Path) -> None:
    settings = {**SETTINGS, "double": False, "warmup_steps": 0, "max_steps": 4}
    on_gloo = {"use_cpu": False, "ddp_backend": "gloo"}
    ours = {**settings, **SAVING, **on_gloo, "python": DEEPSPEED / "bin" / "python"}
    directory = tmp_path / "two"
    launch(directory, "deepspeed_zero3", killed=True, kill_after=3, **ours)
    launch(directory, "deepspeed_zero3", resume=True, **ours)
    result, single = measured(directory), alone(tmp_path / "one", **settings)
    assert result["began"] == 2  # the kill came before step 3 was saved
    assert_same(saved_weights(directory), saved_weights(tmp_path / "one"), 1e-4)
    assert_logs_agree(single["log"], result["log"])


def test_the_configs_are_part_of_the_package() -> None:
    found = importlib.util.find_spec("leaf_distill")
    assert found is not None and found.submodule_search_locations
    assert Path(found.submodule_search_locations[0]) / "configs" == CONFIGS
    assert {path.stem for path in CONFIGS.iterdir()} == {"ddp", "fsdp2", "deepspeed_zero3"}
