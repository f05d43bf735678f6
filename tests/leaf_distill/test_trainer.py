"""LeafTrainer: the paper's loss exactly, whatever the way a step is cut, killed or launched."""

from __future__ import annotations

import json
import logging
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import distill_pair
import pytest
import torch
from distill_pair import (
    TEMPLATE,
    WORDS,
    make_config,
    make_rows,
    make_student,
    make_teacher,
    make_tokenizer,
    make_trainer,
)
from torch import Tensor
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    TrainerCallback,
)

from leaf_distill.checkpoint import checkpoint_fault
from leaf_distill.collate import prepare_examples
from leaf_distill.render import Renderer
from leaf_distill.trainer import LeafTrainer

BRANCH = {"kd": "original", "cd": "counterfactual"}


def losses(trainer: LeafTrainer) -> list[float]:
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


def weights(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float = 0.0) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        difference = float((tensor - theirs[name]).abs().max())
        assert difference <= tolerance, f"{name} differs by {difference}"


def plain_measures(student: Any, teacher: Any, rows: list[dict[str, Any]]) -> dict[str, float]:
    """Means per label token from the models' own logits, row by row, in float64."""
    renderer = Renderer(make_tokenizer())
    examples, _ = prepare_examples(rows, renderer, renderer, max_length=4096)
    sums: dict[str, float] = {}
    for example in examples:
        ids, at = torch.tensor(example.student_ids[None]).long(), example.student_predicts
        with torch.no_grad():
            log_s, log_t = (
                model(input_ids=ids).logits[0, at, : len(WORDS)].double().log_softmax(-1)
                for model in (student, teacher)
            )
        branch = "cd" if example.counterfactual else "kd"
        same = (log_s.argmax(-1) == log_t.argmax(-1)).double()
        for name, value in {
            f"{branch}_loss": (log_t.exp() * (log_t - log_s)).sum(),
            f"{branch}_tokens": at.sum(),
            "student_entropy": -(log_s.exp() * log_s).sum(),
            "teacher_entropy": -(log_t.exp() * log_t).sum(),
            "agreement": same.sum(),
        }.items():
            sums[name] = sums.get(name, 0.0) + float(value)
    n_kd, n_cd = sums.pop("kd_tokens"), sums.pop("cd_tokens")
    tokens = {"kd_loss": n_kd, "cd_loss": n_cd}
    means = {name: value / tokens.get(name, n_kd + n_cd) for name, value in sums.items()}
    means["pool"] = n_kd / (n_kd + n_cd)
    return means


# ---- the objective ----


@pytest.mark.parametrize("kd_weight", ["pool", "0.3"])
def test_the_first_step_is_the_papers_loss(tmp_path: Path, kd_weight: str) -> None:
    rows = make_rows(8, 3)
    expected = plain_measures(make_student().eval(), make_teacher().eval(), rows)
    trainer = make_trainer(tmp_path, rows, kd_weight=kd_weight, num_train_epochs=1)
    trainer.train()
    log = trainer.state.log_history[0]
    share = expected.pop("pool") if kd_weight == "pool" else 0.3
    loss = share * expected["kd_loss"] + (1 - share) * expected["cd_loss"]
    assert log["loss"] == pytest.approx(loss, rel=1e-5)
    assert log["cf_rows"] == 3 and log["steps_without_cf"] == log["skipped_rows"] == 0
    for name in ("kd_loss", "cd_loss", "student_entropy", "teacher_entropy", "agreement"):
        assert log[name] == pytest.approx(expected[name], rel=1e-5), name


def test_the_student_learns_and_the_teacher_does_not(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, num_train_epochs=8)
    before = weights(trainer.teacher_model)
    trainer.train()
    assert losses(trainer)[-1] < 0.7 * losses(trainer)[0]
    assert_same(weights(trainer.teacher_model), before)
    assert not trainer.teacher_model.training
    trained = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    for parameter in trainer.teacher_model.parameters():
        assert parameter.grad is None and id(parameter) not in trained


def test_a_step_without_counterfactuals_is_counted(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, make_rows(24, 1), num_train_epochs=1, kd_weight="0.5")
    trainer.train()
    logs = trainer.state.log_history[:3]
    assert sum(log["steps_without_cf"] for log in logs) == 2
    alone = next(log for log in logs if log["steps_without_cf"])
    assert alone["loss"] == pytest.approx(alone["kd_loss"], rel=1e-6)
    assert "cd_loss" not in alone


def test_the_evaluation_loss_is_that_of_the_whole_dataset(tmp_path: Path) -> None:
    rows = make_rows(7, 4)
    expected = plain_measures(make_student().eval(), make_teacher().eval(), rows)
    for batch_size in (1, 3, 16):
        trainer = make_trainer(
            tmp_path, rows, kd_weight="0.25", per_device_eval_batch_size=batch_size
        )
        measured = trainer.evaluate()
        loss = 0.25 * expected["kd_loss"] + 0.75 * expected["cd_loss"]
        assert measured["eval_loss"] == pytest.approx(loss, rel=1e-5)
        assert measured["eval_kd_loss"] == pytest.approx(expected["kd_loss"], rel=1e-5)
        assert measured["eval_cf_rows"] == 4


# ---- the same step, cut in other ways ----


def test_accumulation_changes_nothing(tmp_path: Path) -> None:
    single, double = [], []
    for batch_size in (8, 4, 1):
        settings = {"per_device_train_batch_size": batch_size, "max_steps": 5, "kd_weight": "0.4"}
        trainer = make_trainer(tmp_path, **settings)
        assert trainer.args.gradient_accumulation_steps == 8 // batch_size
        trainer.train()
        single.append(losses(trainer))

        student = make_student().double()
        rows, config = make_rows(), make_config(tmp_path, **settings)
        LeafTrainer(student, make_teacher().double(), config, rows, None, make_tokenizer()).train()
        double.append(weights(student))
    assert len(single[0]) == 5
    assert single[1] == pytest.approx(single[0], abs=1e-6, rel=0)
    assert single[2] == pytest.approx(single[0], abs=1e-6, rel=0)
    assert_same(double[1], double[0], 1e-10)
    assert_same(double[2], double[0], 1e-10)


def settings_file(directory: Path) -> Path:
    """20 originals in steps of 8: the last step of an epoch has 4, all of them on one rank."""
    directory.mkdir()
    file = directory / "settings.json"
    settings = {"double": True, "max_steps": 5, "per_device_train_batch_size": 4}
    file.write_text(json.dumps(settings))
    return file


def result_of(directory: Path) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
    log = json.loads((directory / "log.json").read_text())
    return torch.load(directory / "student.pt"), log


def torchrun(file: Path, processes: int) -> None:
    """Run distill_pair.py as a user runs a training script, on that many ranks."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}"]
    command += ["--master_addr=127.0.0.1", f"--master_port={port}", distill_pair.__file__]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command.append(str(file))
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL, timeout=180)


def test_two_ranks_change_nothing(tmp_path: Path) -> None:
    distill_pair.main(settings_file(tmp_path / "one"))
    torchrun(settings_file(tmp_path / "two"), 2)
    (ours, our_log), (theirs, their_log) = result_of(tmp_path / "one"), result_of(tmp_path / "two")
    assert_same(theirs, ours, 1e-10)
    measured = {"loss", "kd_loss", "cd_loss", "agreement", "cf_rows", "eval_loss", "eval_kd_loss"}
    assert len(our_log) == len(their_log) == 7  # five steps, the end, the evaluation
    for one, two in zip(our_log, their_log, strict=True):
        assert one.keys() == two.keys()
        for name in measured & one.keys():
            assert two[name] == pytest.approx(one[name], rel=1e-5), name


# ---- killed and resumed ----


class _Kill(TrainerCallback):
    """Stands for Ctrl-C after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


SAVING = {
    "save_strategy": "steps",
    "save_steps": 1,
    "save_total_limit": None,
    "per_device_train_batch_size": 2,
}


def dropout_trainer(directory: Path, **settings: Any) -> LeafTrainer:
    """With dropout, so that the random state must be right too."""
    student, rows = make_student(attention_dropout=0.2), make_rows()
    config = make_config(directory, **{**SAVING, "num_train_epochs": 2, **settings})
    return LeafTrainer(student, make_teacher(), config, rows, None, make_tokenizer())


# Three steps an epoch, and one step is lost: it goes on in the first, between both, in the second.
@pytest.mark.parametrize("killed_after", [2, 4, 5])
def test_resuming_gives_the_same_weights_bit_for_bit(tmp_path: Path, killed_after: int) -> None:
    straight = dropout_trainer(tmp_path / "straight")
    straight.train()
    assert straight.state.global_step == 6

    killed = dropout_trainer(tmp_path / "killed")
    killed.add_callback(_Kill(killed_after))
    with pytest.raises(KeyboardInterrupt):
        killed.train()
    resumed = dropout_trainer(tmp_path / "killed")
    resumed.train(resume_from_checkpoint=True)
    # The kill came before that step was saved.
    assert resumed._initial_global_step == killed_after - 1
    assert resumed.state.global_step == 6
    assert_same(weights(resumed.model), weights(straight.model))
    assert losses(resumed)[killed_after - 1 :] == losses(straight)[killed_after - 1 :]


FAULTS = {
    "trainer_state.json": None,
    "model.safetensors": -1,
    "optimizer.pt": -100,
    "rng_state.pth": None,
}


@pytest.mark.parametrize(("name", "cut"), FAULTS.items(), ids=FAULTS)
def test_half_a_checkpoint_is_passed_over_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, cut: int | None
) -> None:
    dropout_trainer(tmp_path, max_steps=3).train()
    newest = tmp_path / "checkpoint-3"
    assert checkpoint_fault(newest) is None
    file = newest / name
    if cut is None:
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:cut])
    resumed = dropout_trainer(tmp_path, max_steps=4)
    with caplog.at_level(logging.WARNING, logger="leaf_distill"):
        resumed.train(resume_from_checkpoint=True)
    assert resumed._initial_global_step == 2
    assert f"checkpoint-3 is not whole ({name}" in caplog.text
    file.unlink(missing_ok=True)
    with pytest.raises(ValueError, match=r"checkpoint-3 is not a whole checkpoint \(.*missing"):
        dropout_trainer(tmp_path, max_steps=4).train(resume_from_checkpoint=str(newest))


def test_resuming_without_a_checkpoint_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no whole checkpoint in"):
        make_trainer(tmp_path).train(resume_from_checkpoint=True)


# ---- bad numbers, bad rows ----


def only_row_with(word: str) -> list[dict[str, Any]]:
    rows = make_rows(8, 2)
    for row in rows:
        for turn in (*row["prompt"], *row["completion"]):
            turn["content"] = turn["content"].replace(word, "w1")
    rows[3]["prompt"][0]["content"] += f" {word}"
    return rows


def poison(model: LlamaForCausalLM, word: str) -> LlamaForCausalLM:
    with torch.no_grad():
        model.model.embed_tokens.weight[WORDS.index(word)] = torch.nan
    return model


def test_a_row_that_breaks_the_teacher_is_skipped_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows, student = only_row_with("w30"), make_student()
    teacher = poison(make_teacher(tie_word_embeddings=False), "w30")
    trainer = LeafTrainer(
        student, teacher, make_config(tmp_path, num_train_epochs=2), rows, None, make_tokenizer()
    )
    with caplog.at_level(logging.WARNING, logger="leaf_distill"):
        trainer.train()
    assert [log["skipped_rows"] for log in trainer.state.log_history[:2]] == [1, 1]
    assert "skipped row_id [3]" in caplog.text
    assert all(tensor.isfinite().all() for tensor in weights(student).values())
    assert losses(trainer)[-1] > 0


def test_a_row_that_breaks_the_student_stops_the_run_and_is_named(tmp_path: Path) -> None:
    rows, student = only_row_with("w30"), make_student(tie_word_embeddings=False)
    config = make_config(tmp_path)
    trainer = LeafTrainer(
        poison(student, "w30"), make_teacher(), config, rows, None, make_tokenizer()
    )
    with pytest.raises(RuntimeError, match=r"loss is NaN on the rows with row_id \[3\]"):
        trainer.train()


def test_long_rows_are_left_out_counted_and_kept_track_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="leaf_distill"):
        trainer = make_trainer(tmp_path, max_length=14)
    assert trainer.rejections and {r.reason for r in trainer.rejections} == {"too_long"}
    assert len(trainer.train_dataset) + len(trainer.rejections) == 27
    assert f"{len(trainer.rejections)} of 27 rows left out" in caplog.text
    with pytest.raises(ValueError, match="no row is left"):
        make_trainer(tmp_path, max_length=3)


def test_the_teacher_may_have_another_template_but_no_other_labels(tmp_path: Path) -> None:
    def build(template: str) -> LeafTrainer:
        config = make_config(tmp_path, max_steps=1)
        models = make_student(), make_teacher()
        teachers = make_tokenizer(template)
        return LeafTrainer(
            *models, config, make_rows(), None, make_tokenizer(), teacher_processing_class=teachers
        )

    framed = build("w39 w38 " + TEMPLATE)
    framed.train()
    assert 0 < losses(framed)[0] < 10
    with pytest.raises(ValueError, match="different label tokens"):
        build(TEMPLATE.replace("<eos>", "<unk>"))


# ---- models ----

SIZES: dict[str, Any] = {
    "vocab_size": len(WORDS),
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "initializer_range": 0.5,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 1,
}
ARCHITECTURES: dict[str, Any] = {
    "gemma2 (softcap)": lambda: Gemma2ForCausalLM(
        Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=2.0)
    ),
    "cohere (factor)": lambda: CohereForCausalLM(CohereConfig(**SIZES, logit_scale=0.25)),
    "granite (divisor)": lambda: GraniteForCausalLM(GraniteConfig(**SIZES, logits_scaling=3.0)),
    "phi (head with bias)": lambda: PhiForCausalLM(PhiConfig(**SIZES)),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=len(WORDS), n_positions=64, n_embd=16, n_layer=2, n_head=2)
    ),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_any_architecture_trains_on_its_own_logits(tmp_path: Path, name: str) -> None:
    torch.manual_seed(2)
    student, teacher = ARCHITECTURES[name](), ARCHITECTURES[name]()
    with torch.no_grad():  # a fresh bias is zero, and would show nothing
        for model in (student, teacher):
            if getattr(model.get_output_embeddings(), "bias", None) is not None:
                model.get_output_embeddings().bias.normal_()
    rows = make_rows(8, 3)
    expected = plain_measures(student.eval(), teacher.eval(), rows)
    config = make_config(tmp_path, num_train_epochs=1)
    trainer = LeafTrainer(student, teacher, config, rows, rows, make_tokenizer())
    measured = trainer.evaluate()
    assert measured["eval_kd_loss"] == pytest.approx(expected["kd_loss"], rel=1e-4)
    assert measured["eval_agreement"] == pytest.approx(expected["agreement"], rel=1e-6)
    trainer.train()
    assert losses(trainer)[0] > 0


class _Secretive(LlamaForCausalLM):
    """Scales its logits, and its config does not tell."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * 1.01
        return output


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_logits_that_the_head_does_not_give_are_refused(tmp_path: Path, role: str) -> None:
    models = {"student": make_student(), "teacher": make_teacher()}
    models[role] = _Secretive(models[role].config)
    trainer = LeafTrainer(
        *models.values(), make_config(tmp_path), make_rows(), None, make_tokenizer()
    )
    with pytest.raises(ValueError, match=f"{role}: the model's own logits differ"):
        trainer.train()


def test_the_model_is_itself_outside_the_trainer(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, max_steps=2)
    trainer.train()
    ids = torch.arange(5, 12)[None]
    logits = trainer.model(input_ids=ids).logits
    assert logits.shape == (1, 7, len(WORDS))
    trainer.save_model()
    saved = LlamaForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(saved(input_ids=ids).logits, logits)
    assert {"tokenizer.json", "generation_config.json"} <= {p.name for p in tmp_path.iterdir()}


def test_a_lora_student_trains_its_adapter_only(tmp_path: Path) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model

    student = get_peft_model(
        make_student(), LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    )
    before, rows = weights(student), make_rows()
    config = make_config(tmp_path, num_train_epochs=4, learning_rate=3e-2)
    trainer = LeafTrainer(student, make_teacher(), config, rows, None, make_tokenizer())
    trainer.train()
    after = weights(student)
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert changed and all("lora_" in name for name in changed)
    assert student.get_output_embeddings().weight.grad is None
    assert losses(trainer)[-1] < losses(trainer)[0]
    trainer.save_model()
    saved = PeftModel.from_pretrained(make_student(), tmp_path)
    assert_same(weights(saved), after)


def test_an_adapter_on_the_head_is_refused(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    student = make_student(tie_word_embeddings=False)
    adapted = get_peft_model(student, LoraConfig(r=2, target_modules=["lm_head"]))
    with pytest.raises(ValueError, match="student: needs a causal language model with a plain"):
        LeafTrainer(
            adapted, make_teacher(), make_config(tmp_path), make_rows(), None, make_tokenizer()
        )


# ---- settings ----


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"originals_per_step": 10}, "originals_per_step: needs a multiple of 4"),
        ({"gradient_accumulation_steps": 3}, "follows from originals_per_step 8 and is 2 here"),
        ({"kd_weight": "1.5"}, "kd_weight: needs 'pool' or a number"),
        ({"kd_weight": "half"}, "kd_weight: needs 'pool' or a number"),
        ({"temperature": 0.0}, "temperature: needs a number above 0"),
        ({"max_length": 0}, "max_length: needs at least 1"),
        ({"remove_unused_columns": True}, "remove_unused_columns: must be off"),
    ],
)
def test_settings_are_checked(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_config(tmp_path, **settings)


def test_the_defaults_are_the_papers(tmp_path: Path) -> None:
    from leaf_distill.distill_config import LeafConfig

    config = LeafConfig(output_dir=str(tmp_path), use_cpu=True)
    assert (config.learning_rate, config.lr_scheduler_type) == (1e-5, "cosine")
    assert (config.num_train_epochs, config.warmup_steps, config.max_length) == (3, 5, 4096)
    assert config.per_device_train_batch_size * config.gradient_accumulation_steps == 64
    assert not config.bf16 and config.report_to == [] and config.objective_weight == "pool"
