"""Tiny random models of many architectures, over one vocabulary of 50 tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from transformers import PreTrainedModel

VOCABULARY = 50
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "attention_dropout": 0.0,
}
PLAIN = {name: SIZES[name] for name in ("vocab_size", "hidden_size", "intermediate_size")}
MINICPM3 = {"q_lora_rank": 8, "kv_lora_rank": 8, "v_head_dim": 8}
MINICPM3 |= {"qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "dim_model_base": 8}
MINICPM3 |= {"num_key_value_heads": 4}


class HeadlessLlama(hf.LlamaForCausalLM):
    """A model that does not tell which module its head is."""

    def get_output_embeddings(self) -> None:
        return None


def ctrl() -> PreTrainedModel:
    return hf.CTRLLMHeadModel(
        hf.CTRLConfig(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, dff=48, n_positions=64)
    )


def prophetnet(ngram: int = 2) -> PreTrainedModel:
    heads = {"num_decoder_attention_heads": 4, "num_encoder_attention_heads": 4}
    layers = {"num_decoder_layers": 2, "num_encoder_layers": 1, "ngram": ngram}
    return hf.ProphetNetForCausalLM(
        hf.ProphetNetConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            decoder_ffn_dim=48,
            encoder_ffn_dim=48,
            max_position_embeddings=64,
            **heads,
            **layers,
        )
    )


def gpt2() -> PreTrainedModel:
    return hf.GPT2LMHeadModel(
        hf.GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    )


def inkling() -> PreTrainedModel:
    """A model whose head is padded to 64 rows, and which cuts its logits to 50."""
    sizes = {**PLAIN, "vocab_size": 64, "unpadded_vocab_size": VOCABULARY}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    window = {f"swa_{name}": value for name, value in heads.items()}
    return hf.InklingForCausalLM(
        hf.InklingTextConfig(
            **sizes,
            **heads,
            **window,
            num_hidden_layers=2,
            sliding_window_size=8,
            d_rel=4,
            rel_extent=16,
            max_position_embeddings=64,
            mlp_layer_types=["dense", "dense"],
        )
    )


CAUSAL: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES)),
    "tied": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES, tie_word_embeddings=True)),
    "headless": lambda: HeadlessLlama(hf.LlamaConfig(**SIZES)),
    "softcap": lambda: hf.Gemma2ForCausalLM(
        hf.Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=0.5)
    ),
    "divided": lambda: hf.GraniteForCausalLM(hf.GraniteConfig(**SIZES, logits_scaling=3.0)),
    "divided before the head": lambda: hf.MiniCPM3ForCausalLM(
        hf.MiniCPM3Config(**{**SIZES, **MINICPM3})
    ),
    "scaled": lambda: hf.CohereForCausalLM(hf.CohereConfig(**SIZES, logit_scale=0.25)),
    "biased": lambda: hf.PhiForCausalLM(hf.PhiConfig(**SIZES)),
    "gpt2": gpt2,
    "ctrl": ctrl,
    "padded head": inkling,
}
# The logits of ProphetNet depend on the padding.
NOT_CAUSAL: dict[str, Callable[[], PreTrainedModel]] = {
    "prophetnet": prophetnet,
    "bert": lambda: hf.BertLMHeadModel(
        hf.BertConfig(**PLAIN, num_hidden_layers=1, num_attention_heads=4)
    ),
    "xlnet": lambda: hf.XLNetLMHeadModel(
        hf.XLNetConfig(vocab_size=VOCABULARY, d_model=32, n_layer=1, n_head=4, d_inner=48)
    ),
    "cpmant": lambda: hf.CpmAntForCausalLM(
        hf.CpmAntConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            num_attention_heads=4,
            dim_head=8,
            dim_ff=48,
            num_hidden_layers=1,
            prompt_length=4,
        )
    ),
}


def build(name: str = "llama", seed: int = 0) -> PreTrainedModel:
    """A random model in eval mode, no weight of which is 0 or 1 throughout."""
    torch.manual_seed(seed)
    model = {**CAUSAL, **NOT_CAUSAL}[name]()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.05)
    return model.eval()
