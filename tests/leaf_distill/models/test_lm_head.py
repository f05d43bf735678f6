"""The way to the head: a model's own logits, or a refusal before the first step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from distill_pair import (
    WORDS,
    losses,
    make_config,
    make_model,
    make_rows,
    make_student,
    make_teacher,
    make_tokenizer,
    plain_measures,
)
from torch import Tensor, nn
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
)

from leaf_distill.models.lm_head import HeadPath
from leaf_distill.training.trainer import LeafTrainer

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

    factor = 1.0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * self.factor
        return output


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("factor", [0.99, 1.01, 1.2])
def test_a_factor_on_the_logits_is_refused_in_every_dtype(
    tmp_path: Path, factor: float, dtype: torch.dtype
) -> None:
    teacher = _Secretive(make_teacher().config)
    teacher.factor = factor
    models = make_student(), teacher.to(dtype)
    trainer = LeafTrainer(*models, make_config(tmp_path), make_rows(), None, make_tokenizer())
    with pytest.raises(ValueError, match=f"teacher: the model's own.*and are {factor}.* times"):
        trainer.train()


class _WideHead(nn.Linear):
    """Multiplies in float32: the logits lack the rounding that `HeadPath` sees in its own."""

    def forward(self, hidden: Tensor) -> Tensor:
        return nn.functional.linear(hidden.float(), self.weight.float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rounding_is_not_taken_for_a_factor(dtype: torch.dtype) -> None:
    for seed in range(20):
        model = make_model(seed, tie_word_embeddings=False)
        model.lm_head = _WideHead(16, len(WORDS), bias=False)
        ids = torch.randint(5, len(WORDS), (1, 4))
        at = torch.tensor([[False, False, False, True]])  # one label: it averages out the least
        HeadPath(model.to(dtype), "teacher").check(ids, torch.ones_like(ids), at)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("role", ["student", "teacher"])
def test_a_head_that_is_not_finite_is_refused(tmp_path: Path, role: str, value: float) -> None:
    models = {
        "student": make_student(tie_word_embeddings=False),
        "teacher": make_teacher(tie_word_embeddings=False),
    }
    with torch.no_grad():
        models[role].lm_head.weight[3, 2] = value
    trainer = LeafTrainer(
        *models.values(), make_config(tmp_path), make_rows(), None, make_tokenizer()
    )
    with pytest.raises(ValueError, match=f"{role}: the weights of the head .* are not finite"):
        trainer.train()


def test_the_check_reads_the_shortest_row(tmp_path: Path) -> None:
    rows = make_rows()
    rows[0]["prompt"][0]["content"] = "w1 " * 60
    rows[8]["prompt"][0]["content"], rows[8]["completion"][0]["content"] = "w1", "w2"
    teacher, lengths = make_teacher(), []
    teacher.model.embed_tokens.register_forward_pre_hook(
        lambda _, args: lengths.append(args[0].shape[1])
    )
    config = make_config(tmp_path, max_steps=1)
    LeafTrainer(make_student(), teacher, config, rows, None, make_tokenizer()).train()
    assert lengths[:2] == [5, 5]  # its own logits, then the head's


def test_an_adapter_on_the_head_is_refused(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    student = make_student(tie_word_embeddings=False)
    adapted = get_peft_model(student, LoraConfig(r=2, target_modules=["lm_head"]))
    with pytest.raises(ValueError, match="student: needs a causal language model with a plain"):
        LeafTrainer(
            adapted, make_teacher(), make_config(tmp_path), make_rows(), None, make_tokenizer()
        )
