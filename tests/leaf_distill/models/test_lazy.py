"""LazyModel: what is known before the weights are read, and models that are in memory."""

from __future__ import annotations

import gc
import json
import sys
import weakref
from pathlib import Path

import pytest
import torch
from architectures import build
from transformers import ByT5Tokenizer, LlamaConfig, LlamaForCausalLM

from leaf_distill.detection.answers import prompted_model
from leaf_distill.detection.config import DetectConfig
from leaf_distill.models.loading import LazyModel, load_model
from leaf_distill.models.placement import _NATIVE, resolve_dtype

CPU = torch.device("cpu")


def test_weights_are_read_at_the_first_need_and_let_go(saved):
    lazy = LazyModel(str(saved))
    assert (lazy.name, lazy.dtype, lazy.max_positions) == (str(saved), "float32", 128)
    assert lazy.tokenizer.is_fast and lazy.config.vocab_size == 420 and len(lazy.fingerprint) == 64
    weights = (saved / "model.safetensors").rename(saved / "away.safetensors")
    with pytest.raises(ValueError, match=r"^model: must be "):
        lazy.load()
    weights.rename(saved / "model.safetensors")
    model = lazy.load()
    assert lazy.load() is model and not model.training
    gone = weakref.ref(model)
    del model
    lazy.release()
    gc.collect()
    assert gone() is None
    assert lazy.load().dtype == torch.float32


def test_weights_in_a_cycle_are_let_go(saved):
    lazy = LazyModel(str(saved))
    layer = lazy.load().model.layers[0]
    layer.itself = [layer]
    gone = weakref.ref(layer.mlp.up_proj.weight)
    del layer
    lazy.release()
    assert gone() is None


def test_what_is_wrong_is_said_before_the_weights_are_read(tmp_path, saved):
    for arguments, message in (
        ({"dtype": "half"}, "^dtype: must be one of"),
        ({"device": "gpu"}, "^device: must be 'auto'"),
        ({"processing_class": ByT5Tokenizer()}, "^tokenizer: must be a fast one"),
    ):
        with pytest.raises(ValueError, match=message):
            LazyModel(str(saved), **arguments)
    (saved / "model.safetensors").unlink()
    with pytest.raises(
        ValueError, match=r"^model: must be a directory with weights, got .*student"
    ):
        LazyModel(str(saved))
    with pytest.raises(ValueError, match="which does not exist; check the path"):
        LazyModel(tmp_path / "nowhere")


def test_a_given_tokenizer_is_used(saved, make_tokenizer):
    other = make_tokenizer(template="llama3")
    assert LazyModel(str(saved), processing_class=other).tokenizer is other


@pytest.mark.parametrize("stored", ["bfloat16", "float16", "float64"])
def test_auto_is_the_checkpoints_dtype_where_the_cpu_multiplies_in_it(
    stored, tmp_path, make_model, make_tokenizer
):
    make_model().to(getattr(torch, stored)).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    capabilities = torch.cpu.get_capabilities()
    native = stored == "float64" or any(capabilities.get(name) for name in _NATIVE[stored])
    expected = stored if native else "float32"
    lazy = LazyModel(str(tmp_path), device="cpu")
    assert lazy.dtype == expected and lazy.load().dtype == getattr(torch, expected)
    assert load_model(str(tmp_path), device="cpu").dtype == getattr(torch, expected)
    assert LazyModel(str(tmp_path), dtype=stored).load().dtype == getattr(torch, stored)
    assert resolve_dtype("auto", lazy.config, torch.device("cuda")) == stored


def test_a_checkpoint_that_names_no_dtype_is_float32():
    assert resolve_dtype("auto", LlamaConfig(), CPU) == "float32"


def test_a_model_in_memory_stays_as_it_is(make_model, make_tokenizer):
    model, tokenizer = make_model().bfloat16().train(), make_tokenizer()
    lazy = LazyModel(model, processing_class=tokenizer)
    assert (lazy.name, lazy.dtype, lazy.device) == ("LlamaForCausalLM", "bfloat16", CPU)
    assert lazy.load() is model and model.training and lazy.tokenizer is tokenizer
    lazy.release()
    assert lazy.load() is model
    with pytest.raises(ValueError, match=r"^dtype: must be 'auto' or 'bfloat16' for the model"):
        LazyModel(model, processing_class=tokenizer, dtype="float32")
    with pytest.raises(ValueError, match=r"^processing_class: must be the tokenizer of 'Llama"):
        LazyModel(model)
    with pytest.raises(ValueError, match=r"^source: must be a name or a transformers model, got 3"):
        LazyModel(3)


def test_a_loaded_model_brings_its_tokenizer(saved, tmp_path):
    lazy = LazyModel(load_model(str(saved)))
    assert lazy.name == str(saved) and lazy.tokenizer.is_fast


def test_the_fingerprint_of_a_model_in_memory_follows_weights_and_settings(
    make_model, make_tokenizer
):
    def fingerprint(model):
        return LazyModel(model, processing_class=make_tokenizer()).fingerprint

    first = fingerprint(make_model())
    assert fingerprint(make_model()) == first
    moved, edited, generating = make_model(), make_model(), make_model()
    with torch.no_grad():
        moved.model.norm.weight[3] += 1
    edited.config.rms_norm_eps = 1e-3
    generating.generation_config.eos_token_id = 7
    others = [moved, edited, generating, make_model().bfloat16(), make_model(seed=1)]
    assert len({first, *map(fingerprint, others)}) == 6


def test_large_tensors_in_memory_are_sampled_from_end_to_end(make_tokenizer):
    sizes = {"vocab_size": 9001, "hidden_size": 64, "intermediate_size": 64}
    layers = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **layers))
    first = LazyModel(model, processing_class=make_tokenizer()).fingerprint
    with torch.no_grad():
        model.lm_head.weight[-1, -1] += 1
    assert LazyModel(model, processing_class=make_tokenizer()).fingerprint != first


@pytest.mark.parametrize("name", ["bert", "xlnet", "cpmant", "prophetnet"])
def test_a_model_that_is_not_causal_is_refused(name, tmp_path, make_tokenizer):
    model = build(name)
    model.save_pretrained(tmp_path)
    make_tokenizer("words").save_pretrained(tmp_path)
    reason = "whose logits for a token depend on the (tokens|padding) after it"
    for lazy in (LazyModel(str(tmp_path)), LazyModel(model, processing_class=make_tokenizer())):
        for _ in range(2):
            with pytest.raises(ValueError, match=f"^model: must be a causal .*, {reason}"):
                lazy.load()


def test_an_encoder_trained_as_a_decoder_loads(tmp_path, make_tokenizer):
    model = build("bert")
    model.config.is_decoder = True
    model.save_pretrained(tmp_path)
    make_tokenizer("words").save_pretrained(tmp_path)
    assert LazyModel(str(tmp_path)).load().config.is_decoder


def test_broken_weights_load(make_model, make_tokenizer):
    model = make_model()
    with torch.no_grad():
        model.lm_head.weight[3] = torch.nan
        model.model.norm.weight.fill_(torch.nan)
    LazyModel(model, processing_class=make_tokenizer()).load()  # marked row by row, later


def test_code_of_a_model_runs_only_where_it_is_trusted(
    tmp_path: Path, monkeypatch, make_model, make_tokenizer
):
    cache = str(tmp_path / "cache")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", cache)
    monkeypatch.setattr("sys.path", [*sys.path])  # transformers appends the cache
    directory = tmp_path / "custom"
    make_model().save_pretrained(directory)
    make_tokenizer().save_pretrained(directory)
    settings = json.loads((directory / "config.json").read_text())
    settings |= {"model_type": "custom_llama", "architectures": ["CustomForCausalLM"]}
    settings["auto_map"] = {
        "AutoConfig": "modeling_custom.CustomConfig",
        "AutoModelForCausalLM": "modeling_custom.CustomForCausalLM",
    }
    (directory / "config.json").write_text(json.dumps(settings))
    (directory / "modeling_custom.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class CustomConfig(LlamaConfig):\n    model_type = 'custom_llama'\n"
        "class CustomForCausalLM(LlamaForCausalLM):\n    config_class = CustomConfig\n"
    )
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked a question"))
    with pytest.raises(ValueError, match=r"^trust_remote_code: must be true for"):
        LazyModel(str(directory))
    lazy = LazyModel(str(directory), trust_remote_code=True)
    assert type(lazy.load()).__name__ == "CustomForCausalLM"
    first = lazy.fingerprint
    with (directory / "modeling_custom.py").open("a") as file:
        file.write("# changed\n")
    assert LazyModel(str(directory), trust_remote_code=True).fingerprint != first


def test_the_free_memory_of_a_model_includes_its_weights(make_model, make_tokenizer, monkeypatch):
    monkeypatch.setattr("leaf_distill.models.loading.free_memory", lambda: 1000)
    model = make_model()
    lazy = LazyModel(model, processing_class=make_tokenizer())
    assert lazy.free_memory == 1000 + sum(weight.nbytes for weight in model.parameters())


def test_the_batches_of_a_run_stay_as_they_were_planned(saved, monkeypatch):
    asked = prompted_model("student", LazyModel(str(saved), device="cpu"), DetectConfig())
    planned = asked.batch_tokens(DetectConfig())
    monkeypatch.setattr("leaf_distill.models.memory.free_memory", lambda: 0)  # weights take all
    assert asked.batch_tokens(DetectConfig()) == planned > 256
