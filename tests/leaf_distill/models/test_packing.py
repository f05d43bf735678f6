"""Rows that follow one another in one pass have the logits and gradients that they have alone."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as hf
from architectures import CAUSAL, SIZES, VOCABULARY
from torch import Tensor
from transformers import PreTrainedModel

from leaf_distill.models import packing
from leaf_distill.models.packing import attention_of_rows, can_pack, packed, padded

LENGTHS = (9, 3, 13)  # two of them longer than the windows
KEPT = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
MASK = KEPT.long()
IDS = torch.arange(3, 42).reshape(3, 13) * 7 % VOCABULARY
WINDOW = {"sliding_window": 4}
BOTH = {"layer_types": ["sliding_attention", "full_attention"]}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16, "num_experts": 4}
LINEAR = {f"linear_{one}": 2 for one in ("num_value_heads", "num_key_heads")}
LINEAR |= {f"linear_{one}": 8 for one in ("key_head_dim", "value_head_dim")}

KEPT_APART: dict[str, Callable[[], PreTrainedModel]] = {
    **{name: CAUSAL[name] for name in ("llama", "divided", "biased", "gpt2")},
    "qwen2": lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**SIZES)),
    "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**SIZES, head_dim=8)),
    "window": lambda: hf.MistralForCausalLM(hf.MistralConfig(**SIZES, **WINDOW)),
    "some windows": lambda: hf.Gemma3ForCausalLM(
        hf.Gemma3TextConfig(**SIZES, **WINDOW, **BOTH, head_dim=8)
    ),
    "chunks": lambda: hf.Llama4ForCausalLM(
        hf.Llama4TextConfig(
            **SIZES,
            head_dim=8,
            attention_chunk_size=4,
            intermediate_size_mlp=48,
            num_local_experts=2,
        )
    ),
    "experts": lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**SIZES, num_local_experts=4)),
}
MIXED: dict[str, Callable[[], PreTrainedModel]] = {
    "convolution": lambda: hf.Lfm2ForCausalLM(
        hf.Lfm2Config(**SIZES, layer_types=["conv", "full_attention"])
    ),
    "recurrence": lambda: hf.Qwen3NextForCausalLM(
        hf.Qwen3NextConfig(
            **SIZES,
            **EXPERTS,
            **LINEAR,
            head_dim=8,
            shared_expert_intermediate_size=16,
            layer_types=["linear_attention", "full_attention"],
        )
    ),
    "state space": lambda: hf.MambaForCausalLM(
        hf.MambaConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, state_size=4)
    ),
    "positions of another kind": lambda: hf.FalconForCausalLM(
        hf.FalconConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            alibi=True,
        )
    ),
    "eager": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES, attn_implementation="eager")),
}


def made(make: Callable[[], PreTrainedModel]) -> PreTrainedModel:
    """A model with weights that are large enough to tell one token from another."""
    torch.manual_seed(0)
    model = make().double()
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.3)
    return model.eval()


def logits_alone(model: Any) -> Tensor:
    """Logits of the rows one by one, [N, V]."""
    rows = zip(IDS, LENGTHS, strict=True)
    return torch.cat([model(input_ids=row[None, :n], use_cache=False).logits[0] for row, n in rows])


def logits_packed(model: Any) -> Tensor:
    with packed(IDS, MASK) as arguments:
        logits: Tensor = model(**arguments, use_cache=False).logits
    return logits[0]


@pytest.mark.parametrize("name", KEPT_APART)
def test_packed_rows_have_the_logits_and_gradients_of_rows_alone(name: str) -> None:
    model, tolerance = made(KEPT_APART[name]), 1e-9
    if name == "experts":  # their products know no float64
        model, tolerance = model.float(), 1e-4
    assert can_pack(model, "student")
    weight = model.get_input_embeddings().weight  # type: ignore[operator]
    alone = logits_alone(model)
    (expected,) = torch.autograd.grad(alone.square().sum(), weight)
    with attention_of_rows(model):
        logits = logits_packed(model)
        (gradient,) = torch.autograd.grad(logits.square().sum(), weight)
    for one, other in ((logits, alone), (gradient, expected)):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MIXED)
def test_a_model_that_mixes_rows_is_told(
    caplog: pytest.LogCaptureFixture, name: str, dtype: torch.dtype
) -> None:
    model = made(MIXED[name]).to(dtype)
    with caplog.at_level(logging.INFO, logger="leaf_distill"):
        assert not can_pack(model, "teacher") and not can_pack(model, "teacher")
    (line,) = [one for one in caplog.messages if "padded" in one]
    assert line.startswith("the teacher's rows are padded: ")
    assert type(model).__name__ in line or "it has eager" in line


def test_a_leak_below_the_rounding_of_other_shapes_is_told() -> None:
    model: Any = made(MIXED["convolution"])
    model.model.layers[0].conv.out_proj.weight.data *= 0.01
    assert not can_pack(model.bfloat16(), "student")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_model_that_keeps_rows_apart_is_told_in_every_dtype(dtype: torch.dtype) -> None:
    assert can_pack(made(KEPT_APART["llama"]).to(dtype), "student")


def test_outside_a_packed_pass_the_model_is_itself(tmp_path: Path) -> None:
    model = made(KEPT_APART["some windows"])
    whole = model(input_ids=IDS, attention_mask=MASK).logits
    answer = {"max_new_tokens": 5, "do_sample": False, "attention_mask": MASK[:, :4]}
    answered = model.generate(IDS[:, :4], **answer)  # type: ignore[operator]
    with attention_of_rows(model):
        assert model.config._attn_implementation == packing._NAME
        assert torch.equal(model(input_ids=IDS, attention_mask=MASK).logits, whole)
        assert torch.equal(model.generate(IDS[:, :4], **answer), answered)  # type: ignore[operator]
        model.save_pretrained(tmp_path)
    assert model.config._attn_implementation == "sdpa"
    assert packing._NAME not in (tmp_path / "config.json").read_text()


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["llama", "some windows"])
def test_checkpointing_computes_the_same_pass_again(name: str, reentrant: bool) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = made(KEPT_APART[name]).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        with attention_of_rows(model):
            logits_packed(model).square().sum().backward()
        gradients.append([one.grad for one in model.parameters() if one.grad is not None])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("window", [None, 4])
def test_attention_of_padded_rows_is_that_of_the_rows(window: int | None) -> None:
    """Devices other than a CPU pad the rows for the one call of attention."""
    torch.manual_seed(0)
    module: Any = SimpleNamespace(num_key_value_groups=2, is_causal=True)
    heads = (4, 2, 2)
    states = [
        torch.randn(1, n, sum(LENGTHS), 8, dtype=torch.float64, requires_grad=True) for n in heads
    ]
    seen = torch.ones(13, 13, dtype=torch.bool).tril()
    mask = None if window is None else seen.triu(1 - window)[None, None]
    rows = packing.PackedRows(LENGTHS, mask)
    expected, _ = packing._attention(module, *states, rows)  # type: ignore[arg-type]
    result = packing._attention_of_padded(module, states, rows)
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)
    upstream = torch.randn_like(expected)
    for one, other in zip(
        torch.autograd.grad(result, states, upstream),
        torch.autograd.grad(expected, states, upstream),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_padding_behind_a_row_needs_no_mask_and_padding_in_front_keeps_it() -> None:
    model = made(KEPT_APART["llama"])
    alone = logits_alone(model)
    with padded(IDS, MASK) as arguments:
        assert arguments["attention_mask"] is None
        torch.testing.assert_close(model(**arguments).logits[KEPT], alone, rtol=1e-10, atol=1e-10)
    front, ids = KEPT.flip(1), torch.zeros_like(IDS)
    ids[front] = IDS[KEPT]
    with padded(ids, front.long()) as arguments:
        logits = model(**arguments).logits[front]
    # Other positions, whose cosines are of float32 in a float64 model, too.
    torch.testing.assert_close(logits, alone, rtol=1e-5, atol=1e-5)
    with attention_of_rows(model), packed(ids, front.long()) as arguments:
        logits = model(**arguments, use_cache=False).logits[0]
    torch.testing.assert_close(logits, alone, rtol=1e-10, atol=1e-10)
