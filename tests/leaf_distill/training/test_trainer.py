"""LeafTrainer: the paper's loss exactly, whatever the way a step is cut or launched."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from distill_pair import (
    TEMPLATE,
    WORDS,
    assert_same,
    losses,
    make_config,
    make_rows,
    make_student,
    make_teacher,
    make_tokenizer,
    make_trainer,
    plain_measures,
    weights,
)
from torch import Tensor
from transformers import LlamaForCausalLM

from leaf_distill.data.collator import collate, count_reasons
from leaf_distill.data.example import Example
from leaf_distill.training.trainer import LeafTrainer

# ---- the objective ----


@pytest.mark.parametrize("cross", [0, 2])
@pytest.mark.parametrize("kd_weight", ["pool", 0.3])
def test_the_first_step_is_the_papers_loss(tmp_path: Path, kd_weight: Any, cross: int) -> None:
    rows = make_rows(8, 3, cross=cross)
    if cross:  # the first word of a response is given to both models
        rows[-1]["context"] = rows[8]["context"] = 3
    expected = plain_measures(make_student().eval(), make_teacher().eval(), rows)
    trainer = make_trainer(tmp_path, rows, kd_weight=kd_weight, num_train_epochs=1)
    trainer.train()
    log = trainer.state.log_history[0]
    share = expected.pop("pool") if kd_weight == "pool" else 0.3
    loss = share * expected["kd_loss"] + (1 - share) * expected["cd_loss"]
    assert log["loss"] == pytest.approx(loss, rel=1e-5)
    assert log["cf_rows"] == 3 + cross and log["steps_without_cf"] == log["skipped_rows"] == 0
    for name in ("kd_loss", "cd_loss", "student_entropy", "teacher_entropy", "agreement", "nll"):
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


def test_a_log_is_one_line_and_a_bar_needs_a_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    trainer = make_trainer(tmp_path / "file", disable_tqdm=None, **settings)
    trainer.train()
    trainer.evaluate()
    out, err = capsys.readouterr()
    number = r"\d[\d.e-]*"
    measured = rf" +{number} +{number} +{number} +\d+%"
    speed = rf" +{number} +[\d,]+ +\d+ s"
    wanted = [
        r"step +loss +kl +cut kl +agree +lr +tok/s +time +left",
        rf" *1/2{measured}{speed} +\d+ s",
        rf" *2/2{measured}{speed}",
        rf"trained 2 steps in \d+ s, mean loss {number}",
        rf" *2/2{measured} +eval +\d+ s",
    ]
    for form, line in zip(wanted, out.splitlines(), strict=True):
        assert re.fullmatch(form, line), line
        assert len(line) <= 80
    assert "%|" not in err

    make_trainer(tmp_path / "terminal", disable_tqdm=False, **settings).train()
    out, err = capsys.readouterr()
    assert "2/2 steps" in err and out.startswith("step ") and "{" not in out


def test_a_step_without_counterfactuals_is_counted(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, make_rows(24, 1), num_train_epochs=1, kd_weight=0.5)
    trainer.train()
    logs = trainer.state.log_history[:3]
    assert sum(log["steps_without_cf"] for log in logs) == 2
    alone = next(log for log in logs if log["steps_without_cf"])
    assert alone["loss"] == pytest.approx(alone["kd_loss"], rel=1e-6)
    assert "cd_loss" not in alone


@pytest.mark.parametrize(
    "settings",
    [{"kd_weight": 0.25}, {"kd_weight": "0.9:0.25", "token_selection": "entropy"}],
    ids=["number", "schedule"],
)
def test_the_evaluation_loss_is_that_of_the_whole_dataset(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    rows = make_rows(7, 4)
    expected = plain_measures(make_student().eval(), make_teacher().eval(), rows)
    for batch_size in (1, 3, 16):
        trainer = make_trainer(tmp_path, rows, per_device_eval_batch_size=batch_size, **settings)
        measured = trainer.evaluate()
        loss = 0.25 * expected["kd_loss"] + 0.75 * expected["cd_loss"]
        assert measured["eval_loss"] == pytest.approx(loss, rel=1e-5)
        assert measured["eval_kd_loss"] == pytest.approx(expected["kd_loss"], rel=1e-5)
        assert measured["eval_cf_rows"] == 4


def test_a_lambda_of_one_measures_the_counterfactuals_all_the_same(tmp_path: Path) -> None:
    rows = make_rows(7, 4)
    expected = plain_measures(make_student().eval(), make_teacher().eval(), rows)
    for batch_size in (1, 16):
        trainer = make_trainer(tmp_path, rows, per_device_eval_batch_size=batch_size, kd_weight=1.0)
        measured = trainer.evaluate()
        assert measured["eval_loss"] == pytest.approx(expected["kd_loss"], rel=1e-5)
        assert measured["eval_cd_loss"] == pytest.approx(expected["cd_loss"], rel=1e-5)


class _Rows:
    """Counts the padded tokens of each forward pass."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.tokens: list[int] = []
        model.get_input_embeddings().register_forward_hook(self._see)  # type: ignore[operator]

    def _see(self, module: Any, args: Any, output: Tensor) -> None:
        self.tokens.append(output.shape[0] * output.shape[1])


def test_a_pass_is_bounded(tmp_path: Path) -> None:
    rows = make_rows(4, 24)  # six counterfactuals come with each original
    student, teacher = make_student(), make_teacher()
    seen = [_Rows(student), _Rows(teacher)]
    settings = {"originals_per_step": 4, "per_device_train_batch_size": 2, "max_steps": 2}
    config = make_config(tmp_path, max_batch_tokens=64, **settings)
    LeafTrainer(student, teacher, config, rows, None, make_tokenizer()).train()
    assert 32 < max(max(one.tokens) for one in seen) <= 64


def test_speed_and_share_of_labels_are_logged(tmp_path: Path) -> None:
    settings = {"logging_steps": 5, "logging_first_step": False, "kd_weight": "0.8:0.4"}
    trainer = make_trainer(tmp_path, num_train_epochs=1, **settings)
    trainer.train()
    last = next(log for log in trainer.state.log_history if "loss" in log)
    assert last["step"] == 3 and last["kd_weight"] == pytest.approx(0.4)
    dataset = trainer.train_dataset
    assert dataset is not None
    tokens = sum(len(one.renderings["student"]) for one in dataset.examples)
    assert last["label_share"] == pytest.approx(dataset.label_tokens / tokens)
    whole = trainer.state.log_history[-1]["train_runtime"]
    assert last["tokens_per_second"] > tokens / whole  # which counts what is not training too


# ---- bad numbers, bad rows ----


def only_row_with(word: str, column: str = "prompt") -> list[dict[str, Any]]:
    rows = make_rows(8, 2)
    for row in rows:
        for turn in (*row["prompt"], *row["completion"]):
            turn["content"] = turn["content"].replace(word, "w1")
    rows[3][column][0]["content"] += f" {word}"
    return rows


def poison(model: LlamaForCausalLM, word: str) -> LlamaForCausalLM:
    with torch.no_grad():
        model.model.embed_tokens.weight[WORDS.index(word)] = torch.nan
    return model


def overflow(model: LlamaForCausalLM, word: str) -> LlamaForCausalLM:
    """Weights and hidden states stay finite, but after `word` a logit is too large for float32."""
    with torch.no_grad():
        for layer in model.model.layers:  # each position then reads its own token only
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight[:, 0] = 0
        model.model.embed_tokens.weight[WORDS.index(word), 0] = 1
        model.lm_head.weight[7, 0] = 3e38
    return model


@pytest.mark.parametrize("token_selection", ["all", "tip"])
@pytest.mark.parametrize(
    ("column", "broken"), [("prompt", poison), ("completion", overflow)], ids=["hidden", "logits"]
)
def test_a_row_that_breaks_the_teacher_is_skipped_and_counted(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    column: str,
    broken: Any,
    token_selection: str,
) -> None:
    rows, student = only_row_with("w30", column), make_student()
    teacher = broken(make_teacher(tie_word_embeddings=False), "w30")
    others = plain_measures(make_student().eval(), teacher.eval(), rows[:3] + rows[4:])
    share = 0.5 if token_selection == "all" else 1.0  # all tokens, one way or the other
    config = make_config(
        tmp_path, num_train_epochs=2, token_selection=token_selection, token_share=share
    )
    trainer = LeafTrainer(student, teacher, config, rows, None, make_tokenizer())
    with caplog.at_level(logging.WARNING, logger="leaf_distill"):
        trainer.train()
    assert [log["skipped_rows"] for log in trainer.state.log_history[:2]] == [1, 1]
    assert "skipped row_id [3]" in caplog.text
    assert all(tensor.isfinite().all() for tensor in weights(student).values())
    first = trainer.state.log_history[0]
    for name in ("kd_loss", "cd_loss", "agreement"):
        assert first[name] == pytest.approx(others[name], rel=1e-5), name


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
    assert trainer.left_out and count_reasons(trainer.left_out).keys() == {"too_long"}
    assert trainer.train_dataset is not None
    assert len(trainer.train_dataset) + len(trainer.left_out) == 27
    assert f"{len(trainer.left_out)} of 27 rows left out" in caplog.text
    with pytest.raises(ValueError, match=r"got 27 too_long \(row 0: must have at most 3 tokens"):
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
    with pytest.raises(
        ValueError, match=r"got 27 different_labels .*for the teacher and .* student"
    ):
        build(TEMPLATE.replace("<eos>", "<unk>"))


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


# ---- what a user brings ----


@pytest.mark.parametrize("kind", [str, Path])
def test_models_and_rows_may_be_names(tmp_path: Path, kind: type) -> None:
    names = {}
    for name, model in (("student", make_student()), ("teacher", make_teacher())):
        model.save_pretrained(tmp_path / name)
        make_tokenizer().save_pretrained(tmp_path / name)
        names[name] = kind(tmp_path / name)
    arm = tmp_path / "run" / "arms" / "span"
    arm.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(make_rows()), arm / "dataset.parquet")
    config = make_config(tmp_path / "out", max_steps=2)
    named = LeafTrainer(names["student"], names["teacher"], config, kind(tmp_path / "run"))
    named.train()
    given = make_trainer(tmp_path / "out", max_steps=2)
    given.train()
    assert_same(weights(named.model), weights(given.model))
    assert len(named.processing_class) == len(WORDS)


def test_rows_may_be_conversations_or_a_dataset(tmp_path: Path) -> None:
    import datasets

    rows = [
        {
            "messages": [
                {"role": "user", "content": f"w{i} w1"},
                {"role": "assistant", "content": "w2 w3"},
            ]
        }
        for i in range(8)
    ]
    trainer = make_trainer(tmp_path, datasets.Dataset.from_list(rows), max_steps=1)
    trainer.train()
    pairs = [{"prompt": f"w{i} w1", "completion": "w2 w3"} for i in range(8)]
    same = make_trainer(tmp_path, pairs, max_steps=1)
    same.train()
    assert losses(trainer) == losses(same)


def test_a_peft_config_wraps_the_student(tmp_path: Path) -> None:
    from peft import LoraConfig, PeftModel

    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    models, config = (make_student(), make_teacher()), make_config(tmp_path, max_steps=1)
    trainer = LeafTrainer(*models, config, make_rows(), None, make_tokenizer(), peft_config=lora)
    assert isinstance(trainer.model, PeftModel)
    assert all("lora_" in n for n, p in trainer.model.named_parameters() if p.requires_grad)
    with pytest.raises(ValueError, match=r"lora_r \(peft_config\): must be left out"):
        LeafTrainer(
            trainer.model,
            make_teacher(),
            config,
            make_rows(),
            None,
            make_tokenizer(),
            peft_config=lora,
        )


def test_compute_metrics_adds_to_the_evaluations_measures(tmp_path: Path) -> None:
    seen: list[dict[str, float]] = []

    def both(measures: dict[str, float]) -> dict[str, float]:
        seen.append(measures)
        return {"sum": measures["kd_loss"] + measures["cd_loss"]}

    config, rows = make_config(tmp_path), make_rows(6, 3)
    trainer = LeafTrainer(
        make_student(), make_teacher(), config, rows, rows, make_tokenizer(), compute_metrics=both
    )
    measured = trainer.evaluate()
    assert measured["eval_sum"] == measured["eval_kd_loss"] + measured["eval_cd_loss"]
    assert seen[0]["loss"] == measured["eval_loss"]


def test_a_users_collator_makes_the_batches(tmp_path: Path) -> None:
    calls: list[int] = []

    def counting(examples: Any) -> dict[str, Tensor]:
        assert all(isinstance(one, Example) for one in examples)
        calls.append(len(examples))
        return collate(examples)

    def build(collator: Any, **settings: Any) -> LeafTrainer:
        return LeafTrainer(
            make_student(),
            make_teacher(),
            make_config(tmp_path, max_steps=1, **settings),
            make_rows(8, 4),
            None,
            make_tokenizer(),
            data_collator=collator,
        )

    build(counting).train()
    assert sum(calls) > 12  # also the one row on which the heads are checked
    with pytest.raises(
        ValueError, match=r"data_collator: must return the keys .*teacher_loss_mask"
    ):
        build(lambda rows: {"input_ids": collate(rows)["input_ids"]}).train()

    def unweighted(examples: Any) -> dict[str, Tensor]:
        return {name: one for name, one in collate(examples).items() if name != "row_weight"}

    build(unweighted).train()
    with pytest.raises(ValueError, match=r"data_collator: .* got none of row_weight"):
        build(unweighted, span_weighting="sample").train()


def test_models_in_memory_must_share_a_vocabulary(tmp_path: Path) -> None:
    config, rows = make_config(tmp_path), make_rows()
    with pytest.raises(
        ValueError,
        match=r"teacher_model: must share the tokenizer's vocabulary, got 30 embeddings for a "
        "tokenizer whose token 'w39' has the id 44",
    ):
        teacher = make_teacher(vocab_size=30)
        LeafTrainer(make_student(), teacher, config, rows, None, make_tokenizer())

    other = make_tokenizer()
    swapped = {"w1": 7, "w2": 6}
    vocabulary = {**other.get_vocab(), **swapped}
    other.backend_tokenizer.model = type(other.backend_tokenizer.model)(
        vocabulary, unk_token="<unk>"
    )
    make_teacher().save_pretrained(tmp_path / "teacher")
    other.save_pretrained(tmp_path / "teacher")
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "teacher")
    with pytest.raises(ValueError, match="tokenizers: must be the same"):
        LeafTrainer(make_student(), loaded, config, rows, None, make_tokenizer())
    same = make_student()
    with pytest.raises(ValueError, match="teacher_model: must have weights of its own"):
        LeafTrainer(same, same, config, rows, None, make_tokenizer())


def test_a_pad_token_outside_the_embedding_does_no_harm(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
    assert tokenizer.pad_token_id == len(WORDS)  # beyond the student's embedding
    runs = []
    for one in (tokenizer, make_tokenizer()):
        trainer = LeafTrainer(
            make_student(),
            make_teacher(),
            make_config(tmp_path, max_steps=2),
            make_rows(),
            None,
            one,
        )
        trainer.train()
        runs.append(weights(trainer.model))
    assert_same(*runs)


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_rows_longer_than_a_models_positions_leave(tmp_path: Path, role: str) -> None:
    short = {"max_position_embeddings": 14}
    student = make_student(**short if role == "student" else {})
    teacher = make_teacher(**short if role == "teacher" else {})
    config = make_config(tmp_path, max_steps=1)
    trainer = LeafTrainer(student, teacher, config, make_rows(), None, make_tokenizer())
    longest = max(len(one.renderings["student"]) for one in trainer.train_dataset.examples)
    assert longest <= 14 and count_reasons(trainer.left_out).keys() == {"too_long"}


def test_variables_reach_the_chat_template(tmp_path: Path) -> None:
    template = TEMPLATE.replace("<assistant> {% endif %}", "<assistant> {{ mark }} {% endif %}")
    tokenizer = make_tokenizer(template)
    config = make_config(tmp_path, chat_template_kwargs='{"mark": "w39"}')
    models = make_student(), make_teacher()
    trainer = LeafTrainer(*models, config, make_rows(8, 0), None, tokenizer)
    ids = trainer.train_dataset.examples[0].renderings["student"].input_ids.tolist()
    assert ids[ids.index(WORDS.index("<assistant>")) + 1] == WORDS.index("w39")


def test_dropout_can_be_switched_off(tmp_path: Path) -> None:
    def trained(**settings: Any) -> dict[str, Tensor]:
        student = make_student(attention_dropout=0.5)
        config = make_config(tmp_path, max_steps=2, **settings)
        LeafTrainer(student, make_teacher(), config, make_rows(), None, make_tokenizer()).train()
        assert student.config.attention_dropout == 0.5
        return weights(student)

    plain = make_trainer(tmp_path, max_steps=2)
    plain.train()
    assert_same(trained(disable_dropout=True), weights(plain.model))
    with pytest.raises(AssertionError, match="differs"):
        assert_same(trained(), weights(plain.model))
