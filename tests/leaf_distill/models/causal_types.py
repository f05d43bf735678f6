"""Tiny random models of the causal types of transformers, built from shrunk configurations."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from architectures import VOCABULARY
from architectures import inkling as padded_inkling
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

LARGEST = 7_000_000  # parameters
TYPES = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)

_VALUES: dict[int, str] = {
    VOCABULARY: "vocab_size vocab_size_per_layer_input src_vocab_size n_words",
    32: "hidden_size d_model n_embd emb_dim embedding_size lru_width",
    48: "intermediate_size ffn_dim d_inner n_inner dff dim_ff encoder_ffn_dim decoder_ffn_dim "
    "ffn_hidden_size intermediate_size_mlp",
    2: "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers "
    "num_experts_per_tok num_experts_per_token moe_k moe_topk top_k moe_top_k index_n_heads "
    "num_encoder_layers num_decoder_layers num_mem_blocks",
    4: "num_attention_heads n_head n_heads num_heads encoder_attention_heads "
    "decoder_attention_heads num_decoder_attention_heads num_encoder_attention_heads num_experts "
    "n_routed_experts num_local_experts moe_num_experts mamba_n_heads linear_num_key_heads "
    "linear_num_value_heads mamba_chunk_size chunk_size swa_num_attention_heads mamba_num_heads",
    8: "head_dim swa_head_dim kv_lora_rank q_lora_rank v_head_dim qk_nope_head_dim "
    "qk_rope_head_dim rotary_dim mamba_d_state state_size sliding_window sliding_window_size "
    "index_head_dim linear_key_head_dim linear_value_head_dim dim_head time_step_rank "
    "mamba_dt_rank laurel_rank hidden_size_per_layer_input global_head_dim attention_head_size "
    "ssm_state_size window_size block_size dim_model_base o_lora_rank attention_window_size",
    16: "moe_intermediate_size shared_expert_intermediate_size mamba_d_head mamba_head_dim "
    "moe_shared_expert_intermediate_size expert_ffn_hidden_size shared_intermediate_size "
    "moe_shared_intermediate_size adapter_rank query_pre_attn_scalar",
    64: "max_position_embeddings n_positions n_ctx max_seq_len model_max_length seq_length "
    "original_max_position_embeddings",
    1: "n_group topk_group num_expert_group moe_layer_interval moe_layer_start_index bos_token_id "
    "first_k_dense_replace n_shared_experts num_dense_layers num_shared_experts mamba_n_groups "
    "n_groups moe_layer_end_index",
    0: "pad_token_id num_nextn_predict_layers num_kv_shared_layers",
}
_SMALL = {name: value for value, names in _VALUES.items() for name in names.split()}
_ROTARY = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
_OVERRIDES: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dory": {"n_input_layers": 0, "n_recurrent_layers": 2, "n_output_layers": 0},
    "falcon_h1": {"mamba_d_ssm": 64},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "hunyuan_v1_dense": {"head_dim": 8, **_ROTARY},
    "hunyuan_v1_moe": {"head_dim": 8, **_ROTARY},
    "kimi_linear": {"layer_types": ["linear_attention", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "ministral": {"head_dim": 8, **_ROTARY},
    "moshi": {"sliding_window": 64},  # its cache keeps to the window, its forward does not
    "nemotron": {"num_key_value_heads": 2, "head_dim": 8},
    "reformer": {
        "is_decoder": True,
        "axial_pos_shape": [8, 8],
        "axial_pos_embds_dim": [8, 24],
        "attn_layers": ["local", "local"],
        "local_attn_chunk_length": 4,
    },
    **{
        name: {"num_hidden_layers": 4}
        for name in (
            "recurrent_gemma",
            "qwen3_next",
            "qwen3_5_text",
            "qwen3_5_moe_text",
            "qwen4_exp_text",
        )
    },
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "bamba": {"attn_layer_indices": [1]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "zaya": {"num_experts_per_tok": 1},
}
_UNEVEN = {"inkling2_text", "inkling2_loop_text", "xlstm", "xmod"}
"""Types whose sizes depend on each other in ways of their own, or that need a setting to run."""
_BUILDERS: dict[str, Callable[[], PreTrainedModel]] = {"inkling_text": padded_inkling}


def small(default: Any) -> dict[str, Any]:
    """Return small values of a configuration's settings, and of those of its parts."""
    known = default.to_dict()
    chosen = {name: value for name, value in _SMALL.items() if isinstance(known.get(name), int)}
    if "num_key_value_heads" in chosen or isinstance(known.get("num_key_value_heads"), int):
        same = known["num_key_value_heads"] == known.get("num_attention_heads")
        chosen["num_key_value_heads"] = 4 if same else 2
    if "eos_token_id" in known:
        chosen["eos_token_id"] = 2
    parts = {part: getattr(default, part, None) for part in default.sub_configs}
    chosen |= {part: small(one) for part, one in parts.items() if one is not None}
    return chosen | _OVERRIDES.get(default.model_type, {})


def tiny(name: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """Build a random model in eval mode; the test is skipped if the type cannot be shrunk."""
    try:
        torch.manual_seed(seed)
        model = _BUILDERS[name]() if name in _BUILDERS else _build(name, changes)
    except Exception as problem:  # configurations raise whatever their checks raise
        pytest.skip(f"{name} has no small model of these settings: {problem!r:.200}")
    torch.manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.05)
    return model.float().eval()


def _build(name: str, changes: dict[str, Any]) -> PreTrainedModel:
    if name in _UNEVEN:
        raise ValueError("its settings depend on each other")
    kind: Any = CONFIG_MAPPING[name]
    config = kind(**{**small(kind()), **changes})
    classes: Any = MODEL_FOR_CAUSAL_LM_MAPPING[kind]
    wanted = classes[0] if isinstance(classes, tuple) else classes
    text = config.get_text_config()
    if wanted.config_class is not kind and wanted.config_class is type(text):
        config = text  # as AutoModelForCausalLM does
    with torch.device("meta"):
        size = sum(weight.numel() for weight in wanted(copy.deepcopy(config)).parameters())
    if size > LARGEST:
        raise ValueError(f"{size} parameters")
    model: PreTrainedModel = wanted(config)
    return model
